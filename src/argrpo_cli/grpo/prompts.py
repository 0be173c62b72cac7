"""What a run is asked to draw, and which condition each group gets: a fixed order that depends on the seed alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from argrpo_cli.captions import read_captions
from argrpo_cli.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from argrpo_cli.conditions import Condition
    from argrpo_cli.policy import Policy
    from argrpo_cli.recipe import Recipe


def run_conditions(recipe: Recipe, policy: Policy) -> list[Condition]:
    """What the recipe asks to draw, each condition once, in a fixed order.

    Raises:
        UserError: classes for a policy of captions or the reverse, an unknown class, captions that cannot be read.
    """
    section = recipe.conditions
    draws = "classes" if policy.text_encoder is None else "captions"
    if section.source != draws:
        raise UserError(
            f"conditions.source is {section.source!r}, but the policy {recipe.policy.checkpoint} draws {draws}; "
            f"set conditions.source: {draws}"
        )
    if draws == "classes":
        return policy.conditions(policy.class_names if section.classes == "all" else section.classes)
    return policy.conditions(dict.fromkeys(read_captions(section.captions)))


def condition_order(conditions: int, groups: int, seed: int) -> list[int]:
    """Indices of the conditions that the run's groups draw, first group first.

    Every pass over the conditions is a new permutation from (seed, pass), so all are drawn equally often, a longer run
    starts like a shorter one, and a resumed run continues like an uninterrupted one.

    Args:
        conditions: how many there are, 1 or more.
        groups: how many groups the run draws in all.
    """
    order: list[int] = []
    for number in range(-(-groups // conditions)):
        order.extend(np.random.Generator(np.random.PCG64([seed, number])).permutation(conditions).tolist())
    return order[:groups]


def prompt_dataset(conditions: int, groups: int, seed: int) -> Dataset:
    """The data set TRL walks through: one row per group, its `prompt` the index of the condition as text.

    TRL hands prompts to the rollout as text and to nobody else; an index stays exact where class names repeat.
    """
    from datasets import Dataset

    return Dataset.from_dict({"prompt": [str(index) for index in condition_order(conditions, groups, seed)]})
