"""The reward models as TRL reward functions: one function per reward, all scores of a batch computed once (eq. 10)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import is_
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import load_tensors, save_tensors
from argrpo_cli.system.processes import ALONE, Team

if TYPE_CHECKING:
    from argrpo_cli.rewards import RewardSet
    from argrpo_cli.shapes import Condition
    from argrpo_cli.training.rollout import Stopwatch

# Names under which the reward functions hand their measurements to TRL's log.
WITHIN_GROUP_STD = "reward_within_group_std"
LEFT_OUT = "images_left_out"
WITHOUT_SPREAD = "groups_without_spread"
STATE = "rewards.safetensors"  # of a checkpoint
REPLACED, EXTRA = "groups_replaced", "images_extra"

ROUNDING = 4 * torch.finfo(torch.float32).eps  # of a score, in parts of it: after a product and a sum of four terms
ADVANTAGE_EPSILON = 1e-4  # TRL's, added to a deviation
WINDOW = 4  # batches over which missing scores are counted: a server that restarts is no reason to stop


def spread_of(name: str) -> str:
    """The name under which the mean within-group standard deviation of one reward is logged."""
    return f"within_group_std/{name}"


def group_std(rewards: Tensor) -> Tensor:
    """Sample standard deviation of each group of rewards [groups, G], leaving missing ones (NaN) out.

    Returns:
        [groups]; NaN where fewer than two rewards are known, and exactly 0 where all that are known are equal.
    """
    known = ~rewards.isnan()
    above = rewards - rewards.nan_to_num(torch.inf).amin(-1, keepdim=True)  # 0 if all are equal, unlike their mean's
    deviation = torch.where(known, above - above.nanmean(-1, keepdim=True), 0)
    freedom = known.sum(-1) - 1
    return torch.where(freedom > 0, deviation.square().sum(-1) / freedom, torch.nan).sqrt()


def settled(scores: Tensor, size: Tensor | None = None) -> Tensor:
    """Scores [..., G] of groups; where those of a group differ by rounding alone, all are the lowest of them.

    Equal rewards must have advantages of exactly 0, since AdamW makes a whole step of a remainder however small. Which
    differences are remainders, no fixed number can say: rewards of 1e-9 and 2e-9 differ, 1e8 and 1e8 + 8 hardly do. But
    scores are float32, computed with relative errors, so differences up to `ROUNDING` of their size mean nothing.

    Args:
        scores: NaN for a missing one, which stays so.
        size: [...], of what the scores were computed from; that of the largest by default.
    """
    low, high = scores.nan_to_num(torch.inf).amin(-1), scores.nan_to_num(-torch.inf).amax(-1)
    size = torch.maximum(low.abs(), high.abs()) if size is None else size
    level = (high - low <= ROUNDING * size)[..., None] & ~scores.isnan()
    return torch.where(level, low[..., None], scores)


class Measured(NamedTuple):
    """What was measured of images of one process.

    Attributes:
        table: raw scores float64 [N, rewards]; NaN where one is missing, and of rewards that compare images.
        seen: what those have to know of each image, [N, ...] by name; one that failed is not there.
        conditions: N.
    """

    table: Tensor
    seen: dict[str, Tensor]
    conditions: list[Condition]

    def put(self, places: list[int], others: Measured) -> None:
        """Other images in these places."""
        self.table[places] = others.table
        for name in list(self.seen):
            rows = self.seen.pop(name)
            if name in others.seen:
                self.seen[name] = rows.clone()
                self.seen[name][places] = others.seen[name]
        for place, condition in zip(places, others.conditions, strict=True):
            self.conditions[place] = condition


@dataclass
class BatchScorer:
    """Scores a batch when the first reward function asks, and answers the others from memory.

    Attributes:
        weights: what each raw score counts; 0 for one that is only measured.
        max_missing: the share of scores of a reward that counts, over the latest `WINDOW` batches, that may be missing.
        fail: told once it is more, or a reward cannot be asked at all. The images without scores are left out.
        team: the processes that score the batch together, each its own images. What is measured and decided here is
            that of the whole batch, the same in all of them; a group may lie on several.
        aggregation: of several rewards, `grpo.aggregation`.
        entropies: float32 [N, 2] of this process's images, see `image_entropies`; the trainer sets them before it asks
            for the scores of rewards that read the policy.
        table: scores of the latest batch, float64 [B, rewards], `settled`; NaN for an image that is left out.
        spread: by how much the images of each of its groups differ, [groups], as `spreads` gives it.
        summed: sum_k w_k z_k of the latest batch, float64 [B], 0 for an image that is left out; None where rewards are
            not each normalised first.
    """

    rewards: RewardSet
    weights: dict[str, float]
    group_size: int
    stopwatch: Stopwatch
    max_missing: float = 1.0
    fail: Callable[[str], None] = lambda why: None
    team: Team = ALONE
    aggregation: str = "sum_then_normalize"
    entropies: Tensor | None = field(default=None, init=False, repr=False)
    table: Tensor = field(init=False, repr=False)
    spread: Tensor = field(init=False, repr=False)
    summed: Tensor | None = field(default=None, init=False, repr=False)
    _images: list[Tensor] | None = field(default=None, init=False, repr=False)
    _measured: tuple[list[Tensor], Measured, dict[str, float]] | None = field(default=None, init=False, repr=False)
    _scores: dict[str, list[float | None]] = field(default_factory=dict, init=False, repr=False)
    _missing: deque[Tensor] = field(default_factory=lambda: deque(maxlen=WINDOW), init=False, repr=False)

    def __post_init__(self) -> None:
        comparing = [name for name in self.weights if self.rewards.scope[name] != "image"]
        self.policy_readers = [name for name in comparing if self.rewards.rewards[name].reads_policy]
        # Those that read the policy come last: they also ask which image is best by all others.
        self.comparing = [name for name in comparing if name not in self.policy_readers] + self.policy_readers

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
        table = self._whole(own, advance=True)
        self._watch(table.isnan().double().mean(dim=0))
        # TRL sums the rewards of a sample with nansum, which would count a missing one as 0. A sample that lacks any
        # reward that counts gets None for all: TRL then leaves it out of its group and sets its advantage to 0.
        scores, total, self.spread, summed = self._groups(table)
        self.summed = None if summed is None else summed.nan_to_num().flatten()
        self.table = scores.transpose(1, 2).flatten(0, 1)
        if not self.blank:
            log_metric(WITHIN_GROUP_STD, group_std(total).nanmean().item())
            log_metric(WITHOUT_SPREAD, (self.spread[~self.spread.isnan()] == 0).double().mean().item())
        for name, spread in zip(self.weights, group_std(scores).nanmean(0).tolist(), strict=True):
            if not math.isnan(spread):
                log_metric(spread_of(name), spread)
        log_metric(LEFT_OUT, float(total.isnan().sum()))
        first = self.team.index * len(images)
        columns = zip(self.weights, self.table[first : first + len(images)].T.tolist(), strict=True)
        return {name: [None if math.isnan(score) else score for score in column] for name, column in columns}

    def measure(self, images: list[Tensor], conditions: list[Condition]) -> Measured:
        """What can be measured of this process's images by themselves."""
        scores, seen = {}, {}
        try:
            with self.stopwatch.measure("reward"), torch.inference_mode():
                scores, seen = self.rewards.look(torch.stack(images), conditions)
        except UserError as error:
            self.fail(str(error))
        missing = torch.full((len(images),), torch.nan)
        own = torch.stack([scores.get(name, missing).detach().double().cpu() for name in self.weights], dim=1)
        return Measured(own.masked_fill(~own.isfinite(), torch.nan), seen, list(conditions))

    def _whole(self, own: Measured, advance: bool = False) -> Tensor:
        """Raw scores float64 [B, rewards] of the whole batch, each process knowing its `own` part of it.

        Args:
            advance: the batch is settled, and rewards take it up into what they remember.
        """
        table = self.team.gather(own.table)
        if self.comparing:
            conditions = [condition for part in self.team.exchange(own.conditions) for condition in part]
        for name in self.comparing:
            if name in self.policy_readers:
                seen = self._policy_and_total(table)
            else:
                everywhere = all(self.team.exchange(name in own.seen))
                seen = self.team.gather(own.seen[name]) if everywhere else None
            scores = torch.full((len(table),), torch.nan)
            try:
                with self.stopwatch.measure("reward"):
                    scores = self.rewards.compare(name, seen, conditions, self.group_size)
                    if advance and seen is not None:
                        self.rewards.advance(name, seen)
            except UserError as error:
                self.fail(str(error))
            # Those of the first process: one's own function may draw numbers, and all must have the same.
            table[:, list(self.weights).index(name)] = self.team.gather(scores.double())[: len(table)]
        return table.masked_fill(~table.isfinite(), torch.nan)

    def _policy_and_total(self, table: Tensor) -> Tensor:
        """`entropies` of the whole batch beside the total of those rewards that do not read them, float64 [B, 3]."""
        rest = table.clone()
        rest[:, [list(self.weights).index(name) for name in self.policy_readers]] = 0
        _, total, _, summed = self._groups(rest)
        total = total if summed is None else summed
        return torch.cat([self.team.gather(self.entropies).double(), total.reshape(-1, 1)], dim=1)

    def save(self, folder: Path) -> None:
        """Add what rewards remember of earlier updates to a checkpoint, if they do."""
        states = {name: self.rewards.rewards[name].state() for name in self.comparing}
        if whole := {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}:
            save_tensors(folder / STATE, whole)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        whole = load_tensors(folder / STATE) or {}
        for name in self.comparing:
            start = f"{name}/"
            if state := {key.removeprefix(start): one for key, one in whole.items() if key.startswith(start)}:
                self.rewards.rewards[name].restore(state)

    def spreads(self, own: Measured) -> Tensor:
        """How much the images of each group of the whole batch differ [groups], from what `measure` gave for this
        process's part of it: standard deviation of the total reward; where each reward is normalised before their sum,
        the weighted sum of their deviations. NaN where fewer than two images are known, 0 where there is nothing to
        compare, or rewards cancel. All processes must call it."""
        return self._groups(self._whole(own))[2]

    @property
    def blank(self) -> bool:
        """Whether no two images of any group of the latest batch have scores: nothing is known that could be learnt."""
        return bool(self.spread.isnan().all())

    def remember(self, images: list[Tensor], own: Measured, counts: dict[str, float]) -> None:
        """Take these as the scores of the images when TRL asks for them, and log `counts` then."""
        self._measured = images, own, counts

    def _groups(self, table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of raw scores [B, rewards]: scores [groups, rewards, G], total reward [groups, G], spread [groups], and sum
        of normalised rewards [groups, G], or None.

        All are `settled`, a total by the size of those rewards that differ in the group: beside a constant of 1e8 one
        of 0 and 1 counts. NaN for images that lack a reward that counts.
        """
        weights = torch.tensor(list(self.weights.values()), dtype=table.dtype)
        missing = table[:, weights != 0].isnan().any(dim=1, keepdim=True)
        table = table.masked_fill(missing, torch.nan)
        scores = settled(table.view(-1, self.group_size, len(weights)).transpose(1, 2))
        spread = group_std(scores)
        size = torch.where(spread > 0, scores.nan_to_num().abs().amax(-1), 0) @ weights.abs()
        total = (weights[:, None] * scores.nan_to_num()).sum(dim=1)
        total = settled(total.masked_fill(missing.view_as(total), torch.nan), size)
        if self.aggregation == "sum_then_normalize":
            return scores, total, group_std(total), None
        # As TRL normalises them. Rewards that pull apart alike cancel, and rounding leaves something of their sum.
        z = ((scores - scores.nanmean(-1, keepdim=True)) / (spread[..., None] + ADVANTAGE_EPSILON)).nan_to_num()
        size = z.abs().amax(-1) @ weights.abs()
        together = settled((weights[:, None] * z).sum(dim=1).masked_fill(total.isnan(), torch.nan), size)
        deviations = spread[:, weights != 0] @ weights[weights != 0].abs()
        return scores, total, deviations.masked_fill(group_std(together) == 0, 0), together

    def _watch(self, missing: Tensor) -> None:
        """Fail when too many scores were missing; `missing` [rewards] is their share in the latest batch."""
        self._missing.append(missing)
        shares = torch.stack(list(self._missing)).mean(dim=0)
        for (name, weight), share in zip(self.weights.items(), shares, strict=True):
            if weight and share > self.max_missing and len(self._missing) == WINDOW:
                last = self.rewards.last_error.get(name)
                why = f" (the latest: {last})" if last else ""
                self.fail(f"reward {name} lacks {share:.0%} of the scores of the last {WINDOW} batches{why}")
