"""Images of a folder, of an .npz or in single files, what each of them shows, and reading them as uint8 arrays.

    images = open_images("images/")          # or an .npz with `arr_0`, uint8 [N, H, W, 3], as ADM's scripts write them
    images.read(images.items[:64])           # uint8 [64, 3, H, W]
    find_items([Path("images/")])            # the same with prompts, for what looks at them

Pictures of every kind become RGB: grey, transparent (laid on white), 16 bits, turned by EXIF. An .npz of any length is
read image by image, never as a whole.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from argrpo_cli.kept import SETTINGS
from argrpo_cli.shapes import Condition, class_prompt
from argrpo_cli.system.errors import UserError, printable
from argrpo_cli.system.files import read_json, read_jsonl, readable, reason
from argrpo_cli.system.npz import Npz

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
OVERVIEWS = ("grid.png", "best_worst.png")  # of the other pictures, not some of them
METADATA = "metadata.jsonl"  # what each picture shows; `argrpo sample` writes it last
SAMPLE = "sample"  # the "command" in settings.json of a folder that `argrpo sample` draws
EARLIER_SETTINGS = "sampling.json"  # of such a folder before there was settings.json
ARRAY = "arr_0"  # of an .npz
EXPECTED = f"expected {ARRAY}, uint8 images [N, H, W, 3]"
MOST_IMAGES = 5_000_000  # of an .npz: what is kept of each takes some 400 bytes
READERS = 8  # threads that unpack pictures
NO_PROMPT_WORDS = re.compile("|dsc|generated|images?|img|output|photo|picture|sample|untitled", re.IGNORECASE)


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        file: its name, within its folder; in an .npz its number.
        stamp: changes when the image does.
        read: gives it as uint8 [3, H, W]; UserError when it cannot be read.
        condition: what it shows, None when nothing says so.
        extra: what its metadata says beside that.
    """

    file: str
    stamp: str
    read: Callable[[], np.ndarray]
    condition: Condition | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageSet:
    """Images of one place.

    Attributes:
        path: the folder, or the .npz file.
        note: where it is known from what they show: a remark on guessed prompts, a file of labels; or "".
    """

    path: Path
    items: Sequence[Item]
    note: str = ""

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

        with ThreadPoolExecutor(1 if self.is_array else READERS) as readers:
            arrays = list(readers.map(lambda item: item.read(), items))
        for item, array in zip(items, arrays, strict=True):
            if array.shape[1:] != self.size:
                first = f"{self.name(0)} is {self.size[1]}x{self.size[0]}"
                other = f"{self.path / item.file} {array.shape[2]}x{array.shape[1]}"
                raise UserError(f"the images of a set must have one size: {first}, {other}")
        return torch.from_numpy(np.stack(arrays))


def open_images(path: str | Path) -> ImageSet:
    """The images at `path`: a folder of pictures in the order of their names, or an .npz file. Nothing says what they
    show; see `find_items` for that.

    Raises:
        UserError: nothing there, no images in it, or an .npz that holds something else.
    """
    path = Path(path)
    if path.is_dir():
        return ImageSet(path, [file_item(path, name) for name in image_files(path)])
    if not path.exists():
        raise UserError(f"no folder or .npz file {path}")
    array, status = _Array(path), path.stat()
    digits = max(5, len(str(len(array))))
    stamp = f"{status.st_size} {status.st_mtime_ns}"
    return ImageSet(path, [Item(f"{i:0{digits}d}", stamp, partial(array.read, i)) for i in range(len(array))])


def find_items(
    sources: Sequence[Path], prompt: str | None = None, class_name: str | None = None, captions: Path | None = None
) -> ImageSet:
    """The images of one folder, of one .npz, or of image files, with what they show.

    That is what the command line says (a prompt for all, a class, or a file of captions), else metadata.jsonl of the
    folder (`file`, `prompt`, `class_id`), else file names that are words (`golden_retriever-12.png`).

    Raises:
        UserError: something is not there or not readable, or two things say what the images show.
    """
    options = {"--prompt": prompt, "--class": class_name, "--prompts": captions}
    statements = {option: value for option, value in options.items() if value is not None}
    if len(statements) > 1:
        raise UserError(f"give {' or '.join(list(statements)[:2])}, not both")
    for option, value in statements.items():
        if not str(value).strip():
            raise UserError(f"{option} is empty; say what the images should show")
    first = sources[0]
    if len(sources) == 1 and (first.is_dir() or first.suffix == ".npz"):
        if (first / METADATA).is_file():
            if statements:
                raise UserError(
                    f"{first / METADATA} says what the images show; leave out --prompt, --class and --prompts"
                )
            rows = read_metadata(first)
            if not rows:
                raise UserError(f"{first / METADATA} lists no images")
            return ImageSet(first, [_item_of_metadata(first, file, row) for file, row in rows.items()])
        if not first.exists():
            raise UserError(f"there is no file {first}")
        if first.is_dir() and not statements:
            recorded_sampling(first)  # refuses an unfinished one
        images = open_images(first)
    else:
        for path in sources:
            if path.is_dir() or path.suffix == ".npz":
                raise UserError(f"{path} is not an image file; give one folder, one .npz, or image files")
            if not path.is_file():
                what = "no folder" if len(sources) == 1 and not path.suffix else "there is no image"
                raise UserError(f"{what} {path}")
        items = [replace(file_item(path.parent, path.name), file=str(path)) for path in sources]
        images = ImageSet(first.parent, items)
    if captions is not None:
        return replace(images, items=_captioned(images.items, captions))
    if not statements:
        return _named(images)
    condition = Condition(prompt if class_name is None else class_prompt(class_name))
    return replace(images, items=[replace(item, condition=condition) for item in images.items])


def image_files(folder: Path) -> list[str]:
    """Names of the pictures in a folder, sorted, without overviews and hidden files; UserError when there are none."""
    names = [path.name for path in folder_entries(folder) if path.suffix.lower() in SUFFIXES]
    names = [name for name in names if name not in OVERVIEWS]
    if not names:
        raise UserError(f"no images in {folder} (looked for {', '.join(SUFFIXES)})")
    return names


def folder_entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted, without hidden files; UserError when it cannot be listed."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}" if not folder.exists() else f"{folder} is a file, not a folder of images")
    with readable(f"the folder {folder}"):
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def file_item(folder: Path, name: str, condition: Condition | None = None, **extra: Any) -> Item:
    """The image `name` in a folder; UserError when it is not there."""
    with readable(f"the image {folder / name}"):
        status = (folder / name).stat()
    return Item(name, f"{status.st_size} {status.st_mtime_ns}", partial(read_image, folder / name), condition, extra)


def recorded_sampling(folder: Path) -> dict[str, Any] | None:
    """How `argrpo sample` drew the pictures of a folder; None for pictures of another origin.

    Raises:
        UserError: it has not drawn all of them.
    """
    path = next((folder / name for name in (SETTINGS, EARLIER_SETTINGS) if (folder / name).is_file()), None)
    if path is None:
        return None
    settings = read_json(path)
    if path.name == SETTINGS and settings.get("command") != SAMPLE:
        return None
    if not (folder / METADATA).is_file():
        raise UserError(f"{folder} is unfinished; give the same `argrpo sample` command again to complete it")
    return settings


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 [3, H, W], RGB: upright, transparency laid on white, 16 bits scaled to 8, the first frame.

    Raises:
        UserError: it cannot be read, or unpacks to more than twice as many pixels as Pillow takes for harmless.
    """
    from PIL import Image, ImageOps

    with opened_image(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            coloured = image.convert("RGBA")
            white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, coloured)
        pixels = np.asarray(image.convert("RGB"))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


@contextmanager
def opened_image(path: Path) -> Iterator[Image.Image]:
    """An image file, opened by Pillow; what goes wrong while it is looked at is a UserError as in `read_image`."""
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # of odd files that Pillow reads all the same
            yield image
    except FileNotFoundError as error:
        raise UserError(f"there is no image {path}") from error
    except Image.DecompressionBombError as error:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise UserError(f"cannot read the image {path}: it unpacks to more than {most:,} pixels") from error
    except (OSError, SyntaxError, ValueError) as error:
        # Pillow's UnidentifiedImageError and truncated files are OSErrors without a number.
        why = reason(error) if getattr(error, "errno", None) else "it is not an image, or a damaged one"
        raise UserError(f"cannot read the image {path}: {why}") from error


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

    def read(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [3, H, W]."""
        size = math.prod(self.shape[1:])
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
                raise UserError(f"{path}, {file}: {key} = {row[key]!r}: must be {what}")
        if whole and not (folder / file).is_file():
            raise UserError(f"{path} lists {file}, which is not there")
        rows[file] = row
    return rows


def _item_of_metadata(folder: Path, file: str, row: Mapping[str, Any]) -> Item:
    extra = {key: row[key] for key in ("class_name", "seed", "policy") if key in row}
    condition = None if row["prompt"] is None else Condition(row["prompt"], row["class_id"])
    return file_item(folder, file, condition, **extra)


def _named(images: ImageSet) -> ImageSet:
    """The images with what their names say of them."""
    texts = [prompt_from_file_name(Path(item.file).stem) for item in images.items]
    conditions = [None if text is None else Condition(text) for text in texts]
    items = [replace(item, condition=one) for item, one in zip(images.items, conditions, strict=True)]
    note = next((f"{Path(item.file).name}: {item.condition.prompt!r}" for item in items if item.condition), "")
    return replace(images, items=items, note=note and f"prompts were read from the file names ({note})")


def prompt_from_file_name(stem: str) -> str | None:
    """What a file name says its image shows, or None when it is only a number or a camera's word.

    `a_photo_of_two_cats_007`: `a photo of two cats`; `003-dog-00012`: `a photo of a dog`; `IMG_0012`: None.
    """
    words = re.sub(r"[_\-\s]+", " ", stem).strip()
    words = re.sub(r"^(\d+ )+|( ?\(?\d+\)?)+$", "", words).strip()
    if NO_PROMPT_WORDS.fullmatch(words) or not any(character.isalpha() for character in words):
        return None
    if printable(words) != words:  # bytes that are no UTF-8, control characters
        return None
    return words if len(words.split()) >= 4 else class_prompt(words)


def _captioned(items: Sequence[Item], path: Path) -> list[Item]:
    """Captions of a .txt (one a line) or .jsonl (`prompt`) in the images' order; with `file`, by name."""
    from argrpo_cli.captions import read_captions

    captions = read_captions(str(path), each=True)
    rows = read_jsonl(path) if path.suffix == ".jsonl" else []
    if rows and all(isinstance(row.get("file"), str) for row in rows):
        prompts = dict(zip((row["file"] for row in rows), captions, strict=True))
        lacking = next((item.file for item in items if item.file not in prompts), None)
        if lacking is not None:
            raise UserError(f"{path} has no caption for {lacking}")
        captions = [prompts[item.file] for item in items]
    if len(captions) != len(items):
        raise UserError(f"{path} has {len(captions)} captions for {len(items)} images; give one for each, in order")
    return [replace(item, condition=Condition(caption)) for item, caption in zip(items, captions, strict=True)]
