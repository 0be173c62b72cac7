"""The guard rails: what each one fires on and what not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from argrpo_cli.runs.curves import trend
from argrpo_cli.training.guards import SKIPPED_IN_A_ROW, Finding, Guards, bad_gradient
from tests.training.guarded import guarded
from tests.training.tiny import tiny_recipe

WEIGHTS = {"bright": 1.0, "red": 0.0}
GUARD = "constant_reward"


def record(step: int, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl of a run without trouble; `bright` and `red` are (mean, spread within groups)."""
    rewards = {name: changes.pop(name, (0.5, 0.1)) for name in WEIGHTS}
    healthy = {
        "step": step,
        "reward": rewards["bright"][0],
        "rewards": {name: {"mean": mean, "within_group_std": spread} for name, (mean, spread) in rewards.items()},
        "kl": 0.01,
        "ratio_deviation_mean": 1e-6,
        "images_left_out": 0.0,
        "groups_without_spread": 0.0,
    }
    return healthy | changes


def findings(
    records: list[dict[str, Any]],
    weights: dict[str, float] | None = None,
    grpo: dict[str, Any] | None = None,
    **guards: Any,
) -> list[Finding]:
    """All findings about records that come one after the other."""
    watch = Guards(guarded(tiny_recipe(**(grpo or {})), **guards), weights or WEIGHTS)
    found = [finding for one in records for finding in watch.look(one)]
    assert all("\n" not in finding.text for finding in found)
    return found


def steps(found: list[Finding], guard: str) -> list[int]:
    return [finding.step for finding in found if finding.guard == guard]


# --- the ratio


def test_ratio_fires_above_the_limit_of_the_dtype() -> None:
    ratios = [record(1, ratio_deviation_mean=0.009), record(2, ratio_deviation_mean=0.011)]
    assert steps(findings(ratios), "ratio") == [2]
    assert not findings([record(1, ratio_deviation_mean=0.09)], grpo={"dtype": "bfloat16"})
    (found,) = findings([record(1, ratio_deviation_mean=0.11)], grpo={"dtype": "bfloat16"})
    assert found.action == "warn" and "0.11" in found.text and "guards.ratio.limit" in found.text
    assert not findings(ratios, ratio={"limit": 0.02})


def test_ratio_looks_at_the_first_update_of_a_batch_only() -> None:
    moved = [record(step, ratio_deviation_mean=0.0 if step % 2 else 0.5) for step in range(1, 9)]
    assert not findings(moved, grpo={"updates_per_batch": 2})
    assert steps(findings(moved), "ratio") == [2]


def test_a_warning_is_given_once_and_again_after_ten_quiet_batches() -> None:
    bad = {1, 2, 3, 9, 25}
    records = [record(step, ratio_deviation_mean=0.5 if step in bad else 0.0) for step in range(1, 30)]
    assert steps(findings(records), "ratio") == [1, 25]
    assert steps(findings(records, ratio={"action": "stop"}), "ratio") == sorted(bad)
    assert not findings(records, ratio={"action": "ignore"})


# --- the KL


def test_kl_stops_when_it_is_above_the_limit_in_two_updates_in_a_row() -> None:
    kls = [0.1, 2.5, 0.1, 2.5, 2.6]
    found = findings([record(step, kl=kl) for step, kl in enumerate(kls, start=1)])
    assert [(one.step, one.guard, one.action) for one in found] == [(5, "kl", "stop")]
    assert "2.6 nats per token (limit 2)" in found[0].text
    assert not findings([record(step, kl=None) for step in range(1, 30)])
    measured = {4: 2.5, 8: 2.7}  # beta 0: now and then, on the images of a grid
    found = findings([record(step, kl=None, kl_start=measured.get(step)) for step in range(1, 12)])
    assert [(one.step, one.action) for one in found] == [(8, "stop")]


def test_a_tenfold_jump_of_the_kl_is_said_above_a_floor() -> None:
    def jump(usual: float, latest: float) -> list[Finding]:
        return findings([record(step, kl=usual) for step in range(1, 11)] + [record(11, kl=latest)])

    (found,) = jump(0.02, 0.25)
    assert (found.guard, found.action) == ("kl", "warn") and "jumped to 0.25" in found.text
    assert not jump(0.02, 0.19)  # less than tenfold
    assert not jump(0.002, 0.09)  # as any run that leaves zero


# --- constant rewards


def test_a_reward_without_spread_is_found_after_the_given_number_of_batches() -> None:
    constant = [record(step, bright=(0.7, 1e-8)) for step in range(1, 12)]
    (found,) = findings(constant)
    assert (found.step, found.guard, found.action) == (10, "constant_reward", "warn")
    assert "reward bright has collapsed to 0.7" in found.text
    assert steps(findings(constant, constant_reward={"batches": 3, "action": "stop"}), "constant_reward")[:2] == [3, 4]
    broken = [*constant[:5], record(6), *constant[6:]]
    assert not findings(broken)  # never ten in a row
    assert not findings([record(step, red=(0.7, 0.0)) for step in range(1, 30)])  # held out: it teaches nothing anyhow


def test_a_reward_whose_spread_falls_to_a_hundredth_has_collapsed() -> None:
    def fallen(to: float) -> list[int]:
        return steps(
            findings([record(step, bright=(0.9, 0.1 if step <= 20 else to)) for step in range(1, 35)]),
            "constant_reward",
        )

    assert fallen(0.0009) == [30]
    assert fallen(0.0011) == []


def test_updates_that_reuse_images_are_no_batches() -> None:
    records = [record(step, bright=(0.7, 0.0)) for step in range(1, 19)]
    for one in records[1::2]:
        one |= {"reward": None, "rewards": {name: {"mean": None, "within_group_std": None} for name in WEIGHTS}}
    assert not findings(records, grpo={"updates_per_batch": 2})
    records.append(record(19, bright=(0.7, 0.0)))
    assert steps(findings(records, grpo={"updates_per_batch": 2}), "constant_reward") == [19]


def test_batches_without_any_spread_have_no_gradient() -> None:
    flat = [record(step, groups_without_spread=1.0) for step in range(1, 11)]
    (found,) = findings(flat)
    assert found.step == 10 and "no policy gradient" in found.text
    (found,) = findings([*flat[:9], record(10, groups_without_spread=0.9)], constant_reward={"action": "stop"})
    assert found.action == "warn" and "99% of the groups had no spread" in found.text


def test_most_groups_without_spread_are_said() -> None:
    def sparse(share: float) -> list[int]:
        shares = [None, *[share] * 10]  # of the first batch no two scores are known
        return steps(findings([record(step, groups_without_spread=one) for step, one in enumerate(shares, 1)]), GUARD)

    assert (sparse(0.6), sparse(0.5)) == ([11], [])


@pytest.mark.parametrize(("key", "what"), [("advantage_std", "every advantage"), ("grad_norm", "the gradient")])
def test_advantages_or_a_gradient_of_exactly_0_are_said_soon(key: str, what: str) -> None:
    values = [0.1, 0.0, 0.0, None, 0.0, 0.0, 1e-30, 0.0, 0.0]  # one that was not measured says nothing
    records = [record(step, **{key: value}) for step, value in enumerate(values, 1)]
    (found,) = findings(records, constant_reward={"action": "stop"})
    assert (found.step, found.action) == (5, "warn") and f"{what} was exactly 0 in the last 3 updates" in found.text
    assert not findings(records, constant_reward={"action": "ignore"})


# --- held-out rewards


def lines(optimised: np.ndarray, held_out: np.ndarray) -> list[dict[str, Any]]:
    pairs = zip(optimised.tolist(), held_out.tolist(), strict=True)
    return [record(step, bright=(one, 0.1), red=(other, 0.1)) for step, (one, other) in enumerate(pairs, start=1)]


def test_a_held_out_reward_that_falls_while_the_optimised_one_rises_is_said_once() -> None:
    rng = np.random.default_rng(0)
    rise = np.linspace(0, 1, 100) + 0.2 * rng.standard_normal(100)
    fall = np.linspace(0, -1, 100) + 0.2 * rng.standard_normal(100)
    (found,) = findings(lines(rise, fall))
    assert (found.guard, found.action) == ("held_out", "warn") and 40 <= found.step < 100
    assert "held-out red fell by" in found.text and "optimised reward rose by" in found.text
    assert not findings(lines(rise, -fall))  # both rise
    assert not findings(lines(-rise, fall))  # both fall
    assert not findings(lines(rise[:39], 10 * fall[:39]))  # too few
    assert not findings(lines(rise, fall), weights={"bright": 1.0, "red": 1.0})


def test_a_late_turn_of_a_held_out_reward_is_seen() -> None:
    rng = np.random.default_rng(1)
    rise = np.linspace(0, 3, 300) + 0.1 * rng.standard_normal(300)
    turn = np.minimum(np.arange(300), 240) / 100 - np.maximum(np.arange(300) - 240, 0) / 50
    found = steps(findings(lines(rise, turn + 0.1 * rng.standard_normal(300))), "held_out")
    assert len(found) == 1 and 240 < found[0] <= 280


def false_alarms(noise: Callable[[int], np.ndarray], runs: int = 100) -> float:
    """The share of runs of 300 batches with a warning, where the optimised reward rises and the other has no trend."""
    rise = np.linspace(0, 1, 300)
    return sum(bool(steps(findings(lines(rise, noise(run))), "held_out")) for run in range(runs)) / runs


def test_noise_gives_hardly_any_warning() -> None:
    def white(run: int) -> np.ndarray:
        return np.random.default_rng(run).standard_normal(300)

    def correlated(run: int) -> np.ndarray:
        noise = white(run)
        for step in range(1, 300):
            noise[step] += 0.3 * noise[step - 1]
        return noise

    assert false_alarms(white) <= 0.02
    assert false_alarms(correlated) <= 0.1


def test_trend_and_its_error() -> None:
    assert trend(np.full(20, 0.3)) == (0, 0)
    rise, error = trend(np.arange(10) * 0.5)
    assert rise == pytest.approx(4.5) and error == pytest.approx(0, abs=1e-9)
    values = np.arange(50) + 20 * np.random.default_rng(0).standard_normal(50)
    (slope, _), covariance = np.polyfit(np.arange(50), values, 1, cov=True)
    plain = np.sqrt(covariance[0, 0])
    assert trend(values)[0] == pytest.approx(49 * slope)
    assert trend(values)[1] >= 49 * plain * 0.999  # larger where neighbours are alike, never smaller
    walks = [np.cumsum(np.random.default_rng(run).standard_normal(100)) for run in range(200)]
    assert np.mean([abs(rise) < 3 * error for rise, error in map(trend, walks)]) > 0.6


# --- numbers that are none


def test_images_left_out_are_said_once() -> None:
    found = findings([record(step, images_left_out=2.0 if step in (2, 90) else 0.0) for step in range(1, 100)])
    assert [(one.step, one.guard, one.action) for one in found] == [(2, "images_left_out", "warn")]
    assert "2 of 8 images" in found[0].text


def test_bad_gradients_stop_or_are_skipped_up_to_ten_in_a_row() -> None:
    assert bad_gradient(3, "stop", 1).action == "stop"
    assert bad_gradient(3, "skip", SKIPPED_IN_A_ROW - 1).action == "warn"
    assert bad_gradient(3, "skip", SKIPPED_IN_A_ROW).action == "stop"


def test_the_error_of_a_trend_is_that_of_least_squares() -> None:
    """Where neighbours do not correlate positively there is no factor for it."""
    time = np.arange(40.0)
    values = 0.1 * time + np.tile([1.0, -1.0], 20)
    (slope, _), covariance = np.polyfit(time, values, 1, cov=True)
    rise, error = trend(values)
    assert rise == pytest.approx(39 * slope, rel=1e-9)
    assert error == pytest.approx(39 * covariance[0, 0] ** 0.5, rel=1e-6)
