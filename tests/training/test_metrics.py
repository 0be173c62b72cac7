"""The record of an update: what TRL logs and what is measured, under our names."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from argrpo_cli.training.metrics import MetricsCallback, StopCallback, StopRequest
from argrpo_cli.training.rollout import Stopwatch
from argrpo_cli.training.scorer import WITHIN_GROUP_STD
from tests.runs.test_trackers import metrics, train
from tests.training.tiny import tiny_recipe


def recorded(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], step: float, **logs: Any) -> dict[str, Any]:
    """The record of one update of `step` seconds and 12 images, in which the stages took `seconds`."""
    clock = iter([0.0, 0.0, step])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    stopwatch = Stopwatch()
    stopwatch.seconds.update(seconds)
    kept: list[dict[str, Any]] = []
    run = SimpleNamespace(append_metrics=kept.append, metrics=list)
    display = SimpleNamespace(step=lambda record: None)
    callback = MetricsCallback(run, display, stopwatch, ["a"], images=12, seconds=5.0)
    state = SimpleNamespace(global_step=1, is_world_process_zero=True)
    for event in (callback.on_train_begin, callback.on_step_begin, callback.on_step_end):
        event(None, state, None)
    callback.on_log(None, state, None, logs={"loss": 0.0, **logs})
    return kept[0]


def test_stages_have_their_seconds_and_their_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    record = recorded(monkeypatch, {"text": 1e-5, "rollout": 2.0, "reward": 0.5}, step=6.5)
    assert record["seconds_update"] == pytest.approx(4.0, abs=1e-4)
    assert record["images_per_second"] == pytest.approx(12 / 6.5, rel=1e-5)
    assert record["images_per_second_rollout"] == 6.0
    assert record["images_per_second_reward"] == 24.0
    assert record["images_per_second_update"] == pytest.approx(3.0, rel=1e-4)
    assert record["images_per_second_text"] is None  # class conditions are not read
    assert record["seconds_total"] == 11.5


def test_an_update_without_images_of_its_own_has_no_drawing_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    record = recorded(monkeypatch, {}, step=3.0)
    assert record["images_per_second"] is record["images_per_second_rollout"] is None
    assert record["images_per_second_update"] == 4.0


@pytest.mark.parametrize(
    ("logs", "low", "high"),
    [
        ({"clip_ratio/low_mean": 0.1, "clip_ratio/high_mean": 0.2}, 0.1, 0.2),
        ({"cispo_clip_ratio": 0.3}, None, 0.3),
        ({}, None, None),  # sapo, vespo
    ],
)
def test_clip_fractions_of_every_loss(
    monkeypatch: pytest.MonkeyPatch, logs: dict[str, float], low: float | None, high: float | None
) -> None:
    record = recorded(monkeypatch, {}, step=1.0, **logs)
    assert (record["clip_low"], record["clip_high"]) == (low, high)


def test_what_was_measured_of_the_policy_is_held_against_the_gain() -> None:
    run = SimpleNamespace(append_metrics=lambda record: None)
    display = SimpleNamespace(step=lambda record: None)
    callback = MetricsCallback(run, display, Stopwatch(), [], images=12, seconds=0.0, tokens=64)
    for step in range(1, 21):
        if step == 20:
            callback.measured = {"kl_start": 0.01, "drift": {"layers.0": 0.123456789}}
        logs = {"loss": 0.0, "reward": float(step > 10), WITHIN_GROUP_STD: 2.0}
        callback.on_log(None, SimpleNamespace(global_step=step), None, logs=logs)
        assert ("gain" in callback.record) == (step == 20)
    last = callback.record
    assert last["gain"] == 0.5  # of 1, in deviations of 2
    assert last["kl_efficiency"] == pytest.approx((0.5**2 - last["gain_error"] ** 2) / 2 / 0.64, rel=1e-4)
    assert last["drift"] == {"layers.0": 0.123457}


def test_the_weight_of_the_entropy_bonus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorded(monkeypatch, {}, step=1.0, entropy_coef=0.02)["entropy_weight"] == 0.02
    assert recorded(monkeypatch, {}, step=1.0)["entropy_weight"] is None


def test_the_total_reward_does_not_contain_held_out_ones(policy_folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(policy_folder, steps=2, weights={"bright": 2.0, "red": 0.0})
    train(recipe, tmp_path / "run")
    for record in metrics(tmp_path / "run"):
        assert record["rewards"]["red"]["mean"] != 0
        assert record["reward"] == pytest.approx(2 * record["rewards"]["bright"]["mean"], rel=1e-4)


@pytest.mark.parametrize(("updates_per_batch", "last"), [(1, 4), (2, 4), (3, 3)])
def test_training_ends_before_the_batch_that_would_pass_the_limit(updates_per_batch: int, last: int) -> None:
    """Ten seconds an update: after four the next, or the next two, would end after 45; after three the next three."""
    metrics = SimpleNamespace(seconds=0.0)
    stop = StopCallback(StopRequest(), metrics, updates_per_batch, time_limit=45.0)
    for step in range(1, 10):
        metrics.seconds = 10.0 * step
        control = SimpleNamespace(should_training_stop=False)
        stop.on_step_end(None, SimpleNamespace(global_step=step), control)
        if control.should_training_stop:
            break
    assert step == last and stop.out_of_time
