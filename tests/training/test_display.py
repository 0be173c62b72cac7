"""What a run shows while it trains."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from argrpo_cli.runs.run import duration
from argrpo_cli.training.display import RunDisplay


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


def test_a_distillation_shows_its_own_measures() -> None:
    one = {"step": 1, "divergence": 0.25, "entropy": 3.5, "grad_norm": 0.75, "images_per_second": 24.0}
    (line,) = shown(False, [{**one, "seconds_total": 2.0}]).splitlines()
    assert line.startswith("step 1/10  divergence 0.2500  entropy 3.500  gradient 0.7500  24.0 images/s  left 0:")
    text = shown(True, [one, {**one, "step": 2, "divergence": 0.125}])
    last = text[text.rindex("demo") :]
    assert "divergence to the guided teacher  0.2500  0.1250" in last and "reward" not in last and "KL" not in last


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


def test_terminal_shows_held_out_rewards_gradient_and_stages() -> None:
    more = {"grad_norm": 0.5, "groups_without_spread": 0.25, "seconds_rollout": 3.0, "seconds_update": 1.0}
    text = shown(True, [record(1, **more)], held_out=["nano-critic"])
    last = text[text.rindex("demo") :]
    for part in ("nano-critic, held out", "gradient norm", "0.5000", "groups without spread", "25%",
                 "time: rollout 75%, update 25%"):  # fmt: skip
        assert part in last
    assert "nano-clip, held out" not in last


def test_a_loss_that_clips_on_one_side_shows_that_side() -> None:
    assert "clip 2.00%" in shown(False, [record(1, clip_low=None)])


def test_a_live_table_acknowledges_a_signal_and_names_the_end_of_the_batch() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    display = RunDisplay("demo", steps=10, log_every=1, console=console)
    display.start(0)
    display.step(record(5))
    display.stopping(updates_per_batch=4)
    display.stop()
    assert "finishing update 8; again to stop now" in console.file.getvalue()
