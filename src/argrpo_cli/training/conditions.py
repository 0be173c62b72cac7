"""What a run is asked to draw, and which condition each group gets: a fixed order, whose place a checkpoint keeps.

What a group draws is a function of the recipe and the group's number alone. A list of conditions is drawn in
permutations of (seed, pass), so its place is the number of updates done; a stream is drawn in its own order, and its
place is a file of every checkpoint.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from argrpo_cli.captions import distinct, read_captions
from argrpo_cli.recipe.sections import ConditionSection
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_json, write_json
from argrpo_cli.training.streams import StreamedConditions, all_captions

if TYPE_CHECKING:
    from datasets import Dataset

    from argrpo_cli.policy import Policy
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.shapes import Condition

POSITION = "prompts.json"  # of a checkpoint: how far a stream was read
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class WeightedConditions(Sequence):
    """Conditions that are not drawn equally often; `weights` has one positive number for each."""

    conditions: tuple[Condition, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.conditions)

    def __getitem__(self, index: int) -> Condition:
        return self.conditions[index]


Conditions = Sequence["Condition"] | StreamedConditions


def run_conditions(recipe: Recipe, policy: Policy) -> Conditions:
    """What the recipe asks to draw: each condition once, in a fixed order, or a stream of them.

    Raises:
        UserError: classes for a policy of captions or the reverse, an unknown class, captions that cannot be read.
    """
    section = recipe.conditions
    check_source(section, policy.card.reads, recipe.policy.checkpoint)
    if policy.card.reads == "classes":
        return _classes(section, policy)
    if section.dataset is not None and section.dataset.streaming:
        return StreamedConditions(section.dataset, section.deduplicate, lambda text: policy.conditions([text])[0])
    return policy.conditions(run_captions(section))


def digest(conditions: Conditions) -> str:
    """A hash of what a run is asked to draw, in order: a file of captions may change between start and resume."""
    return hashlib.sha256(repr(conditions).encode()).hexdigest()[:16]


def check_source(section: ConditionSection, draws: str, policy: str) -> None:
    """UserError when the keys of `conditions` are not those for a policy that draws "classes" or "captions"."""
    if section.source != draws:
        raise UserError(
            f"conditions.source is {section.source!r}, but the policy {policy} draws {draws}; "
            f"set conditions.source: {draws}"
        )
    if draws == "classes" and section.dataset is not None:
        raise UserError(f"conditions.dataset {section.dataset.name!r}: the policy {policy} draws classes; leave it out")
    plain = ConditionSection()
    if draws == "classes" and (section.captions, section.column) != (plain.captions, plain.column):
        raise UserError(f"conditions.captions and .column are of captions, and {policy} draws classes; leave them out")
    if draws == "captions" and section.classes != plain.classes:
        raise UserError(f"conditions.classes: {policy} draws captions; leave it out")
    if draws == "captions" and section.weights:
        name = next(iter(section.weights))
        raise UserError(f"conditions.weights {name!r}: weights are of classes, and {policy} draws captions; leave out")


def run_captions(section: ConditionSection) -> list[str]:
    """The captions that the recipe names, a stream's excepted; UserError when they cannot be read."""
    data = section.dataset
    captions = read_captions(section.captions, section.column) if data is None else all_captions(data)
    if section.deduplicate:
        captions = distinct(captions)
    chosen = list(captions if data is None else islice(captions, data.limit))
    if not chosen:
        raise UserError(f"conditions.dataset: {data.name} has no caption in the column {data.column!r}")
    return chosen


def _classes(section: ConditionSection, policy: Policy) -> Sequence[Condition]:
    # Ids, since names may repeat: ImageNet has two cranes.
    conditions = policy.conditions(range(len(policy.card.names)) if section.classes == "all" else section.classes)
    if section.deduplicate:
        conditions = list(dict.fromkeys(conditions))
    if not section.weights:
        return conditions
    weights = dict.fromkeys(conditions, 1.0)
    named: dict[Condition, str | int] = {}
    for name, weight in section.weights.items():
        (one,) = policy.conditions([name])
        if one not in weights:
            raise UserError(f"conditions.weights {name!r}: conditions.classes leaves this class out; so leave it out")
        if one in named:
            raise UserError(f"conditions.weights: {named[one]!r} and {name!r} are the same class; give one weight")
        named[one] = name
        weights[one] = weight
    if not math.isfinite(sum(weights.values())):
        raise UserError("conditions.weights: their sum is too large a number; make all of them smaller")
    positive = [one for one in conditions if weights[one] > 0]
    if not positive:
        raise UserError("conditions.weights: every class has weight 0, so there is nothing to draw")
    return WeightedConditions(tuple(positive), tuple(weights[one] for one in positive))


def systematic(weights: Sequence[float], count: int, start: float) -> np.ndarray:
    """Indices int64 [count], each as often as its share of the weights says, up or down to a whole number.

    Args:
        start: in [0, 1), where the first of the evenly spaced points lies.
    """
    ends = np.cumsum(weights, dtype=np.float64)
    ends *= count / ends[-1]
    return np.minimum(np.searchsorted(ends, np.arange(count) + start, side="right"), len(weights) - 1)


def condition_order(weights: Sequence[float], groups: int, seed: int) -> list[int]:
    """Indices of the conditions that the run's groups draw, first group first, each in proportion to its weight.

    Every pass over the conditions is a new permutation from (seed, pass), so a longer run starts like a shorter one,
    and a resumed run continues like an uninterrupted one. With equal weights a pass has each condition once.

    A pass is as many groups as there are conditions, chosen by systematic sampling: the conditions lie on a line, as
    long as their share of the pass, and evenly spaced points are laid on it. So a pass has each of them as often as its
    share says, up or down to a whole number; independent draws would stray by the square root of that. The points move
    by the golden ratio from pass to pass, which evens out what was rounded.

    Args:
        weights: positive, one for each condition.
        groups: how many groups the run draws in all.
    """
    count = len(weights)
    start = np.random.Generator(np.random.PCG64(seed)).random()
    order: list[int] = []
    for number in range(-(-groups // count)):
        chosen = systematic(weights, count, (start + number * GOLDEN) % 1)
        shuffle = np.random.Generator(np.random.PCG64([seed, number])).permutation(count)
        order.extend(chosen[shuffle].tolist())
    return order[:groups]


def prompt_dataset(conditions: Conditions, groups: int, seed: int) -> Dataset:
    """The data set TRL walks through: one row per group, its `prompt` the index of its condition as text.

    TRL hands prompts to the rollout as text and to nobody else; an index stays exact where class names repeat. The
    indices of a stream are the groups' numbers.
    """
    from datasets import Dataset

    if isinstance(conditions, StreamedConditions):
        order = list(range(groups))
    else:
        weighted = isinstance(conditions, WeightedConditions)
        order = condition_order(conditions.weights if weighted else [1.0] * len(conditions), groups, seed)
    return Dataset.from_dict({"prompt": [str(index) for index in order]})


def save_position(conditions: Conditions, folder: Path) -> None:
    """Write into a checkpoint how far a stream was read; a list needs no more than the number of updates done."""
    if isinstance(conditions, StreamedConditions):
        write_json(folder / POSITION, conditions.state_dict())


def load_position(conditions: Conditions, folder: Path) -> None:
    """Go on with a stream where a checkpoint left it. One that does not say so is read from its start."""
    if isinstance(conditions, StreamedConditions) and (folder / POSITION).is_file():
        conditions.load_state_dict(read_json(folder / POSITION))
