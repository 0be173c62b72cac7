"""The .tar files of a webdataset: pictures, each beside files of the same name that say what it shows.

    000001.jpg, 000001.txt (a caption), 000001.cls (a class id), 000001.json (either, under a key)

Only headers and those small files are read here; a picture is read from its place in the file when it is needed.
"""

from __future__ import annotations

import glob
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from argrpo_cli.images import Item
from argrpo_cli.listing import is_picture, natural
from argrpo_cli.pictures import read_image
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError, shortened
from argrpo_cli.system.files import expanded, open_regular, readable, stamp_of
from argrpo_cli.system.plain import parse_json

if TYPE_CHECKING:
    from argrpo_cli.recipe import Recipe

NANO = "nano"  # of `real.path`: scenes that are rendered
MOST_TEXT = 2**20  # bytes of what says what a picture shows
SAYING = (".txt", ".cls", ".json")


def shards(pattern: str) -> list[Path]:
    """The .tar files that a path, a pattern or a folder of nothing but such files stands for, in natural order."""
    path = expanded(pattern)
    if os.path.isdir(path):  # which, unlike a Path, takes any text
        with readable(f"the folder {path}"):
            files = [one for one in path.iterdir() if not one.name.startswith(".")]
        tars = [one for one in files if one.suffix == ".tar"]
        return sorted(tars, key=lambda one: natural(one.name)) if len(tars) == len(files) else []
    if ".tar" not in path.name:
        return []
    names = (glob.glob(str(path)) if "\0" not in pattern else []) or [str(path)]
    return [Path(name) for name in sorted(names, key=natural)]


def check_there(recipe: Recipe) -> None:
    """UserError where real images that the recipe learns from are not there; nothing is opened."""
    for path in (one.real.path for one in recipe.stages if one.learns_from_images):
        if path != NANO and not any(map(os.path.exists, shards(path) or [expanded(path)])):
            raise UserError(f"real.path {path}: no folder, .npz or .tar files; or say {NANO}, for rendered scenes")


def members(tars: Sequence[Path], column: str, limit: int | None) -> Iterator[Item]:
    """The pictures of .tar files, `limit` at most, with a `condition` where there is a caption beside, and a `label` in
    `extra` where there is a class id.

    Args:
        column: key of a caption (text) or a class id (a number) in a .json file.

    Raises:
        UserError: a file that is not there, is no .tar, is compressed, damaged or cut short; or a .cls or .json that
            holds something else.
    """
    count = 0
    for tar in tars:
        for key, picture, texts in _samples(tar):
            extra: dict[str, Any] = {}
            prompt = texts.get(".txt")
            if ".json" in texts:
                said = _value(texts[".json"], column, f"{tar}, {key}.json")
                prompt, extra = (said, extra) if isinstance(said, str) else (prompt, {"label": said})
            if ".cls" in texts:
                number = texts[".cls"].strip()
                if not number.isdecimal() or len(number) > 9:
                    raise UserError(f"{tar}, {key}.cls: {shortened(number)}: must be the id of a class")
                extra = {"label": int(number)}
            extra = {} if extra.get("label") is None else extra
            condition = Condition(" ".join(prompt.split())) if prompt and prompt.strip() else None
            name = Path(f"{tar}/{picture.name}")
            place = (picture.offset_data, picture.size, stamp_of(tar))
            read = partial(_read, tar, *place, name)
            yield Item(str(name), f"{place[2]} {place[0]}", read, condition, extra)
            count += 1
            if count == limit:
                return


def _samples(tar: Path) -> Iterator[tuple[str, tarfile.TarInfo, dict[str, str]]]:
    """Keys, pictures and the texts beside them; what has no picture is passed over."""
    key, own, picture, texts = "", "its beginning", None, {}
    why = "it is no .tar, a compressed or a damaged one; the shards of a webdataset are plain .tar files"
    faults = (tarfile.TarError, ValueError, EOFError, OverflowError)
    with readable(tar, faults, why), open_regular(tar) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        whole = os.fstat(file.fileno()).st_size
        for member in archive:
            archive.members.clear()  # which would hold every header of a large file
            if not member.isreg() or member.issparse():
                continue
            path = PurePosixPath(member.name)
            stem, _, ending = path.name.partition(".")  # as webdataset divides: at the first dot
            if not stem:
                continue
            own = str(path.with_name(stem))
            if own != key:
                if picture is not None:
                    yield key, picture, texts
                key, picture, texts = own, None, {}
            if member.offset_data + member.size > whole:
                raise UserError(f"cannot read {tar}: it is cut short at {member.name}")
            if f".{ending}" in SAYING and member.size <= MOST_TEXT:
                texts[f".{ending}"] = archive.extractfile(member).read().decode("utf-8", "replace")
            elif picture is None and is_picture(path.name):
                picture = member
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE).strip(tarfile.NUL):  # tarfile takes a part of a header for the end
            raise UserError(f"cannot read {tar}: it is cut short or damaged after {own}")
        if picture is not None:
            yield key, picture, texts


def _value(text: str, column: str, where: str) -> str | int | None:
    try:
        row = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    value = row.get(column) if isinstance(row, dict) else None
    if value is not None and type(value) not in (str, int):
        raise UserError(f"{where}: {column} = {shortened(value)}: must be a caption or the id of a class (real.column)")
    return value


def _read(
    tar: Path, start: int, size: int, stamp: str, name: Path, most: int | None = None, upright: bool = True
) -> np.ndarray | None:
    """A picture of a .tar file, see `images.Read`."""

    def opener(_: Path) -> BinaryIO:
        with open_regular(tar) as file:
            file.seek(start)
            return io.BytesIO(file.read(size))

    if stamp_of(tar) != stamp:
        raise UserError(f"{tar} changed while it was read; give the command again")
    return read_image(name, most, upright, opener)
