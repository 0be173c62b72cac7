"""Whether scenes can be rendered here: a mark for the tests that do."""

from __future__ import annotations

import pytest

from argrpo_cli.nano import scenes
from argrpo_cli.system.errors import UserError


def font_missing() -> bool:
    try:
        scenes.find_font()
    except UserError:
        return True
    return False


needs_font = pytest.mark.skipif(font_missing(), reason="scenes are rendered with the font Noto Color Emoji")
