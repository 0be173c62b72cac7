"""The convolutional body that nano-quality and nano-critic are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """norm, swish, 3x3 convolution, twice, beside the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Body(nn.Sequential):
    """Pixels [B, 3, 64, 64] in [-1, 1] to features [B, widths[-1], 8, 8], one position per token of nano-vq."""

    def __init__(self, widths: Sequence[int] = (32, 48, 80), blocks: Sequence[int] = (1, 2, 2)):
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 3, padding=1)]
        for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            if level:
                layers.append(nn.Conv2d(widths[level - 1], width, 3, stride=2, padding=1))
            layers += [Residual(width) for _ in range(count)]
        super().__init__(*layers, nn.BatchNorm2d(widths[-1]), nn.SiLU())


def pooled(features: Tensor) -> Tensor:
    """[B, C, h, w] to [B, 2 C]: mean and maximum over the positions."""
    return torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=-1)
