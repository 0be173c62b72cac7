"""aesthetic, LAION's improved aesthetic predictor (repository christophschuhmann/improved-aesthetic-predictor).

A stack of linear layers on CLIP ViT-L/14's image feature, trained on ratings from 1 to 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from argrpo_cli.networks.clip import load_open_clip, load_state
from argrpo_cli.rewards.published import published_file
from argrpo_cli.shapes import Condition

# A copy of the published file, which lies in the repository above, under its name there. SHA-256 of the published one:
# 21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0.
REPOSITORY, CHECKPOINT = "camenduru/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth"
CLIP = ("ViT-L-14-quickgelu", "openai")


class AestheticHead(nn.Module):
    """Unit image features [B, width] to ratings [B]: linear layers without activations, as published.

    The dropout between them is inert when scoring; it only keeps the published numbering of the layers.
    """

    def __init__(self, width: int = 768):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)[:, 0]


class Aesthetic:
    """The rating of an image, mostly between 1 and 10, without bounds.

    Args:
        weights: a local file of the predictor in the place of the published one.
        clip_weights: a local file of OpenAI's ViT-L/14 in open_clip's layout in the place of the published one.
        dtype: float32, bfloat16 or float16, of the CLIP network; the predictor computes in float32.

    Raises:
        UserError: weights that are missing, damaged or of another network.
    """

    def __init__(
        self,
        device: str = "cpu",
        *,
        weights: str | Path | None = None,
        clip_weights: str | Path | None = None,
        dtype: str = "float32",
    ):
        self.head = AestheticHead()
        load_state(self.head, published_file(REPOSITORY, CHECKPOINT, weights))
        self.head.to(device).eval().requires_grad_(False)
        self.clip = load_open_clip(*CLIP, clip_weights, device, dtype)

    @torch.inference_mode()
    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, H, W] to float32 [B]; the conditions are not looked at."""
        return self.head(self.clip.image_features(images))
