"""nano-critic, the realism reward of the nano world: could this picture be a real scene, or was it generated?

A convolutional critic that learned scenes against samples of the base policy (`nano/make/rewards.py`). Its logit is
bent softly into (-5, 5), so that no picture wins by an outlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from argrpo_cli.nano.rewards.convnet import Body, pooled
from argrpo_cli.networks.weights import load_weights, read_config, to_unit
from argrpo_cli.shapes import Condition
from argrpo_cli.system.files import WEIGHTS

LIMIT = 5.0


class CriticNet(nn.Module):
    """64x64 pixels to a logit; positive means real."""

    def __init__(self, widths: Sequence[int] = (32, 48, 80), blocks: Sequence[int] = (1, 2, 2), dropout: float = 0.3):
        super().__init__()
        last = widths[-1]
        self.body = Body(widths, blocks)
        self.head = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(2 * last, last), nn.SiLU(), nn.Dropout(dropout), nn.Linear(last, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, 64, 64] in [-1, 1] to logits [B]."""
        return self.head(pooled(self.body(x)))[:, 0]


def soft_limit(logits: Tensor) -> Tensor:
    """5 tanh(logit / 5): the logit where it is small, bounded where it is not."""
    return LIMIT * torch.tanh(logits / LIMIT)


class NanoCritic:
    """Softly bounded logit in (-5, 5); the higher, the more real."""

    def __init__(self, folder: str | Path = WEIGHTS / "nano-critic", device: str = "cpu"):
        self.network = load_weights(CriticNet(**read_config(folder)), folder, device)

    @torch.inference_mode()
    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, 64, 64] to float32 [B]; the conditions are not looked at."""
        return soft_limit(self.network(to_unit(images)))
