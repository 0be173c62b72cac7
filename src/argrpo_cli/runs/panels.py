"""What the curves of a run show: one panel per question, for curves.png and for report.html alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WINDOW = 0.1  # of the run, fitted for the thick line; the pale one is what was measured
# Of an update. "text" are the captions; class conditions have none.
STAGES = ("text", "rollout", "reward", "update")

# Colour-blind safe, and readable on white and on a dark ground; a family keeps its colour everywhere.
COLOURS = {
    "total": "#3b7dd8",
    "conditional": "#d9822b",
    "quality": "#1f9d6b",
    "realism": "#b65fc4",
    "held_out": "#8a8f98",
    "plain": "#3b7dd8",
    "second": "#d9534f",
    "text": "#8a8f98",
    "rollout": "#3b7dd8",
    "reward": "#d9822b",
    "update": "#1f9d6b",
}

Record = Mapping[str, Any]
Roles = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Line:
    """One curve: a value per record, None where it was not measured, and the key of its colour in `COLOURS`."""

    label: str
    values: list[float | None]
    colour: str = "plain"


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis.

    Attributes:
        held_out: a reward that is measured and not optimised.
        reward: what is optimised: the total, or a reward that counts.
        exact: a setting, not a measurement: there is no noise to smooth away.
    """

    title: str
    lines: list[Line]
    held_out: bool = False
    reward: bool = False
    logarithmic: bool = False
    exact: bool = False


def panels(records: Sequence[Record], roles: Roles) -> list[Panel]:
    """The panels of a run, in the order in which they are read; what was never measured has none.

    Args:
        records: lines of metrics.jsonl. Keys that an earlier version did not write count as not measured.
        roles: name of a reward to {"family": ..., "weight": ...}; weight 0 is held out.
    """
    rewards = [_reward(name, records, roles) for name in reward_names(records)]

    def single(title: str, key: str, colour: str = "plain") -> Panel:
        return Panel(title, [Line("", column(records, lambda record: record.get(key)), colour)])

    def several(title: str, keys: Mapping[str, tuple[str, str]], logarithmic: bool = False) -> Panel:
        lines = [
            Line(label, column(records, lambda record, key=key: record.get(key)), colour)
            for key, (label, colour) in keys.items()
        ]
        return Panel(title, [line for line in lines if _measured(line)], logarithmic=logarithmic)

    found = [
        Panel(
            "reward, weighted total",
            [Line("", column(records, lambda record: record.get("reward")), "total")],
            reward=True,
        ),
        *(panel for panel in rewards if not panel.held_out),
        *(panel for panel in rewards if panel.held_out),
        single("total reward, std within groups", "within_group_std", "total"),
        single("KL to the base policy (nats per token)", "kl"),
        single("policy entropy (nats per token)", "entropy"),
        _varying(single("weight of the entropy bonus", "entropy_weight")),
        single("ratio to the sampler, mean", "ratio"),
        several(
            "|ratio - 1|",
            {"ratio_deviation_mean": ("mean", "plain"), "ratio_deviation": ("largest", "second")},
            logarithmic=True,
        ),
        several("share of tokens clipped", {"clip_low": ("low", "plain"), "clip_high": ("high", "second")}),
        single("share of groups without spread", "groups_without_spread"),
        single("gradient norm", "grad_norm"),
        _varying(single("learning rate", "learning_rate")),
        several(
            "images per second, by stage",
            {f"images_per_second_{stage}": (stage, stage) for stage in STAGES},
            logarithmic=True,
        ),
    ]
    return [panel for panel in found if any(_measured(line) for line in panel.lines)]


def reward_names(records: Sequence[Record]) -> list[str]:
    """Names of the rewards that any record has, in the recipe's order."""
    return list(dict.fromkeys(name for record in records for name in record.get("rewards", {})))


def column(records: Sequence[Record], read: Callable[[Record], float | None]) -> list[float | None]:
    """One value per record."""
    return [read(record) for record in records]


def smoothed(values: Sequence[float]) -> list[float]:
    """A straight line fitted around each value, at that value: a moving average that does not lag at the ends.

    Held to the range of the values, so that a share does not fall below 0 at an end.
    """
    y = np.asarray(values, dtype=float)
    if len(y) < 2:
        return y.tolist()
    reach = max(2, int(len(y) * WINDOW / 2))
    width = min(len(y), 2 * reach + 1)
    index = np.arange(len(y))
    start = np.clip(index - reach, 0, len(y) - width)  # as many values at the ends as in the middle
    middle, offset = start + (width - 1) / 2, y.mean()
    sums, moments = (
        np.concatenate([[0.0], np.cumsum(series)]) for series in (y - offset, (y - offset) * index)
    )  # differences of running sums: no loop over windows
    total, moment = (series[start + width] - series[start] for series in (sums, moments))
    slope = (moment - middle * total) / (width * (width**2 - 1) / 12)
    return np.clip(offset + total / width + slope * (index - middle), y.min(), y.max()).tolist()


def _reward(name: str, records: Sequence[Record], roles: Roles) -> Panel:
    role = roles.get(name, {})
    held_out = role.get("weight") == 0
    colour = "held_out" if held_out else role.get("family") or "plain"
    values = column(records, lambda record: record.get("rewards", {}).get(name, {}).get("mean"))
    return Panel(
        f"{'held out' if held_out else 'reward'}: {name}", [Line("", values, colour)], held_out, reward=not held_out
    )


def _measured(line: Line) -> bool:
    return any(value is not None for value in line.values)


def _varying(panel: Panel) -> Panel:
    """The panel, or an empty one when its value never changes, which the recipe says as well."""
    kept = [line for line in panel.lines if len({value for value in line.values if value is not None}) > 1]
    return Panel(panel.title, kept, exact=True)
