"""Token entropy of a policy, H_t = - sum_v pi(v | x_<t, c) log pi(v | x_<t, c) in nats (section 4.3 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from argrpo_cli.policy.llamagen.modeling import teacher_forced
from argrpo_cli.policy.llamagen.policy import Policy
from argrpo_cli.shapes import Condition

LOGITS_AT_ONCE = 2**26  # a quarter of a gigabyte


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
    model = policy.model
    condition, mask = policy.embed(conditions)
    inputs, predicting = teacher_forced(model.config, condition, mask, tokens.to(model.device))
    before, model.guidance_scale = model.guidance_scale, cfg_scale
    try:
        hidden = model.model(**inputs).last_hidden_state[:, predicting]
    finally:
        model.guidance_scale = before
    rows = []
    for part in hidden.split(max(1, LOGITS_AT_ONCE // (hidden.shape[1] * model.config.vocab_size))):
        log_probs = torch.log_softmax(model.lm_head(part).float() / max(temperature, 1e-5), dim=-1)
        rows.append(-(log_probs.exp() * log_probs).sum(-1).cpu())
    return torch.cat(rows)
