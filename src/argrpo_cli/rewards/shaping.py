"""From raw scores to the reward that training maximises (equation 10), for the trainer and for evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from argrpo_cli.rewards import FAMILIES, REWARDS
from argrpo_cli.system.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MAPPINGS = ("paper", "code")


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
    weights = {term.name: lambdas[family[term.name]] * term.weight * _factor(term) for term in section.terms}
    if not any(weights.values()):
        raise UserError(
            "rewards: every reward has weight 0 (lambda x weight x factor), so there is nothing to train; "
            "set one of rewards.lambda_conditional, lambda_quality, lambda_realism above 0"
        )
    return weights


def _factor(term: Term) -> float:
    if term.factor is not None:
        return term.factor
    return REWARDS[term.name].factor if term.name in REWARDS else 1.0


def quantize(scores: Tensor, mapping: str = "paper") -> Tensor:
    """CLIP or HPSv2 scores as steps, which leave less to exploit (appendix D); they replace the scaled score.

    - "paper": 0.5 below 0.3, 1 from 0.3, 1.5 from 0.6. The paper gives the three values, the edges are the code's.
    - "code": the published code's, where a negative score gives -1. It fails at a score of 1 or more, which has no
      bin; here that score is missing (NaN).

    Args:
        scores: raw float32 scores; NaN stays NaN.
    """
    import torch

    steps = torch.full_like(scores, 0.5).masked_fill(scores >= 0.3, 1.0).masked_fill(scores >= 0.6, 1.5)
    missing = scores.isnan()
    if mapping == "code":
        steps = steps.masked_fill(scores < 0, -1.0)
        missing = missing | (scores >= 1)
    return steps.masked_fill(missing, float("nan"))
