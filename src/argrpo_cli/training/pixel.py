"""Pixels without rollouts: VA-pi (Liao et al., CVPR 2026, arXiv:2512.19680), on real images.

A tokenizer learns to decode the codes of real images, a policy the likelihood of codes; nobody looks at what a likely
code does to the picture. Here a share of a real image's codes is replaced by random ones, as sampling errors will be;
in one teacher-forced pass along them every token is drawn G times from its own distribution, the draws are decoded, and
the policy is moved, as by GRPO, to those that look more like the image. A cross entropy to the image's own codes, read
along the same noise, holds it near what it has learnt.

The authors draw in one pass and train in G more; the pass is the same, and here it is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from argrpo_cli.policy.tokens import entropy_of, inverse_cdf
from argrpo_cli.training.image_trainer import ImageTrainer
from argrpo_cli.training.scorer import WITHIN_GROUP_STD, WITHOUT_SPREAD, group_std, settled, spread_of

if TYPE_CHECKING:
    from argrpo_cli.policy.protocol import Encoded
    from argrpo_cli.training.real import Real

EPSILON = 1e-8  # the authors', added to a deviation: rewards of one image differ by hundredths
MSE, PERCEPTUAL = "mse", "perceptual"  # what is measured of a draw, as rewards are called in a record
NAMES = (MSE, PERCEPTUAL)


def replaced(tokens: Tensor, share: float, codes: int, generator: torch.Generator) -> Tensor:
    """Codes int64 [T] of an image, each replaced with probability `share` by one of `codes`, all alike likely."""
    chosen = torch.rand(tokens.shape, generator=generator) < share
    return torch.where(chosen, torch.randint(codes, tokens.shape, generator=generator), tokens)


def advantages(rewards: Tensor) -> Tensor:
    """A = (r - mean r) / (std r + 1e-8) of rewards [B, G] among the draws of each image; 0 where all are alike."""
    rewards = settled(rewards)
    return (rewards - rewards.mean(1, keepdim=True)) / (group_std(rewards) + EPSILON)[:, None]


def policy_loss(logp: Tensor, advantage: Tensor) -> Tensor:
    """- mean A r of log-probabilities [B, T, G] and advantages [B, G], with the ratio r = pi / pi.detach(): 1, and its
    gradient that of log pi. Nothing is clipped, since the policy that drew is the one that is trained."""
    return -(advantage[:, None] * (logp - logp.detach()).exp()).mean()


class PixelTrainer(ImageTrainer):
    """A trainer that looks at what tokens drawn along its real images, tokenised, are decoded to."""

    compares = False

    def __init__(self, *args: Any, given: Real, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.real, self._order = given, self.order(len(given.conditions))

    def update(self) -> list[tuple[Encoded, Tensor, Tensor, Tensor, Tensor]]:
        """Of each micro-batch: conditions, tokens int64 [B, T], the same with noise, uniforms float64 [B, T, G], and
        pictures uint8 [B, 3, S, S]."""
        rollout, slots, pixel = self.rollout, self.slots(), self.rollout.recipe.pixel
        card, device = rollout.policy.card, rollout.policy.model.device
        rows = [self._order[slot] for slot in slots]
        with rollout.stopwatch.measure("text"):
            asked = [self.real.conditions[row] for row in rows]
            encoded = rollout.team.together(lambda: rollout.policy.encode(asked))
        with rollout.stopwatch.measure("rollout"):
            images = rollout.team.together(lambda: self.real.pixels(rows)).to(device)
            tokens = self.real.tokens(rows)
            noisy, uniforms = torch.empty_like(tokens), torch.empty(*tokens.shape, pixel.samples, dtype=torch.float64)
            for place, seed in enumerate(self.seeds()):  # each image with noise of its own, whoever draws it
                generator = torch.Generator("cpu").manual_seed(seed)
                noisy[place] = replaced(tokens[place], pixel.noise, card.codes, generator)
                uniforms[place] = torch.rand(*uniforms.shape[1:], dtype=torch.float64, generator=generator)
            if device.type == "mps":  # which has no float64
                uniforms = uniforms.float()
            columns = [one.to(device) for one in (tokens, noisy, uniforms)]
        return [(encoded[part], *(one[part] for one in columns), images[part]) for part in self.parts()]

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The mean loss of a micro-batch, from one pass."""
        encoded, tokens, noisy, uniforms, images = inputs
        drawn = torch.zeros(uniforms.shape, dtype=torch.int64, device=uniforms.device).flatten(0, 1)
        truth, levels = tokens.flatten(), uniforms.flatten(0, 1)
        seen: set[int] = set()

        def draw(logp: Tensor, at: slice) -> Tensor:
            """Log-probabilities of the draws and of the image's own codes, and the entropy, [n, G + 2]."""
            with torch.no_grad():
                if at.start not in seen:  # asked again in the backward pass, where rounding must not draw others
                    seen.add(at.start)
                    drawn[at] = inverse_cdf(logp, levels[at])
                entropy = entropy_of(logp)[:, None]
            return torch.cat([logp.gather(1, drawn[at]), logp.gather(1, truth[at, None]), entropy], dim=1)

        scored = model(encoded, noisy, self.sampling, False, draw).compared
        logp, own, entropy = scored[..., :-2], scored[..., -2], scored[..., -1]
        with self.rollout.stopwatch.measure("reward"):
            rewards = self._rewards(drawn.view(uniforms.shape), images)
        self.note(entropy=entropy.mean(1), cross_entropy=-own.mean(1))
        weight = self.rollout.recipe.pixel.cross_entropy_weight
        return policy_loss(logp, advantages(rewards).float().to(logp.device)) - weight * own.mean()

    @torch.no_grad()
    def _rewards(self, drawn: Tensor, images: Tensor) -> Tensor:
        """Float64 [B, G] on the CPU, of draws int64 [B, T, G] of images uint8 [B, 3, S, S]."""
        pixel, samples = self.rollout.recipe.pixel, drawn.shape[2]
        with self.accelerator.autocast():
            pictures = self.rollout.policy.decode(drawn.transpose(1, 2).flatten(0, 1))
        target = images.repeat_interleave(samples, 0)
        error = ((pictures.float() - target.float()) / 127.5).square().mean((1, 2, 3))
        distance = self.real.distance
        apart = torch.zeros_like(error) if distance is None else distance(pictures, target)
        scores = {MSE: error.cpu().double().view(-1, samples), PERCEPTUAL: apart.cpu().double().view(-1, samples)}
        rewards = -(pixel.mse_weight * scores[MSE] + pixel.perceptual_weight * scores[PERCEPTUAL])
        spread = group_std(settled(rewards))
        self.note(reward=rewards.mean(1), **{WITHIN_GROUP_STD: spread, WITHOUT_SPREAD: (spread == 0).double()})
        for name, values in scores.items():
            own = {f"rewards/{name}/mean": values.mean(1), spread_of(name): group_std(settled(values))}
            self.note(**own)
        return rewards
