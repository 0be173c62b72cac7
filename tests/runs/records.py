"""Records of metrics.jsonl made by hand."""

from __future__ import annotations

import random
from typing import Any


def record(step: int, **changes: Any) -> dict[str, Any]:
    """One update of a run that gets better: the total rises by 0.01 a step, `judge` falls."""
    noise = random.Random(step).gauss(0, 0.05)
    return {
        "step": step,
        "reward": 1.0 + 0.01 * step + noise,
        "within_group_std": 0.25,
        "rewards": {
            "nano-clip": {"mean": 0.5 + noise, "std": 0.1, "within_group_std": 0.1},
            "judge": {"mean": 1.0 - 0.01 * step, "std": 0.2, "within_group_std": 0.1},
        },
        "kl": 0.01 * step,
        "entropy": 5.5 * (1 + noise),
        "clip_low": 0.01 * (1 + noise),
        "clip_high": 0.02 * (1 + noise),
        "ratio": 1.0 * (1 + noise),
        "ratio_deviation_mean": 1e-6 * (1 + noise),
        "ratio_deviation": 1e-5 * (1 + noise),
        "groups_without_spread": 0.1 * (step % 2),
        "grad_norm": 0.5 * (1 + noise),
        "learning_rate": 1e-3,
        "images_per_second": 24.0,
        "images_per_second_rollout": 48.0 * (1 + noise),
        "images_per_second_update": 48.0 * (1 + noise),
        "seconds_text": 0.0,
        "seconds_rollout": 1.0,
        "seconds_reward": 0.0,
        "seconds_update": 1.0,
        "seconds_total": 2.5 * step,
    } | changes


ROLES = {"nano-clip": {"family": "conditional", "weight": 1.0}, "judge": {"family": "quality", "weight": 0.0}}
