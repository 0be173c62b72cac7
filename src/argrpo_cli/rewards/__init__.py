"""Reward models: the one table of their names, and scoring a batch of images with several of them.

from argrpo_cli.rewards import load_rewards
scores = load_rewards(["nano-clip", "nano-quality"]).score(images, conditions)   # name -> float32 [B]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from argrpo_cli.conditions import Condition
from argrpo_cli.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = ("conditional", "quality", "realism")  # r_C, r_I, r_R of equations 7 to 9


class Entry(NamedTuple):
    """Where a reward lives (imported when asked for), its family, and the bundled weights where a class has several."""

    module: str
    class_name: str
    family: str
    weights: str | None = None


REWARDS: dict[str, Entry] = {
    "nano-clip": Entry("argrpo_cli.rewards.nano_clip", "NanoClip", "conditional"),
    "nano-geneval": Entry("argrpo_cli.rewards.nano_geneval", "NanoGenEval", "conditional"),
    "nano-quality": Entry("argrpo_cli.rewards.nano_quality", "NanoQuality", "quality"),
    "nano-quality-t2i": Entry("argrpo_cli.rewards.nano_quality", "NanoQuality", "quality", "nano-quality-t2i"),
    "nano-critic": Entry("argrpo_cli.rewards.nano_critic", "NanoCritic", "realism"),
    "nano-critic-t2i": Entry("argrpo_cli.rewards.nano_critic", "NanoCritic", "realism", "nano-critic-t2i"),
}


class Reward(Protocol):
    """A reward model: one raw score per image, in the reward's own unit.

    One of the conditional family also has `check(conditions)`, which raises UserError for what it cannot read.
    """

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, H, W] and B conditions to float32 [B]."""
        ...


def check_reward(name: str) -> Entry:
    """The table's row for a reward; UserError lists the names when there is none."""
    if name not in REWARDS:
        raise UserError(f"reward {name!r} is unknown; there are {', '.join(REWARDS)}{did_you_mean(name, REWARDS)}")
    return REWARDS[name]


def load_reward(name: str, device: str = "cpu") -> Reward:
    """Load one reward model by name."""
    import importlib

    from argrpo_cli.nano import WEIGHTS

    entry = check_reward(name)
    reward = getattr(importlib.import_module(entry.module), entry.class_name)
    return reward(device=device) if entry.weights is None else reward(WEIGHTS / entry.weights, device)


class RewardSet:
    """Several reward models that look at the same images."""

    def __init__(self, rewards: dict[str, Reward], device: str = "cpu"):
        self.rewards, self.device = rewards, device
        self.names = list(rewards)
        self.family = {name: check_reward(name).family for name in rewards}

    def check(self, conditions: Sequence[Condition]) -> None:
        """Raise UserError for a condition that a conditional reward cannot read, before anything is scored."""
        for name, reward in self.rewards.items():
            if self.family[name] == "conditional":
                reward.check(conditions)

    def score(self, images: Tensor, conditions: Sequence[Condition], batch_size: int = 64) -> dict[str, Tensor]:
        """Raw scores of uint8 images [B, 3, H, W]: name to float32 [B], on the device of the models."""
        import torch

        if len(images) != len(conditions):
            raise ValueError(f"{len(images)} images but {len(conditions)} conditions")
        parts: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for start in range(0, len(images), batch_size):
            chunk = images[start : start + batch_size].to(self.device)
            for name, reward in self.rewards.items():
                parts[name].append(reward.score(chunk, conditions[start : start + batch_size]).float())
        return {name: torch.cat(p) if p else torch.zeros(0, device=self.device) for name, p in parts.items()}


def load_rewards(names: Sequence[str], device: str = "cpu") -> RewardSet:
    """Load reward models by name; all names are checked before anything is loaded.

    Raises:
        UserError: a name is unknown, or its weights are missing.
    """
    for name in names:
        check_reward(name)
    return RewardSet({name: load_reward(name, device) for name in names}, device)
