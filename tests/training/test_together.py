"""Training by two processes on the CPU is training by one: the same images, advantages, updates, and one voice."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from argrpo_cli.cli.app import run
from argrpo_cli.recipe import dump_recipe
from argrpo_cli.system.errors import UserError
from argrpo_cli.training import run_training
from argrpo_cli.training.launch import CONFIGS, config_file, images_per_process, launch
from tests.together import forked
from tests.training import together_worker
from tests.training.tiny import FakeRewards, save_tiny_policy, tiny_caption_policy, tiny_recipe

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
TWO = ("plain", "straddling", "comparing", "level", "captions", "stopped", "resumed", "failing", "refused", "broken")


def start(folder: Path, *cases: str, config: str | None = None) -> list[dict[str, str]]:
    """Run cases of the worker by two processes, in the environment that accelerate's launcher makes of a configuration;
    how they ended in each."""
    save_tiny_policy(folder / "policy")
    tiny_caption_policy().save(folder / "captions")
    environment = {"ACCELERATE_USE_CPU": "true"} | ({} if config is None else environment_of(config))
    done = forked(partial(together_worker.main, folder, cases, environment), folder / "printed")
    assert done.codes == [0, 0], done.err[-4000:]
    return [json.loads((folder / f"{process}.json").read_text()) for process in (0, 1)]


def environment_of(config: str) -> dict[str, str]:
    options = ["--config_file", str(config_file(config)), "--num_processes", "2", "script"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(options))
    return prepare_multi_gpu_env(arguments)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """All cases by two processes."""
    folder = tmp_path_factory.mktemp("two")
    return folder, start(folder, *TWO)


@pytest.fixture(scope="module")
def one(two: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases that come to their end, by one process."""
    folder = tmp_path_factory.mktemp("one")
    for name in ("policy", "captions"):
        (folder / name).symlink_to(two[0] / name)
    for name in ("plain", "straddling", "comparing"):
        together_worker.CASES[name](folder, folder / name)
    together_worker.captions(folder, folder / "run_of_captions")
    return folder


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "policy" / "model.safetensors")


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """What is measured of an update, less times and rounding errors."""
    flat = {key: value for key, value in record.items() if not isinstance(value, dict)}
    rewards = record.get("rewards", {})  # a distillation has none
    flat |= {f"{name} {key}": number for name, one in rewards.items() for key, number in one.items()}
    return {
        key: value
        for key, value in flat.items()
        if value is not None and not key.startswith(("seconds", "images_per", "ratio_deviation"))
    }


def assert_same_training(single: Path, shared: Path, base: Path, gradients: bool = False) -> None:
    """The same metrics and parameters, up to the order in which numbers are added.

    Args:
        gradients: whether those of the same groups are seen apart.
    """
    before = load_file(base / "model.safetensors")
    for name, expected in weights(single).items():
        torch.testing.assert_close(weights(shared)[name], expected, rtol=1e-4, atol=1e-5)
        if expected.dim() > 1 and name != "model.null_caption":
            assert (expected - before[name]).abs().max() > 1e-3, f"{name} was trained, so that equality says something"
    for left, right in zip(metrics(single), metrics(shared), strict=True):
        left, right = numbers(left), numbers(right)
        if not gradients:
            for one in (left, right):
                for key in ("gradient_signal", "gradient_noise"):
                    one.pop(key, None)
        assert right == pytest.approx(left, rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("case", ["plain", "straddling"])
def test_two_processes_train_as_one_does(one: Path, two: tuple[Path, Any], case: str) -> None:
    assert_same_training(one / case, two[0] / case, two[0] / "policy", gradients=True)
    assert all("gradient_signal" in numbers(record) for record in metrics(two[0] / "plain"))
    uneven = metrics(one / "straddling")
    assert any(record["images_left_out"] for record in uneven), "some groups had gaps"
    assert any(record["images_extra"] for record in uneven), "and some had to be drawn again"


def test_two_processes_compare_images_as_one_does_also_when_they_go_on(one: Path, two: tuple[Path, Any]) -> None:
    """What loo-fid remembers comes out of the checkpoint."""
    assert [end["comparing"] for end in two[1]] == ["", ""]
    assert_same_training(one / "comparing", two[0] / "comparing", two[0] / "policy")
    for record in metrics(one / "comparing"):
        spreads = {name: reward["within_group_std"] for name, reward in record["rewards"].items()}
        assert len(spreads) == 4 and all(spread > 0 for spread in spreads.values()), "each has something to say"


def assert_nothing_changed(out: Path, base: Path) -> None:
    before = load_file(base / "model.safetensors")
    assert all(torch.equal(before[name], weight) for name, weight in weights(out).items())
    assert [record["updates_left_out"] for record in metrics(out)] == [1, 2]


def test_rewards_that_tell_nothing_apart_change_nothing(two: tuple[Path, Any]) -> None:
    assert_nothing_changed(two[0] / "level", two[0] / "policy")


def assert_same_training_of_captions(single: Path, shared: Path, base: Path) -> None:
    """Of the run, of the distillation before it, and of the scale that was chosen for that."""
    assert_same_training(single, shared, single / "start" / "policy")
    assert_same_training(single / "start", shared / "start", base)
    drew = [record["divergence_student"] is not None for record in metrics(shared / "start")]
    assert set(drew) == {True, False}
    chosen = [json.loads((out / "start" / "run.json").read_text())["scale"]["cfg_scale"] for out in (single, shared)]
    assert chosen[0] == chosen[1]


def test_captions_stay_with_their_images_and_a_start_is_shared_too(one: Path, two: tuple[Path, Any]) -> None:
    assert_same_training_of_captions(one / "run_of_captions", two[0] / "run_of_captions", two[0] / "captions")


def test_grids_and_the_last_pictures_are_those_of_one_process(one: Path, two: tuple[Path, Any]) -> None:
    for name in ("grids/step_000000.png", "grids/step_000002.png", "before_after.png"):
        assert (two[0] / "plain" / name).read_bytes() == (one / "plain" / name).read_bytes()


def test_a_run_directory_has_one_writer(two: tuple[Path, Any]) -> None:
    out = two[0] / "plain"
    assert [record["step"] for record in metrics(out)] == [1, 2, 3, 4, 5]
    checkpoints = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert checkpoints == ["step_000004", "step_000005"]
    for name in checkpoints:
        states = {path.name for path in (out / "checkpoints" / name).glob("rng_state*")}
        assert states == {"rng_state_0.pth", "rng_state_1.pth"}, "the random state of each process"
    assert not [path for path in out.rglob("*") if "partial" in path.name]


def test_a_signal_to_one_process_stops_all_and_resume_continues_exactly(two: tuple[Path, Any]) -> None:
    folder, (first, second) = two
    assert first["stopped"] == second["stopped"] == "Interrupted 143"
    assert first["resumed"] == second["resumed"] == ""
    resumed, whole = weights(folder / "stopped"), weights(folder / "plain")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert [record["loss"] for record in metrics(folder / "stopped")] == [
        record["loss"] for record in metrics(folder / "plain")
    ]


def test_a_reward_that_fails_in_one_process_stops_all_with_a_checkpoint(two: tuple[Path, Any]) -> None:
    folder, (first, second) = two
    resume = f"continue with: argrpo train --resume {folder / 'failing'}"
    assert first["failing"] == f"UserError stopped after step 2: the judge is out; {resume}"
    assert second["failing"] == "SystemExit 2"
    assert (folder / "failing" / "checkpoints" / "step_000002" / "policy.json").exists()


def test_a_fault_of_one_process_is_told_by_the_first_alone(two: tuple[Path, Any]) -> None:
    folder, (first, second) = two
    assert first["refused"].startswith("UserError no policy") and "nothing" in first["refused"]
    assert not (folder / "refused").exists(), "nothing is written before training can start"
    assert first["broken"].startswith("UserError after step 0: the logits are not numbers")
    assert second["refused"] == second["broken"] == "SystemExit 2"


def test_sharded_parameters_train_as_whole_ones_do(one: Path, tmp_path: Path) -> None:
    """FSDP2 by the configuration that the package ships; one run is stopped and resumed."""
    ends = start(tmp_path, "captions", "level", "stopped", "resumed", "moving", config="fsdp2")
    assert ends[0]["moving"].startswith("UserError grpo.reference_decay needs whole weights in each process")
    assert [end["stopped"] for end in ends] == ["Interrupted 143"] * 2
    assert_same_training_of_captions(one / "run_of_captions", tmp_path / "run_of_captions", tmp_path / "captions")
    assert_same_training(one / "plain", tmp_path / "stopped", tmp_path / "policy")
    assert_nothing_changed(tmp_path / "level", tmp_path / "policy")
    checkpoint = tmp_path / "stopped" / "checkpoints" / "step_000004"
    assert (checkpoint / "pytorch_model_fsdp.bin").exists(), "the model was sharded"
    for name in ("grids/step_000002.png", "before_after.png"):
        assert (tmp_path / "stopped" / name).read_bytes() == (one / "plain" / name).read_bytes()


def test_checkpoints_of_another_sharding_are_refused(one: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(one / "plain", out)
    notes = json.loads((out / "run.json").read_text())
    assert notes["sharding"] == "none"
    (out / "run.json").write_text(json.dumps(notes | {"sharding": "fsdp", "finished": None}))
    recipe = tiny_recipe(one / "policy", **{**together_worker.PLAIN, "steps": 6})
    with pytest.raises(UserError, match="started with sharding fsdp, with none"):
        run_training(recipe, out, resume=True, rewards=FakeRewards())
    assert (out / "policy").exists()


def test_processes_option_starts_them_and_hands_a_signal_on(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\ndef reward(images, conditions):\n    time.sleep(0.3)\n    return images.float().mean((1, 2, 3))\n"
    )
    save_tiny_policy(tmp_path / "policy")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(tiny_recipe("policy", rewards=["slow:reward"], steps=100)))
    command = [sys.executable, "-m", "argrpo_cli", "train", "recipe.yaml", "--out", "run", "--processes", "2"]
    job = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={name: value for name, value in ENVIRONMENT.items() if name != "ACCELERATE_USE_CPU"},
    )  # fmt: skip
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(metrics(tmp_path / "run")) < 2:
        assert job.poll() is None
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    shown, complaints = job.communicate()
    assert job.returncode == 143
    step = len(metrics(tmp_path / "run"))
    assert shown.splitlines()[0].endswith("(2 groups of 4) by 2 processes in run")
    assert shown.splitlines()[-1].startswith(f"stopped after step {step}; continue with: ")
    assert shown.splitlines()[-1].endswith(" train --resume run")  # called as it was called
    assert re.fullmatch(r"finishing update \d+; again to stop now\n", complaints)  # of one process, and at once
    assert (tmp_path / "run" / "checkpoints" / f"step_{step:06d}" / "rng_state_1.pth").exists()


def test_launcher_passes_on_the_exit_code_and_adds_no_words(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(["train", "no-such-recipe"], 2, "ddp", cpu=True) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines and all(line.startswith("argrpo: error: no recipe") for line in lines), lines


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--processes", "5"], "grpo.batch_size: 48 images cannot be shared by 5 processes; use for instance 40 or 80"),
        (["--processes", "2", "--set", "grpo.micro_batch_size=16"], "16 does not divide the 24 images"),
        (["--processes", "2", "--accelerate-config", "fspd2"], "did you mean 'fsdp2'?"),
        (["--processes", "2", "--accelerate-config", "fsdp2"], "for GPUs, and this run is on the CPU"),
        (["--accelerate-config", "ddp"], "say how many with --processes"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(
    options: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(["train", "nano/paper/c2i", "--set", "policy.device=cpu", "--out", str(out), *options]) == 2
    told = capsys.readouterr().err
    assert complaint in told and told.count("\n") == 1
    assert not out.exists()


def test_images_are_shared_evenly_and_groups_may_straddle() -> None:
    def shares(processes: int, **grpo: Any) -> tuple[int, int]:
        return images_per_process(tiny_recipe(**grpo), processes)

    assert shares(1, batch_size=64, group_size=8) == (64, 64)
    assert shares(16, batch_size=64, group_size=8) == (4, 4)
    assert shares(4, batch_size=64, group_size=8, micro_batch_size=8) == (16, 8)
    assert shares(16, batch_size=64, group_size=8, micro_batch_size=16) == (4, 4), "a recipe for one GPU runs on 16"
    with pytest.raises(UserError, match="use for instance 40, or another"):
        shares(5, batch_size=8, group_size=8)


def test_every_configuration_can_be_read_by_accelerate() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {name: load_config_from_file(str(config_file(name))) for name in CONFIGS}
    assert kinds["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert [kinds[name].deepspeed_config["zero_stage"] for name in ("zero2", "zero3")] == [2, 3]
    assert {one.num_machines for one in kinds.values()} == {1}
