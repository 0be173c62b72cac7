"""Guidance put into the weights by contrast: condition contrastive alignment, CCA (Chen et al. 2024, arXiv:2410.09347).

Of real images: an image is to be likelier than before under its own condition, and less likely under that of another.
What that tends to is the guided distribution: D(x|c) -> log p(x|c) / p(x), up to a factor. As after `distil` an image
is then drawn in one pass a token. Distillation needs no images; this needs no drawing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from argrpo_cli.policy.tokens import entropy_of
from argrpo_cli.seeds import happens
from argrpo_cli.training.image_trainer import ImageTrainer

if TYPE_CHECKING:
    from argrpo_cli.policy.protocol import Encoded
    from argrpo_cli.training.real import Real


def contrast(own: Tensor, other: Tensor, positive: Tensor, beta: float, weight: float) -> Tensor:
    """CCA's loss of each image, [B], over max(lambda, 1): the paper's section 3, unconditional images as in its code.

        - log sigma(beta D(x|c)) - lambda log sigma(- beta D(x|c'))
        - log sigma(beta D(x|c)) - log sigma(beta D(x|c'))            of an image whose c' counts as its own

    The authors divide by lambda, too: without that the norm to which gradients are cut would mean something else.

    Args:
        own, other: D, the log-ratio to the base summed over tokens, float [B], under c and under c'.
        positive: bool [B], where c' counts as the image's own.
        weight: lambda.
    """
    sign = torch.where(positive, 1.0, -1.0)
    factor = torch.where(positive, 1.0, weight)
    return -(F.logsigmoid(beta * own) + factor * F.logsigmoid(sign * beta * other)) / max(weight, 1.0)


class CcaTrainer(ImageTrainer):
    """A trainer that holds each of its real images, tokenised, against its own condition and that of the next."""

    def __init__(self, *args: Any, given: Real, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.real, self._order = given, self.order(len(given.conditions))

    def update(self) -> list[tuple[Encoded, Tensor, Tensor]]:
        """Of each micro-batch: conditions of 2 B rows, the images' own and then the others', tokens int64 [B, T], and
        bool [B], whether the other one counts as the image's own."""
        rollout, slots, conditions = self.rollout, self.slots(), self.real.conditions
        recipe = rollout.recipe
        first = self.state.global_step * recipe.optim.batch_size
        # The next image of the whole batch, so that it is the same on any number of processes.
        following = [first + (slot + 1 - first) % recipe.optim.batch_size for slot in slots]
        rows, others = ([self._order[slot] for slot in part] for part in (slots, following))
        dropped = torch.tensor([happens("drop", seed, recipe.cca.condition_dropout) for seed in self.seeds()])
        same = torch.tensor([conditions[row] == conditions[other] for row, other in zip(rows, others, strict=True)])
        asked = [conditions[row] for row in rows + others]
        with rollout.stopwatch.measure("text"):
            encoded = rollout.team.together(lambda: rollout.policy.encode(asked, dropped.repeat(2)))
        with rollout.stopwatch.measure("rollout"):
            tokens = self.real.tokens(rows).to(rollout.policy.model.device)
        positive, index = (dropped | same).to(tokens.device), torch.arange(self.share, device=tokens.device)
        pairs = [torch.cat([index[part], index[part] + self.share]) for part in self.parts()]
        return [(encoded[pair], tokens[part], positive[part]) for pair, part in zip(pairs, self.parts(), strict=True)]

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The mean loss of a micro-batch."""
        encoded, tokens, positive = inputs
        cca, pair = self.rollout.recipe.cca, tokens.repeat(2, 1)

        def entropy(logp: Tensor, at: slice) -> Tensor:
            with torch.no_grad():
                return entropy_of(logp)

        with torch.no_grad(), self.accelerator.autocast():
            before = self.base(encoded, pair, self.sampling).logp
        scored = model(encoded, pair, self.sampling, False, entropy)
        own, other = (scored.logp - before).sum(1).chunk(2)
        apart = ~positive
        self.note(
            entropy=scored.compared[: len(tokens)].mean(1),
            gain_own=own.masked_fill(positive, torch.nan),
            gain_other=other.masked_fill(positive, torch.nan),
            told_apart=torch.where(apart, (own > other).float(), torch.nan),
        )
        return contrast(own, other, positive, cca.beta, cca.lmbda).mean()
