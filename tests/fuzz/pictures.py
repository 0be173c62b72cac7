"""Pictures of twelve formats: read as what they show, or refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from argrpo_cli.images import file_item
from argrpo_cli.pictures import read_image
from argrpo_cli.score import score_rows
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import save_png
from tests.fuzz.mutate import Damage, damaged, sealed_png

FORMATS = ("png", "jpeg", "webp", "gif", "bmp", "tiff", "avif", "jpeg2000", "dds", "tga", "ppm", "ico")
NUMBERS = "numbers"  # pictures of numbers, for which nothing says which is white: refused
ORIENTATION = 0x0112
Seeds = dict[str, list[bytes]]


class Brightness:
    """Stands for a set of rewards: the mean of an image's numbers."""

    names = ("bright",)

    def score(self, images, conditions, batch_size):
        return {"bright": images.double().mean(dim=(1, 2, 3))}


def brightness(images, conditions):
    """The same as a reward of one's own."""
    return images.double().mean(dim=(1, 2, 3))


brightness.family = "quality"


def seeds(folder: Path) -> Seeds:
    """Small pictures of each format, of several modes and ways of packing."""
    import torch  # noqa: F401  (its three gigabytes of addresses are no part of a case)

    rng = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(17) * 9, np.arange(24) * 4)
    colours = np.stack([ramp, 255 - ramp, rng.integers(0, 256, ramp.shape)], -1).clip(0, 255).astype(np.uint8)
    rgb = Image.fromarray(colours)
    rgba = Image.fromarray(np.dstack([colours, ramp.clip(0, 255).astype(np.uint8)]))
    deep = Image.fromarray((ramp * 170).astype(np.uint16))
    real = Image.fromarray((ramp / ramp.max()).astype(np.float32))
    palette, grey, bits, clear = rgb.quantize(40), rgb.convert("L"), rgb.convert("1"), rgba.convert("LA")
    icon, cmyk = rgba.resize((32, 32)), rgb.convert("CMYK")
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010E] = 6, "a dog"
    turned = _with(rgb, exif=exif)
    moving = _with(rgb, save_all=True, append_images=[rgb.rotate(180)])
    packed = [_with(image, compression=how) for image, how in ((rgb, "jpeg"), (bits, "group4"), (cmyk, "packbits"))]
    kinds = {
        "png": [turned, rgba, _with(palette, transparency=3), deep, clear, bits, _with(grey, transparency=9), moving],
        "jpeg": [turned, grey, cmyk, _with(rgb, progressive=True, subsampling=2)],
        "webp": [turned, rgba, _with(rgb, lossless=True), moving],
        "gif": [_with(palette, transparency=3), grey, moving],
        "bmp": [rgb, palette, bits, rgba],
        "tiff": [rgb, turned, deep, palette, rgb.convert("LAB"), moving, _with(rgba, compression="tiff_lzw"), *packed],
        "avif": [turned, rgba, moving],
        "jpeg2000": [rgb, _with(rgba, irreversible=True), _with(grey, no_jp2=True), deep],
        "dds": [rgb, rgba, grey, _with(rgba, pixel_format="DXT5"), _with(rgba, pixel_format="DXT1")],
        "tga": [rgb, palette, clear, _with(rgba, compression="tga_rle")],
        "ppm": [rgb, grey, bits, deep],
        "ico": [icon, _with(icon, sizes=[(16, 16), (32, 32)], bitmap_format="bmp")],
    }
    made = {name: [_file(name, image) for image in images] for name, images in kinds.items()}
    return made | {NUMBERS: [_file("tiff", real), _file("ppm", real), _file("tiff", real.convert("I"))]}


def _with(image: Image.Image, **options: Any) -> Image.Image:
    """A picture that is to be saved with these options."""
    image = image.copy()
    image.encoderinfo = options
    return image


def _file(name: str, image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **getattr(image, "encoderinfo", {}))
    return file.getvalue()


def mutant(seeds: Seeds, rng: Damage) -> bytes:
    """A damaged picture; a PNG often with checksums that are right."""
    name = rng.choice(FORMATS if rng.none else (*FORMATS, NUMBERS))
    content = damaged(rng.choice(seeds[name]), rng, head=200)
    return sealed_png(content) if name == "png" and rng.random() < 0.7 else content


def case(seeds: Seeds, rng: Damage, folder: Path) -> str:
    """A picture that is read shows the same each time, and scores the same as its pixels in a PNG."""
    path = folder / "dog.png"
    path.write_bytes(mutant(seeds, rng))
    pixels = read_image(path)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.size, "no picture"
    assert np.array_equal(pixels, read_image(path)), "another picture each time"
    plain = plain_pixels(path)
    assert plain is None or np.array_equal(pixels, plain.transpose(2, 0, 1)), "other pixels than the file's"
    (folder / "png").mkdir()
    save_png(folder / "png" / "dog.png", Image.fromarray(pixels.transpose(1, 2, 0)))
    both = [file_item(path.parent, "dog.png"), file_item(folder / "png", "dog.png")]
    one, other = score_rows(Brightness(), both)
    assert one == other == {"bright": float(np.mean(pixels, dtype=np.float64))}, "another score than that of its pixels"
    return f"{pixels.shape[2]}x{pixels.shape[1]}"


def plain_pixels(path: Path) -> np.ndarray | None:
    """Pixels [H, W, 3] of a picture without transparency and orientation, as Pillow has them; None for all others."""
    try:
        with Image.open(path) as image:
            image.load()
            if (
                image.mode not in ("RGB", "L")
                or image.has_transparency_data
                or image.getexif().get(ORIENTATION, 1) != 1
            ):
                return None
            return np.asarray(image.convert("RGB"))
    except Exception:  # what is odd about it, the reader under test has to cope with
        return None


def readable_score(path: Path) -> float | None:
    """The score of a picture on its own; None where it is refused."""
    try:
        return float(np.mean(read_image(path), dtype=np.float64))
    except UserError:
        return None
