"""Geometry of a VAR policy, and the published sizes."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Annotated, Any, Literal

from annotated_types import Interval, Len
from transformers import PreTrainedConfig

from argrpo_cli.policy.llamagen.geometry import Count, Epsilon, Share

# Tokens a side of every scale, by pixels a side; the tokenizer divides these by 16.
SCALES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}
Side = Annotated[int, Interval(ge=1, le=512)]  # of a scale, in tokens
HEAD_DIM = 64  # published: d layers of d heads of this width
MAX_SCALE = math.log(100)  # of the learnt sharpness of cosine attention
NOT_IN_SHAPES = ("num_attention_heads", "scales", "phi_ratio", "cosine_attention", "norm_eps")


Scales = Annotated[list[Side] | tuple[Side, ...], Len(2, 64)]


class VARConfig(PreTrainedConfig):
    """Configuration of `VARForImageGeneration`; the defaults are those of VAR-d16.

    Args:
        scales: tokens a side of every scale, K in all, rising; the last one is the tokenizer's grid.
        vocab_size, code_dim: codes of the tokenizer and their width.
        phis, phi_ratio: convolutions of the residual quantisation, which the scales share, and how much of one counts.
        shared_modulation: one linear layer makes the scales, shifts and gates of all blocks, each block adds its own
            vectors (VAR-d36 at 512 pixels); otherwise each block has a layer.
        cosine_attention: queries and keys have unit length, and a learnt sharpness a head (attn_l2_norm as published).
        class_dropout_prob: share of conditions the policy was pre-trained without. Kept for the record.
    """

    model_type = "var"
    vocab_size: Count = 4096
    code_dim: Count = 32
    hidden_size: Count = 1024
    num_hidden_layers: Count = 16
    num_attention_heads: Count = 16
    intermediate_size: Count | None = None  # None is four times the width
    num_classes: Count = 1000
    scales: Scales = SCALES[256]
    phis: Count = 4
    phi_ratio: Share = 0.5
    shared_modulation: bool = False
    cosine_attention: bool = True
    norm_eps: Epsilon = 1e-6
    class_dropout_prob: Share = 0.1
    tie_word_embeddings: Literal[False] = False
    auto_map: dict[str, str] = field(default_factory=dict)  # TRL reads it of any custom model

    def __post_init__(self, **others: Any) -> None:
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.scales = list(self.scales)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        if len(self.scales) < 2 or self.scales[0] < 1 or sorted(set(self.scales)) != self.scales:
            raise ValueError(f"scales are {self.scales}; they must be two or more whole numbers, rising")
        super().__post_init__(**others)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(side**2 for side in self.scales)

    @property
    def block_size(self) -> int:
        """T, tokens of an image: 680 at 256 pixels, 2,240 at 512."""
        return sum(self.counts)

    @property
    def spans(self) -> list[slice]:
        """Where the tokens of each scale lie in an image's."""
        ends = [sum(self.counts[: k + 1]) for k in range(len(self.scales))]
        return [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]


def published_config(depth: int, image_size: int = 256) -> VARConfig:
    """Configuration of the published VAR of so many layers: its width is 64 times that.

    The published scripts build every size with cosine attention, and the one at 512 pixels with shared modulation.

    Raises:
        ValueError: an image size that no VAR was published for.
    """
    if image_size not in SCALES:
        raise ValueError(f"no VAR draws {image_size} pixels; published are {', '.join(map(str, SCALES))}")
    return VARConfig(
        hidden_size=HEAD_DIM * depth,
        num_hidden_layers=depth,
        num_attention_heads=depth,
        scales=SCALES[image_size],
        shared_modulation=image_size == 512,
    )
