"""Guidance distilled into the weights: generalised knowledge distillation (Agarwal et al. 2024, arXiv:2306.13649).

The teacher is the policy as it is, frozen and guided; the student is the same policy without guidance. On every token
of a batch of images the two are compared over all codes. The teacher draws the images, and a share `distil.lmbda` of
the batches the student, so that it learns in the states that it will come to itself. What it learns needs no second
pass for the null condition any more: an image costs half.
TRL's own GKDTrainer reads texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from argrpo_cli.policy.tokens import entropy_of
from argrpo_cli.seeds import happens, of_training
from argrpo_cli.shapes import Shot
from argrpo_cli.system.errors import UserError
from argrpo_cli.training.conditions import prompt_dataset
from argrpo_cli.training.gathering import whole_model
from argrpo_cli.training.image_trainer import ImageTrainer
from argrpo_cli.training.instruments import total_rewards

if TYPE_CHECKING:
    from argrpo_cli.policy import Policy
    from argrpo_cli.policy.protocol import Encoded
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.rewards import RewardSet
    from argrpo_cli.shapes import Condition
    from argrpo_cli.system.processes import Team

SCALE_STEP = -3  # stands for "no step" in the seeds of the images that choose a scale
SCALE_IMAGES = 256  # drawn at each scale


def divergence(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence of distributions, in nats (Agarwal et al. 2024, eq. 1).

        beta KL(teacher || M) + (1 - beta) KL(student || M)   with M = beta teacher + (1 - beta) student

    At the ends, where that is zero, stands what it tends to when divided by beta or 1 - beta, as in TRL: beta 0 is the
    forward KL(teacher || student), beta 1 the reverse KL(student || teacher).

    Args:
        teacher, student: log-probabilities [..., V].

    Returns:
        [...], 0 or more up to rounding.
    """
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p (log p - log q) of log-probabilities [..., V]."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


class DistilTrainer(ImageTrainer):
    """A trainer whose batches are images that it draws when an update begins; the teacher is the policy as it was.

    What the null condition alone reads gets no gradient; a distilled policy is not meant to be guided again.

    Args:
        given: the teacher's guidance scale.
    """

    def __init__(self, *args: Any, given: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guided = replace(self.sampling, cfg_scale=given)
        self.own = False  # the student has drawn the batch
        rollout, optim = self.rollout, self.rollout.recipe.optim
        self._prompts = prompt_dataset(rollout.conditions, optim.steps * optim.batch_size, rollout.recipe.seed)

    def update(self) -> list[tuple[Encoded, Tensor]]:
        """Conditions and tokens int64 [B, T] of each micro-batch."""
        encoded, tokens = self._draw()
        return [(encoded[part], tokens[part]) for part in self.parts()]

    def _draw(self) -> tuple[Encoded, Tensor]:
        """This process's images of the update, as in GRPO."""
        rollout, slots = self.rollout, self.slots()
        recipe, team = rollout.recipe, rollout.team
        prompts = self._prompts[slots.start : slots.stop]["prompt"]
        _, encoded = team.together(lambda: rollout.read(prompts))
        self.own = happens("student", of_training(recipe.seed, self.state.global_step, 0), recipe.distil.lmbda)
        sampling, drawing = self.guided, nullcontext(self.base)
        if self.own:
            sampling, drawing = self.sampling, whole_model(self)
        with rollout.stopwatch.measure("rollout"), drawing as model:
            parts = team.together(lambda: rollout.draw(model, encoded, self.seeds(), self, sampling))
        return encoded, torch.cat([part.tokens for part in parts]).clone()  # of inference mode, which cannot be trained

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The mean divergence of a micro-batch's tokens. Of the teacher hidden states are held, and of logits those of
        one part of the tokens at a time."""
        encoded, tokens = inputs
        with torch.no_grad(), self.accelerator.autocast():
            target = self.base.distribution(encoded, tokens, self.guided)

        def compare(logp: Tensor, at: slice) -> Tensor:
            """Divergence and the student's entropy, [n, 2]."""
            with torch.no_grad():
                goal, entropy = target(at), entropy_of(logp)
            return torch.stack([divergence(goal, logp, self.rollout.recipe.distil.beta), entropy], dim=-1)

        distance, entropy = model(encoded, tokens, self.sampling, False, compare).compared.unbind(-1)
        self.note(entropy=entropy.mean(1))
        return distance.mean()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {"divergence_student" if self.own else "divergence_teacher": logs["loss"]}
        super().log(logs, start_time)


def choose_scale(
    recipe: Recipe,
    policy: Policy,
    conditions: Sequence[Condition],
    rewards: RewardSet,
    weights: dict[str, float],
    team: Team,
) -> dict[str, Any]:
    """The guidance scale of `distil.cfg_scale` that the rewards like best, of the policy as it is.

    Every scale draws the same conditions with the same seeds, so what two scales differ by is measured image by image.
    The smallest scale is taken whose images are not worse than the best one's by more than one standard error: the less
    guidance, the more of the diversity is left.

    Args:
        conditions: as many as images are drawn at each scale.
        weights: what each raw reward counts.

    Returns:
        {"cfg_scale": the choice, "scales": [{"cfg_scale", "reward": mean weighted total, "error": of that mean,
        "behind": by how much it is less than the best one's, "behind_error"}, ...]}.
    """
    shots = [Shot(one, of_training(recipe.seed, SCALE_STEP, index)) for index, one in enumerate(conditions)]
    own = shots[team.index :: team.count]
    totals = {}
    for scale in sorted(set(recipe.distil.cfg_scale)):
        sampling = replace(recipe.sampling, cfg_scale=scale)
        totals[scale] = team.gather(total_rewards(policy, own, sampling, rewards, weights))
    return smallest_of_the_best(totals)


def smallest_of_the_best(totals: dict[float, Tensor]) -> dict[str, Any]:
    """See `choose_scale`, of the images' total rewards [N] at each scale, ascending; NaN where one is missing.

    Raises:
        UserError: hardly an image has all its scores.
    """
    known = torch.stack(list(totals.values()))
    known = known[:, known.isfinite().all(0)]
    if known.shape[1] < 2:
        raise UserError("distil.cfg_scale: the rewards gave no scores to choose a scale by; name a single one")
    root = known.shape[1] ** 0.5
    best = known[known.mean(1).argmax()]
    rows = [
        {
            "cfg_scale": scale,
            "reward": one.mean().item(),
            "error": one.std().item() / root,
            "behind": (best - one).mean().item(),
            "behind_error": (best - one).std().item() / root,
        }
        for scale, one in zip(totals, known, strict=True)
    ]
    chosen = next(row["cfg_scale"] for row in rows if row["behind"] <= row["behind_error"])
    return {"cfg_scale": chosen, "scales": rows}
