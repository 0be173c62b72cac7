"""The nano world's truth: 64x64 scenes composed of colour emoji with COCO names, and captions in GenEval's grammar.

Rendering needs the font Noto Color Emoji (Debian: fonts-noto-color-emoji; or NANO_EMOJI_FONT=.../NotoColorEmoji.ttf).
Only the builder and the check of the tokenizer render; sampling, scoring, training and judging use the bundled weights.
"""

from __future__ import annotations

import colorsys
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from argrpo_cli.geneval.prompts import COUNTS, NANO_OBJECTS, RELATIONS, TAGS, Prompt, Requirement, compose, plural
from argrpo_cli.system.errors import UserError

if TYPE_CHECKING:
    from argrpo_cli.policy.protocol import Card

IMAGE_SIZE = 64
CLASS_NAMES = NANO_OBJECTS
WORDS = {word for name in CLASS_NAMES for word in name.split()}
# Of the classes; two are pairs of code points.
EMOJI = [*"🚲🚗", "✈️", *"🚌🚂⛵🚦🐦🐈🐕🐎🐑🐘🦓🦒🎒", "☂️", *"🍌🍎🍕🍩🍰⏰🧸"]
COLORS = {  # RGB of the colour words
    "red": (0.86, 0.12, 0.12),
    "orange": (0.96, 0.52, 0.08),
    "yellow": (0.96, 0.84, 0.10),
    "green": (0.14, 0.62, 0.22),
    "blue": (0.12, 0.34, 0.88),
    "purple": (0.52, 0.18, 0.70),
    "pink": (0.98, 0.50, 0.72),
    "brown": (0.48, 0.29, 0.13),
}
MOST_OBJECTS = 4  # of a class in a scene of the category counting, which begins at one
SINGLE_SIZES = (40, 60)  # side of a lone object's box in pixels, inclusive
HUES = tuple(3.0 * step for step in range(-6, 7))  # degrees; more than 18 would turn apples into plums
_FONT_PLACES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
    "/System/Library/Fonts/NotoColorEmoji.ttf",
)


Cell = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels
WHOLE, HALVES = ((0, IMAGE_SIZE),), ((0, IMAGE_SIZE // 2), (IMAGE_SIZE // 2, IMAGE_SIZE))


def draws_nano_world(card: Card) -> bool:
    """Whether a policy knows the nano world's objects and draws pictures of its size."""
    knows = card.names == CLASS_NAMES if card.reads == "classes" else set(card.words or ()) >= WORDS
    return card.image_size == IMAGE_SIZE and knows


@dataclass(frozen=True)
class Placed:
    """One object: class, side of its box, top-left corner (pixels), mirrored, hue turn in degrees, colour word."""

    class_id: int
    size: int
    x: int
    y: int
    mirror: bool = False
    hue: float = 0.0
    color: str | None = None


@dataclass(frozen=True)
class Scene:
    """Objects (drawn in order) on a plain background, RGB in [0, 1].

    Attributes:
        prompt: what the scene shows, in GenEval's terms; None for one that nobody describes.
        class_id: of the class-conditional task.
    """

    objects: tuple[Placed, ...]
    background: tuple[float, float, float]
    prompt: Prompt | None = None
    class_id: int | None = None


def vocabulary() -> list[str]:
    """Every word that a caption of the nano world can contain, in alphabetical order; plurals are GenEval's."""
    names = [*CLASS_NAMES, *(plural(name) for name in CLASS_NAMES)]
    phrases = [*names, *COLORS, *RELATIONS, *COUNTS.values(), "a photo of an and"]
    return sorted({word for phrase in phrases for word in phrase.split()})


def find_font() -> Path:
    """Path of Noto Color Emoji; raises UserError when it is nowhere."""
    for place in (os.environ.get("NANO_EMOJI_FONT"), *_FONT_PLACES):
        if place and Path(place).is_file():
            return Path(place)
    raise UserError(
        "font NotoColorEmoji.ttf not found: install fonts-noto-color-emoji or set NANO_EMOJI_FONT to its path"
    )


@lru_cache(maxsize=1)
def _sprites() -> list[Image.Image]:
    """One square RGBA picture per class, cropped to what is drawn."""
    font = ImageFont.truetype(str(find_font()), 109)  # the only size of this bitmap font
    sprites = []
    for emoji in EMOJI:
        canvas = Image.new("RGBA", (200, 180))
        ImageDraw.Draw(canvas).text((16, 16), emoji, font=font, embedded_color=True)
        picture = canvas.crop(canvas.getbbox())
        side = max(picture.size)
        square = Image.new("RGBA", (side, side))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        sprites.append(square)
    return sprites


@lru_cache(maxsize=8192)
def _sized(class_id: int, size: int, mirror: bool) -> tuple[np.ndarray, np.ndarray]:
    """Colour [s, s, 3] in [0, 1] (not premultiplied) and alpha [s, s, 1] of a class at one size."""
    rgba = np.asarray(_sprites()[class_id], dtype=np.float32) / 255
    premultiplied = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], -1)
    filter_ = Image.Resampling.BOX if size < 30 else Image.Resampling.BILINEAR
    planes = [np.asarray(Image.fromarray(premultiplied[..., c]).resize((size, size), filter_)) for c in range(4)]
    out = np.clip(np.stack(planes, -1), 0, 1)
    alpha = out[..., 3:]
    color = np.where(alpha > 1e-3, out[..., :3] / np.maximum(alpha, 1e-3), 0).clip(0, 1)
    if mirror:
        color, alpha = color[:, ::-1], alpha[:, ::-1]
    return np.ascontiguousarray(color), np.ascontiguousarray(alpha)


@lru_cache(maxsize=512)
def hue_matrix(degrees: float) -> np.ndarray:
    """3x3 rotation of RGB about the grey axis: turns the hue, keeps greys and the sum of the channels."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    third, root = (1 - cos) / 3, sin * np.sqrt(1 / 3)
    a, b, c = cos + third, third - root, third + root
    return np.array([[a, b, c], [c, a, b], [b, c, a]], dtype=np.float32)


def tinted(color: np.ndarray, name: str) -> np.ndarray:
    """Repaint an object in a colour word: its light and shade are kept, its hues are not."""
    luma = (color @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None]
    paint = np.array(COLORS[name], dtype=np.float32)
    dark = paint * np.clip(luma / 0.55, 0.15, 1)
    return dark + (1 - dark) * np.clip((luma - 0.75) / 0.25, 0, 1) * 0.75


def object_pixels(placed: Placed) -> tuple[np.ndarray, np.ndarray]:
    """Colour [s, s, 3] and alpha [s, s, 1] of a placed object, float32 in [0, 1]."""
    color, alpha = _sized(placed.class_id, placed.size, placed.mirror)
    if placed.color is not None:
        color = tinted(color, placed.color)
    elif placed.hue:
        color = np.clip(color @ hue_matrix(placed.hue).T, 0, 1)
    return color, alpha


def render(scene: Scene) -> np.ndarray:
    """uint8 [64, 64, 3]."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    image[:] = scene.background
    for placed in scene.objects:
        color, alpha = object_pixels(placed)
        window = image[placed.y : placed.y + placed.size, placed.x : placed.x + placed.size]
        window += alpha * (color - window)
    return (image * 255 + 0.5).astype(np.uint8)


def render_all(batch: Iterable[Scene]) -> np.ndarray:
    """uint8 [B, 3, 64, 64]."""
    return np.ascontiguousarray(np.stack([render(scene) for scene in batch]).transpose(0, 3, 1, 2))


def random_background(rng: np.random.Generator) -> tuple[float, float, float]:
    """A plain pastel."""
    return colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.08, 0.35), rng.uniform(0.88, 1.0))


def random_hue(rng: np.random.Generator) -> float:
    """One of `HUES`, which are few so that turned colours can be cached."""
    return HUES[rng.integers(len(HUES))]


def class_scene(rng: np.random.Generator, class_id: int | None = None) -> Scene:
    """A scene of the class-conditional task: one object; position, size, mirror image, hue and background vary."""
    class_id = int(rng.integers(len(CLASS_NAMES))) if class_id is None else class_id
    prompt = compose("single_object", (Requirement(CLASS_NAMES[class_id]),))
    return Scene((_placed(rng, class_id),), random_background(rng), prompt, class_id)


def caption_scene(rng: np.random.Generator, tag: str | None = None) -> Scene:
    """A scene of the text task; `tag` is one of GenEval's six categories, drawn uniformly when None."""
    tag = tag or TAGS[rng.integers(len(TAGS))]
    if tag not in TAGS:
        raise UserError(f"scene category '{tag}' is unknown: choose one of {', '.join(TAGS)}")
    background = random_background(rng)

    def pick(count: int) -> list[int]:
        """So many classes, each once."""
        return [int(i) for i in rng.choice(len(CLASS_NAMES), count, replace=False)]

    if tag == "single_object":
        return class_scene(rng)
    if tag == "counting":
        count, class_id = int(rng.integers(1, MOST_OBJECTS + 1)), pick(1)[0]
        objects = tuple(_placed(rng, class_id, cell) for cell in _cells(rng, count))
        include = (Requirement(CLASS_NAMES[class_id], count),)
        # GenEval counts from two; one is a single object.
        return Scene(objects, background, compose(tag if count > 1 else "single_object", include))
    if tag == "colors":
        class_id, color = pick(1)[0], list(COLORS)[rng.integers(len(COLORS))]
        include = (Requirement(CLASS_NAMES[class_id], color=color),)
        return Scene((_placed(rng, class_id, color=color),), background, compose(tag, include))
    pair = pick(2)
    first, second = (CLASS_NAMES[class_id] for class_id in pair)
    colors: list[str | None] = [None, None]
    if tag == "position":
        relation = RELATIONS[rng.integers(4)]
        cells = _cells(rng, 2, relation in ("left of", "right of"))[:: 1 if relation in ("left of", "above") else -1]
        include = Requirement(second), Requirement(first, position=(relation, 0))
    else:
        cells = _cells(rng, 2)
        if tag == "color_attr":
            colors = [list(COLORS)[i] for i in rng.choice(len(COLORS), 2, replace=False)]
        include = Requirement(first, color=colors[0]), Requirement(second, color=colors[1])
    objects = tuple(_placed(rng, *one) for one in zip(pair, cells, colors, strict=True))
    return Scene(objects, background, compose(tag, include))


def _cells(rng: np.random.Generator, count: int, row: bool | None = None) -> list[Cell]:
    """`count` boxes that do not overlap, in random order; two in a row or a column keep theirs."""
    if count == 1:
        return [(4, 4, IMAGE_SIZE - 4, IMAGE_SIZE - 4)]
    side_by_side = bool(rng.integers(2)) if count == 2 and row is None else row
    columns, rows = (HALVES, HALVES) if count > 2 else (HALVES, WHOLE) if side_by_side else (WHOLE, HALVES)
    cells = [(x0, y0, x1, y1) for y0, y1 in rows for x0, x1 in columns]
    return [cells[i] for i in rng.permutation(len(cells))[:count]] if row is None else cells


def _placed(
    rng: np.random.Generator, class_id: int, cell: Cell = (0, 0, IMAGE_SIZE, IMAGE_SIZE), color: str | None = None
) -> Placed:
    """An object of random size, place and mirror image in a cell; the hue is turned where no colour is asked for."""
    x0, y0, x1, y1 = cell
    room = min(x1 - x0, y1 - y0)
    low, high = (SINGLE_SIZES[0], min(room, SINGLE_SIZES[1])) if room > 32 else (room - 8, room)
    size = int(rng.integers(low, high + 1))
    x, y = int(rng.integers(x0, x1 - size + 1)), int(rng.integers(y0, y1 - size + 1))
    hue = 0.0 if color else random_hue(rng)
    return Placed(class_id, size, x, y, bool(rng.integers(2)), hue, color)


def class_batch(rng: np.random.Generator, count: int, balanced: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [B, 3, 64, 64] and class ids int64 [B] of the class-conditional task."""
    ids = np.arange(count) % len(CLASS_NAMES) if balanced else rng.integers(len(CLASS_NAMES), size=count)
    return render_all(class_scene(rng, int(i)) for i in ids), ids.astype(np.int64)


def caption_batch(
    rng: np.random.Generator, count: int, shares: Mapping[str, float] | None = None
) -> tuple[np.ndarray, list[Scene]]:
    """Images uint8 [B, 3, 64, 64] and their scenes, categories drawn uniformly or by `shares`, which sum to 1."""
    tags = [None] * count if shares is None else rng.choice(list(shares), count, p=list(shares.values()))
    batch = [caption_scene(rng, tag) for tag in tags]
    return render_all(batch), batch
