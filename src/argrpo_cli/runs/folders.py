"""Folders that appear and vanish as a whole, whenever the process or the machine dies.

Beside a folder NAME there may be, after a death: `.old-NAME`, what was there before it; `.removed-NAME`, half removed.
`recover` clears them up.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from argrpo_cli.system.files import cannot_write, make_dir, open_to_all

OLD, REMOVED = ".old-", ".removed-"
TEMPORARY = ".tmp-"  # what files.py and save_model write before they rename
PARTIAL = ".partial"  # the end of the names of folders that are being written


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
    try:
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
    except OSError as error:
        raise cannot_write(final, error) from error
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
    try:
        os.replace(folder, aside)
        sync_folder(folder.parent)
    except OSError as error:
        raise cannot_write(aside, error) from error
    return aside


def is_leftover(path: Path) -> bool:
    """Whether a file or folder is what a death in the middle of writing leaves."""
    return path.name.startswith((OLD, REMOVED, TEMPORARY)) or (
        path.name.startswith(".") and path.name.endswith(PARTIAL)
    )


def recover(folder: Path) -> None:
    """Clear up what a death left in a folder: an older folder gets its name back, the rest goes.

    Raises:
        UserError: the file system refuses.
    """
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        final = folder / path.name.removeprefix(OLD)
        try:
            if path.name.startswith(OLD) and not final.exists():
                os.replace(path, final)
            elif is_leftover(path) and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif is_leftover(path):
                path.unlink()
        except OSError as error:
            raise cannot_write(path, error) from error
