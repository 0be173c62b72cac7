"""hpsv2, the human preference score v2.0 and v2.1 (Wu et al. 2023, arXiv 2306.09341; repository tgxs002/HPSv2).

A CLIP ViT-H-14 trained on which of two images people prefer for a prompt. The published checkpoints have open_clip's
names and shapes, so they run in open_clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argrpo_cli.networks.clip import (
    ClipModel,
    build_open_clip,
    check_dtype,
    load_state,
    tokenizer_of,
    uninitialized,
)
from argrpo_cli.networks.pixels import normalize
from argrpo_cli.rewards.published import published_file
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError, did_you_mean

REPOSITORY = "xswu/HPSv2"
CHECKPOINTS = {"2.1": "HPS_v2.1_compressed.pt", "2.0": "HPS_v2_compressed.pt"}
ARCHITECTURE = "ViT-H-14"


def build_hpsv2() -> nn.Module:
    """open_clip's ViT-H-14 (GELU), at random."""
    return build_open_clip(open_clip.get_model_config(ARCHITECTURE))


def preprocess(images: Tensor, size: int = 224) -> Tensor:
    """The published preprocessing, on a batch: the longest side to `size`, black borders, no crop.

    The floating-point image is resized (bicubic, antialiased, not clamped to [0, 1]) and padded in the centre, an odd
    pixel at the right and the bottom, before it is normalised. The published code does not pad an image whose longest
    side is `size` already; if it is not square, its own network refuses the result. Here it is padded too.

    Args:
        images: uint8 [B, 3, H, W].

    Returns:
        float32 [B, 3, size, size].
    """
    x = images.float() / 255
    longest = max(x.shape[-2:])
    if longest != size:
        shape = [max(1, round(side * size / longest)) for side in x.shape[-2:]]
        x = F.interpolate(x, shape, mode="bicubic", antialias=True, align_corners=False)
    down, right = (size - side for side in x.shape[-2:])
    x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
    return normalize(x, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


class HPSv2:
    """Cosine similarity of unit features, as `hpsv2.score` returns it: no logit scale, no factor.

    The published code runs under float16 autocast and so rounds its scores to steps of 0.00024; float32 does not.

    Args:
        version: "2.1" or "2.0", which published checkpoint.
        weights: a local file in its place.
        dtype: float32, bfloat16 or float16, of the network.

    Raises:
        UserError: an unknown version, weights that are missing, damaged or of another network.
    """

    def __init__(
        self,
        device: str = "cpu",
        *,
        version: str | float = "2.1",
        weights: str | Path | None = None,
        dtype: str = "float32",
    ):
        version = str(version)  # YAML reads 2.0 as a number
        if version not in CHECKPOINTS:
            hint = did_you_mean(version, CHECKPOINTS)
            raise UserError(f"hpsv2 has no version {version!r}; there are {', '.join(CHECKPOINTS)}{hint}")
        check_dtype(dtype)
        path = published_file(REPOSITORY, CHECKPOINTS[version], weights)
        with uninitialized():
            network = build_hpsv2()
        load_state(network, path)
        config = open_clip.get_model_config(ARCHITECTURE)
        prepare = partial(preprocess, size=config["vision_cfg"]["image_size"])
        self.clip = ClipModel(network, tokenizer_of(config["text_cfg"]), prepare, device, dtype)

    @torch.inference_mode()
    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, H, W] and B conditions to float32 [B]."""
        return self.clip.cosine(images, [condition.prompt for condition in conditions])
