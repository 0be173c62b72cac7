"""What trackers are told: TensorBoard's events are read back; the others are played by a stand-in."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trl import GRPOTrainer

from argrpo_cli.recipe import Recipe
from argrpo_cli.runs.trackers import scalars
from argrpo_cli.system.errors import UserError
from argrpo_cli.training import run_training
from tests.training.tiny import FakeRewards, tiny_recipe


class Stopped(Exception):
    """A run that dies, as far as the test is concerned."""


def with_trackers(recipe: Recipe, *names: str) -> Recipe:
    logging = recipe.logging.model_dump() | {"trackers": list(names)}
    return Recipe.model_validate(recipe.model_dump() | {"logging": logging})


def train(recipe: Recipe, out: Path, resume: bool = False, dies_at_batch: int | None = None) -> str:
    """Run, and return what was shown."""
    rewards = FakeRewards()

    def on_batch(number: int) -> None:
        if number == dies_at_batch:
            raise Stopped

    rewards.on_batch = on_batch
    console = Console(file=io.StringIO(), width=200)
    run_training(recipe, out, resume, rewards=rewards, console=console)
    return console.file.getvalue()


def events(out: Path) -> EventAccumulator:
    return EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def recipe(policy_folder: Path) -> Recipe:
    return tiny_recipe(policy_folder, steps=6, save_every=2, grid_every=3)


class Stub:
    """The parts of wandb and trackio that a run uses; remembers what it was told."""

    def __init__(self) -> None:
        self.opened: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.url = None
        self.finished: list[int | None] = []
        self.fail_at: int | None = None
        self.Image = lambda picture: Path(getattr(picture, "filename", picture)).name
        self.Settings = lambda **settings: settings

    def init(self, **options: Any) -> Stub:
        self.opened.append(options)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        if step == self.fail_at:
            raise ConnectionError("the server has gone\nand more lines")
        self.logged.append((step, values))

    def finish(self, exit_code: int | None = None) -> None:
        self.finished.append(exit_code)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Stands for both packages."""
    stub = Stub()
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, stub)
    monkeypatch.setattr(GRPOTrainer, "create_model_card", lambda *args, **kwargs: None)  # TRL would look into them
    return stub


def test_tensorboard_has_every_number_and_every_grid(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run")
    found, records = events(tmp_path / "run"), metrics(tmp_path / "run")
    assert {"reward/total", "reward/bright/mean", "reward/red/within_group_std", "policy/kl", "policy/entropy",
            "policy/ratio", "policy/clip_low", "policy/clip_high", "optim/grad_norm", "optim/learning_rate",
            "speed/images_per_second", "speed/seconds_rollout"} <= set(found.Tags()["scalars"])  # fmt: skip
    read = [(event.step, event.value) for event in found.Scalars("reward/bright/mean")]
    assert [step for step, _ in read] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in read] == pytest.approx([record["rewards"]["bright"]["mean"] for record in records])
    assert [event.step for event in found.Images("grid")] == [0, 3, 6]


@pytest.mark.parametrize("dies_at_batch", [2, 6])  # before the first checkpoint, and one step after the second
def test_a_resumed_run_has_every_step_once(recipe: Recipe, tmp_path: Path, dies_at_batch: int) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(recipe, out, dies_at_batch=dies_at_batch)
    before = [event.step for event in events(out).Scalars("policy/kl")]
    assert before[-1] == dies_at_batch - 1  # nothing is lost when a run dies
    train(recipe, out, resume=True)
    found = events(out)
    assert [event.step for event in found.Scalars("policy/kl")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in found.Images("grid")] == [0, 3, 6]


def test_no_tracker_no_files(recipe: Recipe, tmp_path: Path) -> None:
    train(with_trackers(recipe), tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_missing_package_is_one_line_before_anything_is_written(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not there
    with pytest.raises(UserError, match=r"wandb cannot be imported .*; `pip install wandb`"):
        train(with_trackers(recipe, "wandb"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_wandb_and_trackio_are_told_every_step_once_and_the_same_run_is_resumed(
    recipe: Recipe, tmp_path: Path, stub: Stub
) -> None:
    chosen, out = with_trackers(recipe, "wandb"), tmp_path / "run"
    with pytest.raises(Stopped):
        train(chosen, out, dies_at_batch=6)
    assert stub.finished == [1]
    train(chosen, out, resume=True)
    assert stub.finished == [1, 0]
    first, second = stub.opened
    assert first["id"] == second["id"] == json.loads((out / "run.json").read_text())["trackers"]["id"]
    assert (first["project"], first["name"], first["resume"]) == ("argrpo", "tiny", "allow")
    assert first["config"]["grpo"]["steps"] == 6
    told = [step for step, values in stub.logged if "reward/total" in values]
    assert told == [1, 2, 3, 4, 5, 6]
    assert [(step, values["grid"]) for step, values in stub.logged if "grid" in values] == [
        (step, [f"step_{step:06d}.png"]) for step in (0, 3, 6)
    ]


def test_trackio_runs_of_one_recipe_have_names_of_their_own(recipe: Recipe, tmp_path: Path, stub: Stub) -> None:
    for name in ("one", "two"):
        train(with_trackers(recipe, "trackio"), tmp_path / name)
    names = [options["name"] for options in stub.opened]
    assert len(set(names)) == 2
    assert all(name.startswith("tiny-") for name in names)


def test_a_tracker_that_fails_is_left_after_one_line(recipe: Recipe, tmp_path: Path, stub: Stub) -> None:
    stub.fail_at = 2
    shown = train(with_trackers(recipe, "wandb", "tensorboard"), tmp_path / "run")
    assert [line for line in shown.splitlines() if line.startswith("warning")] == [
        "warning: the tracker wandb failed and is told nothing more (ConnectionError: the server has gone); "
        "training goes on"
    ]
    assert max(step for step, _ in stub.logged) == 1
    assert len(metrics(tmp_path / "run")) == len(events(tmp_path / "run").Scalars("reward/total")) == 6


def test_what_was_not_measured_is_not_told() -> None:
    record = {"step": 1, "reward": None, "kl": 0.5, "rewards": {"a": {"mean": 1.0}}, "seconds_total": 2.0}
    assert scalars(record) == {"policy/kl": 0.5, "reward/a/mean": 1.0, "speed/seconds_total": 2.0}
