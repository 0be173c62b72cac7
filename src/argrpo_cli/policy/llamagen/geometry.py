"""The geometry of a LlamaGen and of its image tokenizer, and the published sizes; nothing of transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Interval, Len

Count = Annotated[int, Ge(1)]
Share = Annotated[float, Interval(ge=0, le=1)]
Levels = Annotated[list[Count] | tuple[Count, ...], Len(1, 12)]
Epsilon = Annotated[float, Interval(gt=0, lt=0.1)]  # of a norm
CONDITIONS = ("class", "caption")

# Published geometries: width, layers, heads. All use a vocabulary of 16384 codes.
SIZES: dict[str, dict[str, int]] = {
    "B": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "L": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "XL": {"hidden_size": 1280, "num_hidden_layers": 36, "num_attention_heads": 20},
    "XXL": {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24},
    "3B": {"hidden_size": 3200, "num_hidden_layers": 24, "num_attention_heads": 32},
}


def swiglu_size(hidden_size: int, multiple_of: int = 256) -> int:
    """Width of the feed-forward layer: two thirds of 4 * hidden_size, rounded up to `multiple_of`."""
    return math.ceil(int(2 * 4 * hidden_size / 3) / multiple_of) * multiple_of


@dataclass(kw_only=True)
class Geometry:
    """Of a LlamaGen.

    Args:
        block_size: image tokens per image, a square number (rows and columns of the token grid).
        cls_token_num: condition tokens before the image tokens; 1 for a class.
        condition: "class" (an embedding table of `num_classes` rows and one null row) or "caption"
            (text features of width `caption_dim` through a two-layer MLP).
        num_key_value_heads: None means one per attention head.
        intermediate_size: None means the SwiGLU rule, `swiglu_size(hidden_size)`.
        class_dropout_prob: share of conditions the policy was pre-trained without. Kept for the record;
            the network itself never drops anything.
    """

    model_type = "llamagen"
    vocab_size: Count = 16384
    hidden_size: Count = 768
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    num_key_value_heads: Count | None = None
    intermediate_size: Count | None = None
    block_size: Count = 256
    cls_token_num: Count = 1
    condition: str = "class"
    num_classes: Count = 1000
    caption_dim: Count = 2048
    rope_theta: Annotated[float, Interval(ge=1, le=1e9)] = 10000.0
    rms_norm_eps: Epsilon = 1e-5
    initializer_range: Annotated[float, Ge(0)] = 0.02
    class_dropout_prob: Share = 0.0
    tie_word_embeddings: Literal[False] = False  # the embedding and the head are separate matrices
    auto_map: dict[str, str] = field(default_factory=dict)  # TRL reads it of any custom model

    def __post_init__(self) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.intermediate_size = self.intermediate_size or swiglu_size(self.hidden_size)
        self._check()

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def grid_size(self) -> int:
        """Rows (and columns) of the square token grid."""
        return math.isqrt(self.block_size)

    def _check(self) -> None:
        if self.condition not in CONDITIONS:
            raise ValueError(f"condition is {self.condition!r}; it must be one of {', '.join(CONDITIONS)}")
        if self.condition == "class" and self.cls_token_num != 1:
            raise ValueError(f"cls_token_num is {self.cls_token_num}; a class takes exactly 1 token")
        if self.grid_size**2 != self.block_size:
            raise ValueError(f"block_size is {self.block_size}; a square token grid needs a square number")
        if self.hidden_size % self.num_attention_heads or self.head_dim % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} over {self.num_attention_heads} heads: the head width must "
                "be a multiple of 4 (half of its pairs rotate by row, half by column)"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )


@dataclass(kw_only=True)
class VQGeometry:
    """Of the image tokenizer; the defaults are VQ-16 as published.

    `codebook_size` codes of width `codebook_embed_dim`; `ch` base channels times the multiplier of each level; the
    downsampling factor is patch_size * 2 ** (levels - 1).
    """

    model_type = "llamagen_vq"
    codebook_size: Count = 16384
    codebook_embed_dim: Count = 8
    in_channels: Count = 3
    ch: Count = 128
    encoder_ch_mult: Levels = (1, 1, 2, 2, 4)
    decoder_ch_mult: Levels = (1, 1, 2, 2, 4)
    num_res_blocks: Count = 2
    z_channels: Count = 256
    patch_size: Count = 1

    @property
    def downsample(self) -> int:
        return self.patch_size * 2 ** (len(self.encoder_ch_mult) - 1)


def published_geometry(size: str, image_size: int = 256, downsample: int = 16, condition: str = "class") -> Geometry:
    """Of a published LlamaGen: `size` from `SIZES`, T = (image_size / downsample)^2 tokens.

    Raises:
        ValueError: unknown size, or an image size that the tokenizer cannot divide.
    """
    if size not in SIZES:
        raise ValueError(f"unknown LlamaGen size {size!r}; published sizes: {', '.join(SIZES)}")
    if image_size % downsample:
        raise ValueError(f"image size {image_size} is not a multiple of {downsample}, the downsampling")
    return Geometry(
        **SIZES[size],
        block_size=(image_size // downsample) ** 2,
        cls_token_num=1 if condition == "class" else 120,
        condition=condition,
        class_dropout_prob=0.1,
    )
