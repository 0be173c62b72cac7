"""Pictures as token ids, made once and kept: what teacher-forced measuring walks along.

The codes of `CHUNK` pictures are one file, named by a hash of all that decides them: tokenizer, size, and name, length
and time of change of each picture. Whatever is there is right, then: an interrupted job goes on, several processes
share the work, every policy of one tokenizer and size uses the same codes, and a changed picture is encoded anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from argrpo_cli.policy.llamagen.vq import VQModel, from_uint8
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import load_tensors, reason, save_tensors, user_cache
from argrpo_cli.system.processes import Team
from argrpo_cli.system.progress import progress

if TYPE_CHECKING:
    from PIL import Image

CHUNK = 256  # pictures
ENCODE_PIXELS = 2**20  # encoded at a time, as many as `Policy.decode` decodes
READERS = min(8, os.cpu_count() or 1)  # threads; unpacking a JPEG is slower than encoding it on a GPU
PREPROCESSING = "centre crop"  # part of the key: another preprocessing needs another name
CODES = "codes"


@dataclass(frozen=True)
class CodedImages:
    """Pictures and where their codes are kept.

    Attributes:
        folder, files: the pictures, in the order of the codes.
        size: pixels a side that they are cropped to.
        tokenizer: fingerprint of what encodes them.
        tokens: codes of a picture.
        cache: folder of the kept codes.
    """

    folder: Path
    files: tuple[str, ...]
    size: int
    tokenizer: str
    tokens: int
    cache: Path

    @property
    def chunks(self) -> range:
        return range(-(-len(self.files) // CHUNK))

    def place(self, chunk: int) -> slice:
        """Where a chunk is among the pictures."""
        return slice(chunk * CHUNK, (chunk + 1) * CHUNK)

    def names(self, chunk: int) -> tuple[str, ...]:
        """Files of a chunk."""
        return self.files[self.place(chunk)]

    def key(self, chunk: int) -> str:
        """A hash of all that decides the codes of a chunk, 32 hexadecimal digits.

        Raises:
            UserError: a picture is gone.
        """
        stated = [(name, *_size_and_time(self.folder / name)) for name in self.names(chunk)]
        return hashlib.sha256(json.dumps([PREPROCESSING, self.size, self.tokenizer, stated]).encode()).hexdigest()[:32]

    def path(self, chunk: int) -> Path:
        """The file that keeps, or will keep, the codes of a chunk."""
        return self.cache / f"{self.tokenizer}-{self.size}" / f"{self.key(chunk)}.safetensors"

    def load(self, chunk: int) -> Tensor | None:
        """Kept codes int64 [B, T] of a chunk; None where there are none, or a damaged file."""
        codes = (load_tensors(self.path(chunk)) or {}).get(CODES)
        fits = codes is not None and codes.shape == (len(self.names(chunk)), self.tokens)
        return codes.long() if fits else None


def default_cache() -> Path:
    """Where codes are kept unless told otherwise."""
    return user_cache() / "codes"


def tokenise(images: CodedImages, vq: VQModel, team: Team) -> int:
    """Encode the pictures whose codes are not kept yet; every process of the team takes its share.

    Returns:
        How many pictures were encoded, by all processes together.

    Raises:
        UserError: a picture that cannot be read, or a cache that cannot be written.
    """
    missing = team.from_lead(lambda: [chunk for chunk in images.chunks if images.load(chunk) is None])
    mine = missing[team.index :: team.count]
    team.together(lambda: _encode_chunks(images, vq, mine, team.index == 0))
    return sum(len(images.names(chunk)) for chunk in missing)


def _encode_chunks(images: CodedImages, vq: VQModel, chunks: Sequence[int], shown: bool) -> None:
    if not chunks:
        return
    total = sum(len(images.names(chunk)) for chunk in chunks)
    dtype = torch.int16 if vq.config.codebook_size <= 2**15 else torch.int32
    pool = ThreadPoolExecutor(READERS)

    def start(chunk: int) -> tuple[Path, list[Future[np.ndarray]]]:
        path = images.path(chunk)  # of the pictures as they are before they are read
        return path, [pool.submit(read_cropped, images.folder / name, images.size) for name in images.names(chunk)]

    try:
        with progress(f"tokenising at {images.size} px", total) if shown else nullcontext(_nothing) as advance:
            reading = start(chunks[0])
            for place, chunk in enumerate(chunks):
                path, current = reading
                if place + 1 < len(chunks):
                    reading = start(chunks[place + 1])  # read while these are encoded
                codes = []
                at_once = max(1, ENCODE_PIXELS // images.size**2)
                for first in range(0, len(current), at_once):
                    pixels = np.stack([future.result() for future in current[first : first + at_once]])
                    codes.append(encode(vq, torch.from_numpy(pixels)))
                    advance(len(pixels))
                if images.path(chunk) != path:
                    raise UserError(f"pictures in {images.folder} changed while they were read; give the command again")
                save_tensors(path, {CODES: torch.cat(codes).to(dtype)})
    finally:
        pool.shutdown(cancel_futures=True)


@torch.inference_mode()
def encode(vq: VQModel, pixels: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] to codes int64 [B, T] on the CPU."""
    return vq.encode(from_uint8(pixels.to(vq.device))).cpu()


def read_cropped(path: Path, size: int) -> np.ndarray:
    """A picture as LlamaGen's tokenizer was evaluated on it, uint8 [3, size, size].

    RGB as Pillow converts it, then `centre_crop`. LlamaGen's `extract_codes_c2i.py` and `val_ddp.py` read through
    torchvision's ImageFolder: a turn noted in EXIF is not made, so that the few pictures that have one stay as trained
    on. Its policies are trained on ten crops of a picture 1.1 times as large; a validation set has one: the middle.

    Raises:
        UserError: it cannot be read.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(path) as opened:
            warnings.simplefilter("ignore")  # of odd EXIF data, which ImageNet has
            cropped = np.asarray(centre_crop(opened.convert("RGB"), size))
    except OSError as error:  # Pillow's UnidentifiedImageError and truncated files are OSErrors without a number
        why = reason(error) if error.errno else "it is not an image, or a damaged one"
        raise UserError(f"cannot read the image {path}: {why}") from error
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path}: it is not an image, a damaged one, or far too large") from error
    return np.ascontiguousarray(cropped.transpose(2, 0, 1))


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an RGB picture, scaled to `size` pixels: ADM's `center_crop_arr`, as LlamaGen uses it.

    Halved with a box filter while the shorter side is at least twice `size`, then bicubic to a shorter side of `size`,
    then cropped; of an odd rest the pixel more is cut off right and below.
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _nothing(count: int) -> None:
    """Of several processes one shows progress."""


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"cannot read the image {path}: {reason(error)}") from error
    return found.st_size, found.st_mtime_ns
