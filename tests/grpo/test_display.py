"""What a run shows, and its curves."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from argrpo_cli.grpo.callbacks.display import RunDisplay, duration
from argrpo_cli.grpo.panels import smoothed
from argrpo_cli.grpo.plots import draw_curves


def record(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "reward": 1.5 + step,
        "within_group_std": 0.25,
        "rewards": {"nano-clip": {"mean": 0.5, "std": 0.1}, "nano-critic": {"mean": 1.0, "std": 0.2}},
        "kl": 0.01,
        "entropy": 5.5,
        "clip_low": 0.01,
        "clip_high": 0.02,
        "ratio": 1.0,
        "images_per_second": 24.0,
        "seconds_total": 2.0 * step,
    } | changes


def shown(terminal: bool, records: list[dict[str, Any]], **options: Any) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    display = RunDisplay("demo", steps=10, log_every=options.pop("log_every", 1), console=console, **options)
    display.start(0)
    for one in records:
        display.step(one)
    display.stop()
    return console.file.getvalue()


def test_plain_lines_say_everything_about_a_step() -> None:
    (line,) = shown(False, [record(1)]).splitlines()
    for part in ("step 1/10", "reward 2.5000", "nano-clip 0.500", "nano-critic 1.000", "std 0.250", "kl 0.0100",
                 "entropy 5.500", "clip 3.00%", "ratio 1.0000", "24.0 images/s", "left 0:"):  # fmt: skip
        assert part in line
    assert "\x1b" not in line


def test_plain_lines_come_every_so_often_and_for_the_first_and_last_step() -> None:
    lines = shown(False, [record(step) for step in range(1, 11)], log_every=4).splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "8/10", "10/10"]


def test_terminal_shows_first_and_last_step_side_by_side() -> None:
    text = shown(True, [record(1), record(2)])
    last = text[text.rindex("demo") :]
    for part in ("step 2/10", "step 1", "reward, weighted total", "2.5000", "3.5000", "nano-clip", "3.00%", "left"):
        assert part in last


def test_what_was_not_measured_is_a_dash() -> None:
    missing = {"kl": None, "reward": None, "clip_low": None, "images_per_second": None, "within_group_std": None}
    assert "kl -" in shown(False, [record(1, **missing)])
    shown(True, [record(1, **missing)])


def test_time_left_ends_at_the_time_limit() -> None:
    display = RunDisplay("demo", 1000, 1, time_limit=60.0, console=Console(file=io.StringIO()))
    display.start(0)
    assert display.seconds_left() is None
    display.step(record(1, seconds_total=59.0))
    assert display.seconds_left() <= 1.0


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 59.6, 3599, 3600, 36610)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "10:10:10",
    ]


def test_curves_have_a_panel_for_each_quantity_that_was_measured(tmp_path: Path) -> None:
    draw_curves([record(step) for step in range(1, 6)], tmp_path / "five.png")  # total, two rewards, KL, entropy
    draw_curves([record(step, kl=None) for step in range(1, 6)], tmp_path / "four.png")
    draw_curves([record(1), record(2, reward=None)], tmp_path / "gap.png")
    assert all(Image.open(path).size[1] > 300 for path in tmp_path.iterdir())
    draw_curves([], tmp_path / "none.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["five.png", "four.png", "gap.png"]


def test_smoothing_follows_a_line_without_lag() -> None:
    line = [float(step) for step in range(40)]
    assert smoothed(line) == pytest.approx(line)
    zigzag = [float(step % 2) for step in range(60)]
    assert all(0.3 < value < 0.7 for value in smoothed(zigzag)[3:-3])
    assert smoothed([1.0]) == [1.0]
    assert smoothed([0.0, 1.0]) == pytest.approx([0.0, 1.0])
