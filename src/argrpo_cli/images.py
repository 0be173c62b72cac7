"""Images of a folder, of an .npz or in single files, and reading them as uint8 arrays.

    images = open_images("images/")          # or an .npz with `arr_0`, uint8 [N, H, W, 3], as ADM's scripts write them
    images.read(images.items[:64])           # uint8 [64, 3, H, W]

`pictures.py` says what a picture is, and how one becomes RGB; `image_prompts.py` what each of them shows. Of a folder
those in its sub-folders count too, in the order in which people count: 2.png before 10.png. An .npz of any length is
read image by image, never as a whole.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from typing_extensions import TypedDict

from argrpo_cli.kept import SETTINGS, in_batches
from argrpo_cli.listing import EARLIER_SETTINGS, METADATA, image_files
from argrpo_cli.pictures import LARGE, read_image
from argrpo_cli.shapes import Condition, Sampling
from argrpo_cli.system.errors import BadPicture, UserError, shortened
from argrpo_cli.system.files import read_json, read_jsonl, stamp_of
from argrpo_cli.system.npz import Npz

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = "sample"  # the "command" in settings.json of a folder that `argrpo sample` draws
ARRAY = "arr_0"  # of an .npz
EXPECTED = f"expected {ARRAY}, uint8 images [N, H, W, 3]"
MOST_IMAGES = 5_000_000  # of an .npz: what is kept of each takes some 400 bytes
READERS = 8  # threads that unpack pictures
MOST_BYTES = 2**28  # of pictures at a time, however many
WNID = re.compile(r"n\d{8}(?!\d)")  # ImageNet's name of a class


class Read(Protocol):
    """Gives an image as uint8 [3, H, W], or None where it has more than `most` pixels; BadPicture, see `pictures`."""

    def __call__(self, most: int | None = None) -> np.ndarray | None: ...


# What is read of the settings of a folder that was drawn.
Recorded = TypedDict(
    "Recorded", {one.name: type(one.default) for one in fields(Sampling)} | {"seed": int, "weights": str}, total=False
)


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        file: its name, within its folder; in an .npz its number.
        stamp: changes when the image does.
        read: gives it; BadPicture when it cannot be read.
        condition: what it shows, None when nothing says so.
        extra: what its metadata says beside that.
    """

    file: str
    stamp: str
    read: Read
    condition: Condition | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageSet:
    """Images of one place.

    Attributes:
        path: the folder, or the .npz file.
        note: where it is known from what they show: a remark on guessed prompts, a file of labels; or "".
        remarks: what a user should know before the work: files that are left out, captions that go by order.
    """

    path: Path
    items: Sequence[Item]
    note: str = ""
    remarks: Sequence[str] = ()

    @property
    def count(self) -> int:
        return len(self.items)

    @cached_property
    def is_array(self) -> bool:
        """Whether the images are those of an .npz, whose order means something."""
        return self.path.is_file()

    @property
    def folder(self) -> Path:
        """Where what is found out of the images goes by default."""
        return self.path.with_name(f"{self.path.stem}-scores") if self.is_array else self.path

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width of the first image."""
        return self.items[0].read().shape[1:]

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        if self.is_array:
            return f"{self.path}, image {index} (counted from 0)"
        return str(self.path / self.items[index].file)

    def read(self, items: Sequence[Item]) -> Tensor:
        """Some of the images, uint8 [B, 3, H, W].

        Raises:
            UserError: a damaged one, or one of another size than the first of the set.
        """
        import torch

        batch = np.empty((len(items), 3, *self.size), np.uint8)
        for place, array in enumerate(read_ahead(items)):
            if isinstance(array, BadPicture):
                raise array
            if array.shape[1:] != self.size:
                first = f"{self.name(0)} is {self.size[1]}x{self.size[0]}"
                other = f"{self.path / items[place].file} {array.shape[2]}x{array.shape[1]}"
                raise UserError(f"the images of a set must have one size: {first}, {other}")
            batch[place] = array
        return torch.from_numpy(batch)

    def at_once(self, batch_size: int) -> int:
        """So many images of a batch as memory should hold, one at least."""
        return max(1, min(batch_size, MOST_BYTES // (3 * self.size[0] * self.size[1])))


def read_ahead(items: Sequence[Item]) -> Iterator[np.ndarray | BadPicture]:
    """Images in order, uint8 [3, H, W], or what is wrong with one. Threads read a few ahead; one of more than `LARGE`
    pixels is read alone, when its turn comes, so that memory holds `READERS` times as many and one such picture."""

    def attempt(item: Item, most: int | None = LARGE) -> np.ndarray | BadPicture | None:
        try:
            return item.read(most)
        except BadPicture as error:
            return error

    with ThreadPoolExecutor(READERS) as readers:
        for part in in_batches(items, READERS):
            # Images of one file are read in order; for one image no thread is begun, which takes memory, too.
            one_by_one = len({item.stamp for item in part}) < max(2, len(part))
            images = map(attempt, part) if one_by_one else readers.map(attempt, part)
            for item, image in zip(part, images, strict=True):
                yield attempt(item, None) if image is None else image


def refuse(item: Item, error: BadPicture) -> None:
    """What to do about an image that cannot be read, where all of them must be."""
    raise error


def read_runs(
    items: Sequence[Item], unreadable: Callable[[Item, BadPicture], None] = refuse
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Neighbours of one size, of at most `MOST_BYTES`: their places among the items, and uint8 [B, 3, H, W].

    Args:
        unreadable: is told of an image that cannot be read, and that is left out.
    """
    places: list[int] = []
    run: list[np.ndarray] = []
    place = -1  # not `enumerate`, which would hold the last image while the next one is read
    for image in read_ahead(items):
        place += 1
        if isinstance(image, BadPicture):
            unreadable(items[place], image)
            continue
        if run and image.shape != run[0].shape:
            yield places, np.stack(run)
            places, run = [], []
        places.append(place)
        run.append(image)
        full, image = (len(run) + 1) * image.size > MOST_BYTES, None
        if full:  # a large image is gone before the next one is read
            pixels = run[0][None] if len(run) == 1 else np.stack(run)
            run = []
            yield places, pixels
            places, pixels = [], None
    if run:
        yield places, np.stack(run)


def open_images(path: str | Path) -> ImageSet:
    """The images at `path`: a folder of pictures in the order of their names, or an .npz file. Nothing says what they
    show; see `image_prompts.find_items` for that.

    Raises:
        UserError: nothing there, no images in it, or an .npz that holds something else.
    """
    path = Path(path)
    if path.is_dir():
        files, remarks = image_files(path)
        return ImageSet(path, [file_item(path, file) for file in files], remarks=remarks)
    if not path.exists():
        raise UserError(f"no folder or .npz file {path}")
    array, stamp = _Array(path), stamp_of(path)
    digits = max(5, len(str(len(array))))
    return ImageSet(path, [Item(f"{i:0{digits}d}", stamp, partial(array.read, i)) for i in range(len(array))])


def file_item(folder: Path, name: str, condition: Condition | None = None, **extra: Any) -> Item:
    """The image `name` in a folder; one that is not there, or no file, says so when it is read."""
    try:
        stamp = stamp_of(folder / name)
    except OSError:
        stamp = ""
    return Item(name, stamp, partial(read_image, folder / name), condition, extra)


def recorded_sampling(folder: Path) -> dict[str, Any] | None:
    """How `argrpo sample` drew the pictures of a folder; None for pictures of another origin.

    Raises:
        UserError: it has not drawn all of them.
    """
    path = next((folder / name for name in (SETTINGS, EARLIER_SETTINGS) if (folder / name).is_file()), None)
    if path is None:
        return None
    settings = read_json(path, Recorded)
    if path.name == SETTINGS and settings.get("command") != SAMPLE:
        return None
    if not (folder / METADATA).is_file():
        raise UserError(f"{folder} is unfinished; give the same `argrpo sample` command again to complete it")
    return settings


class _Array:
    """Images of an .npz read one by one, so that 50,000 need not fit memory; quickest in order.

    Of several arrays those called `arr_0`, or else the first that are images.
    """

    def __init__(self, path: Path):
        self._file = Npz(path)
        for key in [ARRAY] if ARRAY in self._file.keys else self._file.keys:
            header = self._file.header(key)
            shape = header.shape
            if header.dtype == np.uint8 and len(shape) == 4 and shape[3] == 3:
                break
            if key == ARRAY:
                raise UserError(f"{path}: {key} is {header.dtype} {list(shape)}; {EXPECTED}")
        else:
            raise UserError(f"{path} holds {self._file.content}; {EXPECTED}")
        if header.in_columns:
            raise UserError(f"{path}: {key} is in Fortran order; save numpy.ascontiguousarray of it")
        if 0 in shape:
            raise UserError(f"{path}: {key} holds no images")
        if shape[0] > MOST_IMAGES:
            raise UserError(f"{path}: {key} holds {shape[0]:,} images; at most {MOST_IMAGES:,} are read of one file")
        self.shape, self._key, self._start = shape, key, header.start

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, index: int, most: int | None = None) -> np.ndarray | None:
        """Image `index`, see `Read`."""
        size = math.prod(self.shape[1:])
        if most is not None and size > 3 * most:
            return None
        content = self._file.bytes(self._key, self._start + index * size, size)
        if len(content) < size:
            raise UserError(f"{self._file.path}, image {index} (counted from 0): the file is cut short")
        return np.frombuffer(content, np.uint8).reshape(self.shape[1:]).transpose(2, 0, 1).copy()


def read_metadata(folder: Path, whole: bool = True) -> dict[str, dict[str, Any]]:
    """The rows of a folder's metadata.jsonl by `file`; `prompt` and `class_id` are None where nothing says them.

    Args:
        whole: refuse one that lists a file that is not there.

    Raises:
        UserError: no such file, or a row that is none of a picture.
    """
    path, rows = folder / METADATA, {}
    for number, row in enumerate(read_jsonl(path), start=1):
        file = row.get("file")
        if not isinstance(file, str) or not file:
            raise UserError(f"{path}, image {number}: 'file' is missing")
        for key, kind, what in (("prompt", str, "text"), ("class_id", int, "a whole number")):
            if row.setdefault(key) is not None and type(row[key]) is not kind:
                raise UserError(f"{path}, {file}: {key} = {shortened(row[key])}: must be {what}")
        if whole and not os.path.exists(folder / file):  # False of a name that no file can have, too
            raise UserError(f"{path} lists {file}, which is not there")
        if file in rows:
            raise UserError(f"{path} lists {file} twice")
        rows[file] = row
    return rows
