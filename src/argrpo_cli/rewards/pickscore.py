"""pickscore, PickScore v1 (Kirstain et al. 2023, arXiv 2305.01569; repository yuvalkirstain/PickScore).

A CLIP ViT-H-14, in transformers' layout, trained on which of two images people picked for a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from argrpo_cli.networks.clip import (
    TRANSFORMERS_FILES,
    TransformersClip,
    check_dtype,
    transformers_clip,
)
from argrpo_cli.rewards.published import published_file
from argrpo_cli.shapes import Condition

REPOSITORY = "yuvalkirstain/PickScore_v1"
CONFIG = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
}


def build_pickscore() -> TransformersClip:
    """transformers' CLIP ViT-H-14 (GELU), at random."""
    return TransformersClip(CONFIG)


class PickScore:
    """exp(logit scale) times the cosine similarity, the logit that the published example computes.

    AR-GRPO's tables divide it by 26; here it is raw.

    Args:
        weights: a local file in the place of the published one.
        dtype: float32, bfloat16 or float16, of the network.

    Raises:
        UserError: weights that are missing, damaged or of another network.
    """

    def __init__(self, device: str = "cpu", *, weights: str | Path | None = None, dtype: str = "float32"):
        check_dtype(dtype)
        path = published_file(REPOSITORY, TRANSFORMERS_FILES, weights)
        self.clip = transformers_clip(CONFIG, path, device, dtype)

    @torch.inference_mode()
    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, H, W] and B conditions to float32 [B]."""
        scale = self.clip.network.clip.logit_scale.float().exp()
        return scale * self.clip.cosine(images, [condition.prompt for condition in conditions])
