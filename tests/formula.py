"""Weights from a formula, so that golden outputs need no stored weights.

For a tensor named N (its published key) of shape S: a PCG64 generator seeded with crc32(N) draws standard
normals n in float32; matrices and larger are n / sqrt(fan_in), biases 0.1 n, other vectors 1 + 0.1 n.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch


def formula_tensor(name: str, shape: Sequence[int]) -> torch.Tensor:
    """The float32 tensor of one published key."""
    if name.endswith("codebook_used"):  # a usage counter
        return torch.zeros(*shape)
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    normal = generator.standard_normal(tuple(shape), dtype=np.float32)
    if len(shape) >= 2:
        value = normal * np.float32(1 / math.sqrt(math.prod(shape[1:])))
    elif name.endswith(".bias"):
        value = np.float32(0.1) * normal
    else:
        value = np.float32(1) + np.float32(0.1) * normal
    return torch.from_numpy(value)


def formula_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """A whole state dict from {published key: shape}."""
    return {name: formula_tensor(name, shape) for name, shape in shapes.items()}
