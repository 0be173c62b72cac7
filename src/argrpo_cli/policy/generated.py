"""What `policy.generate` gives: images, and all that others ask of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from argrpo_cli.shapes import Condition


@dataclass(frozen=True)
class Generated:
    """B images, condition by condition, each condition's in the order of their seeds.

    Attributes:
        images: uint8 [B, 3, H, W] on the policy's device, as rewards take them.
        tokens: int64 [B, T], what the images were decoded from.
        conditions: B, what each shows.
        seeds: B, of each image's noise; with its condition it is that image again.
    """

    images: Tensor
    tokens: Tensor
    conditions: Sequence[Condition]
    seeds: Sequence[int]

    def __len__(self) -> int:
        return len(self.images)

    def pil(self) -> list[Image.Image]:
        """As pictures of Pillow."""
        from argrpo_cli.system.files import to_pil

        return to_pil(self.images)

    def grid(self, columns: int = 8, scale: int = 1) -> Image.Image:
        """All in one picture, `columns` to a row, each pixel `scale` pixels wide."""
        from argrpo_cli.system.grids import image_grid

        return image_grid(self.images, min(columns, len(self)), scale=scale)
