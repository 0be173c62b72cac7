"""The GRPO objective in the paper's symbols (section 3.2, eq. 3 to 6).

Training runs TRL's implementation; this one is short enough to read, says what the settings in `grpo.py` must make TRL
compute, and the tests hold TRL to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ADVANTAGE_EPSILON = 1e-4  # added to the standard deviation, so that a group of equal rewards has advantage 0


def group_std(rewards: Tensor, ddof: int = 1) -> Tensor:
    """Standard deviation of each group, leaving missing rewards (NaN) out.

    Args:
        rewards: [groups, G].
        ddof: 1 is the sample standard deviation, as in TRL; 0 that of the population.

    Returns:
        [groups]; NaN where ddof or fewer rewards are known.
    """
    known = ~rewards.isnan()
    count = known.sum(-1)
    deviation = torch.where(known, rewards - rewards.nanmean(-1, keepdim=True), 0)
    freedom = (count - ddof).to(rewards.dtype)
    return torch.where(freedom > 0, deviation.square().sum(-1) / freedom, torch.nan).sqrt()


def advantages(rewards: Tensor, ddof: int = 1) -> Tensor:
    """A_i = (r_i - mean(r)) / std(r) within each group (eq. 3).

    Args:
        rewards: [groups, G]; a missing reward (NaN) stays out of its group's mean and deviation and gets advantage 0.
        ddof: see `group_std`.

    Returns:
        [groups, G]; 0 throughout a group of equal rewards.
    """
    centred = rewards - rewards.nanmean(-1, keepdim=True)
    return (centred / (group_std(rewards, ddof).unsqueeze(-1) + ADVANTAGE_EPSILON)).nan_to_num(nan=0.0)


def ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """r(theta) = pi_theta / pi_theta_old, token by token (eq. 5)."""
    return torch.exp(logp - old_logp)


def kl_estimate(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """pi_ref / pi_theta - log(pi_ref / pi_theta) - 1, never negative, token by token (eq. 6, known as k3).

    An unbiased estimate of D_KL(pi_theta || pi_ref) only where the tokens were drawn from pi_theta itself: with
    `grpo.logprob: guided`, or without guidance (`sampling.cfg_scale: 1`). With `grpo.logprob: conditional` the guided
    sampler drew them from another distribution, and it is a non-negative penalty of the same form.
    """
    log_ratio = ref_logp - logp
    return torch.exp(log_ratio) - log_ratio - 1


def surrogate(r: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    """min(r A, clip(r, 1 - epsilon, 1 + epsilon) A), the gain of each token (inside eq. 4)."""
    return torch.minimum(r * advantage, r.clamp(1 - epsilon, 1 + epsilon) * advantage)


@dataclass(frozen=True)
class Objective:
    """The loss to minimise, -J of eq. 4, and what goes into a log beside it (all scalars)."""

    loss: Tensor
    policy_loss: Tensor
    kl: Tensor
    clip_low: Tensor
    clip_high: Tensor


def grpo_objective(
    logp: Tensor, old_logp: Tensor, ref_logp: Tensor | None, advantage: Tensor, epsilon: float, beta: float
) -> Objective:
    """-J_GRPO: the mean over sequences of the mean over tokens of -(surrogate - beta KL) (eq. 4).

    Args:
        logp, old_logp, ref_logp: [N, T] log-probabilities of the drawn tokens under the policy being trained, the one
            that drew them and the reference; ref_logp may be None when beta is 0.
        advantage: [N], the same for all tokens of a sequence.
        epsilon: clip range of the ratio.
        beta: weight of the KL estimate.

    Returns:
        Differentiable with respect to logp. `clip_low` and `clip_high` are the shares of all tokens whose clipped
        branch is the active one.
    """
    r = ratio(logp, old_logp)
    per_token_advantage = advantage.unsqueeze(-1)
    policy_loss = -surrogate(r, per_token_advantage, epsilon).mean(-1).mean()
    kl = logp.new_zeros(()) if ref_logp is None else kl_estimate(logp, ref_logp).mean(-1).mean()
    low = (r < 1 - epsilon) & (per_token_advantage < 0)
    high = (r > 1 + epsilon) & (per_token_advantage > 0)
    loss = policy_loss + beta * kl if beta else policy_loss
    return Objective(loss, policy_loss, kl, low.to(logp.dtype).mean(), high.to(logp.dtype).mean())
