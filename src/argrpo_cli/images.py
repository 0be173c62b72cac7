"""Finding image files and reading them as the uint8 arrays that rewards and metrics take."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from argrpo_cli.kept import SETTINGS
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_json, reason

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
OVERVIEWS = ("grid.png", "best_worst.png")  # of the other pictures, not some of them


METADATA = "metadata.jsonl"  # what each picture shows; `argrpo sample` writes it last
SAMPLE = "sample"  # the "command" in settings.json of a folder that `argrpo sample` draws
EARLIER_SETTINGS = "sampling.json"  # of such a folder before there was settings.json


def recorded_sampling(folder: Path) -> dict[str, Any] | None:
    """How `argrpo sample` drew the pictures of a folder; None for pictures of another origin.

    Raises:
        UserError: it has not drawn all of them.
    """
    path = next((folder / name for name in (SETTINGS, EARLIER_SETTINGS) if (folder / name).is_file()), None)
    if path is None:
        return None
    settings = read_json(path)
    if path.name == SETTINGS and settings.get("command") != SAMPLE:
        return None
    if not (folder / METADATA).is_file():
        raise UserError(f"{folder} is unfinished; give the same `argrpo sample` command again to complete it")
    return settings


def image_files(folder: Path) -> list[str]:
    """Names of the pictures in a folder, sorted, without overviews and hidden files; UserError when there are none."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}" if not folder.exists() else f"{folder} is a file, not a folder of images")
    try:
        names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {reason(error)}") from error
    names = [name for name in names if name not in OVERVIEWS and not name.startswith(".")]
    if not names:
        raise UserError(f"no images in {folder} (looked for {', '.join(SUFFIXES)})")
    return names


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 [3, H, W], RGB: upright, transparency laid on white, 16 bits scaled to 8, the first frame.

    Raises:
        UserError: it cannot be read, or unpacks to more than twice as many pixels as Pillow takes for harmless.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings(), Image.open(path) as opened:
            warnings.simplefilter("ignore")  # of odd files that Pillow reads all the same
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
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
    except Image.DecompressionBombError as error:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise UserError(f"cannot read the image {path}: it unpacks to more than {most:,} pixels") from error
    except (SyntaxError, ValueError) as error:
        raise UserError(f"cannot read the image {path}: it is not an image, or a damaged one") from error
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
