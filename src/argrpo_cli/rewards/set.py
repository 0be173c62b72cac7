"""Scoring a batch of images with several rewards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from argrpo_cli.rewards.base import Reward
from argrpo_cli.rewards.table import check_reward, identity_of
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import BadPicture, UserError, first_line, out_of_memory

if TYPE_CHECKING:
    from torch import Tensor


class RewardSet:
    """Several reward models that look at the same images.

    Attributes:
        family, scope: name to family and scope.
        missing: how many scores of each reward were missing, not finite or out of range.
        last_error: what was wrong with the latest of those.
        tolerated: rewards that may fail altogether: their scores are missing then, instead of an error.
        mixed: compute those in bfloat16 that say `Reward.mixed`.
        bases: rewards that are derived from the scores of another of the set, to its name.
    """

    def __init__(self, rewards: dict[str, Reward], device: str = "cpu", bases: Mapping[str, str] | None = None):
        self.rewards, self.device, self.bases = rewards, device, bases or {}
        self.names = list(rewards)
        self.entries = {name: check_reward(name) for name in self.names}
        self.family = {name: entry.family for name, entry in self.entries.items()}
        self.scope = {name: reward.scope for name, reward in rewards.items()}
        self.missing: Counter[str] = Counter()
        self.tolerated: set[str] = set()
        self.mixed = False
        self.last_error: dict[str, str] = {}
        self._why: dict[str, str] = {}  # of tolerated ones, why they failed
        self._most: dict[str, int] = {}  # images at a time, of rewards that ran out of memory

    def identity(self, options: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
        """What decides the scores of each reward, plain data: as `identity`, with a hash of its networks as "weights".

        Args:
            options: those that the set was loaded with.
        """
        return {name: identity_of(name, options or {}, reward) for name, reward in self.rewards.items()}

    def only(self, names: Sequence[str]) -> RewardSet:
        """Some of the same rewards, those that they are derived from among them."""
        bases = {name: basis for name, basis in self.bases.items() if name in names}
        return RewardSet({name: self.rewards[name] for name in names}, self.device, bases)

    def check(self, conditions: Sequence[Condition]) -> None:
        """Raise UserError for a condition that a reward cannot read, before anything is scored."""
        for reward in self.rewards.values():
            reward.check(conditions)

    def score(self, images: Tensor, conditions: Sequence[Condition], batch_size: int = 64) -> dict[str, Tensor]:
        """Raw scores of uint8 images [B, 3, H, W]: name to float32 [B], on the device of the models.

        A reward of scope batch compares all of them, one of scope group those with the same condition. A score that is
        not finite or lies outside the reward's range is NaN, as a missing one is, and counted in `missing`.
        """
        scores, seen = self.look(images, conditions, batch_size)
        return {
            name: scores[name] if name in scores else self.compare(name, seen.get(name), conditions)
            for name in self.rewards
        }

    def look(
        self, images: Tensor, conditions: Sequence[Condition], batch_size: int = 64
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The scores, as `score`, of rewards that look at each image by itself; and of each other one what it will
        compare, [B, ...] on the CPU, or nothing where it failed.

        Rewards that wait for another machine do so while the others compute. Those run on `batch_size` images at a
        time, moved to the device once for all, and on half as many as long as memory does not suffice.
        """
        import torch

        if len(images) != len(conditions):
            raise ValueError(f"{len(images)} images but {len(conditions)} conditions")
        for name in self.rewards:
            if self.scope[name] == "image":  # one that compares images says later why it failed
                self._why.pop(name, None)
        remote = {name: reward for name, reward in self.rewards.items() if reward.remote}
        parts: dict[str, list[Tensor | None]] = {
            name: []
            for name, reward in self.rewards.items()
            if not (name in remote or name in self.bases or reward.reads_policy)
        }
        with ThreadPoolExecutor(max_workers=max(1, len(remote))) as waiting:
            pending = {name: waiting.submit(self._scores, name, images, conditions) for name in remote}
            try:
                for start in range(0, len(images), batch_size):
                    chunk = images[start : start + batch_size].to(self.device)
                    for name in parts:
                        parts[name].append(self._scores(name, chunk, conditions[start : start + batch_size]))
                answers = {name: answer.result().to(self.device) for name, answer in pending.items()}
            except BaseException:  # Ctrl-C comes here, and not to the threads that wait for a server
                for reward in remote.values():
                    reward.stop()
                raise
        empty = torch.zeros(0, device=self.device)
        whole = {name: chunks for name, chunks in parts.items() if all(chunk is not None for chunk in chunks)}
        raw = {name: torch.cat(chunks) if chunks else empty for name, chunks in whole.items()}
        seen = {name: raw.pop(name).cpu() for name in list(raw) if self.scope[name] != "image"}
        raw |= answers
        raw |= {name: self.rewards[name].derive(raw[basis].float()) for name, basis in self.bases.items()}
        return {name: self._trusted(name, raw[name].float(), len(images)) for name in self.rewards if name in raw}, seen

    def compare(
        self, name: str, seen: Tensor | None, conditions: Sequence[Condition], group_size: int | None = None
    ) -> Tensor:
        """Raw scores, as `score`, by one reward of scope group or batch.

        Args:
            seen: what it saw of all N images, as `look` gives it, or, of one that reads the policy, the training; None
                where it failed, so that all scores are missing.
            group_size: images side by side that are a group; by default those with the same condition are one.
        """
        import torch

        rows = list(range(len(conditions)))
        if self.scope[name] == "group":
            groups: dict[Any, list[int]] = {}
            for row in rows:
                groups.setdefault(conditions[row] if group_size is None else row // group_size, []).append(row)
        else:
            groups = {None: rows}
        scores = torch.full((len(rows),), math.nan)
        for places in groups.values():
            same = [conditions[place] for place in places]
            part = None
            if seen is not None:
                part = self._attempt(name, partial(self.rewards[name].compare, seen[places], same))
            if part is not None:
                scores[places] = self._shaped(name, part, len(places)).float().cpu()
        return self._trusted(name, scores, len(rows)).to(self.device)

    def advance(self, name: str, seen: Tensor) -> None:
        """See `Reward.advance`."""
        self.rewards[name].advance(seen)

    def _scores(self, name: str, images: Tensor, conditions: Sequence[Condition]) -> Tensor | None:
        """What one reward says of each image or, if it compares images, sees of it; None where that failed."""
        import torch

        result = self._attempt(name, partial(self._score, name, images, conditions))
        return torch.full((len(images),), math.nan) if result is None and self.scope[name] == "image" else result

    def _attempt(self, name: str, action: Callable[[], Tensor]) -> Tensor | None:
        """What an action of one reward gives; its error is told under its name, or None given where it is tolerated."""
        import torch

        try:
            with torch.inference_mode():
                return action()
        except (UserError, RuntimeError) as error:
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
            why = why if name in why else f"reward {name} failed: {why}"
            if name not in self.tolerated:
                raise (BadPicture if isinstance(error, BadPicture) else UserError)(why) from error
            self._why[name] = why
            return None

    def _score(self, name: str, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        import torch

        parts, start, reward = [], 0, self.rewards[name]
        ask = reward.score if self.scope[name] == "image" else reward.look
        coarse = torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.mixed and reward.mixed)
        while start < len(images):
            most = self._most.get(name, len(images))
            part = slice(start, start + most)
            try:
                with coarse:
                    parts.append(ask(images[part], conditions[part]))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                now = len(images[part])
                if now == 1:
                    why = f"reward {name}: the memory of {self.device} does not suffice for one image"
                    raise UserError(why) from error
                self._most[name] = now // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            start += most
        return torch.cat(parts)

    @staticmethod
    def _shaped(name: str, scores: Tensor, count: int) -> Tensor:
        if scores.shape != (count,):
            raise UserError(f"reward {name} gave scores of shape {list(scores.shape)} for {count} images")
        return scores

    def _trusted(self, name: str, scores: Tensor, count: int) -> Tensor:
        scores = self._shaped(name, scores, count)
        entry = self.entries[name]
        wrong = ~scores.isfinite() | (scores < entry.low) | (scores > entry.high)
        if wrong.any():
            self.missing[name] += int(wrong.sum())
            value = scores[wrong][-1].item()
            why = self._why.get(name) or self._why.get(self.bases.get(name)) or self.rewards[name].last_error
            self.last_error[name] = (math.isnan(value) and why) or f"a score of {value:g}"
            if self.scope[name] != "image":
                self._why.pop(name, None)
        return scores.masked_fill(wrong, math.nan)
