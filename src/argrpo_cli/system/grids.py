"""Many images as one picture: a labelled grid, and two grids side by side for before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK = (255, 255, 255), (40, 40, 40)
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def image_grid(
    images: Any,
    columns: int,
    labels: Sequence[str] | None = None,
    pad: int = 2,
    scale: int = 1,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Images row by row, `columns` to a row.

    Args:
        images: uint8 [B, 3, H, W], a torch tensor on any device or a numpy array.
        labels: a text above each row (one per row) or below each image (one per image, in up to three lines).
            With one column the two readings agree in number; the text then goes above.
        pad: white pixels around each image.
        scale: each pixel becomes scale x scale pixels, so that 64-pixel images can be seen on a screen.
        captions: texts below the images, one each, where the labels are those of rows.
    """
    pixels = _as_array(images)
    count, _, height, width = pixels.shape
    if count == 0 or columns < 1:
        raise ValueError(f"a grid needs at least one image and one column, got {count} and {columns}")
    columns = min(columns, count)
    rows = -(-count // columns)
    height, width = height * scale, width * scale
    if labels is not None and len(labels) not in (rows, count):
        raise ValueError(f"{len(labels)} labels for {count} images in {rows} rows; give one per row or per image")
    by_row = labels is not None and len(labels) == rows
    font = ImageFont.load_default(max(11, min(18, width // 6)))
    below = captions if captions is not None else None if by_row else labels
    small = font if captions is None else ImageFont.load_default(max(10, min(14, width // 10)))
    lines = [] if below is None else [_wrap(label, small, width) for label in below]
    head = _line_height(font) if by_row else 0
    foot = _line_height(small) * max(map(len, lines), default=0)
    cell_height, cell_width = height + 2 * pad + head + foot, width + 2 * pad

    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = column * cell_width + pad, row * cell_height + pad
        tile = Image.fromarray(np.ascontiguousarray(pixels[index].transpose(1, 2, 0)))
        if scale != 1:
            tile = tile.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y + head))
        if lines:
            draw.multiline_text((x, y + head + height), "\n".join(lines[index]), fill=INK, font=small, spacing=2)
    if by_row:
        for row, label in enumerate(labels):
            draw.text((pad, row * cell_height + pad), _fit(label, font, sheet.width - pad), fill=INK, font=font)
    return sheet


def before_after(
    before: Any,
    after: Any,
    labels: Sequence[str] | None = None,
    columns: int = 4,
    scale: int = 2,
    base: Path | None = None,
) -> Image.Image:
    """Two grids of the same conditions and seeds side by side, image for image in the same place.

    Args:
        before, after: uint8 [B, 3, H, W].
        labels, columns, scale: as in `image_grid`, for each of the two.
        base: a file with such a grid of what was there even before, which then stands first, if it fits.
    """
    left, right = (image_grid(images, columns, labels, scale=scale) for images in (before, after))
    if left.size != right.size:
        raise ValueError(f"before has {len(before)} images and after {len(after)}; they must be the same conditions")
    grids = {"before": left, "after": right}
    if base is not None and base.is_file():
        with Image.open(base) as picture:
            if picture.size == left.size:
                grids = {"base": picture.convert("RGB"), "after the start": left, "after": right}
    font = ImageFont.load_default(20)
    gap, head = 24, _line_height(font) + 8
    step = left.width + gap
    sheet = Image.new("RGB", (step * len(grids) - gap, left.height + head), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for index, (caption, grid) in enumerate(grids.items()):
        draw.text((index * step + 2, 4), caption, fill=INK, font=font)
        sheet.paste(grid, (index * step, head))
        if index:
            x = index * step - gap // 2
            draw.line([(x, 4), (x, sheet.height - 4)], fill=(200, 200, 200), width=1)
    return sheet


def _as_array(images: Any) -> np.ndarray:
    if hasattr(images, "detach"):  # a torch tensor; this module itself needs no torch
        images = images.detach().cpu().numpy()
    pixels = np.asarray(images)
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"expected images as uint8 [B, 3, H, W], got {pixels.dtype} {list(pixels.shape)}")
    return pixels


def _line_height(font: Font) -> int:
    return round(font.getbbox("Ågjy|")[3]) + 3


def _wrap(text: str, font: Font, width: int, most: int = 3) -> list[str]:
    """The text in up to `most` lines of `width` pixels, broken between words; the last is cut where it must be."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and (font.getlength(longer) <= width or len(lines) == most):
            lines[-1] = longer
        else:
            lines.append(word)
    return [_fit(line, font, width) for line in lines] or [""]


def _fit(text: str, font: Font, width: int) -> str:
    """The text, cut with an ellipsis where it would be wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
