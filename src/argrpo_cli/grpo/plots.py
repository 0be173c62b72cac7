"""curves.png: how reward, KL and entropy went, from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from argrpo_cli.files import atomic_path

WINDOW = 0.1  # of the run, fitted for the thick line; the pale one is what was measured


def smoothed(values: Sequence[float]) -> list[float]:
    """A straight line fitted around each value, at that value: a moving average that does not lag at the ends."""
    reach = max(2, int(len(values) * WINDOW / 2))
    width = min(len(values), 2 * reach + 1)
    result = []
    for index in range(len(values)):
        start = min(max(0, index - reach), len(values) - width)  # as many values at the ends as in the middle
        part = np.asarray(values[start : start + width])
        at = np.arange(start, start + width) - index
        slope = (at - at.mean()) @ part / max(0.5, ((at - at.mean()) ** 2).sum())
        result.append(float(part.mean() - slope * at.mean()))
    return result


def draw_curves(records: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw the records of metrics.jsonl to a PNG, written atomically: total reward, each reward, KL, entropy.

    A quantity that was never measured (KL without a reference model) gets no panel. No records, no file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not records:
        return
    names = list(records[0].get("rewards", {}))
    panels = [("reward, weighted total", [record["reward"] for record in records])]
    panels += [(f"reward: {name}", [record["rewards"][name]["mean"] for record in records]) for name in names]
    panels += [
        ("KL to the base policy (nats per token)", [record["kl"] for record in records]),
        ("policy entropy (nats per token)", [record["entropy"] for record in records]),
    ]
    panels = [(label, values) for label, values in panels if any(value is not None for value in values)]
    steps = [record["step"] for record in records]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for number, (label, values) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
        x, y = [step for step, _ in known], [value for _, value in known]
        axes.plot(x, y, color="tab:blue", alpha=0.3, linewidth=1)
        axes.plot(x, smoothed(y), color="tab:blue", linewidth=2)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
