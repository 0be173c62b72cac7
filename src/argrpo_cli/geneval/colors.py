"""GenEval's question about colour: the crop of an object that CLIP sees, the texts it is compared with, the answer.

    colors = ClipColors(load_color_clip("cuda"))
    colors.classify(["car", "dog"], [crop_of_a_car, crop_of_a_dog])      # ["red", "black"]

OpenAI's CLIP ViT-L/14 looks at the crop. The class feature of a colour is the normalised mean of the normalised
features of its three texts (`color_texts`), as in clip_benchmark's zero-shot classifier; the answer is the colour of
the largest cosine. Computed in float32, where the benchmark has half precision. Weights: open_clip's
`ViT-L-14-quickgelu`, `openai` (under the name `ViT-L-14` open_clip 3 builds another activation for them).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from argrpo_cli.geneval.grammar import COLORS

if TYPE_CHECKING:
    from argrpo_cli.networks.clip import ClipModel

MODEL, PRETRAINED = "ViT-L-14-quickgelu", "openai"
LOGIT_SCALE = 100.0

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = (0x99, 0x99, 0x99)  # what CLIP sees where the object is not


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


class ClipColors:
    """Which of GenEval's ten colours have these objects? Their crops may be of any sizes.

    Args:
        batch_size: crops in the network at a time.
    """

    def __init__(self, clip: ClipModel, batch_size: int = 64):
        import open_clip

        self.clip, self.batch_size = clip, batch_size
        pixels = clip.prepare
        self.transform = open_clip.image_transform(
            pixels.size, is_train=False, mean=tuple(pixels.mean), std=tuple(pixels.std), resize_mode=pixels.resize_mode
        )
        self._classes: dict[str, Tensor] = {}

    def classify(self, names: Sequence[str], crops: Sequence[np.ndarray]) -> list[str]:
        """The colours of objects of classes `names` on their `crops`, uint8 [H, W, 3] as `crop_for_color` cuts them."""
        return pick_colors(self.logits(names, crops).cpu().numpy())

    @torch.inference_mode()
    def logits(self, names: Sequence[str], crops: Sequence[np.ndarray]) -> Tensor:
        """float32 [crops, 10], on the device of the network: 100 times the cosines, in the order of COLORS."""
        rows = [torch.zeros(0, len(COLORS), device=self.clip.device)]
        for start in range(0, len(crops), self.batch_size):
            part = slice(start, start + self.batch_size)
            pixels = torch.stack([self.transform(Image.fromarray(crop)) for crop in crops[part]])
            pixels = pixels.to(self.clip.device, self.clip.dtype)
            images = F.normalize(self.clip.network.encode_image(pixels).float(), dim=-1)
            classes = torch.stack([self._class_features(name) for name in names[part]])
            rows.append(LOGIT_SCALE * torch.einsum("bd,bcd->bc", images, classes))
        return torch.cat(rows)

    def _class_features(self, name: str) -> Tensor:
        """float32 [10, D], a unit vector for each colour of a class."""
        if name not in self._classes:
            texts = color_texts(name)
            features = self.clip.text_features([text for row in texts for text in row])
            self._classes[name] = F.normalize(features.unflatten(0, (len(texts), -1)).mean(1), dim=-1)
        return self._classes[name]


def load_color_clip(device: str = "cpu", weights: str | Path | None = None) -> ClipModel:
    """The published network, from a local file in open_clip's layout or fetched once; UserError when it cannot be."""
    from argrpo_cli.networks.clip import load_open_clip

    return load_open_clip(MODEL, PRETRAINED, weights, device)
