"""GenEval's answer to its question about colour: OpenAI's CLIP ViT-L/14 looks at the crop of an object.

    colors = ClipColors(load_color_clip("cuda"))
    colors.classify(["car", "dog"], [crop_of_a_car, crop_of_a_dog])      # ["red", "black"]

The class feature of a colour is the normalised mean of the normalised features of its three texts (`color_texts`), as
in clip_benchmark's zero-shot classifier; the answer is the colour of the largest cosine. Computed in float32, where the
benchmark has half precision. Weights: open_clip's `ViT-L-14-quickgelu`, `openai` (under the name `ViT-L-14` open_clip 3
builds another activation for them).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from argrpo_cli.geneval.colors import color_texts, pick_colors
from argrpo_cli.geneval.grammar import COLORS
from argrpo_cli.networks.clip import ClipModel, load_open_clip

MODEL, PRETRAINED = "ViT-L-14-quickgelu", "openai"
LOGIT_SCALE = 100.0


class ClipColors:
    """Which of GenEval's ten colours have these objects? Their crops may be of any sizes.

    Args:
        batch_size: crops in the network at a time.
    """

    def __init__(self, clip: ClipModel, batch_size: int = 64):
        self.clip, self.batch_size = clip, batch_size
        pixels = clip.prepare
        self.transform = open_clip.image_transform(
            pixels.size, is_train=False, mean=tuple(pixels.mean), std=tuple(pixels.std), resize_mode=pixels.resize_mode
        )
        self._classes: dict[str, Tensor] = {}

    def classify(self, names: Sequence[str], crops: Sequence[np.ndarray]) -> list[str]:
        """The colours of objects of classes `names` on their `crops`, uint8 [H, W, 3] as `crop_for_color` cuts them."""
        return pick_colors(self.logits(names, crops).cpu().numpy())

    def color_logits(self, name: str, crops: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [crops, 10] for objects of one class, as `color_classifier` asks for them."""
        return self.logits([name] * len(crops), crops).cpu().numpy()

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
    return load_open_clip(MODEL, PRETRAINED, weights, device)
