"""A full disk: the run says so and waits for room, instead of ending."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from argrpo_cli.system.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or the user's share of it
RETRY, PATIENCE = 30.0, 60 * 60.0  # seconds between attempts, and before giving up
LOOK = 0.5  # seconds after which a wait notices that the run is to stop
MARGIN = 64 * 2**20  # bytes that stay free beside a checkpoint: for records, pictures and other programs


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if isinstance(error, SafetensorError) and any(os.strerror(number) in str(error) for number in FULL):
            return True
        error = error.__cause__
    return False


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder and those inside it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Disk:
    """The file system of a run directory, seen by a run that cannot do without what it writes.

    Args:
        folder: the run directory.
        tell: shows one line.
        stopped: whether the run was asked to stop; that ends a wait.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None], stopped: Callable[[], bool]) -> None:
        self.folder, self.tell, self.stopped = folder, tell, stopped

    def wait_for_room(self, what: str, size: int) -> float:
        """Return when `size` bytes and the margin are free; the rest is as in `insist`.

        A quota of the user does not show in what is free: there the write itself fails.
        """

        def look() -> None:
            usage = shutil.disk_usage(self.folder)
            if usage.total and usage.free < size + MARGIN:  # some network file systems tell nothing
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))

        return self.insist(f"{what} ({_gigabytes(size)}, and {_gigabytes(MARGIN)} to spare)", look)

    def insist(self, what: str, write: Callable[[], None]) -> float:
        """Call `write` until it does not fail for a full disk any more. Returns the seconds that were waited.

        Raises:
            UserError: still full after an hour.
            KeyboardInterrupt: the run was asked to stop meanwhile.
            Exception: any other that `write` raises.
        """
        start = time.monotonic()
        waits = False
        while True:
            try:
                write()
            except (OSError, UserError, SafetensorError) as error:
                if not is_full(error):
                    raise
                if self.stopped():
                    raise KeyboardInterrupt from error
                self._complain(what, start, waits)
                waits = True
            else:
                if waits:
                    self.tell(f"there is room again for {what}; the run goes on")
                return time.monotonic() - start if waits else 0.0
            self._pause()

    def _complain(self, what: str, start: float, waits: bool) -> None:
        free = _gigabytes(shutil.disk_usage(self.folder).free)
        if time.monotonic() - start >= PATIENCE:
            raise UserError(
                f"the disk of {self.folder} was full for {PATIENCE / 60:.0f} minutes: no room for {what}, {free} free; "
                f"what was saved is safe; make room and continue with: argrpo train --resume {self.folder}"
            ) from None  # the reason is told, and a second mend would be added to a full disk's error
        if not waits:
            self.tell(
                f"the disk of {self.folder} is full: no room for {what}, {free} free; the run waits up to "
                f"{PATIENCE / 60:.0f} minutes for room (Ctrl-C stops it, and what was saved before is kept)"
            )

    def _pause(self) -> None:
        end = time.monotonic() + RETRY
        while time.monotonic() < end and not self.stopped():
            time.sleep(min(LOOK, RETRY))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
