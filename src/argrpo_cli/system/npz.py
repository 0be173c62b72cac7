"""Arrays in .npz files. Nothing that a file says of itself is believed before it is compared with what is there.

file = Npz(Path("set.npz"))
file.header("arr_0")            # shape and type, where as many numbers follow
file.read("mu")                 # a small array as a whole
"""

from __future__ import annotations

import io
import math
import os
import struct
import threading
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from argrpo_cli.system.errors import UserError, some_names
from argrpo_cli.system.files import open_regular, readable

HEAD = 10_240  # bytes from the start of a member that its header must lie in
INFLATION = 1_032  # bytes that deflate makes of one at most
NAMED = 5  # arrays whose names are in a message
# What zipfile and numpy raise of a file that is cut, damaged or something else.
DAMAGED = (
    zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, EOFError, ValueError, TypeError, LookupError,
    SyntaxError, ArithmeticError, RuntimeError, MemoryError,
)  # fmt: skip


class Header(NamedTuple):
    """What an array's header says, after it was compared with the bytes that follow.

    Attributes:
        in_columns: in Fortran order.
        start: byte within the member where the numbers begin.
    """

    shape: tuple[int, ...]
    in_columns: bool
    dtype: np.dtype
    start: int


class Npz:
    """An .npz file that is open for reading, from several threads.

    Attributes:
        keys: names of its arrays.

    Raises:
        UserError: it cannot be read, or is something else.
    """

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.Lock()
        self._stream: zipfile.ZipExtFile | None = None
        self._key = ""
        with self._damage("it is neither a folder nor an .npz file, or a damaged one"):
            self._archive, self._bytes = zipfile.ZipFile(open_regular(path)), os.path.getsize(path)
        self.names = self._archive.namelist()
        self.keys = [name.removesuffix(".npy") for name in self.names if name.endswith(".npy")]

    @property
    def content(self) -> str:
        """What it holds, for a message."""
        names = [name.removesuffix(".npy") if name.endswith(".npy") else f"{name} (no .npy)" for name in self.names]
        return some_names(names, NAMED) or "nothing"

    def header(self, key: str) -> Header:
        """Of the array `key`.

        Raises:
            UserError: it is encrypted, packed in another way than numpy does, damaged, or not as long as it says.
        """
        member = self._archive.getinfo(f"{key}.npy")
        if member.flag_bits & 1:
            raise UserError(f"{self.path}: {key} is encrypted; save it without a password")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            how = f"packed in another way than numpy does (number {member.compress_type} of the zip format)"
            raise UserError(f"{self.path}: {key} is {how}; save it by numpy.savez or savez_compressed")
        with self._damage(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that Python 2 wrote
            with self._archive.open(member) as stream:
                head = io.BytesIO(stream.read(HEAD))
            first = np.lib.format.read_magic(head) == (1, 0)
            read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
            header = Header(*read(head), head.tell())
        expected, there = header.dtype.itemsize * math.prod(header.shape), member.file_size - header.start
        there = min(there, INFLATION * self._bytes)
        if min(header.shape, default=1) < 0 or (expected != there and not header.dtype.hasobject):
            what = f"{header.dtype} {list(header.shape)} by its header, and {there:,} bytes follow"
            raise UserError(f"{self.path}: it is damaged: {key} is {what}")
        return header

    def bytes(self, key: str, start: int, size: int) -> bytes:
        """So many bytes of the array `key`, after the first `start`; fewer where it ends. Quickest in order.

        Raises:
            UserError: the file is damaged.
        """
        with self._damage(), self._lock:
            if self._stream is None or self._key != key:
                self._stream, self._key = self._archive.open(f"{key}.npy"), key
            if self._stream.tell() != start:  # zipfile checks no sum after a jump
                self._stream.seek(start)
            return self._stream.read(size)

    def read(self, key: str) -> np.ndarray:
        """The whole array `key`, which must fit in memory.

        Raises:
            UserError: see `header`.
        """
        header = self.header(key)
        if header.dtype.hasobject:
            raise UserError(f"{self.path}: {key} holds objects, which are not read")
        with self._damage():
            content = self.bytes(key, header.start, header.dtype.itemsize * math.prod(header.shape))
            order = "F" if header.in_columns else "C"
            return np.frombuffer(content, header.dtype).reshape(header.shape, order=order).copy()

    def numbers(self, keys: Sequence[str], widest: int) -> list[np.ndarray]:
        """Whole arrays of numbers as float64; each is looked at before the first is read.

        Raises:
            UserError: one holds something else, or has a side longer than `widest`; and see `header`.
        """
        for key in keys:
            header = self.header(key)
            if header.dtype.kind not in "fiu" or max(header.shape, default=0) > widest:
                what = f"{header.dtype} {list(header.shape)}"
                raise UserError(f"{self.path}: {key} is {what}; expected numbers, at most {widest} a side")
        return [self.read(key).astype(np.float64) for key in keys]

    @contextmanager
    def _damage(self, why: str = "it is damaged or cut short") -> Iterator[None]:
        with readable(self.path, DAMAGED, why):
            yield
