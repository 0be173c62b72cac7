"""The entropy of each drawn image, of the policy and of the reference: what a reward that reads the policy compares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from trl.trainer.utils import use_adapter

if TYPE_CHECKING:
    from argrpo_cli.training.grpo import ImageGRPOTrainer


@torch.no_grad()
def image_entropies(trainer: ImageGRPOTrainer, completions: Sequence[Sequence[int]]) -> Tensor:
    """Entropy of the trained distribution in nats, averaged over the tokens of each image of this process: float32
    [N, 2], of the policy as it has drawn them and of the reference on the same tokens. All processes must call it.

    Args:
        completions: the tokens of image i, whose condition is row i of `trainer.encoded`.
    """
    tokens = torch.tensor(completions, device=trainer.accelerator.device)
    ids = torch.cat([torch.arange(len(tokens), device=tokens.device)[:, None], tokens], dim=1)

    def of(model: nn.Module) -> Tensor:
        size = trainer.args.per_device_train_batch_size
        return trainer._get_per_token_logps_and_entropies(
            model, ids, torch.ones_like(ids), tokens.shape[1], size, compute_entropy=True
        )[1].mean(1)

    policy = of(trainer.model)
    if trainer.ref_model is not None:
        return torch.stack([policy, of(trainer.ref_model)], dim=1).float()
    with use_adapter(trainer.accelerator.unwrap_model(trainer.model), adapter_name=None):
        return torch.stack([policy, of(trainer.model)], dim=1).float()
