"""The entropies of a policy along tokens, as tests hold them against the definition."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from argrpo_cli.draw import score_tokens
from argrpo_cli.policy.protocol import Policy
from argrpo_cli.shapes import Condition, Sampling


def entropy_of(
    policy: Policy,
    tokens: Tensor,
    conditions: Sequence[Condition],
    cfg_scale: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Entropies [B, T]; conditional without a scale."""
    sampling = Sampling(cfg_scale=cfg_scale or 1.0, temperature=temperature)
    return score_tokens(policy, conditions, tokens, sampling).entropy
