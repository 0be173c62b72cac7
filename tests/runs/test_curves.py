"""What the curves of a run show, and how the first updates are held against the last."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from argrpo_cli.runs.curves import change, draw_curves, panel_rows, panel_svg, panels, smoothed
from tests.runs.records import ROLES, record

RECORDS = [record(step) for step in range(1, 21)]


def titles(**changes: object) -> list[str]:
    return [panel.title for panel in panels([one | changes for one in RECORDS], ROLES)]


def test_every_question_has_its_panel_and_clip_fractions_share_one() -> None:
    found = {panel.title: [line.label for line in panel.lines] for panel in panels(RECORDS, ROLES)}
    assert list(found)[:3] == ["reward, weighted total", "reward: nano-clip", "held out: judge"]
    assert found["share of tokens clipped"] == ["low", "high"]
    assert found["|ratio - 1|"] == ["mean", "largest"]
    assert found["images per second, by stage"] == ["rollout", "update"]  # nothing was measured of the others
    assert {"KL to the base policy (nats per token)", "policy entropy (nats per token)", "ratio to the sampler, mean",
            "share of groups without spread", "gradient norm"} <= set(found)  # fmt: skip


def test_what_was_never_measured_has_no_panel() -> None:
    assert "KL to the base policy (nats per token)" not in titles(kl=None)
    assert "share of tokens clipped" not in titles(clip_low=None, clip_high=None)  # sapo, vespo
    old = [{"step": one["step"], "reward": one["reward"], "rewards": one["rewards"]} for one in RECORDS]
    assert [panel.title for panel in panels(old, {})] == [
        "reward, weighted total",
        "reward: nano-clip",
        "reward: judge",
    ]
    assert panels([], ROLES) == []


def test_the_learning_rate_is_shown_where_it_varies() -> None:
    assert "learning rate" not in titles()
    warming = [record(step, learning_rate=step * 1e-4) for step in range(1, 21)]
    (panel,) = [panel for panel in panels(warming, ROLES) if panel.title == "learning rate"]
    assert panel.exact


def test_a_reward_has_the_colour_of_its_family_and_a_held_out_one_its_own() -> None:
    found = {panel.title: panel for panel in panels(RECORDS, ROLES)}
    assert found["reward: nano-clip"].lines[0].colour == "conditional"
    assert found["held out: judge"].lines[0].colour == "held_out"
    assert found["held out: judge"].held_out
    assert not found["held out: judge"].reward


def test_held_out_rewards_stand_in_rows_of_their_own() -> None:
    rows = panel_rows(panels(RECORDS, ROLES))
    assert [panel.title for panel in rows[1]] == ["held out: judge"]
    assert not any(panel.held_out for row in (rows[0], *rows[2:]) for panel in row)


@pytest.mark.parametrize("count", [1, 2, 20])
def test_curves_are_drawn_from_the_first_update_on(tmp_path: Path, count: int) -> None:
    draw_curves(RECORDS[:count], tmp_path / "curves.png", "a run", ROLES)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > picture.height > 500


@pytest.mark.parametrize("deviations", [(1e-6, 0.0), (0.0, 0.0), (5e-324, 1.0), (1e-6, 1e300)])
def test_gaps_zeros_and_ends_of_floats_are_no_obstacle(tmp_path: Path, deviations: tuple[float, float]) -> None:
    mean, largest = deviations
    measured = {"ratio_deviation_mean": mean, "ratio_deviation": largest, "clip_low": 0.0, "clip_high": 0.0}
    records = [record(step, reward=None, **measured) for step in (1, 2)]
    records.append(record(3, reward=None, ratio_deviation_mean=1e-3, ratio_deviation=1e-2))
    panel_svg(next(one for one in panels(records, {}) if "ratio - 1" in one.title), [1, 2, 3])
    draw_curves(records, tmp_path / "curves.png", "a run", ROLES)
    assert (tmp_path / "curves.png").exists()
    draw_curves([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_smoothing_is_a_straight_line_fitted_around_each_value() -> None:
    values = np.random.default_rng(0).normal(size=140)
    result = smoothed(values)
    for index, start in ((0, 0), (70, 63), (139, 125)):
        at = np.arange(start, start + 15)
        assert result[index] == pytest.approx(np.polyval(np.polyfit(at, values[at], 1), index))


def test_smoothing_stays_within_what_was_measured() -> None:
    share = [0.0] * 30 + [1.0] * 2 + [0.0] * 30
    assert min(smoothed(share)) == 0.0


def test_first_against_last_tenth() -> None:
    moved = change([float(step) for step in range(100)])
    assert (moved.first, moved.last, moved.difference) == (4.5, 94.5, 90.0)
    assert change([1.0]) is None
    assert change([None, 1.0, None, 3.0]).difference == 2.0


def test_each_end_has_the_error_of_its_own_noise() -> None:
    draw = np.random.default_rng(0)
    noise = np.concatenate([draw.normal(0, 1, 300), draw.normal(0, 3, 300)])
    moved = change(noise.tolist())
    assert moved.last_error / moved.first_error == pytest.approx(3, rel=0.15)


def test_the_freedom_of_the_trend_is_counted() -> None:
    """Noise without correlation: the error of a mean of n is its deviation about the cubic, over sqrt(n)."""
    noise = np.tile([1.0, -1.0], 50)  # neighbours are opposite, so no inflation
    x = np.linspace(-1, 1, 100)
    residuals = noise - np.polyval(np.polyfit(x, noise, 3), x)
    expected = np.sqrt(residuals[:33] @ residuals[:33] / 33 * 100 / 96 / 10)
    assert change(noise.tolist()).first_error == pytest.approx(expected, rel=1e-9)


def test_a_trend_is_no_error_and_short_runs_have_none() -> None:
    assert change([float(step) for step in range(100)]).error == pytest.approx(0, abs=1e-9)
    assert change([float(step % 2) for step in range(99)]).error is None


@pytest.mark.parametrize(("correlation", "least", "most"), [(0.0, 0.9, 1.12), (0.6, 0.9, 1.25)])
def test_errors_hold_for_trends_with_correlated_noise(correlation: float, least: float, most: float) -> None:
    random = np.random.default_rng(1)
    misses = []
    for _ in range(300):
        noise = random.normal(size=140)
        for step in range(1, 140):
            noise[step] = correlation * noise[step - 1] + np.sqrt(1 - correlation**2) * noise[step]
        trend = 2 * (1 - np.exp(-3 * np.arange(140) / 140))
        moved = change((trend + noise).tolist())
        misses.append((moved.difference - (trend[-14:].mean() - trend[:14].mean())) / moved.error)
    assert least < np.std(misses) < most  # 1 where the errors are exactly right


def test_what_is_the_same_all_along_has_no_panel_but_a_reward_and_a_runs_first_update_have() -> None:
    still = {"clip_low": 0.0, "clip_high": 0.0, "ratio": 1.0, "grad_norm": None}
    flat = {"nano-clip": {"mean": 0.5}}
    shown = {panel.title for panel in panels([record(step, rewards=flat, **still) for step in (1, 2, 3)], ROLES)}
    assert not {"share of tokens clipped", "ratio to the sampler, mean", "gradient norm"} & shown
    assert {"reward: nano-clip", "policy entropy (nats per token)"} <= shown
    jitter = [record(step, ratio=1 + 1e-8 * step) for step in (1, 2, 3)]
    assert "ratio to the sampler, mean" not in {panel.title for panel in panels(jitter, ROLES)}, "it is rounding"
    assert "ratio to the sampler, mean" in {panel.title for panel in panels([record(1)], ROLES)}
