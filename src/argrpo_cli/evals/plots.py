"""Results as pictures: the groups of columns of a benchmark side by side, policies as bars with their errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from argrpo_cli.shapes import Result
from argrpo_cli.system.files import save_figure

SHADES = ("#9aa5b1", "#d1495b")  # a baseline, and what was asked for
WIDTH = 0.8  # of a column's bars together


def draw_groups(result: Result, groups: Sequence[str], path: Path) -> None:
    """A panel for each group of columns, written as PNG: values in the columns' unit, bars of one standard error."""
    from matplotlib.figure import Figure

    panels = [[key for key, column in result.columns.items() if column.group == group] for group in groups]
    names = list(reversed(result.rows))  # the baseline first
    figure = Figure(figsize=(max(7.0, 1.5 + 0.85 * sum(map(len, panels))), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=[len(keys) for keys in panels])[0]
    for panel, group, keys in zip(axes, groups, panels, strict=True):
        for number, (name, shade) in enumerate(zip(names, SHADES[-len(names) :], strict=True)):
            bars = [
                (place, 100 if result.columns[key].percent else 1, result.rows[name][key])
                for place, key in enumerate(keys)
                if key in result.rows[name] and result.rows[name][key].value is not None
            ]
            panel.bar(
                [place + WIDTH * ((number + 0.5) / len(names) - 0.5) for place, _, _ in bars],
                [scale * value.value for _, scale, value in bars],
                WIDTH / len(names),
                yerr=[scale * (value.error or 0) for _, scale, value in bars],
                color=shade,
                capsize=2,
                label=name,
            )
        panel.set_xticks(range(len(keys)), [result.columns[key].label for key in keys], rotation=30, ha="right")
        panel.set_title(group)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("%" if all(column.percent for column in result.columns.values()) else "")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=8)
    save_figure(path, figure)
