"""Writing that survives: folders that appear and vanish as a whole, and a run that waits while its disk is full.

Beside a folder NAME there may be, after a death: `.old-NAME`, what was there before it; `.removed-NAME`, half removed.
`recover` clears them up.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import cannot_write, make_dir, open_to_all, writable

OLD, REMOVED = ".old-", ".removed-"
TEMPORARY = ".tmp-"  # what files.py and save_model write before they rename
PARTIAL = ".partial"  # the end of the names of folders that are being written

FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or the user's share of it
RETRY, PATIENCE = 30.0, 60 * 60.0  # seconds between attempts, and before giving up
LOOK = 0.5  # seconds after which a wait notices that the run is to stop
MARGIN = 64 * 2**20  # bytes that stay free beside a checkpoint: for records, pictures and other programs


def sync_folder(folder: Path) -> None:
    """Force a folder's list of names to disk: without it a power cut can undo a rename.

    Raises:
        OSError: the disk is full or broken.
    """
    if os.name == "nt":
        return  # Windows opens no folders, and keeps its names in order by itself
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot, such as some network ones
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Force everything in a folder to disk; raises as `sync_folder`."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def replace_folder(partial: Path, final: Path) -> None:
    """Give a completely written folder its final name, where nothing, the old or the new folder is at any moment.

    Raises:
        UserError: the file system refuses; an older folder of that name is still there, under it or for `recover`.
    """
    old = final.with_name(OLD + final.name)
    with writable(final):
        for path in partial.rglob("*"):
            if path.is_file():
                open_to_all(path)
        sync_tree(partial)
        make_dir(final.parent)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        os.replace(partial, final)
        sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Take a folder away; one that is only half gone bears its name no more. Nothing happens where there is none.

    Raises:
        UserError: the file system refuses.
    """
    removed = folder.with_name(REMOVED + folder.name)
    shutil.rmtree(removed, ignore_errors=True)
    try:
        os.replace(folder, removed)
    except FileNotFoundError:
        return
    except OSError as error:
        raise cannot_write(folder, error) from error
    shutil.rmtree(removed, ignore_errors=True)  # what a network file system holds on to goes next time


def set_aside(folder: Path, name: str) -> Path:
    """Rename a folder to `name` beside it, or to `name-2`, ... where that is taken; returns the new path.

    Raises:
        UserError: the file system refuses.
    """
    aside, count = folder.with_name(name), 1
    while aside.exists():
        count += 1
        aside = folder.with_name(f"{name}-{count}")
    with writable(aside):
        os.replace(folder, aside)
        sync_folder(folder.parent)
    return aside


def recover(folder: Path) -> None:
    """Clear up what a death left in a folder: an older folder gets its name back, the rest goes.

    Raises:
        UserError: the file system refuses.
    """
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        final = folder / path.name.removeprefix(OLD)
        partial = path.name.startswith(".") and path.name.endswith(PARTIAL)
        leftover = partial or path.name.startswith((OLD, REMOVED, TEMPORARY))
        with writable(path):
            if path.name.startswith(OLD) and not final.exists():
                os.replace(path, final)
            elif leftover and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif leftover:
                path.unlink()


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if isinstance(error, SafetensorError) and any(os.strerror(number) in str(error) for number in FULL):
            return True
        error = error.__cause__
    return False


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
        start, waits, minutes = time.monotonic(), False, f"{PATIENCE / 60:.0f} minutes"
        while True:
            try:
                write()
            except (OSError, UserError, SafetensorError) as error:
                if not is_full(error):
                    raise
                if self.stopped():
                    raise KeyboardInterrupt from error
                lack = f"no room for {what}, {_gigabytes(shutil.disk_usage(self.folder).free)} free"
                if time.monotonic() - start >= PATIENCE:
                    raise UserError(
                        f"the disk of {self.folder} was full for {minutes}: {lack}; what was saved is safe; make room "
                        f"and continue with: argrpo train --resume {self.folder}"
                    ) from None  # the reason is told, and a second mend would be added to a full disk's error
                if not waits:
                    self.tell(
                        f"the disk of {self.folder} is full: {lack}; the run waits up to {minutes} for room (Ctrl-C "
                        "stops it, and what was saved before is kept)"
                    )
                waits = True
            else:
                if waits:
                    self.tell(f"there is room again for {what}; the run goes on")
                return time.monotonic() - start if waits else 0.0
            end = time.monotonic() + RETRY
            while time.monotonic() < end and not self.stopped():
                time.sleep(min(LOOK, RETRY))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
