"""One picture file: which files are pictures, and the pixels of one as uint8 RGB.

    read_image("cat.png")  # uint8 [3, H, W]; BadPicture when it cannot be read

Pillow reads it, in any format that it decodes itself. By the mode that it finds:

    L, 1, RGB, CMYK, YCbCr, HSV, LAB   as Pillow converts them to RGB; colour profiles are left alone
    LA, PA, RGBA, RGBa, transparency   laid on white
    P                                  by its palette; refused where a pixel has no colour in it
    I;16, 16 bits of PNG and PPM       scaled to 8 bits, white by the bits of a pixel: 4095 of a TIFF of 12
    I (32 bits, signed), F, others     refused: nothing says which number is white

The first frame of several is taken. The turn that EXIF asks for is made, unless that tag cannot be read.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from argrpo_cli.system.errors import BadPicture, UserError
from argrpo_cli.system.files import open_regular, reason
from argrpo_cli.system.processes import say

if TYPE_CHECKING:
    from PIL import Image

LARGE = 2**24  # pixels from which one picture is read at a time
STRIP = 2**22  # pixels that are converted at a time
OTHER_PROGRAMS = ("EPS", "MPEG")  # Ghostscript would run what is in the file; of films Pillow reads the header alone
ORIENTATION, BITS, PHOTOMETRIC, SAMPLE_FORMAT = 0x0112, 0x0102, 0x0106, 0x0153  # tags of EXIF and TIFF
WHITE_IS_ZERO = 0
SILENCE = threading.Lock()  # of standard error, which is one for all threads
TELLING, TOLD = threading.Lock(), set()  # folders of which something was said
Opener = Callable[[Path], BinaryIO]
UNSIGNED = {1, 4}  # whole numbers, or nothing said
CONVERTED = {"1", "L", "LA", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"}
# Orientation to a view of the upright picture [3, H, W] that has the rows and columns of the file.
AS_STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda upright: upright[:, :, ::-1],
    3: lambda upright: upright[:, ::-1, ::-1],
    4: lambda upright: upright[:, ::-1],
    5: lambda upright: upright.swapaxes(1, 2),
    6: lambda upright: upright[:, :, ::-1].swapaxes(1, 2),
    7: lambda upright: upright[:, ::-1, ::-1].swapaxes(1, 2),
    8: lambda upright: upright[:, ::-1].swapaxes(1, 2),
}


@cache
def formats() -> tuple[str, ...]:
    """The formats that this Pillow decodes itself, by its names."""
    from PIL import Image, ImageFile

    Image.init()
    opened = {name: factory for name, (factory, _) in Image.OPEN.items() if name not in OTHER_PROGRAMS}
    stubs = {name for name, one in opened.items() if isinstance(one, type) and issubclass(one, ImageFile.StubImageFile)}
    return tuple(name for name in opened if name not in stubs)


@cache
def suffixes() -> frozenset[str]:
    """The endings of such files, in small letters, with their dots."""
    from PIL import Image

    known = {*formats(), "MPO"}  # opened as JPEG
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in known)


def read_image(
    path: Path, most: int | None = None, upright: bool = True, opener: Opener = open_regular
) -> np.ndarray | None:
    """A picture as uint8 [3, H, W], RGB; see above.

    In memory are Pillow's picture and the result, nothing else of its size: 7 bytes for each pixel.

    Args:
        most: None is returned, before anything is unpacked, for one of more pixels.
        upright: make the turn that EXIF asks for.
        opener: opens what `path` names, where that is no file of its own.

    Raises:
        BadPicture: it cannot be read, or unpacks to more than twice as many pixels as Pillow takes for harmless.
    """
    with opened_image(path, opener) as image:
        if most is not None and image.width * image.height > most:
            return None
        if not image.width * image.height:
            raise BadPicture(f"cannot read the image {path}: it has no pixels")
        with _silence() if image.format == "TIFF" else nullcontext():
            image.load()
        stored = AS_STORED.get(_orientation(image), np.asarray) if upright else np.asarray
        height, width = stored(np.empty((1, image.height, image.width), bool)).shape[1:]
        pixels = np.empty((3, height, width), np.uint8)
        view, rgb, rows = stored(pixels), _rule(path, image), max(1, STRIP // image.width)
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            view[:, top : top + rows] = rgb(strip).transpose(2, 0, 1)
        if _has_frames(image):
            _tell_of_frames(path)
    return pixels


@contextmanager
def opened_image(path: Path, opener: Opener = open_regular) -> Iterator[Image.Image]:
    """A picture file, opened by Pillow; what goes wrong while it is looked at is a `BadPicture` as in `read_image`."""
    from PIL import Image

    warnings.filterwarnings("ignore", module="PIL")  # of odd files that Pillow reads all the same
    try:
        with opener(path) as file, Image.open(file, formats=formats()) as image:
            yield image
    except UserError:
        raise
    except FileNotFoundError as error:
        raise BadPicture(f"there is no image {path}") from error
    except Image.DecompressionBombError as error:
        why = f"it unpacks to more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels"
        raise BadPicture(f"cannot read the image {path}: {why}") from error
    except MemoryError as error:
        raise BadPicture(f"cannot read the image {path}: it needs more memory than there is") from error
    except Exception as error:  # whatever a decoder raises for a file that it did not expect
        # Pillow's UnidentifiedImageError and truncated files are OSErrors without a number.
        why = reason(error) if getattr(error, "errno", None) else "it is not an image, or a damaged one"
        raise BadPicture(f"cannot read the image {path}: {why}") from error


@contextmanager
def _silence() -> Iterator[None]:
    """Keep libtiff from writing to standard error what Pillow raises; lines of other threads are lost meanwhile."""
    with SILENCE, open(os.devnull, "wb") as nowhere:
        shown = os.dup(2)
        try:
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(shown, 2)
            os.close(shown)


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 where it says none that can be read: the other tags, and what is wrong with them, are not looked at."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1


def _rule(path: Path, image: Image.Image) -> Callable[[Image.Image], np.ndarray]:
    """What makes uint8 [h, w, 3], or [h, w, 1] of grey, of a strip of a picture, by the mode of the whole."""
    from PIL import Image

    tags = getattr(image, "tag_v2", {})  # of a TIFF
    unsigned = UNSIGNED.issuperset(tags.get(SAMPLE_FORMAT, (1,)))
    if unsigned and (image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))):
        white, clear = 2 ** tags.get(BITS, (16,))[0] - 1, image.info.get("transparency")

        def deep(strip: Image.Image) -> np.ndarray:
            values = np.asarray(strip)
            grey = np.rint(values.clip(0, white) * (255 / white)).astype(np.uint8)
            grey = 255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey
            return (grey if clear is None else np.where(values == clear, np.uint8(255), grey))[..., None]

        return deep
    if not unsigned or image.mode not in CONVERTED:
        why = f"nothing says which number is white in its pixels ({image.mode}); save it with 8 or 16 bits, unsigned"
        raise BadPicture(f"cannot read the image {path}: {why}")
    if image.mode in ("P", "PA"):
        colours, clear = len(image.getpalette() or ()) // 3, image.info.get("transparency")
        if any(count and index != clear for index, count in enumerate(image.histogram()[colours:256], colours)):
            why = f"its pixels name colours that are not among the {colours} of its palette"
            raise BadPicture(f"cannot read the image {path}: {why}")
    if not image.has_transparency_data:
        return lambda strip: np.asarray(strip.convert("RGB"))

    def on_white(strip: Image.Image) -> np.ndarray:
        coloured = strip.convert("RGBA")
        white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(white, coloured).convert("RGB"))

    return on_white


def _has_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # the second one is damaged
        return True


def _tell_of_frames(path: Path) -> None:
    """Say once for each folder that of several frames the first is taken."""
    with TELLING:
        if path.parent not in TOLD:
            TOLD.add(path.parent)
            say(f"{path} holds several frames or pages; of such files the first one is taken")
