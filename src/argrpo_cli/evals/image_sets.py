"""Sets of images to evaluate, read batch by batch, and the reference statistics they are compared with.

A set is a folder of pictures or an .npz file with `arr_0`, uint8 [N, H, W, 3], as ADM's scripts and `argrpo sample
--npz` write it. Pictures are taken as `images.py` reads them: grey becomes RGB, transparency is laid on white.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from argrpo_cli.evals.fidelity import Statistics
from argrpo_cli.images import image_files, read_image
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import atomic_path, reason

IMAGES = "arr_0"
EXPECTED = f"expected {IMAGES}, uint8 images [N, H, W, 3]"
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # of the pool features and, _s, of the spatial ones
READERS = 8  # threads that unpack pictures
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError)


@dataclass(frozen=True)
class ImageSet:
    """Images of one size: where they are, how many, height and width, and their file names (none in an .npz)."""

    path: Path
    count: int
    size: tuple[int, int]
    files: tuple[str, ...] = ()

    def batches(self, batch_size: int, spans: Sequence[tuple[int, int]] | None = None) -> Iterator[Tensor]:
        """The images in order, uint8 [B, 3, H, W]; an archive of any length is read as it goes, never as a whole.

        Args:
            spans: only the images from the first to before the second number of each, in ascending order; batches end
                where a span does.

        Raises:
            UserError: a damaged file, or a picture of another size than the first.
        """
        parts = [
            (start, min(start + batch_size, end))
            for first, end in ([(0, self.count)] if spans is None else spans)
            for start in range(first, end, batch_size)
        ]
        return self._from_folder(parts) if self.files else self._from_npz(parts)

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        return str(self.path / self.files[index]) if self.files else f"{self.path}, image {index} (counted from 0)"

    def _from_folder(self, parts: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        with ThreadPoolExecutor(READERS) as readers:
            for start, end in parts:
                yield torch.from_numpy(np.stack(list(readers.map(self._read, range(start, end)))))

    def _read(self, index: int) -> np.ndarray:
        """One picture of a folder, uint8 [3, H, W]."""
        image = read_image(self.path / self.files[index])
        if image.shape[1:] != self.size:
            first = f"{self.name(0)} is {self.size[1]}x{self.size[0]}"
            other = f"{self.name(index)} {image.shape[2]}x{image.shape[1]}"
            raise UserError(f"the images of a set must have one size: {first}, {other}")
        return image

    def _from_npz(self, parts: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        height, width = self.size
        place = 0  # images read or skipped
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as member:
                _read_header(member)
                for start, end in parts:
                    member.seek((start - place) * height * width * 3, io.SEEK_CUR)
                    place = end
                    shape = (end - start, height, width, 3)
                    pixels = np.frombuffer(bytearray(member.read(int(np.prod(shape)))), np.uint8).reshape(shape)
                    yield torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        except DAMAGED as error:
            raise UserError(f"cannot read {self.path}: it is damaged or cut short") from error
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {reason(error)}") from error


def open_images(path: str | Path) -> ImageSet:
    """The set of images at `path`: a folder of pictures in the order of their names, or an .npz file.

    Raises:
        UserError: nothing there, no images in it, or an .npz that holds something else.
    """
    path = Path(path)
    if path.is_dir():
        files = image_files(path)
        return ImageSet(path, len(files), read_image(path / files[0]).shape[1:], tuple(files))
    if not path.exists():
        raise UserError(f"no folder or .npz file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
            if IMAGES not in keys:
                raise UserError(f"{path} holds {', '.join(keys) or 'nothing'}; {EXPECTED}")
            with archive.open(f"{IMAGES}.npy") as member:
                shape, by_columns, dtype = _read_header(member)
    except DAMAGED as error:
        raise UserError(f"cannot read {path}: it is neither a folder nor an .npz file, or a damaged one") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise UserError(f"{path}: {IMAGES} is {dtype} {list(shape)}; {EXPECTED}")
    if by_columns:
        raise UserError(f"{path}: {IMAGES} is in Fortran order; save numpy.ascontiguousarray of it")
    if 0 in shape:
        raise UserError(f"{path}: {IMAGES} holds no images")
    return ImageSet(path, shape[0], (shape[1], shape[2]))


def _read_header(member: zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and type of the array that follows."""
    if np.lib.format.read_magic(member) == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)


def save_statistics(path: str | Path, pool: Statistics, spatial: Statistics) -> None:
    """Write reference statistics as ADM's files have them, atomically."""
    arrays = (pool.mean, pool.covariance, spatial.mean, spatial.covariance)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **{key: array.numpy() for key, array in zip(STATISTICS, arrays, strict=True)})


def load_statistics(path: str | Path) -> tuple[Statistics, Statistics]:
    """Reference statistics of the pool and the spatial features; other arrays in the file are left alone.

    Raises:
        UserError: no such file, or it lacks them, or they do not fit together or are not finite.
    """
    path = Path(path)
    try:
        with np.load(path) as held:
            if not set(STATISTICS) <= set(held.files):
                raise UserError(f"{path} holds {', '.join(held.files) or 'nothing'}; expected {', '.join(STATISTICS)}")
            mu, sigma, mu_s, sigma_s = (torch.from_numpy(held[key]) for key in STATISTICS)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except (*DAMAGED, TypeError) as error:  # TypeError: a single array, or one of text
        raise UserError(f"cannot read {path}: it is not an .npz file of numbers, or a damaged one") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    for name, mean, covariance in (("mu, sigma", mu, sigma), ("mu_s, sigma_s", mu_s, sigma_s)):
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            shapes = f"{list(mean.shape)}, {list(covariance.shape)}"
            raise UserError(f"{path}: {name} have the shapes {shapes}; expected [D], [D, D]")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise UserError(f"{path}: {name} are not finite")
    return Statistics(mu.float(), sigma.double()), Statistics(mu_s.float(), sigma_s.double())
