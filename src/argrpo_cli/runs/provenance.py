"""What a run remembers of where and with what it was made, beside its recipe."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from argrpo_cli import __version__

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def versions() -> dict[str, str]:
    """Versions of everything that decides what a run computes; packages that are not there are left out."""
    found = {"argrpo": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: str) -> str:
    """The device in words: a GPU's model, or the processor's architecture and the threads that torch uses."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if device == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"
    return device


def start_notes(
    notes: Mapping[str, Any], weights: Mapping[str, float], family: Mapping[str, str], device: str
) -> dict[str, Any]:
    """What goes into run.json when training starts or goes on.

    Args:
        notes: what is there already; the first start is kept.
        weights: what each raw score counts in the total reward, 0 for a held-out one.
        family: of each reward.
        device: "cpu", "cuda:0", ...
    """
    return {
        "started": notes.get("started") or now(),
        "versions": versions(),
        "device": device_name(device),
        "rewards": {name: {"family": family.get(name), "weight": weight} for name, weight in weights.items()},
    }
