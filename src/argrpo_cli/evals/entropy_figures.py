"""The pictures of `argrpo entropy`: bars by size and resolution (the paper's figure 3) and the curve (figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from argrpo_cli.evals.entropy import MODES, NORMAL_95
from argrpo_cli.system.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"conditional": "tab:blue", "guided": "tab:orange"}
SHADES = ("#9aa5b1", "#d1495b", "#edae49", "#30638e", "#6a994e")  # the first of a family, and those compared with it
LONGEST_NAME = 24


def draw_curve(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Two panels: mean entropy against step (or by policy) with 95 % intervals, and entropy by position."""
    figure = _figure(11, 4)
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["policy"] for row in rows))
    steps = {row["policy"]: row["step"] for row in rows}
    along_run = _along_run(rows)
    for mode, color in COLORS.items():
        own = [row for row in rows if row["mode"] == mode]
        x = [steps[row["policy"]] if along_run else names.index(row["policy"]) for row in own]
        error = [NORMAL_95 * row["standard_error"] for row in own]
        left.errorbar(x, [row["mean"] for row in own], error, color=color, marker="o", capsize=3, label=mode,
                      linestyle="-" if along_run else "none")  # fmt: skip
    left.set_ylabel("entropy, nats per token")
    left.set_xlabel("step" if along_run else "")
    if not along_run:
        left.set_xticks(range(len(names)), [_shortened(name) for name in names])
        left.set_xlim(-0.5, len(names) - 0.5)
        if len(names) > 2:
            left.tick_params(axis="x", rotation=20, labelsize=8)
            for label in left.get_xticklabels():
                label.set_horizontalalignment("right")
    left.legend()
    left.grid(alpha=0.3)
    shown = [name for name in names if name in (names[0], names[-1])]
    for name, style in zip(shown, ("-", "--"), strict=False):
        for mode, color in COLORS.items():
            row = next(row for row in rows if row["policy"] == name and row["mode"] == mode)
            count = len(row["by_position"])
            place = [(index + 0.5) / count for index in range(count)]  # two resolutions on one axis
            right.plot(
                place, row["by_position"], style, color=color, label=f"{_shortened(name)}, {mode}", linewidth=1.3
            )
    right.set_xlabel("place of the token in the image, 0 first, 1 last")
    right.set_ylabel("entropy, nats")
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    _save(figure, path)


def has_bars(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether there is something to compare: two policies or more that are not the steps of one run."""
    return len({row["policy"] for row in rows}) > 1 and not _along_run(rows)


def draw_bars(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each mode: bars with 95 % intervals, side by side the policies of one size, resolution and kind.

    The axis does not start at zero: the differences are small beside the entropy itself. Above each bar but the first
    of its group stands the change with its own, paired error, which is smaller than the bars' errors suggest.
    """
    families: dict[str, list[str]] = {}
    for row in rows:
        members = families.setdefault(row["family"], [])
        if row["policy"] not in members:
            members.append(row["policy"])
    widest = max(map(len, families.values()))
    count = sum(map(len, families.values()))
    figure = _figure(max(8.0, 3.0 + 2.6 * count), 4.6)
    for axes, mode in zip(figure.subplots(1, 2), MODES, strict=True):
        of = {row["policy"]: row for row in rows if row["mode"] == mode}
        ticks, names = [], []
        width = 0.8 / widest
        for group, members in enumerate(families.values()):
            for place, name in enumerate(members):
                row, x = of[name], group + (place - (len(members) - 1) / 2) * width
                error = NORMAL_95 * row["standard_error"]
                axes.bar(x, row["mean"], 0.9 * width, yerr=error, capsize=3, color=SHADES[place % len(SHADES)])
                if place:
                    change = f"{row['change']:+.4f}\n± {NORMAL_95 * row['change_error']:.4f}"
                    axes.annotate(change, (x, row["mean"] + error), (0, 4), textcoords="offset points", ha="center",
                                  fontsize=8)  # fmt: skip
                ticks.append(x)
                names.append(_shortened(name))
        axes.set_xticks(
            ticks, names, rotation=20 if count > 2 else 0, ha="right" if count > 2 else "center", fontsize=8
        )
        axes.set_xlim(-0.6, len(families) - 0.4)
        low = min(row["mean"] - NORMAL_95 * row["standard_error"] for row in of.values())
        high = max(row["mean"] + NORMAL_95 * row["standard_error"] for row in of.values())
        room = max(high - low, 0.02)
        axes.set_ylim(max(0.0, low - 0.5 * room), high + 0.4 * room)
        above = axes.secondary_xaxis("top")
        above.set_xticks(range(len(families)), list(families), fontsize=9)
        above.tick_params(length=0)
        title = mode if mode == "conditional" else f"guided, cfg {rows[0]['cfg_scale']:g}"
        axes.set_title(title, fontsize=11)
        axes.set_ylabel("entropy, nats per token" + (" (not from 0)" if axes.get_ylim()[0] > 0 else ""))
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    _save(figure, path)


def _along_run(rows: Sequence[dict[str, Any]]) -> bool:
    return len({row["policy"] for row in rows}) > 1 and all(row["step"] is not None for row in rows)


def _shortened(name: str) -> str:
    """A name that fits below a bar: of a path the end, without the `policy` that every finished run has."""
    name = name.rstrip("/").removesuffix("/policy")
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
