"""The adapter to TRL's rollout interface: draw a batch of guided images from the current policy and decode it.

TRL calls `Rollout` with one prompt per image (each prompt already repeated group_size times) and the trainer, and wants
back one entry per prompt: `prompt_ids`, `completion_ids`, `logprobs`; every other list goes to the reward functions.
TRL calls this interface experimental. Beside this file only grpo.py (where log-probabilities come from,
sampling_per_token_logps) and scorer.py (one list of images per batch) know TRL's insides.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from argrpo_cli.seeds import happens, of_training
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.processes import ALONE, Team
from argrpo_cli.training.gathering import whole_model
from argrpo_cli.training.launch import drawn_at_once

if TYPE_CHECKING:
    from transformers import Trainer

    from argrpo_cli.policy import Policy
    from argrpo_cli.policy.protocol import Drawn, Encoded
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.shapes import Condition, Sampling
    from argrpo_cli.training.conditions import Conditions
    from argrpo_cli.training.grpo import ImageGRPOTrainer


@dataclass
class Stopwatch:
    """Seconds spent under each name since the last `take`."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The times so far; counting starts again."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


@dataclass(frozen=True)
class Rollout:
    """Draws the images of one batch.

    Attributes:
        recipe: `sampling`, `grpo.logprob`, `grpo.condition_dropout` and `seed` are read.
        conditions: what the prompts of `conditions.prompt_dataset` count into.
        policy: turns conditions into what the model takes, and tokens into images.
        team: the processes that draw the batch together, each its part.
    """

    recipe: Recipe
    conditions: Conditions
    policy: Policy
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    team: Team = ALONE

    def __call__(self, prompts: list[str], trainer: ImageGRPOTrainer) -> dict[str, Any]:
        """One image per prompt, in order; the prompts are this process's part of the batch.

        What the training pass is to read as their conditions is left with the trainer (`encoded`). Where a condition is
        dropped that is the null condition: those images are drawn for their condition, but train the unconditional
        distribution, as in the policy's pre-training.

        Returns:
            prompt_ids: the row of each image's condition in `trainer.encoded`.
            completion_ids: its T token ids.
            logprobs: their log-probabilities under the distribution that `grpo.logprob` trains; None for dropped ones,
                which were drawn from another. They feed `RatioMeter` alone: TRL computes pi_old itself.
            images: uint8 [3, H, W] each.
            conditions: what each image was asked to show.
        """
        conditions, encoded = self.team.together(lambda: self.read(prompts))
        # global_step counts finished updates, so an interrupted and resumed run draws the same images; process i has
        # the i-th part of the batch, so they are also the same on any number of processes.
        first, count = self.team.index * len(prompts), len(prompts)
        seeds = [of_training(self.recipe.seed, trainer.state.global_step, first + index) for index in range(count)]
        dropped = [happens("drop", seed, self.recipe.grpo.condition_dropout) for seed in seeds]
        sampling, logp = self.recipe.sampling, self.recipe.grpo.logprob
        with self.stopwatch.measure("rollout"):
            with whole_model(trainer) as model:
                parts = self.team.together(lambda: self.draw(model, encoded, seeds, trainer, sampling, logp))
            with trainer.accelerator.autocast():  # in bfloat16 a fifth of a level of 256 away, of five times the speed
                images = [image for part in parts for image in self.policy.decode(part.tokens)]
        # The conditions of this batch and no other: those of a whole data set would not fit a GPU.
        trainer.encoded = self.policy.encode(conditions, torch.tensor(dropped)) if any(dropped) else encoded
        logprobs = [row for part in parts for row in part.logp.tolist()]
        return {
            "prompt_ids": [[row] for row in range(count)],
            "completion_ids": [row for part in parts for row in part.tokens.tolist()],
            "logprobs": [[None] * len(row) if drop else row for drop, row in zip(dropped, logprobs, strict=True)],
            "images": images,
            "conditions": conditions,
        }

    def read(self, prompts: Sequence[str]) -> tuple[list[Condition], Encoded]:
        """What is to be shown, and what the model takes for it."""
        with self.stopwatch.measure("text"):
            conditions = [self.conditions[int(prompt)] for prompt in prompts]
            return conditions, self.policy.encode(conditions)

    def draw(
        self,
        model: nn.Module,
        encoded: Encoded,
        seeds: Sequence[int],
        trainer: Trainer,
        sampling: Sampling,
        logp: str | None = None,
    ) -> list[Drawn]:
        """Tokens and, if asked as in `Policy.sample`, their log-probabilities, many images at a time."""
        at_once = drawn_at_once(self.policy.card.tokens)
        parts = [slice(start, start + at_once) for start in range(0, len(seeds), at_once)]
        try:
            with trainer.accelerator.autocast():  # the precision of the training pass, or the ratio is not 1
                return [
                    self.policy.sample(encoded[part], sampling, seeds[part], model=model, logp=logp) for part in parts
                ]
        except UserError as error:  # the sampler's word for weights that are not numbers
            step, method = trainer.state.global_step, self.recipe.method
            raise UserError(
                f"after step {step}: {error}; if training diverged, lower {method}.learning_rate"
            ) from error
