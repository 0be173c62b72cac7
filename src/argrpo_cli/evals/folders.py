"""The folder of an evaluation: names of its policies in it, and not using it for two things."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import make_dir, read_json, write_json

SETTINGS = "settings.json"


def policy_folders(policies: Sequence[str]) -> list[str]:
    """Folder names for one policy, or for one and a baseline.

    Raises:
        UserError: another number of them, or the same one twice.
    """
    if not 1 <= len(policies) <= 2:
        raise UserError(f"{len(policies)} policies; give one, or one and a baseline")
    names = [re.sub(r"[^A-Za-z0-9._-]+", "-", str(path)).strip("-.") or "policy" for path in policies]
    if len(set(names)) < len(names):
        raise UserError(f"{policies[0]} and {policies[1]} are the same policy; give another baseline")
    return names


def check_claim(out: Path) -> None:
    """What can be refused before anything is loaded.

    Raises:
        UserError: `out` is a file, or a folder of something else.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"cannot write to {out}: it is a file, not a folder")
    if out.is_dir() and not (out / SETTINGS).is_file() and any(path.name[0] != "." for path in out.iterdir()):
        raise UserError(f"{out} is not empty; choose another --out")


def claim(out: Path, identity: dict[str, Any], batch_size: int) -> int:
    """Use a new folder, or one that a call with the same `identity` left; the batch size to go on with.

    An unfinished evaluation goes on with its own batch size, on which images depend by rounding.

    Raises:
        UserError: the folder holds something else; the keys that differ are named.
    """
    check_claim(out)
    path = out / SETTINGS
    if not path.is_file() or not any(one.name[0] != "." and one != path for one in out.iterdir()):  # nothing came of it
        make_dir(out)
        write_json(path, {**identity, "batch_size": batch_size})
        return batch_size
    held = read_json(path)
    kept = held.get("batch_size")
    other = _differing(held, identity) + ([] if isinstance(kept, int) else ["batch_size"])
    if other:
        raise UserError(f"{out} holds an evaluation of something else ({', '.join(other)}); choose another --out")
    return kept


def _differing(held: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Keys of `asked` that `held` has otherwise, nested ones with dots."""
    found = []
    for key, value in asked.items():
        if isinstance(value, Mapping) and isinstance(held.get(key), Mapping):
            found += [f"{key}.{inner}" for inner in _differing(held[key], value)]
        elif held.get(key) != value:
            found.append(key)
    return found
