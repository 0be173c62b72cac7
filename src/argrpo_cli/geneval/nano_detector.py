"""The detector of the nano world: which objects does a picture show, where, and in which colour?

A centre-point detector (Zhou et al. 2019): for each cell of a 16x16 grid the probability that it is the centre of an
object of each class, the distances from it to the sides of the box, and the colour. It was trained on rendered scenes
(`nano/make/judges.py`) and knows nothing of any policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argrpo_cli.geneval.prompts import NANO_COLORS, NANO_OBJECTS
from argrpo_cli.geneval.rules import ClassifyColor, Detection, Thresholds
from argrpo_cli.networks.pixels import to_unit
from argrpo_cli.networks.weights import load_network
from argrpo_cli.system.files import WEIGHTS

STRIDE = 4
LEAST_SCORE = 0.05  # what is less likely is not reported at all
# GenEval's settings but for counting: a score of 0.9 is Mask2Former's idea of certainty, not this detector's.
NANO_THRESHOLDS = Thresholds(counting_threshold=0.4)
MOST = 40  # objects reported of one picture


@dataclass(frozen=True)
class Found:
    """One object: class name, box (x0, y0, x1, y1) in pixels, probability, the likeliest colour, and that of each."""

    name: str
    box: tuple[float, float, float, float]
    score: float
    color: str | None
    colors: tuple[float, ...] = ()


class Residual(nn.Module):
    """Two 3x3 convolutions with a dilation, added to their input."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        conv = partial(nn.Conv2d, width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.body = nn.Sequential(conv(), nn.BatchNorm2d(width), nn.LeakyReLU(0.1), conv(), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + self.body(x), 0.1)


class DetectorNet(nn.Module):
    """64x64 pixels to maps of 16x16 cells; dilated convolutions let a cell see the whole picture."""

    def __init__(self, width: int = 80, dilations: Sequence[int] = (1, 2, 4, 1), classes: int = 24, colors: int = 8):
        super().__init__()
        self.classes, self.colors = classes, colors
        self.body = nn.Sequential(
            nn.Conv2d(3, width // 2, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.1),
            *(Residual(width, dilation) for dilation in dilations),
        )
        self.head = nn.Conv2d(width, classes + 4 + colors, 1)
        nn.init.constant_(self.head.bias[:classes], -4.0)  # hardly any cell is a centre

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, 3, 64, 64] in [-1, 1] to centre logits [B, C, 16, 16], distances to left, top, right, bottom in
        pixels [B, 4, 16, 16] and colour logits [B, K, 16, 16]."""
        centres, sides, colors = self.head(self.body(x)).float().split((self.classes, 4, self.colors), dim=1)
        return centres, F.softplus(sides) * STRIDE, colors


@dataclass
class Detector:
    """A DetectorNet in evaluation mode, on a device, for uint8 images."""

    network: DetectorNet
    device: str = "cpu"

    @torch.inference_mode()
    def detect(self, images: Tensor, batch_size: int = 64) -> list[list[Found]]:
        """uint8 [B, 3, H, W], seen at 64x64, to the objects of each, the likeliest first; boxes in those pixels."""
        found = []
        for chunk in images.split(batch_size):
            maps = self.network(to_unit(chunk.to(self.device)))
            found += decode_maps(*(one.cpu() for one in maps))
        return found


def decode_maps(centres: Tensor, sides: Tensor, colors: Tensor) -> list[list[Found]]:
    """The maps of `DetectorNet` to objects: cells that are likelier centres of a class than their eight neighbours."""
    score = centres.sigmoid()
    peak = score == F.max_pool2d(score, 3, stride=1, padding=1)
    result = []
    for index in range(len(score)):
        scores, at = torch.where(peak[index], score[index], 0.0).flatten().topk(MOST)
        cells = score.shape[2] * score.shape[3]
        objects = []
        for value, place in zip(scores.tolist(), at.tolist(), strict=True):
            if value < LEAST_SCORE:
                break
            row, column = divmod(place % cells, score.shape[3])
            x, y = (column + 0.5) * STRIDE, (row + 0.5) * STRIDE
            left, top, right, bottom = sides[index, :, row, column].tolist()
            shares = colors[index, :, row, column].softmax(0)
            color = NANO_COLORS[shares.argmax()]
            box = (max(0.0, x - left), max(0.0, y - top), min(64.0, x + right), min(64.0, y + bottom))
            objects.append(Found(NANO_OBJECTS[place // cells], box, value, color, tuple(shares.tolist())))
        result.append(objects)
    return result


def observation(objects: Sequence[Found]) -> tuple[dict[str, list[Detection]], ClassifyColor]:
    """What was found in one image as GenEval's rules read it, and the detector's own word for the colours."""
    detections: dict[str, list[Detection]] = {}
    for index, one in enumerate(objects):
        detections.setdefault(one.name, []).append(Detection(one.box, one.score, index))
    return detections, lambda name, some: [objects[detection.index].color for detection in some]


def load_detector(folder: str | Path = WEIGHTS / "nano-detector", device: str = "cpu") -> Detector:
    """The bundled detector; UserError when its files are missing."""
    return Detector(load_network(DetectorNet, folder), device)
