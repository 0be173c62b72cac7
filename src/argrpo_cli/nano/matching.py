"""How well does a picture match a rendering of its class? The judge's first question, answered by search alone.

The world's renderings are an object (colour c, alpha A) at some size, place, mirror image and hue on a plain background
B. For a picture J the squared error of a rendering is

    |J - B - A (c - B)|^2 = |D|^2 - 2 <D, P - A B> + |P - A B|^2,    D = J - B,  P = A c,

so all places follow from correlations of D with P and A (by Fourier transform), and all hues from three of them, since
a hue turn is a circulant matrix on the colour channels. Every size, place, mirror image and hue of `scenes.py` is thus
tried, though with the background taken from the border and colours that a hue turn pushes out of [0, 1] left there. The
best few are then rendered exactly, clipped and with the background fitted to each, and the best of those is the match:
a rendering that only the exact error would place first is missed when it is not among them.

The error is divided by the area of the object, not of the picture: plain background is easy, and small objects must not
win by having more of it. match = -10 log10(squared error per object pixel and channel), in dB, colours in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from argrpo_cli.nano.scenes import HUES, IMAGE_SIZE, SINGLE_SIZES, hue_matrix

SIZES = tuple(range(SINGLE_SIZES[0], SINGLE_SIZES[1] + 1))
REACH = IMAGE_SIZE - SIZES[0] + 1  # places along an axis of the smallest object
AT_ONCE = 8
CANDIDATES = 16  # renderings of each picture that the search hands to the exact error
FLOOR = 1e-6  # squared error below which a match is perfect (60 dB)


class Match(NamedTuple):
    """The best rendering of each picture, tensors [B].

    db: the match; size, x, y, mirror and hue (degrees): where it was found.
    """

    db: Tensor
    size: Tensor
    x: Tensor
    y: Tensor
    mirror: Tensor
    hue: Tensor


@dataclass
class Template:
    """An object at its largest size: colour times alpha [3, S, S] and alpha [1, S, S], in [0, 1]."""

    colour: Tensor
    alpha: Tensor

    def placed(self, size: int, mirror: bool, hue: float = 0.0) -> tuple[Tensor, Tensor]:
        """Colour times alpha [3, size, size] and alpha [1, size, size], resized, mirrored and with the hue turned
        as `scenes.object_pixels` does (colours clipped to [0, 1])."""
        both = resized(torch.cat([self.colour, self.alpha]), size)
        both = both.flip(-1) if mirror else both
        colour, alpha = both[:3], both[3:]
        if hue:
            pure = torch.where(alpha > 1e-3, colour / alpha.clamp(min=1e-3), 0.0).clamp(0, 1)
            turned = torch.einsum("ij,jhw->ihw", torch.from_numpy(hue_matrix(hue)), pure)
            colour = turned.clamp(0, 1) * alpha
        return colour, alpha


def resized(planes: Tensor, size: int) -> Tensor:
    """[C, S, S] to [C, size, size], averaged as PIL's bilinear filter does."""
    if planes.shape[-1] == size:
        return planes
    return F.interpolate(planes[None], (size, size), mode="bilinear", antialias=True)[0].clamp(0, 1)


def border_colour(images: Tensor) -> Tensor:
    """Median colour [B, 3] of the outermost pixels of float [B, 3, H, W]: the background, unless edges are covered."""
    inner = torch.zeros(images.shape[-2:], dtype=torch.bool)
    inner[2:-2, 2:-2] = True
    return images[:, :, ~inner].median(-1).values


class Matcher:
    """Searches all renderings of one class."""

    def __init__(self, template: Template, sizes: Sequence[int] = SIZES, hues: Sequence[float] = HUES):
        self.template, self.sizes, self.hues = template, tuple(sizes), tuple(hues)
        self.views = [(size, mirror) for size in self.sizes for mirror in (False, True)]
        planes = torch.zeros(len(self.views), 4, IMAGE_SIZE, IMAGE_SIZE)
        for index, (size, mirror) in enumerate(self.views):
            planes[index, :, :size, :size] = torch.cat(template.placed(size, mirror))
        colour, alpha = planes[:, :3], planes[:, 3]
        self.spectrum = torch.fft.rfft2(planes).conj()  # [V, 4, 64, 33]
        self.colour_energy = colour.square().sum((1, 2, 3))  # the same for every hue: turns keep lengths
        self.alpha_energy = alpha.square().sum((1, 2))
        matrices = torch.from_numpy(np.stack([hue_matrix(hue) for hue in self.hues]))  # [K, 3, 3]
        self.turns = matrices[:, 0]  # a hue turn is circulant: its first row describes it
        shared = (colour * alpha[:, None]).sum((2, 3))  # [V, 3]
        self.shared = torch.einsum("kij,vj->vki", matrices, shared)  # sum of A P for each view and hue
        room = torch.tensor([IMAGE_SIZE - size for size, _ in self.views])
        over = torch.arange(REACH) > room[:, None]
        self.outside = over[:, :, None] | over[:, None, :]  # [V, y, x]

    def errors(self, images: Tensor, background: Tensor) -> Tensor:
        """Squared error of every rendering (before colours are clipped): float [B, V, K, y, x] for float images
        [B, 3, 64, 64] and backgrounds [B, 3] in [0, 1]; infinite where the object would not fit."""
        difference = images - background[:, :, None, None]
        spectrum = torch.fft.rfft2(difference)
        turned = []
        for shift in range(3):  # <D_i, P_(i + shift)>, the parts of a circulant product
            product = sum(spectrum[:, None, i] * self.spectrum[None, :, (i + shift) % 3] for i in range(3))
            turned.append(torch.fft.irfft2(product)[..., :REACH, :REACH])
        toned = (spectrum * background[:, :, None, None]).sum(1)
        covered = torch.fft.irfft2(toned[:, None] * self.spectrum[None, :, 3])[..., :REACH, :REACH]
        correlation = torch.einsum("kn,bvnyx->bvkyx", self.turns, torch.stack(turned, 2)) - covered[:, :, None]
        energy = (
            self.colour_energy[None, :, None]
            - 2 * torch.einsum("vki,bi->bvk", self.shared, background)
            + self.alpha_energy[None, :, None] * background.square().sum(1)[:, None, None]
        )
        total = difference.square().sum((1, 2, 3))[:, None, None, None, None]
        errors = total - 2 * correlation + energy[..., None, None]
        return errors.masked_fill(self.outside[None, :, None], torch.inf)

    @torch.inference_mode()
    def match(self, images: Tensor) -> Match:
        """The best rendering of each uint8 [B, 3, 64, 64]."""
        parts = [self._match(chunk.float() / 255) for chunk in images.split(AT_ONCE)]
        return Match(*map(torch.cat, zip(*parts, strict=True)))

    def _match(self, images: Tensor) -> Match:
        errors = self.errors(images, border_colour(images))
        best = errors.flatten(1).topk(min(CANDIDATES, errors[0].numel()), largest=False).indices
        matches = [
            min(self._exact(image, *place) for place in zip(*np.unravel_index(row, errors.shape[1:]), strict=True))
            for image, row in zip(images, best.numpy(), strict=True)
        ]
        error, area, *where = (torch.tensor(column) for column in zip(*matches, strict=True))
        return Match(-10 * torch.log10((error / (3 * area)).clamp(min=FLOOR)), *where)

    def _exact(self, image: Tensor, view: int, hue: int, y: int, x: int) -> tuple[float, ...]:
        """Error, area, size, x, y, mirror and hue of one rendering: least is best."""
        (size, mirror), degrees = self.views[view], self.hues[hue]
        error, area = exact_error(image, *self.template.placed(size, mirror, degrees), int(y), int(x))
        return error, area, size, int(x), int(y), mirror, degrees


def exact_error(image: Tensor, colour: Tensor, alpha: Tensor, y: int, x: int) -> tuple[float, float]:
    """Squared error [sum over pixels and channels] of a rendering with the best background for it, and the object's
    area in pixels. image float [3, 64, 64]; colour (times alpha) and alpha of the object, its corner at (y, x)."""
    size = colour.shape[-1]
    full = torch.zeros(4, *image.shape[1:])
    full[:, y : y + size, x : x + size] = torch.cat([colour, alpha])
    free = 1 - full[3:]
    background = ((image - full[:3]) * free).sum((1, 2)) / free.square().sum()
    error = (image - full[:3] - free * background[:, None, None]).square().sum()
    return error.item(), alpha.sum().item()


def match_classes(matchers: dict[int, Matcher], images: Tensor, class_ids: Tensor) -> Match:
    """The best rendering of each picture's own class; uint8 [B, 3, 64, 64] and int64 [B]."""
    parts = [matchers[one].match(images[class_ids == one]) for one in class_ids.unique().tolist()]  # in ascending order
    back = torch.argsort(torch.argsort(class_ids, stable=True))
    return Match(*(torch.cat(values)[back] for values in zip(*parts, strict=True)))
