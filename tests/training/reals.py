"""Real images for tiny policies: codes that somebody has made, and recipes that learn from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from argrpo_cli.recipe import Recipe
from tests.training.tiny import CLASSES, CODES, TOKENS, tiny_recipe

COMMON = {"batch_size": 8, "micro_batch_size": 4, "steps": 4, "learning_rate": 1e-3, "weight_decay": 0.0}
OWN: dict[str, dict[str, Any]] = {"cca": {"lmbda": 3.0, "beta": 0.1}, "pixel": {"perceptual_weight": 0.0, "samples": 3}}


def save_codes(path: Path, count: int = 20, tokens: int = TOKENS, codes: int = CODES, prompts: Any = None) -> Path:
    """Images whose codes say their class: those of class k lie about k codes / 4."""
    rng, classes = np.random.default_rng(0), np.arange(count) % CLASSES
    drawn = (classes[:, None] * codes // CLASSES + rng.integers(0, codes // CLASSES, (count, tokens))) % codes
    says = {"class_ids": classes} if prompts is None else {"prompts": np.resize(np.array(prompts), count)}
    np.savez(path, codes=drawn.astype(np.int16), **says)
    return path


def real_recipe(method: str, folder: Path | str, images: Path | str, **keys: Any) -> Recipe:
    """Of method cca or pixel; `keys` are of its section, `logging`, `real`, `conditions` and `policy` of those."""
    tree = tiny_recipe(folder, lora=keys.pop("lora", None)).model_dump()
    logging = {"save_every": 2, "grid_every": 100, "grid_images": 4, **keys.pop("logging", {})}
    others = {key: keys.pop(key) for key in ("conditions",) if key in keys}
    real = {"path": str(images), **keys.pop("real", {})}
    own = COMMON | OWN[method] | keys
    return Recipe.model_validate(tree | others | {"method": method, method: own, "real": real, "logging": logging})
