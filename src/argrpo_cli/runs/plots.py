"""curves.png: how a run went, from metrics.jsonl. `panels.py` says what is shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from argrpo_cli.runs.panels import COLOURS, Panel, Roles, panels, smoothed
from argrpo_cli.system.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 4
PANEL = (3.9, 2.6)  # inches
HEAD = 0.35
DPI = 110
HEADROOM = 0.18  # of a panel's height


def draw_curves(
    records: Sequence[dict[str, Any]], path: str | Path, title: str = "", roles: Roles | None = None
) -> None:
    """Draw the records of metrics.jsonl to a PNG, written atomically. No records, no file.

    Args:
        roles: family and weight of each reward, see `panels.panels`. Rewards of weight 0 get rows of their own.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not records:
        return
    found = panels(records, roles or {})
    if not found:
        return
    rows = _rows(found)
    columns = max(map(len, rows))
    width, height = PANEL[0] * columns, PANEL[1] * len(rows) + HEAD
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.suptitle(title, y=1 - 0.2 / height)
    # Fixed margins, in inches: matplotlib's own layout would take as long as the drawing.
    grid = figure.add_gridspec(
        len(rows),
        columns,
        left=0.75 / width,
        right=1 - 0.15 / width,
        bottom=0.5 / height,
        top=1 - (HEAD + 0.25) / height,
        wspace=0.27,
        hspace=0.45,
    )
    steps = [record["step"] for record in records]
    for row, shown in enumerate(rows):
        for place, panel in enumerate(shown):
            _draw(figure.add_subplot(grid[row, place]), panel, steps)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def _rows(found: Sequence[Panel]) -> list[list[Panel]]:
    """The panels row by row; held-out rewards stand in rows of their own, below what is optimised."""
    first = next((index for index, panel in enumerate(found) if panel.held_out), len(found))
    last = first + sum(panel.held_out for panel in found)
    blocks = [found[:first], found[first:last], found[last:]] if last > first else [found]
    return [list(block[at : at + COLUMNS]) for block in blocks for at in range(0, len(block), COLUMNS)]


def _draw(axes: Axes, panel: Panel, steps: Sequence[int]) -> None:
    from matplotlib.ticker import LogLocator

    for line in panel.lines:
        known = [(step, value) for step, value in zip(steps, line.values, strict=True) if value is not None]
        if panel.logarithmic:
            known = [(step, value) for step, value in known if value > 0]
        if not known:
            continue
        x, y = zip(*known, strict=True)
        colour = COLOURS[line.colour]
        if not panel.exact:
            axes.plot(x, y, color=colour, alpha=0.3, linewidth=1, marker="." if len(x) < 3 else None)
        style = "--" if panel.held_out else "-"
        trend = y if panel.exact else smoothed(y)
        axes.plot(x, trend, color=colour, linewidth=2, linestyle=style, label=line.label or None)
    if panel.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    if all(value in (0, None) for line in panel.lines for value in line.values):
        axes.set_ylim(-0.0005, 0.01)  # shares that stay at 0 have no room below
    if any(line.label for line in panel.lines) and axes.has_data():
        low, high = axes.get_ylim()  # room for the legend above the curves
        axes.set_ylim(low, high * (high / low) ** HEADROOM if panel.logarithmic else high + (high - low) * HEADROOM)
        axes.legend(fontsize=8, loc="upper center", ncols=len(panel.lines), frameon=False, columnspacing=1.2)
    if panel.held_out:
        axes.set_facecolor("#f4f4f4")
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
