"""GenEval's question about colour: the crop of an object that CLIP sees, the texts it is compared with, the answer.

The network is left to the caller: `color_logits(name, crops)` gives an array [crops, 10] for the colours in the order
of COLORS. The official one is OpenAI's CLIP ViT-L/14 (QuickGELU): 100 times the cosine of the image with, for each
colour, the normalised mean of the normalised features of its `color_texts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from argrpo_cli.geneval.grammar import COLORS
from argrpo_cli.geneval.rules import ClassifyColor, Detection

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = (0x99, 0x99, 0x99)  # what CLIP sees where the object is not

ColorLogits = Callable[[str, list[np.ndarray]], np.ndarray]


def color_texts(name: str) -> list[list[str]]:
    """The three texts of each of the ten colours for a class; the article is always "a"."""
    return [[template.format(color=color, name=name) for template in TEMPLATES] for color in COLORS]


def pick_colors(logits: np.ndarray) -> list[str]:
    """The colour of the largest logit in each row; the first one of equals."""
    return [COLORS[column] for column in np.asarray(logits).reshape(-1, len(COLORS)).argmax(1)]


def crop_for_color(
    image: np.ndarray,
    mask: np.ndarray | None,
    box: Sequence[float] | None,
    background: tuple[int, int, int] | None = GREY,
) -> np.ndarray:
    """The picture of one object: `image` (uint8 [H, W, 3]), with `background` outside `mask`, cut to `box`.

    The corners of the box are rounded to whole pixels, halves to even ones; what lies outside the image is black.
    Without a mask or a background the image's own background stays, without a box the image is not cut.
    """
    if mask is not None and background is not None:
        image = np.where(np.asarray(mask, bool)[:, :, None], image, np.array(background, np.uint8))
    if box is None:
        return image
    x0, y0, x1, y1 = (int(corner) for corner in np.rint(np.asarray(box[:4], np.float32)))
    crop = np.zeros((y1 - y0, x1 - x0, 3), np.uint8)
    height, width = image.shape[:2]
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if left < right and top < bottom:
        crop[top - y0 : bottom - y0, left - x0 : right - x0] = image[top:bottom, left:right]
    return crop


def color_classifier(
    image: np.ndarray, masks: Mapping[str, Sequence[np.ndarray]], color_logits: ColorLogits
) -> ClassifyColor:
    """The `classify_color` of one image for `judge_image`; `masks[name][detection.index]` is a detection's mask."""

    def classify(name: str, detections: Sequence[Detection]) -> list[str]:
        crops = [crop_for_color(image, masks[name][found.index], found.box) for found in detections]
        return pick_colors(color_logits(name, crops))

    return classify
