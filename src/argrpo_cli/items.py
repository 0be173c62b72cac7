"""What `argrpo score` looks at: images of a folder, files or an .npz, and what each of them should show."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from argrpo_cli.images import METADATA, image_files, read_image, recorded_sampling
from argrpo_cli.shapes import Condition, class_prompt
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_jsonl, reason

NO_PROMPT_WORDS = {
    "",
    "dsc",
    "generated",
    "image",
    "images",
    "img",
    "output",
    "photo",
    "picture",
    "sample",
    "untitled",
}


@dataclass(frozen=True)
class Item:
    """One image to score.

    Attributes:
        file: its name among the scores.
        stamp: changes when the image does.
        read: gives it as uint8 [3, H, W]; UserError when it cannot be read.
        condition: None when nothing says what it should show.
        extra: what its metadata says beside that.
    """

    file: str
    stamp: str
    read: Callable[[], np.ndarray]
    condition: Condition | None
    extra: dict[str, Any]


@dataclass(frozen=True)
class Items:
    """All images to score, where the scores go by default, and a remark on guessed prompts (or "")."""

    items: list[Item]
    folder: Path
    note: str = ""


@dataclass(frozen=True)
class Said:
    """What the command line says the images show: one prompt for all, a class, or a file of captions."""

    prompt: str | None = None
    class_name: str | None = None
    captions: Path | None = None

    def check(self) -> None:
        """UserError for two sources, or an empty one."""
        given = [
            (option, value)
            for option, value in (("--prompt", self.prompt), ("--class", self.class_name), ("--prompts", self.captions))
            if value is not None
        ]
        if len(given) > 1:
            raise UserError(f"give {given[0][0]} or {given[1][0]}, not both")
        for option, value in given:
            if not str(value).strip():
                raise UserError(f"{option} is empty; say what the images should show")

    @property
    def anything(self) -> bool:
        return (self.prompt, self.class_name, self.captions) != (None, None, None)


def find_items(sources: Sequence[Path], said: Said) -> Items:
    """The images of one folder, of one .npz (uint8 [N, H, W, 3], the array `arr_0`), or of image files.

    Prompts: what the command line says, else metadata.jsonl of the folder (`file`, `prompt`, `class_id`), else file
    names that are words (`golden_retriever-12.png`).

    Raises:
        UserError: something is not there or not readable, or two things say what the images show.
    """
    said.check()
    first = sources[0]
    if len(sources) == 1 and first.is_dir():
        return _folder(first, said)
    if len(sources) == 1 and first.suffix == ".npz":
        return _said_to(_npz(first), said)
    for path in sources:
        if path.is_dir() or path.suffix == ".npz":
            raise UserError(f"{path} is not an image file; give one folder, one .npz, or image files")
        if not path.is_file():
            raise UserError(
                f"no folder {path}" if len(sources) == 1 and not path.suffix else f"there is no image {path}"
            )
    items = [_file(str(path), path) for path in sources]
    return _said_to(Items(items, first.parent), said)


def prompt_from_file_name(stem: str) -> str | None:
    """What a file name says its image shows, or None when it is only a number or a camera's word.

    `a_photo_of_two_cats_007`: `a photo of two cats`; `003-dog-00012`: `a photo of a dog`; `IMG_0012`: None.
    """
    words = re.sub(r"[_\-\s]+", " ", stem).strip()
    words = re.sub(r"^(\d+ )+|( ?\(?\d+\)?)+$", "", words).strip()
    if words.lower() in NO_PROMPT_WORDS or not any(character.isalpha() for character in words):
        return None
    return words if len(words.split()) >= 4 else class_prompt(words)


def _file(name: str, path: Path, condition: Condition | None = None, extra: dict[str, Any] | None = None) -> Item:
    status = path.stat()
    return Item(name, f"{status.st_size} {status.st_mtime_ns}", partial(read_image, path), condition, extra or {})


def _folder(folder: Path, said: Said) -> Items:
    if (folder / METADATA).is_file():
        if said.anything:
            raise UserError(f"{folder / METADATA} says what the images show; leave out --prompt, --class and --prompts")
        return Items(_items_of_metadata(folder), folder)
    if not said.anything:
        recorded_sampling(folder)  # refuses an unfinished one
    return _said_to(Items([_file(name, folder / name) for name in image_files(folder)], folder), said)


def _items_of_metadata(folder: Path) -> list[Item]:
    path = folder / METADATA
    items = []
    for number, row in enumerate(read_jsonl(path), start=1):
        file, prompt, class_id = row.get("file"), row.get("prompt"), row.get("class_id")
        if not isinstance(file, str) or not file:
            raise UserError(f"{path}, image {number}: 'file' is missing")
        if prompt is not None and not isinstance(prompt, str):
            raise UserError(f"{path}, {file}: prompt = {prompt!r}: must be text")
        if class_id is not None and (not isinstance(class_id, int) or isinstance(class_id, bool)):
            raise UserError(f"{path}, {file}: class_id = {class_id!r}: must be a whole number")
        if not (folder / file).is_file():
            raise UserError(f"{path} lists {file}, which is not there")
        extra = {key: row[key] for key in ("class_name", "seed", "policy") if key in row}
        items.append(_file(file, folder / file, Condition(prompt, class_id) if prompt is not None else None, extra))
    if not items:
        raise UserError(f"{path} lists no images")
    return items


def _said_to(found: Items, said: Said) -> Items:
    """The items with what the command line says of them, or else what their names say."""
    if said.captions is not None:
        return replace(found, items=_captioned(found.items, said.captions))
    prompt = said.prompt if said.class_name is None else class_prompt(said.class_name)
    if prompt is not None:
        return replace(found, items=[replace(item, condition=Condition(prompt)) for item in found.items])
    items, note = [], ""
    for item in found.items:
        text = prompt_from_file_name(Path(item.file).stem)
        if text is not None:
            note = note or f"prompts were read from the file names ({Path(item.file).name}: {text!r})"
            item = replace(item, condition=Condition(text))
        items.append(item)
    return replace(found, items=items, note=note)


def _captioned(items: Sequence[Item], path: Path) -> list[Item]:
    """Captions of a .txt (one a line) or .jsonl (`prompt`) in the images' order; with `file`, by name."""
    from argrpo_cli.captions import read_captions

    captions = read_captions(str(path))
    rows = read_jsonl(path) if path.suffix == ".jsonl" else []
    if rows and all(isinstance(row.get("file"), str) for row in rows):
        named = {row["file"]: row["prompt"] for row in rows}
        lacking = next((item.file for item in items if item.file not in named), None)
        if lacking is not None:
            raise UserError(f"{path} has no caption for {lacking}")
        captions = [named[item.file] for item in items]
    if len(captions) != len(items):
        raise UserError(f"{path} has {len(captions)} captions for {len(items)} images; give one for each, in order")
    return [replace(item, condition=Condition(caption)) for item, caption in zip(items, captions, strict=True)]


class _Array:
    """Images of an .npz read one by one, so that 50,000 need not fit memory; quickest in order."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
            names = self._archive.namelist()
            self._member = "arr_0.npy" if "arr_0.npy" in names else names[0]
            self._stream, shape, dtype = self._open()
        except (OSError, EOFError, ValueError, IndexError, zlib.error, zipfile.BadZipFile) as error:
            why = reason(error) if isinstance(error, OSError) and error.errno else "it is no .npz, or a damaged one"
            raise UserError(f"cannot read {path}: {why}") from error
        if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8:
            raise UserError(f"{path}: {self._member} is {dtype} {list(shape)}; expected uint8 [N, H, W, 3]")
        self.shape = shape
        self._start = self._stream.tell()

    def _open(self) -> tuple[IO[bytes], tuple[int, ...], np.dtype]:
        stream = self._archive.open(self._member)
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, in_columns, dtype = read_header(stream)
        if in_columns:
            raise ValueError("Fortran order")
        return stream, shape, dtype

    def read(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [3, H, W]."""
        size = int(np.prod(self.shape[1:]))
        try:
            self._stream.seek(self._start + index * size)
            data = self._stream.read(size)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read image {index} of {self.path}: the file is damaged") from error
        if len(data) != size:
            raise UserError(f"cannot read image {index} of {self.path}: the file is cut off")
        return np.frombuffer(data, np.uint8).reshape(self.shape[1:]).transpose(2, 0, 1).copy()


def _npz(path: Path) -> Items:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    array = _Array(path)
    if not array.shape[0]:
        raise UserError(f"{path} holds no images")
    status = path.stat()
    stamp = f"{status.st_size} {status.st_mtime_ns}"
    digits = max(5, len(str(array.shape[0])))
    items = [
        Item(f"{index:0{digits}d}", stamp, partial(array.read, index), None, {}) for index in range(array.shape[0])
    ]
    return Items(items, path.with_name(f"{path.stem}-scores"))
