"""An .npz is believed in nothing: each lie of its directory or its headers is one line, and nothing is made of it."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from argrpo_cli.images import MOST_IMAGES, open_images
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.npz import HEAD, Npz

PIXELS = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)


def npy(array: np.ndarray = PIXELS, **header: object) -> bytes:
    """The bytes of an .npy with other words in its header."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": array.shape} | header)
    return file.getvalue() + array.tobytes()


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def lying(path: Path) -> Path:
    """The directory says that the member has 2^62 bytes, as its header does."""
    zipped(path, {"arr_0.npy": npy(shape=(2**62 // 36, 3, 4, 3))})
    content = bytearray(path.read_bytes())
    size = struct.pack("<I", len(npy(shape=(2**62 // 36, 3, 4, 3))))
    for start in (content.find(b"PK\x03\x04"), content.find(b"PK\x01\x02")):
        at = content.find(size, start + 14)
        content[at : at + 8] = b"\xff\xff\xff\x7f" * 2
    path.write_bytes(content)
    return path


def flagged(path: Path, at: tuple[int, int], value: int) -> Path:
    """A whole .npz with another 16-bit number at these places of its local and its central header."""
    zipped(path, {"arr_0.npy": npy()})
    content = bytearray(path.read_bytes())
    for mark, offset in zip((b"PK\x03\x04", b"PK\x01\x02"), at, strict=True):
        start = content.find(mark) + offset
        content[start : start + 2] = struct.pack("<H", value)
    path.write_bytes(content)
    return path


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "2^62 pictures": (
        lambda path: zipped(path, {"arr_0.npy": npy(shape=(2**62, 3, 4, 3))}),
        r"it is damaged: arr_0 is uint8 \[4611686018427387904, 3, 4, 3\] by its header, and 72 bytes follow",
    ),
    "a directory that lies, too": (lying, "it is damaged"),
    "a bomb": (
        lambda path: zipped(path, {"arr_0.npy": npy(shape=(10**12, 1, 1, 3))}, zipfile.ZIP_DEFLATED),
        "it is damaged: arr_0 is uint8",
    ),
    "more pictures than can be kept": (
        lambda path: zipped(
            path, {"arr_0.npy": npy(np.zeros((MOST_IMAGES + 1, 1, 1, 3), np.uint8))}, zipfile.ZIP_DEFLATED
        ),
        "arr_0 holds 5,000,001 images; at most 5,000,000",
    ),
    "one picture of endless sides": (
        lambda path: zipped(path, {"arr_0.npy": npy(shape=(1, 2**31, 2**31, 3))}),
        "it is damaged: arr_0 is uint8",
    ),
    "encrypted": (lambda path: flagged(path, (6, 8), 1), "arr_0 is encrypted; save it without a password"),
    "unknown packing": (lambda path: flagged(path, (8, 10), 77), r"packed in another way than numpy does \(number 77"),
    "lzma": (
        lambda path: zipped(path, {"arr_0.npy": npy()}, zipfile.ZIP_LZMA),
        r"\(number 14 of the zip format\); save it by numpy.savez or savez_compressed",
    ),
    "negative": (lambda path: zipped(path, {"arr_0.npy": npy(shape=(-2, 3, 4, 3))}), r"uint8 \[-2, 3, 4, 3\]"),
    "no suffix": (lambda path: zipped(path, {"arr_0": npy()}), r"holds arr_0 \(no \.npy\); expected arr_0"),
    "columns": (lambda path: zipped(path, {"arr_0.npy": npy(fortran_order=True)}), "arr_0 is in Fortran order"),
    "objects": (lambda path: np.savez(path, arr_0=np.array([{}], dtype=object)), r"arr_0 is object \[1\]; expected"),
    "a shape that is a text": (lambda path: zipped(path, {"arr_0.npy": npy(shape="abcd")}), "it is damaged"),
    "a type that is none": (lambda path: zipped(path, {"arr_0.npy": npy(descr="|q9")}), "it is damaged"),
    "a header of a gigabyte": (
        lambda path: zipped(path, {"arr_0.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**30) + b" " * (3 * HEAD)}),
        "it is damaged",
    ),
    "brackets": (
        lambda path: zipped(path, {"arr_0.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000}),
        "it is damaged",
    ),
    "many members": (
        lambda path: zipped(path, {f"{number}.txt": b"" for number in range(300)}),
        r"holds 0\.txt \(no \.npy\), .* and 295 more; expected arr_0",
    ),
    "a pipe": (os.mkfifo, "it is a pipe, not a file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_an_npz_claims_is_compared_with_what_it_holds(name: str, tmp_path: Path) -> None:
    make, message = HOSTILE[name]
    path = tmp_path / "set.npz"
    make(path)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as told:
            open_images(path)
        assert tracemalloc.get_traced_memory()[1] < 2**22, "bytes for no more than the line"
    finally:
        tracemalloc.stop()
    assert "\n" not in str(told.value) and len(str(told.value)) < 300 + len(str(path))


def test_a_picture_that_is_cut_off_is_named(tmp_path: Path) -> None:
    path = zipped(tmp_path / "set.npz", {"arr_0.npy": npy()})
    images = open_images(path)
    assert np.array_equal(images.items[1].read(), PIXELS[1].transpose(2, 0, 1))
    content = path.read_bytes()
    path.write_bytes(content.replace(PIXELS[1].tobytes(), bytes(36)))
    with pytest.raises(UserError, match="damaged or cut short"):
        for item in open_images(path).items:
            item.read()


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_small_array_is_read_as_it_was_saved(order: str, tmp_path: Path) -> None:
    array = np.asarray(np.random.default_rng(0).normal(size=(3, 5)), order=order)
    np.savez_compressed(tmp_path / "x.npz", mu=array, text=np.array(["a"]))
    file = Npz(tmp_path / "x.npz")
    assert file.keys == ["mu", "text"] and np.array_equal(file.read("mu"), array)
    np.savez(tmp_path / "x.npz", mu=np.array([{}]))
    with pytest.raises(UserError, match="mu holds objects, which are not read"):
        Npz(tmp_path / "x.npz").read("mu")
