"""argrpo: GRPO fine-tuning of autoregressive image models. Importing it imports no deep-learning library.

import argrpo_cli as ar
ar.load_policy("nano-c2i").generate(["dog"], n=4, seed=0, cfg_scale=2).pil()
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argrpo_cli.policy.open import load_policy
    from argrpo_cli.recipe import load_recipe
    from argrpo_cli.rewards import load_rewards
    from argrpo_cli.shapes import Condition, Result, Sampling
    from argrpo_cli.system.errors import UserError
    from argrpo_cli.training.train import run_training

# TRL reports every trainer it builds to its makers unless told otherwise before it is imported; users' runs are theirs.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it where it is, and it tells what it lacks

__version__ = "0.1.0"
__all__ = [
    "Condition", "Result", "Sampling", "UserError", "load_policy", "load_recipe", "load_rewards", "run_training",
]  # fmt: skip
_HOMES = {
    "Condition": "argrpo_cli.shapes",
    "Result": "argrpo_cli.shapes",
    "Sampling": "argrpo_cli.shapes",
    "UserError": "argrpo_cli.system.errors",
    "load_policy": "argrpo_cli.policy.open",
    "load_recipe": "argrpo_cli.recipe",
    "load_rewards": "argrpo_cli.rewards",
    "run_training": "argrpo_cli.training.train",
}


def __getattr__(name: str) -> Any:
    """What `__all__` names, imported when it is first asked for: most of it brings torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
