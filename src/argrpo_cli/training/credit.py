"""Which tokens of an image its advantage goes to: A_it = w_it A_i, with published weights that a rollout fixes.

GRPO gives every token of an image the same advantage. The weights are on the policy gradient alone, but for STAGE's,
which also weigh the KL term. Where published code and paper differ, docs/quirks.md says which of them this follows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from argrpo_cli.policy.protocol import Scored
from argrpo_cli.training.gathering import whole_model

if TYPE_CHECKING:
    from argrpo_cli.policy import Policy
    from argrpo_cli.recipe.grpo import TokenSection
    from argrpo_cli.training.grpo import ImageGRPOTrainer

ADVANTAGE_WEIGHTS, KL_WEIGHTS = "advantage_weights", "kl_weights"  # entries of a batch, [B, T]

SHARE = 0.1  # of an image's tokens, each of GCPO's three sets
TOP, MASS = 0.4, 0.8  # of the guidance contrast: this share of the tokens has this share of the weight
LOWEST, HIGHEST = 0.2, 0.5  # shares of the tokens that EG-GRPO leaves out, and gives a bonus
LEAST = 1e-6  # nats: a divergence below is rounding


class TokenBeta(float):
    """The weight beta of the KL term, for each token another: TRL asks whether it is 0, and multiplies the KL by it."""

    weights: Tensor

    def __mul__(self, kl: Tensor) -> Tensor:
        return float(self) * self.weights * kl


@dataclass(frozen=True)
class Credit:
    """Weighs the tokens of each rollout by `section.method`.

    Attributes:
        policy: whose codes and grids the tokens are.
        group_size: images whose codes are compared; a group may lie on several processes.
    """

    section: TokenSection
    policy: Policy
    group_size: int

    def __call__(self, trainer: ImageGRPOTrainer, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The entries, float32 [B, T], that weigh the advantages and, with STAGE, the KL of this process's images.

        All processes must call it.

        Args:
            batch: TRL's, with `completion_ids` [B, T], `advantages` [B] and the rows of `trainer.encoded`.
        """
        method, tokens, advantages = self.section.method, batch["completion_ids"], batch["advantages"]
        if method == "guidance":
            return {ADVANTAGE_WEIGHTS: rank_weights(self._scores(trainer, batch).compared)}
        if method == "eg":
            return {ADVANTAGE_WEIGHTS: entropy_weights(self._scores(trainer, batch).entropy, advantages)}
        # What compares the images of a group sees those of all processes.
        gather = trainer.accelerator.gather
        vectors = self.policy.code_vectors()[gather(tokens)].unflatten(0, (-1, self.group_size))
        first = trainer.accelerator.process_index * len(tokens)
        own = slice(first, first + len(tokens))
        if method == "stage":
            similarity = opposed_similarity(vectors, gather(advantages).view(-1, self.group_size)).flatten(0, 1)
            weights, kl_weights = stage_weights(similarity)
            return {ADVANTAGE_WEIGHTS: (weights / weights.mean().clamp(min=1e-6))[own], KL_WEIGHTS: kl_weights[own]}
        scored = self._scores(trainer, batch)
        similarity = mutual_similarity(vectors).repeat_interleave(self.group_size, dim=0)[own]
        weights = critical_tokens(scored.entropy, similarity, self.sides).float()
        weights = weights / weights.mean(-1, keepdim=True)  # the mean over the tokens that count
        if self.section.confidence:
            log_ratio = scored.logp - batch["ref_per_token_logps"]
            weights = weights * confidence(log_ratio, self.section.confidence)
        return {ADVANTAGE_WEIGHTS: weights}

    @property
    def sides(self) -> list[int]:
        """Tokens a side of the grids that an image's tokens lie on, one after another."""
        card = self.policy.card
        return [math.isqrt(count) for count in card.scales or (card.tokens,)]

    @torch.no_grad()
    def _scores(self, trainer: ImageGRPOTrainer, batch: dict[str, Any]) -> Scored:
        """Log-probabilities and entropies [B, T] of the trained distribution before the update; with the guidance
        contrast those of the unguided one, and its divergence KL(pi(.|c) || pi(.|no condition)) from `trainer.null`."""
        contrast, sampling = self.section.method == "guidance", trainer.sampling
        if contrast:
            sampling = replace(sampling, cfg_scale=1.0)
        rows, size = batch["prompt_ids"][:, 0], trainer.args.per_device_train_batch_size
        parts = []
        with whole_model(trainer) as model, trainer.accelerator.autocast():
            for own, tokens in zip(rows.split(size), batch["completion_ids"].split(size), strict=True):
                compare = None
                if contrast:
                    null = model.distribution(trainer.null[own], tokens, sampling)

                    def compare(logp: Tensor, at: slice, null: Any = null) -> Tensor:
                        return (logp.exp() * (logp - null(at))).sum(-1)

                parts.append(model(trainer.encoded[own], tokens, sampling, True, compare))
        return Scored(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))


# GCPO (Zhang et al. 2025, arXiv:2509.22485)


def critical_tokens(entropy: Tensor, similarity: Tensor, sides: Sequence[int]) -> Tensor:
    """The first 10% of each image's tokens, of the others the 10% with the largest spatial gradient of entropy, and of
    what is left the 10% least similar across the group: bool [B, T], as many in every image.

    Args:
        entropy: [B, T], nats.
        similarity: [B, T], of the codes at the same place in the images of a group, see `mutual_similarity`.
        sides: see `entropy_gradient`.
    """
    count = max(1, int(SHARE * entropy.shape[1]))
    chosen = torch.zeros_like(entropy, dtype=torch.bool)
    chosen[:, :count] = True
    for score in (entropy_gradient(entropy, sides), -similarity):
        chosen.scatter_(1, score.masked_fill(chosen, -torch.inf).topk(count).indices, True)
    return chosen


def entropy_gradient(entropy: Tensor, sides: Sequence[int]) -> Tensor:
    """The length of the gradient of entropy over the places of a grid, [B, T].

    First each place takes the mean of itself and the neighbours that were drawn before it (left, above left, above,
    above right); then central differences, at the edges one-sided ones.

    Args:
        entropy: [B, T], nats, rows first.
        sides: of the grids that the tokens lie on one after another, T = sum of squares; one of a token by itself has
            no gradient.
    """
    before = entropy.new_tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]).view(1, 1, 3, 3)
    lengths = []
    for part, side in zip(entropy.split([side**2 for side in sides], dim=1), sides, strict=True):
        if side == 1:
            lengths.append(torch.zeros_like(part))
            continue
        grid = part.unflatten(1, (1, side, side))
        mean = F.conv2d(grid, before, padding=1) / F.conv2d(torch.ones_like(grid), before, padding=1)
        down, right = torch.gradient(mean[:, 0], dim=(1, 2))
        lengths.append(torch.hypot(down, right).flatten(1))
    return torch.cat(lengths, dim=1)


def mutual_similarity(vectors: Tensor) -> Tensor:
    """The mean cosine similarity of the codes that the pairs of a group's images have at a place, [groups, T].

    Args:
        vectors: of unit length, [groups, G, T, C].
    """
    count = vectors.shape[1]
    return (vectors.sum(1).square().sum(-1) - count) / (count * (count - 1))  # without each image with itself


def confidence(log_ratio: Tensor, clip: float) -> Tensor:
    """GCPO's dynamic weight [B, T]: the mean of exp(clip(log pi / pi_ref, -c, c)) over the tokens up to each."""
    ratio = log_ratio.clamp(-clip, clip).exp()
    return ratio.cumsum(-1) / torch.arange(1, ratio.shape[1] + 1, device=ratio.device)


# STAGE (Ma et al. 2025, arXiv:2509.25027)


def opposed_similarity(vectors: Tensor, advantages: Tensor) -> Tensor:
    """s [groups, G, T]: the mean cosine similarity of an image's code at a place to those of the images of its group
    whose advantage has the other sign, A_i A_j <= 0; -1 where there are none, so that nothing speaks against it.

    Args:
        vectors: of unit length, [groups, G, T, C].
        advantages: [groups, G].
    """
    other = advantages[:, :, None] * advantages[:, None] <= 0
    other &= ~torch.eye(advantages.shape[1], dtype=torch.bool, device=other.device)
    count = other.sum(-1)[..., None]
    total = torch.einsum("gij,gjtc->gitc", other.to(vectors.dtype), vectors)
    return torch.where(count > 0, (vectors * total).sum(-1) / count, -1.0)


def stage_weights(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """w = clip((1 - s) / 2, 0, 1) of the advantage, to be divided by its mean over all tokens of the update, and
    0.5 + 0.5 clip(s + 1, 0, 1) of the KL term, for s of `opposed_similarity`."""
    return ((1 - similarity) / 2).clamp(0, 1), 0.5 + 0.5 * (similarity + 1).clamp(0, 1)


# Guidance contrast (Li et al. 2026, arXiv:2605.29198)


def rank_weights(divergence: Tensor) -> Tensor:
    """Weights [B, T] of mean 1 that rise with the rank of a token's divergence in its image.

    w ~ (rank / T)^a, a = ln(1 - m) / ln(1 - q) - 1, so that of many tokens the share q of the largest has the share m
    of the weight. Equal divergences have equal weights, as all of an image without a condition.

    Args:
        divergence: [B, T], nats, 0 or more.
    """
    divergence = divergence.float()
    divergence = torch.where(divergence < LEAST, 0, divergence).contiguous()
    ordered = divergence.sort(dim=-1).values
    below, up_to = (torch.searchsorted(ordered, divergence, right=right) for right in (False, True))
    percentile = (below + up_to + 1) / (2 * divergence.shape[1])  # the mean rank of those that are equal
    weights = percentile ** (math.log(1 - MASS) / math.log(1 - TOP) - 1)
    return weights / weights.mean(-1, keepdim=True)


# EG-GRPO (Song et al. 2026, arXiv:2604.02355)


def entropy_weights(entropy: Tensor, advantages: Tensor) -> Tensor:
    """w [B, T] of w A = A 1[H >= its 20% quantile] + lambda H 1[H >= its median] in each image: no advantage where the
    policy is sure, and a bonus for what it drew where it is not.

    lambda is such that the bonus of an image adds up to the |A| that is left out of it: the budget is moved.

    Args:
        entropy: [B, T], nats.
        advantages: [B].
    """
    length = entropy.shape[1]
    ordered = entropy.sort(dim=-1).values
    kept = entropy >= ordered[:, [int(LOWEST * length)]]
    high = entropy * (entropy >= ordered[:, [int((1 - HIGHEST) * length)]])
    bonus = (~kept).sum(-1, keepdim=True) * high / high.sum(-1, keepdim=True).clamp(min=LEAST)
    return kept + advantages.sign()[:, None] * bonus
