"""What is worth drawing, by the rewards so far: conditions whose images differ, and a scale of advantages over updates.

The state is plain data that every checkpoint holds; all processes of a run have the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from annotated_types import Ge
from typing_extensions import TypedDict

from argrpo_cli.system.files import read_json, write_json
from argrpo_cli.system.plain import Index
from argrpo_cli.training.conditions import WeightedConditions, systematic

if TYPE_CHECKING:
    from torch import Tensor

    from argrpo_cli.recipe import Recipe
    from argrpo_cli.training.conditions import Conditions

STATE = "selection.json"  # of a checkpoint
LATEST = 0.5  # of a condition's running spread, the share of its latest group
DECAY = 0.9  # of the running square of advantages, per batch


class SelectionState(TypedDict):
    """What a checkpoint holds of it."""

    spreads: dict[Index, Annotated[float, Ge(0)]]
    square: Annotated[float, Ge(0)]
    batches: Annotated[float, Ge(0)]


class Selection:
    """Chooses conditions, and remembers what it chooses by.

    Attributes:
        floor: `grpo.spread_floor`.
        spreads: running standard deviation of the total reward within a condition's groups, by its index.
        square, batches: running sum of mean squares of centred rewards, and of the weights in it.
    """

    def __init__(self, recipe: Recipe, conditions: Conditions) -> None:
        weighted = isinstance(conditions, WeightedConditions)
        self.weights = conditions.weights if weighted else [1.0] * (len(conditions) if recipe.selects else 0)
        self.seed, self.floor = recipe.seed, recipe.grpo.spread_floor
        self.spreads: dict[int, float] = {}
        self.square = self.batches = 0.0

    def probabilities(self) -> np.ndarray:
        """p_c = f w_c / sum w + (1 - f) w_c s_c / sum w s, float64 [conditions]: f the floor, s_c the running spread.

        A condition that no group was drawn for yet counts with the mean spread of the others.
        """
        weights = np.asarray(self.weights) / np.sum(self.weights)
        if self.floor is None or not any(self.spreads.values()):
            return weights
        mean = sum(self.spreads.values()) / len(self.spreads)
        spread = weights * [self.spreads.get(index, mean) for index in range(len(weights))]
        return self.floor * weights + (1 - self.floor) * spread / spread.sum()

    def draw(self, groups: int, step: int, number: int = 0) -> list[int]:
        """The conditions of so many groups, by their index: a function of the seed, the step, the `number` of the
        draw within it, and of the spreads."""
        generator = np.random.Generator(np.random.PCG64([self.seed, step, number]))
        chosen = systematic(self.probabilities(), groups, generator.random())
        return chosen[generator.permutation(groups)].tolist()

    def observe(self, chosen: Sequence[int], spreads: Tensor) -> None:
        """Standard deviations of the total reward [groups] in groups of these conditions; NaN where it is unknown."""
        for index, spread in zip(chosen, spreads.tolist(), strict=True):
            if not math.isnan(spread):
                before = self.spreads.get(index, spread)
                self.spreads[index] = before + LATEST * (spread - before)

    def deviation(self, centred: Tensor) -> float:
        """Running deviation of rewards less the mean of their group, with those of the latest batch [B].

        s^2 = sum_i d^(n - i) v_i / sum_i d^(n - i), v_i the mean square in batch i of n, d = 0.9.
        """
        self.square = DECAY * self.square + centred.double().square().mean().item()
        self.batches = DECAY * self.batches + 1
        return math.sqrt(self.square / self.batches)

    def save(self, folder: Path) -> None:
        """Add the state to a checkpoint, if there is any."""
        if self.spreads or self.batches:
            write_json(folder / STATE, {"spreads": self.spreads, "square": self.square, "batches": self.batches})

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint; one without a state is of a run that had chosen nothing yet."""
        if (folder / STATE).is_file():
            state = read_json(folder / STATE, SelectionState)
            self.spreads = {int(index): spread for index, spread in state["spreads"].items()}
            self.square, self.batches = state["square"], state["batches"]
