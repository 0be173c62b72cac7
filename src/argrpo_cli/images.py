"""Reading image files as the uint8 arrays that rewards and metrics take."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from argrpo_cli.errors import UserError
from argrpo_cli.files import reason

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 [3, H, W], RGB, transparency laid on white; UserError when it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.has_transparency_data:
                coloured = image.convert("RGBA")
                white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, coloured)
            pixels = np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(f"there is no image {path}") from error
    except OSError as error:  # Pillow's UnidentifiedImageError and truncated files are OSErrors without a number
        why = reason(error) if error.errno else "it is not an image, or a damaged one"
        raise UserError(f"cannot read the image {path}: {why}") from error
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path}: it is not an image, or a damaged one") from error
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
