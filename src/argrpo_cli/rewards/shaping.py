"""From raw scores to the reward that training maximises (equation 10), for the trainer and for evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from argrpo_cli.rewards import FAMILIES, REWARDS, check_reward
from argrpo_cli.system.errors import UserError


class Term(Protocol):
    """One reward of a recipe: its name, the factor that brings its unit to the others' (None is the published one), its
    weight in its family."""

    name: str
    factor: float | None
    weight: float


class Shaping(Protocol):
    """The `rewards` section of a recipe."""

    lambda_conditional: float
    lambda_quality: float
    lambda_realism: float
    terms: Sequence[Term]


def reward_weights(section: Shaping, family: Mapping[str, str]) -> dict[str, float]:
    """What each raw score is multiplied by before the sum: lambda_family * weight * factor, in the recipe's order.

    Args:
        family: name of a reward to "conditional", "quality" or "realism".

    Raises:
        UserError: all products are 0, so that nothing would be trained.
    """
    lambdas = {one: getattr(section, f"lambda_{one}") for one in FAMILIES}
    weights = {term.name: lambdas[family[term.name]] * term.weight * factor_of(term) for term in section.terms}
    if not any(weights.values()):
        raise UserError(
            "rewards: every reward has weight 0 (lambda x weight x factor), so there is nothing to train; "
            "set one of rewards.lambda_conditional, lambda_quality, lambda_realism above 0"
        )
    return weights


def factor_of(term: Term) -> float:
    """The factor of a recipe's term: the one it names, else the published one of its reward; 1 for one of one's own."""
    if term.factor is not None:
        return term.factor
    return check_reward(term.name).factor if term.name in REWARDS else 1.0
