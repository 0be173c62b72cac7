"""Preprocessing on batches of images: CLIP's as Pillow computes it, HPSv2's, that of the nano networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from argrpo_cli.system.errors import BadPicture

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's
NANO_SIZE = 64  # pixels, of the nano networks
LARGE = 2**28  # bytes of a batch from which one channel is looked at after the other
MOST_OBLONG = 50  # its long side over its short one: the whole picture is scaled before its centre is taken


@dataclass(frozen=True)
class Preprocess:
    """CLIP's preprocessing on a batch: resize as Pillow does, centre crop, normalise.

    `resize_mode` is "shortest" (the shortest side becomes `size`, then the centre is cropped) or "squash" (both sides
    become `size`). For odd margins the crop is rounded as torchvision's, which open_clip uses.
    """

    size: int = 224
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to normalised float32 [B, 3, size, size] on their device; UserError for oblong ones."""
        height, width = images.shape[-2:]
        if max(height, width) > MOST_OBLONG * min(height, width):
            size = f"{width} x {height} pixels"
            raise BadPicture(f"an image of {size} is too oblong for CLIP; crop it to {MOST_OBLONG}:1")
        if self.resize_mode == "squash":
            resized = resize(images, self.size, self.size, self.interpolation)
        else:
            shortest = min(height, width)
            resized = resize(images, self.size * height // shortest, self.size * width // shortest, self.interpolation)
        top, left = (round((side - self.size) / 2) for side in resized.shape[-2:])
        cropped = resized[..., top : top + self.size, left : left + self.size]
        return normalize(cropped / 255, self.mean, self.std)


def resize(images: Tensor, height: int, width: int, interpolation: str = "bicubic") -> Tensor:
    """Pillow's antialiased resize on a batch, bit for bit: rows, then columns, in its whole-number arithmetic.

    Pillow 13 does the columns first where the height shrinks and the width grows, which "squash" alone can ask for.

    Args:
        images: uint8 [B, C, H, W].

    Returns:
        int32 [B, C, height, width] in [0, 255].
    """
    if _is_large(images):
        return _by_channel(images, lambda one: resize(one, height, width, interpolation))
    x = images.int()
    if width != x.shape[-1]:
        x = _resample(x.transpose(-1, -2).contiguous(), width, interpolation).transpose(-1, -2).contiguous()
    if height != x.shape[-2]:
        x = _resample(x, height, interpolation)
    return x


def _resample(x: Tensor, size: int, interpolation: str) -> Tensor:
    """int32 [..., H, W] to [..., size, W]: one pass of weighted sums, rounded to 8 bits."""
    where, weights = (taps.to(x.device) for taps in _taps(x.shape[-2], size, interpolation))
    total = torch.full((*x.shape[:-2], size, x.shape[-1]), 1 << (FRACTION_BITS - 1), dtype=torch.int32, device=x.device)
    for index, weight in zip(where, weights, strict=True):
        total.addcmul_(x.index_select(-2, index), weight[:, None])
    return (total >> FRACTION_BITS).clamp_(0, 255)


@lru_cache(maxsize=64)
def _taps(length: int, size: int, interpolation: str) -> tuple[Tensor, Tensor]:
    """Which of `length` pixels make each of `size`, int64 [taps, size], and their weights, int32 [taps, size].

    The filters are the cubic convolution of Keys 1981 with a = -0.5 and the triangle, stretched when shrinking.
    """
    filter_, reach = FILTERS[interpolation]
    scale = length / size
    stretch = max(scale, 1.0)
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - reach * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + reach * stretch + 0.5).astype(np.int64), length)
    where = first + np.arange((last - first).max())[:, None]
    weights = np.where(where < last, filter_((where - centre + 0.5) / stretch), 0.0)
    fixed = np.rint(weights / weights.sum(0) * (1 << FRACTION_BITS)).astype(np.int32)
    return torch.from_numpy(np.minimum(where, length - 1)), torch.from_numpy(fixed)


def _cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0.0)


FRACTION_BITS = 22
FILTERS = {"bicubic": (_cubic, 2.0), "bilinear": (_triangle, 1.0)}  # and how far they reach


def _is_large(images: Tensor) -> bool:
    return images.numel() > LARGE and len(images.flatten(0, 1)) > 1


def _by_channel(images: Tensor, made: Callable[[Tensor], Tensor]) -> Tensor:
    """`made` of uint8 [B, C, H, W], channel by channel: of a large picture, whose numbers would not fit memory."""
    channels = [made(one[None, None]) for one in images.flatten(0, 1)]
    return torch.cat(channels, 1).unflatten(1, images.shape[:2]).flatten(0, 1)


def normalize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std for each channel of [B, 3, H, W]."""
    shape = (3, 1, 1)
    return (x - x.new_tensor(mean).view(shape)) / x.new_tensor(std).view(shape)


def letterbox(images: Tensor, size: int = 224) -> Tensor:
    """HPSv2's preprocessing, on a batch: the longest side to `size`, black borders, no crop.

    The floating-point image is resized (bicubic, antialiased, not clamped to [0, 1]) and padded in the centre, an odd
    pixel at the right and the bottom, before it is normalised. The published code does not pad an image whose longest
    side is `size` already; if it is not square, its own network refuses the result. Here it is padded too.

    Args:
        images: uint8 [B, 3, H, W].

    Returns:
        float32 [B, 3, size, size].
    """
    longest = max(images.shape[-2:])
    shape = [max(1, round(side * size / longest)) for side in images.shape[-2:]]

    def resized(images: Tensor) -> Tensor:
        x = images.float() / 255
        return x if longest == size else F.interpolate(x, shape, mode="bicubic", antialias=True, align_corners=False)

    x = _by_channel(images, resized) if _is_large(images) else resized(images)
    down, right = (size - side for side in x.shape[-2:])
    x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
    return normalize(x, CLIP_MEAN, CLIP_STD)


def to_unit(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to float32 [B, 3, 64, 64] in [-1, 1], the input of every nano network.

    Pictures of another size are resized (means of areas), without regard to their proportions.
    """
    if _is_large(images):
        return _by_channel(images, to_unit)
    images = images.float()
    if images.shape[-2:] != (NANO_SIZE, NANO_SIZE):
        images = F.interpolate(images, (NANO_SIZE, NANO_SIZE), mode="area")
    return images.div(127.5).sub(1)
