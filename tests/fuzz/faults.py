"""What a reader of hostile input can do wrong, for a test of the watch."""

from __future__ import annotations

import os
import time
from pathlib import Path

from argrpo_cli.system.errors import UserError
from tests.fuzz.mutate import Damage


def seeds(folder: Path) -> list[str]:
    """What to do, by the place."""
    return ["", "raise", "compute", "wait", "die", "fill", "talk", "well"]


def case(seeds: list[str], rng: Damage, folder: Path) -> str:
    """Do one of them."""
    (folder / "input").touch()
    what = seeds[rng.index]
    if what == "raise":
        raise ValueError
    while what == "compute":
        pass
    if what == "wait":
        time.sleep(3600)
    if what == "die":
        os.abort()
    if what == "fill":
        bytearray(2**32)
    if what == "talk":
        raise UserError(" ")
    return what
