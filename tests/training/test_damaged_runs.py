"""A run directory of which anything is damaged is refused in a line, or gone on from where it is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from argrpo_cli.evals.entropy_results import subjects_of_run
from argrpo_cli.recipe import Recipe
from argrpo_cli.runs.checkpoints import find_damage, newest_whole_checkpoint, write_manifest
from argrpo_cli.runs.report import write_report
from argrpo_cli.runs.run import RunDirectory
from argrpo_cli.system.errors import UserError
from tests.training.test_train import train
from tests.training.tiny import tiny_recipe


@pytest.fixture(scope="module")
def recipe(policy_folder: Path) -> Recipe:
    return tiny_recipe(policy_folder, steps=2, save_every=1)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(recipe, out)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def garbage(path: Path) -> None:
    path.write_bytes(b"garbage")


def another(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def changed(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """The same file with something in it changed."""

    def write(path: Path) -> None:
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)

    return write


def edited(**changes: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def narrow(state: Any) -> None:
    state["state"][0]["exp_avg"] = torch.zeros(3, 5)


def renamed(path: Path) -> None:
    weights = load_file(path)
    save_file({f"x{key}": value for key, value in weights.items()}, path, {"format": "pt"})


NO_STATE = "holds no state of a trainer after step 2"
SEALED = [
    ("optimizer.pt", garbage, NO_STATE),
    ("optimizer.pt", another([1, 2]), NO_STATE),
    ("optimizer.pt", another({"state": {}}), NO_STATE),
    ("optimizer.pt", changed(narrow), NO_STATE),
    ("optimizer.pt", changed(lambda state: state["param_groups"][0].update(lr=float("nan"))), NO_STATE),
    ("optimizer.pt", changed(lambda state: state["state"].update({999: {}})), NO_STATE),
    ("optimizer.pt", Path.unlink, "is missing"),
    ("scheduler.pt", garbage, NO_STATE),
    ("scheduler.pt", another({}), NO_STATE),
    ("scheduler.pt", changed(lambda state: state.update(last_epoch=7)), NO_STATE),
    ("scheduler.pt", changed(lambda state: state.update(base_lrs=["x"])), NO_STATE),
    ("rng_state.pth", garbage, NO_STATE),
    ("rng_state.pth", another({"python": 3}), NO_STATE),
    ("rng_state.pth", changed(lambda state: state.update(cpu=torch.zeros(9))), NO_STATE),
    ("rng_state.pth", changed(lambda state: state.update(numpy=("MT19937", [1], 0, 0, 0.0))), NO_STATE),
    ("rng_state.pth", Path.unlink, "is missing"),
    ("trainer_state.json", garbage, "is unreadable"),
    ("trainer_state.json", edited(global_step="2"), "is unreadable"),
    ("trainer_state.json", edited(log_history=3), "is unreadable"),
    ("trainer_state.json", edited(no_such_key=1), "is unreadable"),
    ("config.json", garbage, "config.json is unreadable"),
    ("model.safetensors", garbage, "is unreadable"),
    ("config.json", garbage, "is unreadable"),
    ("config.json", edited(num_hidden_layers=10**9), "it is no policy ("),
    ("config.json", edited(hidden_size=128), "it is no policy ("),
    ("policy.json", edited(classes=3), "it is no policy ("),
    ("tokenizer/model.safetensors", garbage, "is unreadable"),
    ("tokenizer/config.json", edited(ch=-1), "it is no policy ("),
    ("ema.safetensors", lambda path: save_file({"x": torch.zeros(2)}, path), "holds other weights than the policy"),
    ("ema.safetensors", garbage, "is unreadable"),
    ("reference.safetensors", lambda path: save_file({"x": torch.zeros(2)}, path), "holds other weights than the pol"),
    ("entropy.json", garbage, "is unreadable"),
    ("model.safetensors", renamed, "holds other weights than those that the run started from"),
]


@pytest.mark.parametrize(("name", "damage", "why"), SEALED)
def test_a_checkpoint_that_is_sealed_and_of_no_use_is_moved_aside(
    run: Path, name: str, damage: Callable[[Path], None], why: str
) -> None:
    newest, told = run / "checkpoints" / "step_000002", []
    damage(newest / name)
    write_manifest(newest)  # whatever was done to it was sealed
    assert newest_whole_checkpoint(RunDirectory(run, told.append)) == run / "checkpoints" / "step_000001"
    (line,) = told
    assert line.startswith("the checkpoint of step 2 is damaged: ") and why in line
    assert line.endswith(
        f"moved to {newest.with_name('damaged-step_000002')} (it can be deleted), trying the one before"
    )


def test_an_untouched_checkpoint_is_whole(run: Path) -> None:
    assert find_damage(run / "checkpoints" / "step_000002", 2) is None
    assert newest_whole_checkpoint(RunDirectory(run, pytest.fail)) == run / "checkpoints" / "step_000002"


NOTES = [
    ("[]", "expected a JSON object"),
    ("{", "not JSON"),
    ('{"finished": 3}', "finished is 3: input should be"),
    ('{"finished": {"step": "x", "out_of_time": false}}', r"finished\.step is 'x'"),
    ('{"warnings": [{"step": 1}]}', r"warnings\.0\.guard: field required"),
    ('{"warnings": {}}', "warnings is {}"),
    ('{"base_policy": 1e29}', r"base_policy is 1e\+29"),
    ('{"base_policy": ["a"]}', r"base_policy is \['a'\]"),
    ('{"trained": "all"}', "trained is 'all'"),
    ('{"rewards": {"a": {"family": "quality", "weight": "1"}}}', r"rewards\.a\.weight is '1'"),
    ('{"transfer": [{}]}', r"transfer\.0\.name: field required"),
    ('{"scale": {"cfg_scale": NaN}}', "NaN is no finite number"),
    ('{"trackers": []}', r"trackers is \[\]"),
    ('{"tokens": -1e999}', "is no finite number"),
    ('{"recipe": "x"}', "recipe is 'x'"),
]


@pytest.mark.parametrize(("content", "why"), NOTES)
def test_damaged_notes_are_told_by_their_key_wherever_they_are_read(
    run: Path, recipe: Recipe, content: str, why: str
) -> None:
    (run / "run.json").write_text(content)
    for read in (
        lambda: train(recipe, run, resume=True),
        lambda: write_report(RunDirectory(run), recipe),
        lambda: subjects_of_run(run),
    ):
        with pytest.raises(UserError, match=rf"run\.json.*{why}") as told:
            read()
        assert "\n" not in str(told.value)


RECORDS = [
    ("[]", r"line 1 is damaged: .*input should be a valid dictionary"),
    ('{"reward": 1}', "line 1 is damaged: step: field required"),
    ('{"step": "1"}', "line 1 is damaged: step is '1'"),
    ('{"step": -1}', "line 1 is damaged: step is -1"),
    ('{"step": 1, "kl": "x"}', "line 1 is damaged: kl is 'x'"),
    ('{"step": 1, "kl": 1e300}', r"line 1 is damaged: kl is 1e\+300"),
    ('{"step": 1, "kl": {"a": 1}}', "line 1 is damaged: kl is {'a': 1}"),
    ('{"step": 1, "rewards": [1]}', r"line 1 is damaged: rewards is \[1\]"),
    ('{"step": 1, "rewards": {"a": {"mean": []}}}', r"line 1 is damaged: rewards\.a\.mean is \[\]"),
    ('{"step": 1, "drift": {"a": null}}', r"line 1 is damaged: drift\.a is None"),
    ('{"step": 1', "line 1: not JSON .*; take the line out to go on without it"),
    ('{"step": NaN}', "line 1: not JSON"),
]


@pytest.mark.parametrize(("line", "why"), RECORDS)
def test_a_damaged_record_is_told_by_its_line_and_key(run: Path, recipe: Recipe, line: str, why: str) -> None:
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(f"{line}\n{whole}")
    for read in (lambda: train(recipe, run, resume=True), lambda: write_report(RunDirectory(run), recipe)):
        with pytest.raises(UserError, match=rf"metrics\.jsonl, {why}"):
            read()
    assert (run / "metrics.jsonl").read_text() == f"{line}\n{whole}", "nothing is lost by that"


def test_a_last_line_half_written_is_left_out(run: Path) -> None:
    records = RunDirectory(run).metrics()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    assert RunDirectory(run).metrics() == records and [record["step"] for record in records] == [1, 2]
