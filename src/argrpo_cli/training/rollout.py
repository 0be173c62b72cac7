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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from argrpo_cli.seeds import happens, of_training
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.processes import ALONE, Team
from argrpo_cli.training.gathering import whole_model
from argrpo_cli.training.launch import drawn_at_once
from argrpo_cli.training.scorer import EXTRA, REPLACED

if TYPE_CHECKING:
    from transformers import Trainer

    from argrpo_cli.policy import Policy
    from argrpo_cli.policy.protocol import Drawn, Encoded
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.shapes import Condition, Sampling
    from argrpo_cli.training.conditions import Conditions
    from argrpo_cli.training.grpo import ImageGRPOTrainer
    from argrpo_cli.training.scorer import BatchScorer
    from argrpo_cli.training.selection import Selection


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


class Batch(NamedTuple):
    """Images of a process, one entry each: seed, condition, T token ids and log-probabilities, uint8 [3, H, W]."""

    seeds: list[int]
    conditions: list[Condition]
    tokens: list[list[int]]
    logp: list[list[float]]
    images: list[Tensor]


@dataclass(frozen=True)
class Rollout:
    """Draws the images of one batch.

    Attributes:
        recipe: `sampling`, `grpo.logprob`, `grpo.condition_dropout` and `seed` are read.
        conditions: what the prompts of `conditions.prompt_dataset` count into.
        policy: turns conditions into what the model takes, and tokens into images.
        team: the processes that draw the batch together, each its part.
        scorer, selection: what `grpo.dynamic_sampling` and `grpo.spread_floor` choose by; else the order of the prompts
            stands, and the images are scored when TRL asks.
    """

    recipe: Recipe
    conditions: Conditions
    policy: Policy
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    team: Team = ALONE
    scorer: BatchScorer | None = None
    selection: Selection | None = None

    def __call__(self, prompts: list[str], trainer: ImageGRPOTrainer) -> dict[str, Any]:
        """One image per prompt, in order; the prompts are this process's part of the batch.

        With `grpo.spread_floor` other conditions take the place of the prompts', with `grpo.dynamic_sampling` that of
        those whose groups have no spread.

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
        chosen, size = [int(prompt) for prompt in prompts], self.recipe.grpo.group_size
        # global_step counts finished updates, so an interrupted and resumed run draws the same images; process i has
        # the i-th part of the batch, so they are also the same on any number of processes.
        step, count = trainer.state.global_step, len(prompts)
        slots = range(self.team.index * count, (self.team.index + 1) * count)
        if self.selection is not None and self.selection.floor is not None:
            every = self.selection.draw(count * self.team.count // size, step)
            chosen = [every[slot // size] for slot in slots]
        seeds = [of_training(self.recipe.seed, step, slot) for slot in slots]
        batch, encoded = self._images(chosen, seeds, trainer)
        changed = self.recipe.selects and self._replace(batch, chosen, slots, trainer)
        dropped = torch.tensor([happens("drop", seed, self.recipe.grpo.condition_dropout) for seed in batch.seeds])
        # The conditions of this batch and no other: those of a whole data set would not fit a GPU.
        trainer.encoded = self.policy.encode(batch.conditions, dropped) if changed or dropped.any() else encoded
        if self.recipe.grpo.tokens.method == "guidance":
            trainer.null = self.policy.encode(batch.conditions, torch.ones_like(dropped))
        return {
            "prompt_ids": [[row] for row in range(count)],
            "completion_ids": batch.tokens,
            "logprobs": [[None] * len(row) if drop else row for drop, row in zip(dropped, batch.logp, strict=True)],
            "images": batch.images,
            "conditions": batch.conditions,
        }

    def _images(
        self, chosen: Sequence[int], seeds: Sequence[int], trainer: ImageGRPOTrainer
    ) -> tuple[Batch, Encoded | None]:
        """An image of each of these conditions, which may be none; all processes must call it."""
        sampling, logp = self.recipe.sampling, self.recipe.grpo.logprob
        conditions, encoded = self.team.together(lambda: self.read(chosen) if chosen else ([], None))
        with self.stopwatch.measure("rollout"):
            with whole_model(trainer) as model:
                parts = self.team.together(lambda: self.draw(model, encoded, seeds, trainer, sampling, logp))
            with trainer.accelerator.autocast():  # in bfloat16 a fifth of a level of 256 away, of five times the speed
                images = [image for part in parts for image in self.policy.decode(part.tokens)]
        tokens, logprobs = ([row for part in parts for row in part[index].tolist()] for index in (0, 1))
        return Batch(list(seeds), conditions, tokens, logprobs, images), encoded

    def _replace(self, batch: Batch, chosen: Sequence[int], slots: range, trainer: ImageGRPOTrainer) -> bool:
        """Score the batch, and draw other conditions in the place of groups without spread, as long as the bound on
        images lasts (dynamic sampling, Yu et al. 2025); whether there were any.

        Groups whose spread is not known stay: there a reward has failed.
        """
        recipe, size, step = self.recipe, self.recipe.grpo.group_size, trainer.state.global_step
        total = len(slots) * self.team.count
        left = round(max(recipe.grpo.dynamic_sampling - 1, 0) * total) // size  # groups that may still be drawn
        scores = self.scorer.measure(batch.images, batch.conditions)
        spreads = self.scorer.spreads(scores)
        self.selection.observe(self.team.gather(torch.tensor(chosen))[::size].tolist(), spreads)
        replaced: set[int] = set()
        drawn = number = 0
        while flat := (spreads == 0).nonzero().flatten().tolist()[:left]:
            number += 1
            fresh = dict(zip(flat, self.selection.draw(len(flat), step, number), strict=True))
            own = [index for index, slot in enumerate(slots) if slot // size in fresh]
            seeds = [of_training(recipe.seed, step, number * total + slots[index]) for index in own]
            others, _ = self._images([fresh[slots[index] // size] for index in own], seeds, trainer)
            for column, new in zip(batch, others, strict=True):
                for index, value in zip(own, new, strict=True):
                    column[index] = value
            if own:
                scores.put(own, self.scorer.measure(others.images, others.conditions))
            spreads = self.scorer.spreads(scores)
            self.selection.observe(list(fresh.values()), spreads[flat])
            left, drawn, replaced = left - len(flat), drawn + len(flat), replaced | set(flat)
        counts = {REPLACED: len(replaced) / len(spreads), EXTRA: float(drawn * size)}
        self.scorer.remember(batch.images, scores, counts)
        return bool(replaced)

    def read(self, prompts: Sequence[str | int]) -> tuple[list[Condition], Encoded]:
        """What is to be shown, and what the model takes for it."""
        captions = self.policy.card.reads == "captions"  # of classes there is nothing to read
        with self.stopwatch.measure("text") if captions else nullcontext():
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
