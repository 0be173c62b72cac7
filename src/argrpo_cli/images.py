"""Finding image files and reading them as the uint8 arrays that rewards and metrics take."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from argrpo_cli.errors import UserError
from argrpo_cli.files import reason

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
GRID = "grid.png"  # an overview of the other pictures, not one of them


def image_files(folder: Path) -> list[str]:
    """Names of the pictures in a folder, sorted, without grid.png and hidden files; UserError when there are none."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}" if not folder.exists() else f"{folder} is a file, not a folder of images")
    try:
        names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {reason(error)}") from error
    names = [name for name in names if name != GRID and not name.startswith(".")]
    if not names:
        raise UserError(f"no images in {folder} (looked for {', '.join(SUFFIXES)})")
    return names


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
