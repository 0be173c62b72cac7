"""Whether scenes can be rendered here with the font: a mark for the tests that do; and shapes that stand for emoji."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from argrpo_cli.nano import scenes
from argrpo_cli.system.errors import UserError


def font_missing() -> bool:
    try:
        scenes.find_font()
    except UserError:
        return True
    return False


needs_font = pytest.mark.skipif(font_missing(), reason="scenes are rendered with the font Noto Color Emoji")


def shapes() -> list[Image.Image]:
    """A square RGBA picture for each class: a disc with two bars, in colours and places of its own."""
    result = []
    for index in range(len(scenes.CLASS_NAMES)):
        rng = np.random.default_rng(index)
        picture = Image.new("RGBA", (96, 96))
        draw = ImageDraw.Draw(picture)
        draw.ellipse((8, 8, 88, 88), fill=(*map(int, rng.integers(0, 256, 3)), 255))
        for _ in range(2):
            x, y, width, height = map(int, rng.integers(10, 50, 4))
            draw.rectangle((x, y, x + width, y + height), fill=(*map(int, rng.integers(0, 256, 3)), 255))
        result.append(picture)
    return result


@pytest.fixture
def no_font(monkeypatch):
    """Scenes of `shapes` instead of emoji, so that what renders can be tested without the font."""
    monkeypatch.setattr(scenes, "_sprites", shapes)
    scenes._sized.cache_clear()
    yield
    scenes._sized.cache_clear()
