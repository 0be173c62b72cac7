"""The adapter to TRL's rollout interface: draw a batch of guided images from the current policy and decode it.

TRL calls `Rollout` with one prompt per image (each prompt already repeated group_size times) and the trainer, and wants
back one entry per prompt: `prompt_ids`, `completion_ids`, `logprobs`; every other list goes to the reward functions.
TRL calls this interface experimental. Beside this file only trainer.py (log_probs of TRL's fused head,
sampling_per_token_logps) and reward_functions.py (one list of images per batch) know TRL's insides.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from argrpo_cli.policy.llamagen.sampling import sample_tokens
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.processes import ALONE, Team
from argrpo_cli.training.gathering import whole_model

if TYPE_CHECKING:
    from trl import GRPOTrainer

    from argrpo_cli.policy import Policy
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.shapes import Condition
    from argrpo_cli.training.prompts import Conditions

CHUNK = 64  # images sampled and decoded at a time


def image_seed(seed: int, step: int, index: int) -> int:
    """The seed of image `index` of the batch drawn after `step` updates: the same whenever and wherever it is drawn."""
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits; a CPU generator uses the low 32


def is_dropped(seed: int, probability: float) -> bool:
    """Whether the image with this seed loses its condition in training (condition dropout)."""
    digest = hashlib.blake2b(f"drop/{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < probability


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
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


@dataclass(frozen=True)
class Rollout:
    """Draws the images of one batch.

    Attributes:
        recipe: `sampling`, `grpo.logprob`, `grpo.condition_dropout` and `seed` are read.
        conditions: what the prompts of `prompts.prompt_dataset` count into.
        policy: turns conditions into what the model takes, and tokens into images.
        team: the processes that draw the batch together, each its part.
    """

    recipe: Recipe
    conditions: Conditions
    policy: Policy
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    team: Team = ALONE

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        """One image per prompt, in order; the prompts are this process's part of the batch.

        Returns:
            prompt_ids: what the training pass is to read as the condition of each image: its class id; for captions
                its row in the model's `condition_table`, P times. Where the condition is dropped that is the null class
                or the null caption: those images are drawn for their condition, but train the unconditional
                distribution, as in the policy's pre-training.
            completion_ids: its T token ids.
            logprobs: their log-probabilities under the distribution that `grpo.logprob` trains; None for dropped ones,
                which were drawn from another. They feed `RatioMeter` alone: TRL computes pi_old itself.
            images: uint8 [3, H, W] each.
            conditions: what each image was asked to show.
        """
        asked, condition, mask = self.team.together(lambda: self._read(prompts))
        # global_step counts finished updates, so an interrupted and resumed run draws the same images; process i has
        # the i-th part of the batch, so they are also the same on any number of processes.
        first = self.team.index * len(prompts)
        seeds = [
            image_seed(self.recipe.seed, trainer.state.global_step, first + index) for index in range(len(prompts))
        ]
        dropped = [is_dropped(seed, self.recipe.grpo.condition_dropout) for seed in seeds]
        with self.stopwatch.measure("rollout"):
            with whole_model(trainer) as model:
                drawn = self.team.together(lambda: self._draw(model, condition, mask, seeds, trainer))
            images = [image for tokens, _ in drawn for image in self.policy.decode(tokens)]
        logprobs = [row for _, chunk in drawn for row in chunk.tolist()]
        return {
            "prompt_ids": self._training_prompts(condition, mask, torch.tensor(dropped), trainer),
            "completion_ids": [row for tokens, _ in drawn for row in tokens.tolist()],
            "logprobs": [[None] * len(row) if drop else row for drop, row in zip(dropped, logprobs, strict=True)],
            "images": images,
            "conditions": asked,
        }

    def _read(self, prompts: list[str]) -> tuple[list[Condition], Tensor, Tensor | None]:
        """What is asked for, and what the model takes for it."""
        with self.stopwatch.measure("text"):
            asked = [self.conditions[int(prompt)] for prompt in prompts]
            return asked, *self.policy.embed(asked)

    def _training_prompts(
        self, condition: Tensor, mask: Tensor | None, dropped: Tensor, trainer: GRPOTrainer
    ) -> list[list[int]]:
        """The prompts of the training pass; for captions the models are told first what those count into."""
        config = self.policy.model.config
        dropped = dropped.to(condition.device)
        if mask is None:
            return torch.where(dropped, config.num_classes, condition)[:, None].tolist()
        null = self.policy.model.model.null_caption.to(condition.dtype)
        # The features of this batch and no other: those of a whole data set would not fit a GPU.
        table = torch.where(dropped[:, None, None], null, condition), mask
        self.policy.model.condition_table = table
        if trainer.ref_model is not None:
            trainer.accelerator.unwrap_model(trainer.ref_model).condition_table = table
        return [[row] * config.cls_token_num for row in range(len(condition))]

    def _draw(
        self, model: Any, condition: Tensor, mask: Tensor | None, seeds: Sequence[int], trainer: GRPOTrainer
    ) -> list[tuple[Tensor, Tensor]]:
        """Tokens int64 [B, T] and their log-probabilities float32 [B, T], `CHUNK` images at a time."""
        parts = [slice(at, at + CHUNK) for at in range(0, len(condition), CHUNK)]
        return [
            self._draw_part(model, condition[part], None if mask is None else mask[part], seeds[part], trainer)
            for part in parts
        ]

    def _draw_part(
        self, model: Any, condition: Tensor, mask: Tensor | None, seeds: Sequence[int], trainer: GRPOTrainer
    ) -> tuple[Tensor, Tensor]:
        sampling = self.recipe.sampling
        try:
            with trainer.accelerator.autocast():  # the precision of the training pass, or the ratio is not 1
                return sample_tokens(
                    model,
                    condition,
                    condition_mask=mask,
                    cfg_scale=sampling.cfg_scale,
                    temperature=sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                    seeds=seeds,
                    return_logprobs=self.recipe.grpo.logprob,
                )
        except UserError as error:  # the sampler's word for weights that are not numbers
            step = trainer.state.global_step
            raise UserError(f"after step {step}: {error}; if training diverged, lower grpo.learning_rate") from error
