"""nano-quality, the image quality reward of the nano world: how little a picture is damaged, without a reference.

A small residual convolutional network that learned from scenes broken on purpose (`nano/make/corrupt.py`) how far each
was from the truth: bent, unfinished, joined, blurred, recoloured.
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


class QualityNet(nn.Module):
    """64x64 pixels to a logit of quality. Two more heads only serve training: where the damage is, and what is shown
    (one has to know the object to know what is missing)."""

    def __init__(self, widths: Sequence[int] = (32, 48, 80), blocks: Sequence[int] = (1, 2, 2), classes: int = 24):
        super().__init__()
        last = widths[-1]
        self.body = Body(widths, blocks)
        self.local = nn.Conv2d(last, 1, 1)
        self.name = nn.Linear(2 * last, classes)
        self.head = nn.Sequential(nn.Linear(2 * last, last), nn.SiLU(), nn.Linear(last, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, 64, 64] in [-1, 1] to quality logits [B]."""
        return self.head(pooled(self.body(x)))[:, 0]

    def lessons(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quality logits [B], local damage logits [B, 8, 8] and class logits [B, classes]."""
        features = self.body(x)
        both = pooled(features)
        return self.head(both)[:, 0], self.local(features)[:, 0], self.name(both)


class NanoQuality:
    """Quality in [0, 1]; 1 is undamaged."""

    def __init__(self, folder: str | Path = WEIGHTS / "nano-quality", device: str = "cpu"):
        self.network = load_weights(QualityNet(**read_config(folder)), folder, device)

    @torch.inference_mode()
    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, 64, 64] to float32 [B]; the conditions are not looked at."""
        return self.network(to_unit(images)).sigmoid()
