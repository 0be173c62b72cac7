"""clip, the conditional reward and metric: cosine similarity of image and prompt in CLIP's space.

The published code takes openai/clip-vit-base-patch32 and multiplies by 5 in training; here the similarity is raw.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from torch import Tensor

from argrpo_cli.networks.clip import HUB_PREFIX, load_open_clip, load_transformers_clip
from argrpo_cli.shapes import Condition


class Clip:
    """Cosine similarity of unit features (Radford et al. 2021, section 2.3), in [-1, 1], without factor.

    Args:
        model: a model of open_clip (`ViT-L-14`, also `ViT-L/14`; `hf-hub:owner/name` for one in its layout on the
            hub), or, with a slash, a CLIP of transformers (`openai/clip-vit-large-patch14`) or a folder with one.
        pretrained: which of open_clip's weights; its activation (GELU or QuickGELU) follows the weights.
        weights: a local file in the place of the published one.
        dtype: float32, bfloat16 or float16, of the network.

    Raises:
        UserError: an unknown name, weights that are missing, damaged or of another network.
    """

    def __init__(
        self,
        device: str = "cpu",
        *,
        model: str = "ViT-B-32-quickgelu",
        pretrained: str = "openai",
        weights: str | Path | None = None,
        dtype: str = "float32",
    ):
        dashed = model.replace("/", "-")  # OpenAI's own names have a slash
        if dashed in open_clip.list_models():
            model = dashed
        if "/" in model and not model.startswith(HUB_PREFIX):
            self.clip = load_transformers_clip(model, weights, device, dtype)
        else:
            self.clip = load_open_clip(model, pretrained, weights, device, dtype)

    @torch.inference_mode()
    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, H, W] and B conditions to float32 [B]."""
        return self.clip.cosine(images, [condition.prompt for condition in conditions])
