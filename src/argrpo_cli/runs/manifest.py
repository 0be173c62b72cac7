"""Is a checkpoint whole? `checksums.json` in it lists its files with size and SHA-256.

It is written last, before the checkpoint gets its name, and read before a run is taken up from it.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from argrpo_cli.policy.folder import MANIFEST
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import cannot_write, read_json, reason, write_json

STATE = "trainer_state.json"
# What a checkpoint of a version without manifests needs.
NEEDED = ("policy.json", "config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE)


def write_manifest(folder: Path) -> None:
    """List all files of a folder, those in folders inside it too, as they are now.

    Raises:
        UserError: a file cannot be read, or the list not be written.
    """
    try:
        files = {
            path.relative_to(folder).as_posix(): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()
        }
    except OSError as error:
        raise cannot_write(folder / MANIFEST, error) from error
    files.pop(MANIFEST, None)
    write_json(folder / MANIFEST, {"files": files})


def find_damage(folder: Path, step: int) -> str | None:
    """What is wrong with the checkpoint of `step` in a few words, None when it is whole.

    A checkpoint without a manifest comes from a version that wrote none: its files must be there and readable.

    Raises:
        UserError: a file may not be read, which says nothing about the checkpoint.
    """
    try:
        listed = (folder / MANIFEST).exists()
        damage = _compare(folder) if listed else _look_through(folder)
        return damage or _wrong_step(folder, step)
    except PermissionError as error:
        raise UserError(f"cannot read the checkpoint {folder}: {reason(error)}") from error
    except OSError as error:  # a bad sector for instance
        return f"{Path(error.filename).name if error.filename else 'a file'}: {reason(error)}"


def _compare(folder: Path) -> str | None:
    try:
        files = read_json(folder / MANIFEST).get("files")
    except UserError:
        files = None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        return f"{MANIFEST} is unreadable"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.get("bytes"):
            return f"{name} has {path.stat().st_size} bytes instead of {entry.get('bytes')}"
    for name, entry in files.items():
        if _digest(folder / name) != entry:
            return f"{name} is not what was written"
    return None


def _look_through(folder: Path) -> str | None:
    for name in NEEDED:
        if not (folder / name).is_file():
            return f"{name} is missing"
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors" and not _reads_as_safetensors(path):
            return f"{path.relative_to(folder)} is cut off or damaged"
        if path.suffix in (".pt", ".pth") and not _reads_as_zip(path):
            return f"{path.relative_to(folder)} is cut off or damaged"
    return None


def _reads_as_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):  # compares the header with the length of the file
            return True
    except SafetensorError:
        return False


def _reads_as_zip(path: Path) -> bool:
    """What torch.save writes is a zip archive, with a checksum for each part."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, NotImplementedError):
        return False


def _wrong_step(folder: Path, step: int) -> str | None:
    try:
        said = read_json(folder / STATE).get("global_step")
    except UserError:
        return f"{STATE} is unreadable"
    return None if said == step else f"{STATE} is of step {said}"


def _digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
