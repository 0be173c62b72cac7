"""Two-dimensional rotary embedding: half of a head's pairs rotate by the token's row, half by its column."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def rope_table(
    grid_size: int,
    head_dim: int,
    cls_token_num: int,
    theta: float = 10000.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Cosines and sines for the condition tokens and then the image tokens in row-major order.

    Pair j of the first half turns by row * theta^(-2j / (head_dim / 2)), pair j of the second half by the
    column. The rows of the condition tokens are zero, cosine and sine alike: this is what LlamaGen was
    trained with, and it makes their queries and keys vanish (cos = 1 there changes logits by more than 2).

    Returns:
        float32 [cls_token_num + grid_size^2, head_dim / 2, 2], last axis (cos, sin). Cached: leave it be.
    """
    # The table outlives the call: made inside a sampler's inference mode, it could not be trained with later.
    with torch.inference_mode(False):
        half = head_dim // 2
        frequencies = 1.0 / theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
        angles = torch.outer(torch.arange(grid_size, dtype=torch.float32), frequencies)
        by_row = angles[:, None, :].expand(grid_size, grid_size, -1)
        by_column = angles[None, :, :].expand(grid_size, grid_size, -1)
        angles = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
        table = torch.stack([angles.cos(), angles.sin()], dim=-1)
        return torch.cat([torch.zeros(cls_token_num, *table.shape[1:]), table]).to(device)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate neighbouring pairs (0, 1), (2, 3), ... of the last axis in float32; the result has x's dtype.

    Args:
        x: [B, S, heads, head_dim].
        table: float32 [S, head_dim / 2, 2], the rows of `rope_table` at x's positions.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(table)[:, None]).flatten(-2).to(x.dtype)
