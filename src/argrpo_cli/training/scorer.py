"""The reward models as TRL reward functions: one function per reward, all scores of a batch computed once (eq. 10)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from argrpo_cli.system.errors import UserError
from argrpo_cli.system.processes import ALONE, Team

if TYPE_CHECKING:
    from argrpo_cli.rewards import RewardSet
    from argrpo_cli.shapes import Condition
    from argrpo_cli.training.rollout import Stopwatch

# Names under which the reward functions hand their measurements to TRL's log.
WITHIN_GROUP_STD = "reward_within_group_std"
LEFT_OUT = "images_left_out"
WITHOUT_SPREAD = "groups_without_spread"
REPLACED, EXTRA = "groups_replaced", "images_extra"

NO_SPREAD = 1e-6  # of a group's total reward: what rounding leaves of equal scores
WINDOW = 4  # batches over which missing scores are counted: a server that restarts is no reason to stop


def spread_of(name: str) -> str:
    """The name under which the mean within-group standard deviation of one reward is logged."""
    return f"within_group_std/{name}"


def group_std(rewards: Tensor) -> Tensor:
    """Sample standard deviation of each group of rewards [groups, G], leaving missing ones (NaN) out.

    Returns:
        [groups]; NaN where fewer than two rewards are known.
    """
    known = ~rewards.isnan()
    deviation = torch.where(known, rewards - rewards.nanmean(-1, keepdim=True), 0)
    freedom = known.sum(-1) - 1
    return torch.where(freedom > 0, deviation.square().sum(-1) / freedom, torch.nan).sqrt()


@dataclass
class BatchScorer:
    """Scores a batch when the first reward function asks, and answers the others from memory.

    Attributes:
        weights: what each raw score counts; 0 for one that is only measured.
        max_missing: the share of scores of a reward that counts, over the latest `WINDOW` batches, that may be missing.
        fail: told once it is more, or a reward cannot be asked at all. The images without scores are left out.
        team: the processes that score the batch together, each its own images. What is measured and decided here is
            that of the whole batch, the same in all of them; a group may lie on several.
        blank: no image of the latest batch has a score, so that there is nothing to learn from it.
    """

    rewards: RewardSet
    weights: dict[str, float]
    group_size: int
    stopwatch: Stopwatch
    max_missing: float = 1.0
    fail: Callable[[str], None] = lambda why: None
    team: Team = ALONE
    blank: bool = field(default=False, init=False)
    _images: list[Tensor] | None = field(default=None, init=False, repr=False)
    _measured: tuple[list[Tensor], Tensor, dict[str, float]] | None = field(default=None, init=False, repr=False)
    _scores: dict[str, list[float | None]] = field(default_factory=dict, init=False, repr=False)
    _missing: deque[Tensor] = field(default_factory=lambda: deque(maxlen=WINDOW), init=False, repr=False)

    def functions(self) -> list[Callable[..., list[float | None]]]:
        """One TRL reward function per reward, named after it (TRL logs it under that name)."""
        return [self._function(name) for name in self.weights]

    def _function(self, name: str) -> Callable[..., list[float | None]]:
        def reward(
            images: list[Tensor], conditions: list[Condition], log_metric: Callable[[str, float], None], **_: Any
        ) -> list[float | None]:
            # TRL passes the same list to every reward function of a batch, and a new one for the next batch.
            if images is not self._images:
                self._scores = self._score(images, conditions, log_metric)
                self._images = images
            return self._scores[name]

        reward.__name__ = name
        return reward

    def _score(
        self, images: list[Tensor], conditions: list[Condition], log_metric: Callable[[str, float], None]
    ) -> dict[str, list[float | None]]:
        if self._measured is not None and all(map(is_, images, self._measured[0])):
            _, own, counts = self._measured
            for name, count in counts.items():
                log_metric(name, count)
        else:
            own = self.measure(images, conditions)
        table = self.team.gather(own)
        self._watch(table.isnan().double().mean(dim=0))
        # TRL sums the rewards of a sample with nansum, which would count a missing one as 0. A sample that lacks any
        # reward that counts gets None for all: TRL then leaves it out of its group and sets its advantage to 0.
        total = self._total(table)
        missing = total.isnan()
        table[missing] = torch.nan
        self.blank = bool(missing.all())
        spreads = group_std(total.view(-1, self.group_size))
        known = ~spreads.isnan()
        if known.any():
            log_metric(WITHIN_GROUP_STD, spreads[known].mean().item())
            log_metric(WITHOUT_SPREAD, (spreads[known] < NO_SPREAD).double().mean().item())
        for name, column in zip(self.weights, table.T, strict=True):
            spread = group_std(column.reshape(-1, self.group_size)).nanmean().item()
            if not math.isnan(spread):
                log_metric(spread_of(name), spread)
        log_metric(LEFT_OUT, float(missing.sum()))
        first = self.team.index * len(own)
        columns = zip(self.weights, table[first : first + len(own)].T.tolist(), strict=True)
        return {name: [None if math.isnan(score) else score for score in column] for name, column in columns}

    def measure(self, images: list[Tensor], conditions: list[Condition]) -> Tensor:
        """Raw scores float64 [N, rewards] of this process's images; NaN where one is missing."""
        try:
            with self.stopwatch.measure("reward"), torch.inference_mode():
                raw = self.rewards.score(torch.stack(images), conditions)
        except UserError as error:
            self.fail(str(error))
            raw = {name: torch.full((len(images),), torch.nan) for name in self.weights}
        own = torch.stack([raw[name].detach().double().cpu() for name in self.weights], dim=1)
        return own.masked_fill(~own.isfinite(), torch.nan)

    def spreads(self, own: Tensor) -> Tensor:
        """Standard deviation of the total reward in each group of the whole batch [groups], from what `measure` gave
        for this process's part of it; NaN where fewer than two are known. All processes must call it."""
        return group_std(self._total(self.team.gather(own)).view(-1, self.group_size))

    def remember(self, images: list[Tensor], own: Tensor, counts: dict[str, float]) -> None:
        """Take these as the scores of the images when TRL asks for them, and log `counts` then."""
        self._measured = images, own, counts

    def _total(self, table: Tensor) -> Tensor:
        """Total reward [N] of rows of raw scores [N, rewards]; NaN where one that counts is missing."""
        weights = torch.tensor(list(self.weights.values()), dtype=table.dtype)
        missing = table[:, weights != 0].isnan().any(dim=1)
        return (table.nan_to_num() * weights).sum(dim=1).masked_fill(missing, torch.nan)

    def _watch(self, missing: Tensor) -> None:
        """Fail when too many scores were missing; `missing` [rewards] is their share in the latest batch."""
        self._missing.append(missing)
        shares = torch.stack(list(self._missing)).mean(dim=0)
        for (name, weight), share in zip(self.weights.items(), shares, strict=True):
            if weight and share > self.max_missing and len(self._missing) == WINDOW:
                last = self.rewards.last_error.get(name)
                why = f" (the latest: {last})" if last else ""
                self.fail(f"reward {name} lacks {share:.0%} of the scores of the last {WINDOW} batches{why}")
