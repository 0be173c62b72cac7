"""nano-geneval, the task reward of the nano world: does a detector find what the prompt asks for?

The paper names task rewards as the way forward; this one is GenEval's own logic in the form that serves as a reward
(`geneval.rules.reward_score`), on what the nano detector finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from argrpo_cli.conditions import Condition
from argrpo_cli.geneval.grammar import Prompt, parse_prompt
from argrpo_cli.geneval.rules import reward_score
from argrpo_cli.nano import WEIGHTS
from argrpo_cli.nano.detector import NANO_THRESHOLDS, by_class, color_of, load_detector


class NanoGenEval:
    """The share of what a prompt asks for that is there, at most 1.

    As the published server counts: an object too many costs, too, and a relation that fails costs a quarter.
    """

    def __init__(self, folder: str | Path = WEIGHTS / "nano-detector", device: str = "cpu"):
        self.detector = load_detector(folder, device)
        self._prompts: dict[str, Prompt] = {}

    def check(self, conditions: Sequence[Condition]) -> None:
        """Raise UserError for a prompt that GenEval's templates do not make."""
        for condition in conditions:
            self._prompt(condition.prompt)

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, 64, 64] and B conditions to float32 [B], at most 1."""
        found = self.detector.detect(images)
        scores = [
            reward_score(self._prompt(one.prompt), by_class(objects), color_of(objects), NANO_THRESHOLDS).score
            for one, objects in zip(conditions, found, strict=True)
        ]
        return torch.tensor(scores, device=images.device)

    def _prompt(self, text: str) -> Prompt:
        if text not in self._prompts:
            self._prompts[text] = parse_prompt(text)
        return self._prompts[text]
