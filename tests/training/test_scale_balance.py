"""Scales that count alike: weights of an image's tokens in TRL's losses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from argrpo_cli.policy.llamagen.model import Encoded
from argrpo_cli.policy.protocol import Scored
from argrpo_cli.recipe import load_recipe
from argrpo_cli.system.errors import UserError
from argrpo_cli.training.grpo import ImageGRPOTrainer
from argrpo_cli.training.plan import plan
from tests.training.tiny import TOKENS

IMAGES, BETA, EPSILON = 4, 0.1, 0.2


class GivenLogProbs(nn.Module):
    """A "model" whose log-probabilities are its parameters."""

    def __init__(self, logp: Tensor) -> None:
        super().__init__()
        self.logp = nn.Parameter(logp)

    def forward(self, *args: object) -> Scored:
        return Scored(self.logp, torch.zeros_like(self.logp))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_a_token_counts_by_its_weight_in_the_loss_and_the_ratio(
    new_trainer: Callable[..., ImageGRPOTrainer], loss_type: str, importance: str
) -> None:
    trainer = new_trainer(beta=BETA, epsilon=EPSILON, loss=loss_type, importance=importance)
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    trainer.model.train()
    torch.manual_seed(0)
    weights = torch.rand(TOKENS)
    weights /= weights.mean()
    trainer.token_weights = weights
    trainer.encoded = Encoded(torch.zeros(IMAGES, dtype=torch.long))
    old, reference, advantages = -3 * torch.rand(IMAGES, TOKENS), -3 * torch.rand(IMAGES, TOKENS), torch.randn(IMAGES)
    model = GivenLogProbs(old + 0.3 * torch.randn(IMAGES, TOKENS))
    ones = torch.ones(IMAGES, TOKENS, dtype=torch.long)
    inputs = {
        "prompt_ids": ones[:, :1] * 0, "prompt_mask": ones[:, :1], "completion_ids": ones * 0, "completion_mask": ones,
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": reference,
        "sampling_per_token_logps": old, "num_items_in_batch": ones.sum(),
    }  # fmt: skip
    loss = trainer.compute_loss(model, inputs)
    (gradient,) = torch.autograd.grad(loss, model.logp)

    logp = model.logp.detach().clone().requires_grad_()
    log_ratio = logp - old
    if importance == "sequence":
        log_ratio = (log_ratio * weights).mean(-1, keepdim=True)
    ratio, gain = log_ratio.exp(), advantages[:, None]
    clipped = torch.minimum(ratio * gain, ratio.clamp(1 - EPSILON, 1 + EPSILON) * gain)
    kl = (reference - logp).exp() - (reference - logp) - 1
    expected = ((BETA * kl - clipped) * weights).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logp)[0])


def test_a_policy_without_scales_cannot_balance_them() -> None:
    with pytest.raises(UserError, match=r"scale_balance 0.5: .* draws token by token and has no scales; use 0"):
        plan(load_recipe("nano/c2i", ["grpo.scale_balance=0.5"]))
