"""What decides a reward's scores, so that kept ones are used again only where the same would come out."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from argrpo_cli import __version__

if TYPE_CHECKING:
    from torch import nn

OPERATIONAL = ("url", "timeout", "concurrency", "attempts", "backoff")  # options that change no score
LIBRARIES = {"builtins", "torch", "transformers", "tokenizers", "open_clip", "httpx2", "PIL", "numpy"}


def identity_of(
    options: Mapping[str, Any], function: Callable[..., Any] | None = None, parts: Sequence[object] | None = None
) -> dict[str, Any]:
    """Plain data that decides the scores of one reward.

    Args:
        options: of the reward; those that change no score are left out, and files that one names count by their stamps.
        function: of a reward of one's own; the file that it is in counts.
        parts: what was loaded for the reward; the networks in it count. Without it, "weights" is left out.
    """
    identity = {
        "options": {key: value for key, value in options.items() if key not in OPERATIONAL},
        "files": file_stamps(options),
        "code": None if function is None else source_digest(function),
        "argrpo": __version__,
    }
    if parts is not None:
        from argrpo_cli.networks.loading import fingerprint

        networks = _networks(list(parts), set())
        identity["weights"] = fingerprint(networks) if networks else None
    return identity


def file_stamps(options: Mapping[str, Any]) -> dict[str, str]:
    """Size and time of the files that options name, and of those in folders that they name."""
    named = [Path(value) for value in options.values() if isinstance(value, str | Path) and str(value)]
    files = [
        file for path in named for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()
    ]
    return {str(file): f"{file.stat().st_size} {file.stat().st_mtime_ns}" for file in files}


def source_digest(function: Callable[..., Any]) -> str:
    """A hash of the file that a function is in, "" where there is none: scores of other code are others."""
    try:
        return hashlib.sha256(Path(inspect.getsourcefile(function)).read_bytes()).hexdigest()[:16]
    except (TypeError, OSError):
        return ""


def _networks(value: object, seen: set[int]) -> list[nn.Module]:
    """The networks in an object of ours or of the user's, in its parts, and in lists and dictionaries of them."""
    from torch import nn

    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, nn.Module):
        return [value]
    if isinstance(value, list | tuple | dict):
        parts = list(value.values()) if isinstance(value, dict) else list(value)
    elif type(value).__module__.split(".")[0] in LIBRARIES or isinstance(value, type | ModuleType):
        parts = []
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    return [network for part in parts for network in _networks(part, seen)]
