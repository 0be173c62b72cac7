"""Reward models: loading them, and what each counts.

from argrpo_cli.rewards import load_rewards
scores = load_rewards(["nano-clip", "nano-quality"]).score(images, conditions)   # name -> float32 [B]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from argrpo_cli.rewards.base import FAMILIES, Reward
from argrpo_cli.rewards.set import RewardSet
from argrpo_cli.rewards.table import (
    REWARDS,
    check_options,
    check_reward,
    check_weights,
    identity,
    published_factor,
    refuse_comparing,
)
from argrpo_cli.system.errors import UserError

if TYPE_CHECKING:
    from argrpo_cli.recipe.sections import RewardSection

__all__ = [
    "FAMILIES", "REWARDS", "Reward", "RewardSet", "check_options", "check_reward", "check_weights", "identity",
    "load_reward", "load_rewards", "published_factor", "refuse_comparing", "reward_weights",
]  # fmt: skip


def load_reward(
    name: str, device: str = "cpu", options: Mapping[str, Any] | None = None, basis: Reward | None = None
) -> Reward:
    """Load one reward model by name, with options of its own.

    Args:
        basis: the loaded one that `Reward.derived` names, whose network then serves both.

    Raises:
        UserError: no such reward or option, weights that are missing or do not fit, a package that is not installed.
    """
    reward = check_options(name, options or {})
    try:
        return reward(device, *([] if basis is None else [basis]), **options or {})
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "argrpo_cli" or name not in REWARDS:
            raise
        raise UserError(f"reward {name} needs the package {missing}; install it: pip install {missing}") from error


def load_rewards(
    names: Sequence[str], device: str = "cpu", options: Mapping[str, Mapping[str, Any]] | None = None
) -> RewardSet:
    """Load reward models by name; all names are checked before anything is loaded.

    Args:
        options: name to the options of that reward.

    Raises:
        UserError: a name or option is unknown, or weights are missing.
    """
    options = options or {}
    for name in names:
        check_options(name, options.get(name, {}))
    rewards, bases = {}, {}
    for name in sorted(names, key=lambda name: check_reward(name).derived({}) is not None):  # what others need first
        basis, its_options = check_reward(name).derived(options.get(name, {})) or ("", {})
        if basis in rewards and its_options == options.get(basis, {}):
            bases[name] = basis
        rewards[name] = load_reward(name, device, options.get(name), rewards.get(bases.get(name)))
    return RewardSet({name: rewards[name] for name in names}, device, bases)


def reward_weights(section: RewardSection, family: Mapping[str, str]) -> dict[str, float]:
    """What each raw score is multiplied by before the sum of equation 10: lambda_family * weight * factor.

    Args:
        section: `rewards` of a recipe, whose order is kept.
        family: name of a reward to "conditional", "quality" or "realism".

    Raises:
        UserError: all products are 0, so that nothing would be trained.
    """
    weights = {}
    for term in section.terms:
        factor = published_factor(term.name) if term.factor is None else term.factor
        weights[term.name] = getattr(section, f"lambda_{family[term.name]}") * term.weight * factor
    if not any(weights.values()):
        raise UserError(
            "rewards: every reward has weight 0 (lambda x weight x factor), so there is nothing to train; "
            "set one of rewards.lambda_conditional, lambda_quality, lambda_realism above 0"
        )
    return weights
