"""GRPO on TRL (paper, sections 3.2 and 3.4): rollout, trainer, objective, run directory. Start at `train.py`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argrpo_cli.training.train import run_training

__all__ = ["run_training"]

# Read when TRL is imported, so it is set before any module of this package does.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout.py is written, and tested, for that interface


def __getattr__(name: str) -> Any:
    # torch and TRL are loaded only when something is trained.
    if name in __all__:
        from argrpo_cli.training import train

        return getattr(train, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
