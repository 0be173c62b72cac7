"""Whole runs: what they leave behind, how they stop, and that a resumed run equals an uninterrupted one exactly."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from argrpo_cli.policy import load_policy
from argrpo_cli.policy.folder import unfinished
from argrpo_cli.recipe import Recipe, load_recipe
from argrpo_cli.runs import learning
from argrpo_cli.runs.run import Interrupted, open_run
from argrpo_cli.system.errors import UserError
from argrpo_cli.training import run_training
from tests.training.tiny import FakeRewards, brightness, tiny_recipe

STAGES = ("text", "rollout", "reward", "update")
TIMES = {"seconds_total", "images_per_second"} | {
    f"{what}_{stage}" for what in ("seconds", "images_per_second") for stage in STAGES
}


class Stopped(Exception):
    """A run that dies, as far as the test is concerned."""


def train(recipe: Recipe, out: Path, resume: bool = False, rewards: FakeRewards | None = None) -> str:
    """Run, and return what was shown."""
    console = Console(file=io.StringIO(), width=200)
    run_training(recipe, out, resume, rewards=rewards or FakeRewards(), console=console)
    return console.file.getvalue()


def at_batch(number: int, act: Callable[[], None]) -> FakeRewards:
    """Rewards that do something while scoring a certain batch."""
    rewards = FakeRewards()

    def on_batch(count: int) -> None:
        if count == number:
            act()

    rewards.on_batch = on_batch
    return rewards


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def die() -> None:
    raise Stopped


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """The same policy, optimiser, schedule, grids and metrics, bit for bit."""
    for part in ("policy", f"checkpoints/step_{step:06d}"):
        weights = [load_file(out / part / "model.safetensors") for out in (one, other)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    states = [torch.load(out / f"checkpoints/step_{step:06d}/optimizer.pt")["state"] for out in (one, other)]
    for index, state in states[0].items():
        assert all(torch.equal(state[name], states[1][index][name]) for name in state)
    assert without_times(metrics(one)) == without_times(metrics(other))
    for name in ("before_after.png", f"grids/step_{step:06d}.png"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.fixture(scope="module")
def recipe(policy_folder: Path) -> Recipe:
    return tiny_recipe(policy_folder, steps=6, save_every=2, keep_checkpoints=2, grid_every=3)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(recipe, out)
    return out


def test_run_directory_holds_everything(finished: Path, recipe: Recipe) -> None:
    assert load_recipe(finished / "recipe.yaml") == recipe
    assert [record["step"] for record in metrics(finished)] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in (finished / "grids").iterdir()) == [
        f"step_{step:06d}.png" for step in (0, 3, 6)
    ]
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step_000004", "step_000006"]
    for name in ("before_after.png", "curves.png"):
        with Image.open(finished / name) as picture:
            assert min(picture.size) > 50
    assert not [path for path in finished.rglob("*") if "partial" in path.name or path.name.startswith(".tmp")]


def test_metrics_say_what_happened(finished: Path) -> None:
    first, *rest = metrics(finished)
    assert first.keys() == {
        "step", "reward", "within_group_std", "rewards", "kl", "entropy", "entropy_weight", "clip_low", "clip_high",
        "ratio", "ratio_deviation_mean", "ratio_deviation", "loss", "grad_norm", "learning_rate", "images_left_out",
        "groups_without_spread", "groups_replaced", "images_extra", "advantage_std", "gradient_signal",
        "updates_left_out", "gradient_noise", "noise_scale", "noise_scale_least", *TIMES,
    }  # fmt: skip
    assert first["advantage_std"] == pytest.approx(math.sqrt(6 / 7), rel=0.03)  # of 2 groups of 4, each of deviation 1
    assert first["gradient_signal"] is None  # one micro-batch in one process
    assert 0 < rest[1]["kl_start"] == pytest.approx(rest[1]["kl"], rel=0.7)  # of other images, after the update
    assert rest[-1]["drift"]["layers.1"] > rest[1]["drift"]["layers.1"] > 0
    assert first["rewards"].keys() == {"bright", "red"}
    assert first["reward"] == pytest.approx(sum(value["mean"] for value in first["rewards"].values()), abs=1e-5)
    assert first["kl"] == pytest.approx(0, abs=1e-6)  # the policy is still the reference
    assert all(record["kl"] > 0 for record in rest)
    for record in (first, *rest):
        assert record["ratio"] == pytest.approx(1, abs=1e-5)
        assert record["ratio_deviation"] < 1e-4
        assert record["clip_low"] == record["clip_high"] == 0
        assert record["learning_rate"] == 1e-3
        assert record["within_group_std"] > 0


def test_the_policy_of_a_run_can_be_loaded_from_all_its_folders(finished: Path, policy_folder: Path) -> None:
    final = load_policy(finished / "policy")
    base = load_policy(policy_folder).model.state_dict()
    for folder in (finished, finished / "checkpoints" / "step_000006"):
        weights = load_policy(folder).model.state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in final.model.state_dict().items())
        assert any(not torch.equal(weights[name], tensor) for name, tensor in base.items())
    older = load_policy(finished / "checkpoints" / "step_000004").model.state_dict()
    assert any(not torch.equal(older[name], tensor) for name, tensor in final.model.state_dict().items())
    assert final.class_names == load_policy(policy_folder).class_names


def test_training_leaves_the_base_policy_alone(recipe: Recipe, policy_folder: Path, tmp_path: Path) -> None:
    def digest() -> dict[str, str]:
        files = sorted(path for path in policy_folder.rglob("*") if path.is_file())
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = digest()
    train(recipe, tmp_path / "run")
    assert digest() == before


def test_same_recipe_same_run(finished: Path, recipe: Recipe, tmp_path: Path) -> None:
    torch.manual_seed(1234)  # the state of the world before a run does not matter
    train(recipe, tmp_path / "again")
    assert_same_run(finished, tmp_path / "again", step=6)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_resume_equals_an_uninterrupted_run(
    finished: Path, recipe: Recipe, tmp_path: Path, number: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(Interrupted) as stop:
        run_training(recipe, out, rewards=at_batch(3, send(number)), console=console)
    assert stop.value.code == code
    assert console.file.getvalue().splitlines()[-1] == (
        f"stopped after step 3; continue with: argrpo train --resume {out}"
    )
    assert "finishing update 3; again to stop now\n" in capfd.readouterr().err, "said in the moment of the signal"
    assert (out / "checkpoints" / "step_000003" / "policy.json").exists()
    assert not (out / "policy").exists()
    assert (out / "grids" / "step_000003.png").is_file() and (out / "before_after.png").is_file(), "as far as it came"
    load_policy(out)  # usable as it is
    assert (unfinished(out), unfinished(finished)) == ("step 3 of 6", "")

    shown = train(load_recipe(out / "recipe.yaml"), out, resume=True)
    assert "continuing after step 3" in shown
    assert unfinished(out) == ""
    assert_same_run(finished, out, step=6)


def test_resume_after_a_crash_equals_an_uninterrupted_run(finished: Path, recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(recipe, out, rewards=at_batch(6, die))
    assert [record["step"] for record in metrics(out)] == [1, 2, 3, 4, 5]  # one step beyond the checkpoint
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "rew')  # and a line that was being written
    (out / "checkpoints" / ".partial" / "checkpoint-6").mkdir(parents=True)
    train(recipe, out, resume=True)
    assert_same_run(finished, out, step=6)
    assert not (out / "checkpoints" / ".partial").exists()


def test_crash_before_the_first_checkpoint_resumes_from_the_start(
    finished: Path, recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(recipe, out, rewards=at_batch(1, die))
    train(recipe, out, resume=True)
    assert_same_run(finished, out, step=6)


def test_reused_batches_and_micro_batches_and_guidance_and_what_is_chosen_by_resume_exactly(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between two updates of one batch, training goes on to the end of the batch."""
    monkeypatch.setattr(learning, "FEWEST", 2)  # batches are enough for a noise scale, whose sums go on, too
    recipe = tiny_recipe(
        policy_folder, steps=6, save_every=2, updates_per_batch=2, micro_batch_size=4, logprob="guided",
        condition_dropout=0.25, schedule="cosine", warmup_steps=2,
        dynamic_sampling=2, spread_floor=0.1, scale_rewards="global",
    )  # fmt: skip
    train(recipe, tmp_path / "whole")
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(recipe, out, rewards=at_batch(2, send(signal.SIGINT)))
    assert metrics(out)[-1]["step"] == 4
    train(recipe, out, resume=True)
    assert_same_run(tmp_path / "whole", out, step=6)
    assert [record["reward"] is None for record in metrics(out)] == [False, True] * 3
    assert [record["gradient_signal"] is None for record in metrics(out)] == [False, True] * 3
    assert [record["noise_scale_least"] is None for record in metrics(out)] == [True, True, False, False, False, False]


def test_longer_run_continues_a_finished_one(finished: Path, recipe: Recipe, tmp_path: Path) -> None:
    short = recipe.model_copy(update={"grpo": recipe.grpo.model_copy(update={"steps": 3})})
    out = tmp_path / "run"
    train(short, out)
    assert "is finished after step 3" in train(short, out, resume=True)
    train(recipe, out, resume=True)
    assert_same_run(finished, out, step=6)


def test_second_signal_stops_at_once(recipe: Recipe, tmp_path: Path) -> None:
    def twice() -> None:
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    out = tmp_path / "run"
    with pytest.raises(Interrupted) as stop:
        train(recipe, out, rewards=at_batch(4, twice))
    assert stop.value.code == 130
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000002"]


def test_signal_handlers_are_put_back(recipe: Recipe, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", rewards=at_batch(1, send(signal.SIGINT)))
    assert signal.getsignal(signal.SIGINT) is before


def test_time_limit_ends_a_run_as_finished(policy_folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(policy_folder, steps=1000, time_limit_minutes=1e-6)
    out = tmp_path / "run"
    shown = train(recipe, out)
    assert "finished at the time limit" in shown
    last = metrics(out)[-1]
    assert last["step"] == 1  # the update that was begun is finished
    assert (out / "policy" / "policy.json").exists()
    assert (out / "before_after.png").exists()
    assert "raise grpo.time_limit_minutes" in train(recipe, out, resume=True)
    assert metrics(out)[-1] == last


@pytest.mark.usefixtures("pages")
def test_without_kl_nothing_is_measured_against_the_base(policy_folder: Path, tmp_path: Path) -> None:
    train(tiny_recipe(policy_folder, steps=1, beta=0.0), tmp_path / "run")
    assert metrics(tmp_path / "run")[0]["kl"] is None
    assert (tmp_path / "run" / "curves.png").exists()


def test_diverged_training_stops_with_one_line(policy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lower grpo\.learning_rate"):
        train(tiny_recipe(policy_folder, learning_rate=1e30), tmp_path / "run")


def assert_same_state(out: Path, *names: str) -> None:
    """Weights and optimiser of two checkpoints of a run, bit for bit."""
    weights = [load_file(out / "checkpoints" / name / "model.safetensors") for name in names]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    states = [torch.load(out / "checkpoints" / name / "optimizer.pt")["state"] for name in names]
    for index, state in states[0].items():
        assert all(torch.equal(state[name], states[1][index][name]) for name in state)


def test_a_failed_reward_stops_the_run_with_a_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    def fail() -> None:
        raise UserError("reward bright failed: KeyError: 'x'")

    out = tmp_path / "run"
    recipe = recipe.model_copy(update={"logging": recipe.logging.model_copy(update={"save_every": 1})})
    with pytest.raises(
        UserError, match=r"stopped after step 4: reward bright failed: KeyError.*train --resume"
    ) as told:
        train(recipe, out, rewards=at_batch(4, fail))
    assert "\n" not in str(told.value)
    assert metrics(out)[-1]["images_left_out"] == recipe.grpo.batch_size
    assert (out / "checkpoints" / "step_000004").is_dir() and not (out / "policy").exists()
    assert_same_state(out, "step_000003", "step_000004")
    train(recipe, out, resume=True)
    assert metrics(out)[-1]["step"] == 6


def test_used_folders_are_refused(finished: Path, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"already holds a run; continue it with `argrpo train --resume"):
        train(recipe, finished)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and not a run"):
        train(recipe, tmp_path)
    with pytest.raises(UserError, match="not a run directory"):
        train(recipe, tmp_path, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        train(recipe, tmp_path / "file")


def test_a_damaged_run_json_is_one_line(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with open_run(out, recipe, resume=False) as run:
        run.notes_file.write_text("{")
    with pytest.raises(UserError, match=r"run\.json: not JSON"):
        train(recipe, out, resume=True)


def test_two_processes_cannot_train_in_one_folder(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with (
        open_run(out, recipe, resume=False),
        pytest.raises(UserError, match="another process"),
        open_run(out, recipe, resume=True),
    ):
        pass
    train(recipe.model_copy(update={"grpo": recipe.grpo.model_copy(update={"steps": 1})}), out, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditions": {"classes": ["unicorn"]}}, "unicorn"),
        ({"policy": {"checkpoint": "no-such-policy"}}, "no-such-policy"),
        ({"policy": {"device": "abacus"}}, "abacus"),
        ({"policy": {"trainable": ["norm", "layers.7."]}}, r"policy\.trainable: .*'layers\.7\.'.*layers\.0\."),
        ({"rewards": {"terms": [{"name": "bright", "weight": 0.0}]}}, "nothing to train"),
    ],
)
def test_bad_input_writes_nothing(recipe: Recipe, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tree = recipe.model_dump()
    for section, keys in change.items():
        tree[section].update(keys)
    with pytest.raises(UserError, match=message):
        train(Recipe.model_validate(tree), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_only_the_trainable_parameters_move_and_resume_is_exact(policy_folder: Path, tmp_path: Path) -> None:
    tree = tiny_recipe(policy_folder, save_every=2).model_dump()
    tree["policy"]["trainable"] = ["layers.1.", "class_embedding"]
    recipe = Recipe.model_validate(tree)
    train(recipe, tmp_path / "whole")
    before = load_file(policy_folder / "model.safetensors")
    after = load_file(tmp_path / "whole" / "policy" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "layers.1." in name or "class_embedding" in name}

    with pytest.raises(Stopped):
        train(recipe, tmp_path / "stopped", rewards=at_batch(4, die))
    train(recipe, tmp_path / "stopped", resume=True)
    again = load_file(tmp_path / "stopped" / "policy" / "model.safetensors")
    assert all(torch.equal(after[name], again[name]) for name in after)

    tree["policy"]["trainable"] = ["layers.0.", "class_embedding"]  # as many tensors of the same shapes
    tree["grpo"]["steps"] += 2
    with pytest.raises(UserError, match=r"trainable\.0 was 'layers\.1\.' and is 'layers\.0\.': .*keeps its recipe"):
        train(Recipe.model_validate(tree), tmp_path / "stopped", resume=True)


def test_some_classes_only(policy_folder: Path, tmp_path: Path) -> None:
    tree = tiny_recipe(policy_folder, steps=2).model_dump()
    tree["conditions"]["classes"] = ["cat", 0]
    seen: set[str] = set()

    class Watch(FakeRewards):
        def score(self, images: torch.Tensor, conditions: Any) -> dict[str, torch.Tensor]:
            seen.update(condition.prompt for condition in conditions)
            return super().score(images, conditions)

    train(Recipe.model_validate(tree), tmp_path / "run", rewards=Watch())
    assert seen == {"a photo of a cat", "a photo of an ant"}


def test_reward_goes_up_and_pictures_change(policy_folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        policy_folder, rewards=["bright"], steps=40, batch_size=64, group_size=16, learning_rate=5e-3, beta=0.01, seed=7
    )
    recipe.guards.kl.action = "ignore"  # the policy is meant to go far
    out = tmp_path / "run"
    train(recipe, out, rewards=FakeRewards(bright=brightness))
    records = metrics(out)
    gain = sum(r["reward"] for r in records[-5:]) / 5 - sum(r["reward"] for r in records[:5]) / 5
    assert gain > records[0]["within_group_std"]
    grids = [(out / "grids" / f"step_{step:06d}.png").read_bytes() for step in (0, 40)]
    assert grids[0] != grids[1]


def test_importing_the_package_switches_telemetry_off() -> None:
    code = "import argrpo_cli.training, huggingface_hub.constants as c, sys; print(c.HF_HUB_DISABLE_TELEMETRY)"
    environment = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "True"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on device"),
        (SafetensorError("I/O error: No space left on device"), "No space left on device"),
        (RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 1 vs 0"), "takes no more data"),
    ],
)
def test_full_disk_is_one_line(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("argrpo_cli.training.saving.replace_folder", full)
    with pytest.raises(UserError, match=message):
        train(recipe, tmp_path / "run")
    assert metrics(tmp_path / "run")  # and the run can go on when there is space again


def test_other_errors_are_not_mistaken_for_a_full_disk(recipe: Recipe, tmp_path: Path) -> None:
    def disconnect() -> None:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    with pytest.raises(ConnectionResetError):
        train(recipe, tmp_path / "run", rewards=at_batch(1, disconnect))
