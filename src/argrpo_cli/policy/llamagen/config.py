"""The configurations of a LlamaGen and of its image tokenizer as transformers has them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Self

from transformers import PreTrainedConfig

from argrpo_cli.policy.llamagen.geometry import Geometry, VQGeometry, published_geometry


class LlamaGenConfig(Geometry, PreTrainedConfig):
    """Configuration of `LlamaGenForImageGeneration`: a `Geometry`, and what transformers keeps beside it."""

    def __post_init__(self, **others: Any) -> None:
        Geometry.__post_init__(self)
        PreTrainedConfig.__post_init__(self, **others)

    @classmethod
    def of(cls, geometry: Geometry) -> Self:
        """The same as a configuration."""
        return cls(**{one.name: getattr(geometry, one.name) for one in fields(Geometry)})


class VQConfig(VQGeometry, PreTrainedConfig):
    """Configuration of `VQModel`: a `VQGeometry`, and what transformers keeps beside it."""

    @classmethod
    def of(cls, geometry: VQGeometry) -> Self:
        """The same as a configuration."""
        return cls(**{one.name: getattr(geometry, one.name) for one in fields(VQGeometry)})


def published_config(
    size: str, image_size: int = 256, downsample: int = 16, condition: str = "class"
) -> LlamaGenConfig:
    """Configuration of a published LlamaGen, see `published_geometry`."""
    return LlamaGenConfig.of(published_geometry(size, image_size, downsample, condition))
