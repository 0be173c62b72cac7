"""Token entropy of a policy, H_t = - sum_v pi(v | x_<t, c) log pi(v | x_<t, c) in nats (section 4.3 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from argrpo_cli.policy.protocol import Policy
from argrpo_cli.shapes import Condition, Sampling


@torch.inference_mode()
def token_entropy(
    policy: Policy,
    tokens: Tensor,
    conditions: Sequence[Condition],
    cfg_scale: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Entropy in nats of the next-token distribution at every position, float32 [B, T] on the CPU.

    Args:
        tokens: int64 [B, T], what comes before.
        cfg_scale: None for the conditional distribution, a number for the guided one.
        temperature: the logits are divided by it (0 counts as 1e-5, as in sampling).
    """
    sampling = Sampling(cfg_scale=cfg_scale or 1.0, temperature=temperature)
    encoded = policy.encode(conditions)
    return policy.model(encoded, tokens.to(policy.model.device), sampling, True).entropy.cpu()
