"""nano-quality, the image quality reward of the nano world: how little a picture is damaged, without a reference.

A small residual convolutional network that learned from scenes broken on purpose (`nano/corrupt.py`) how far each was
from the truth: bent, unfinished, joined, blurred, recoloured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argrpo_cli.conditions import Condition
from argrpo_cli.rewards.weights import BUNDLED, load_weights, read_config, to_unit


class Residual(nn.Module):
    """norm, swish, 3x3 convolution, twice, beside the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class QualityNet(nn.Module):
    """64x64 pixels to one logit of quality, and a map of logits of local damage that only training looks at."""

    def __init__(self, widths: Sequence[int] = (32, 48, 80), blocks: Sequence[int] = (1, 2, 2)):
        super().__init__()
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 3, padding=1)]
        for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            if level:
                layers.append(nn.Conv2d(widths[level - 1], width, 3, stride=2, padding=1))
            layers += [Residual(width) for _ in range(count)]
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(widths[-1]), nn.SiLU())
        self.local = nn.Conv2d(widths[-1], 1, 1)
        self.head = nn.Sequential(nn.Linear(2 * widths[-1], widths[-1]), nn.SiLU(), nn.Linear(widths[-1], 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 3, 64, 64] in [-1, 1] to quality logits [B] and local damage logits [B, 8, 8]."""
        h = self.body(x)
        pooled = torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=-1)
        return self.head(pooled)[:, 0], self.local(h)[:, 0]


class NanoQuality:
    """Quality in [0, 1]; 1 is undamaged."""

    def __init__(self, folder: str | Path = BUNDLED / "nano-quality", device: str = "cpu"):
        self.network = load_weights(QualityNet(**read_config(folder)), folder, device)

    @torch.inference_mode()
    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, 64, 64] to float32 [B]; the conditions are not looked at."""
        return self.network(to_unit(images))[0].sigmoid()
