"""nano-critic, the realism reward of the nano world: could this picture be a real scene, or was it generated?

A strided convolutional critic that learned scenes against samples of the base policy (`nano/train_critic.py`).
It reads patches and the whole picture; its logit is bent softly into (-5, 5) so that no picture wins by an outlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from argrpo_cli.conditions import Condition
from argrpo_cli.rewards.weights import BUNDLED, load_weights, read_config, to_unit

LIMIT = 5.0


class CriticNet(nn.Module):
    """64x64 pixels to one logit: the mean of local logits (16-pixel patches) plus one of the whole picture."""

    def __init__(self, widths: Sequence[int] = (32, 64, 112), dropout: float = 0.3):
        super().__init__()
        first, second, third = widths
        act = nn.LeakyReLU(0.1)
        self.patches = nn.Sequential(
            nn.Conv2d(3, first, 4, stride=2, padding=1), act,
            nn.Conv2d(first, second, 4, stride=2, padding=1), nn.GroupNorm(8, second), act,
            nn.Conv2d(second, third, 4, stride=2, padding=1), nn.GroupNorm(8, third), act,
        )  # fmt: skip
        self.whole = nn.Sequential(
            nn.Conv2d(third, third, 3, padding=1), nn.GroupNorm(8, third), act,
            nn.Conv2d(third, third, 3, padding=1, stride=2), nn.GroupNorm(8, third), act,
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(third * 16, 96), act, nn.Linear(96, 1),
        )  # fmt: skip
        self.local = nn.Conv2d(third, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, 64, 64] in [-1, 1] to logits [B]; positive means real."""
        h = self.patches(x)
        return self.whole(h)[:, 0] + self.local(h).mean((1, 2, 3))


def soft_limit(logits: Tensor) -> Tensor:
    """5 tanh(logit / 5): the logit where it is small, bounded where it is not."""
    return LIMIT * torch.tanh(logits / LIMIT)


class NanoCritic:
    """Softly bounded logit in (-5, 5); the higher, the more real."""

    def __init__(self, folder: str | Path = BUNDLED / "nano-critic", device: str = "cpu"):
        self.network = load_weights(CriticNet(**read_config(folder)), folder, device)

    @torch.inference_mode()
    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, 64, 64] to float32 [B]; the conditions are not looked at."""
        return soft_limit(self.network(to_unit(images)))
