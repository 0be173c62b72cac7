"""Which files of a folder are pictures of a set, in natural order, and what is to be said of the others.

image_files(Path("images/"))  # ["2.png", "10.png", "sub/1.png"], and remarks
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from argrpo_cli.kept import SETTINGS
from argrpo_cli.pictures import suffixes
from argrpo_cli.system.errors import UserError, some_names
from argrpo_cli.system.files import readable

OVERVIEWS = ("grid.png", "best_worst.png")  # of the other pictures, not some of them
METADATA = "metadata.jsonl"  # what each picture shows; `argrpo sample` writes it last
EARLIER_SETTINGS = "sampling.json"  # of a folder that `argrpo sample` drew before there was settings.json
SCORES, TABLE, SUMMARY = "scores.jsonl", "scores.csv", "summary.json"  # that `argrpo score` writes
PARTIAL = "scores.partial"  # of such a job that has not ended, or has no score for some images
OWN = (METADATA, SETTINGS, EARLIER_SETTINGS, SCORES, TABLE, SUMMARY)  # beside pictures, and no news to anyone


def image_files(folder: Path) -> tuple[list[str], Sequence[str]]:
    """The pictures of a folder and its sub-folders as `sub/2.png`, in natural order, and remarks on where they lie and
    on the other files.

    Raises:
        UserError: there are none, or a folder that cannot be listed.
    """
    pictures, others = listed(folder)
    if not pictures:
        raise UserError(f"no images in {folder} (looked for {len(suffixes())} kinds of files, such as .png and .jpg)")
    remarks, inner = [], [file for file in pictures if "/" in file]
    if inner:
        places = list(dict.fromkeys(file.rpartition("/")[0] for file in inner))
        remarks.append(
            f"{len(inner)} of the {len(pictures)} images of {folder} lie in sub-folders: {some_names(places)}"
        )
    if others:
        remarks.append(f"left out of {folder}, as no images of the set ({len(others)}): {some_names(others)}")
    return pictures, remarks


def listed(folder: Path) -> tuple[list[str], list[str]]:
    """The pictures of a folder and its sub-folders, and the other files but those that commands write beside pictures;
    both without hidden ones, in natural order. UserError for a folder that cannot be listed."""
    check_folder(folder)
    pictures: list[str] = []
    others: list[str] = []
    chains: dict[str, frozenset[tuple[int, int]]] = {}  # a folder to itself and those above it

    def refuse(error: OSError) -> None:
        raise error

    with readable(f"the folder {folder}", (RecursionError,), "its sub-folders lie too deep"):
        for place, subfolders, files in os.walk(folder, onerror=refuse, followlinks=True):
            status = os.stat(place)
            own, above = (status.st_dev, status.st_ino), chains.get(os.path.dirname(place), frozenset())
            if own in above:  # a link upwards
                subfolders.clear()
                continue
            chains[place] = above | {own}
            inner = Path(place).relative_to(folder)
            subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != PARTIAL]
            ours = {*OWN, *OVERVIEWS} if {METADATA, SCORES}.intersection(files) else OWN
            for name in files:
                if not name.startswith(".") and name not in ours:
                    kind = pictures if is_picture(name) else others
                    kind.append((inner / name).as_posix())
    return sorted(pictures, key=natural), sorted(others, key=natural)


def check_folder(folder: Path) -> None:
    """UserError for what is no folder."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}" if not folder.exists() else f"{folder} is a file, not a folder of images")


def is_picture(name: str) -> bool:
    """Whether a file is taken for a picture, by its name."""
    return Path(name).suffix.lower() in suffixes() and name not in OVERVIEWS


def is_npz(path: Path) -> bool:
    """Whether a path is that of an .npz, by its name."""
    return path.suffix.lower() == ".npz"


def natural(file: str) -> list[list[Any]]:
    """A key that sorts paths as people count: 2.png before 10.png."""
    parts = [re.split(r"(\d+)", part) for part in file.split("/")]
    return [[int(one) if place % 2 else one for place, one in enumerate(part)] for part in parts] + [[file]]
