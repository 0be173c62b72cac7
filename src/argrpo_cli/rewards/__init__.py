"""Reward models: the one table of their names, and scoring a batch of images with several of them.

from argrpo_cli.rewards import load_rewards
scores = load_rewards(["nano-clip", "nano-quality"]).score(images, conditions)   # name -> float32 [B]
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from argrpo_cli import __version__
from argrpo_cli.rewards.base import FAMILIES, Reward
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import BadPicture, UserError, first_line, offer, out_of_memory, refuse_secrets
from argrpo_cli.system.files import check_fetched, in_cache

if TYPE_CHECKING:
    from torch import Tensor, nn

    from argrpo_cli.recipe.sections import RewardSection

__all__ = [
    "FAMILIES", "REWARDS", "Reward", "RewardSet", "check_reward", "identity", "load_reward", "load_rewards",
    "reward_weights",
]  # fmt: skip

REWARDS = {  # name to the class that carries all else that is to be known of it
    "nano-clip": "argrpo_cli.rewards.nano:NanoClip",
    "nano-geneval": "argrpo_cli.rewards.nano:NanoGenEval",
    "nano-quality": "argrpo_cli.rewards.nano:NanoQuality",
    "nano-quality-t2i": "argrpo_cli.rewards.nano:NanoQualityT2I",
    "nano-critic": "argrpo_cli.rewards.nano:NanoCritic",
    "nano-critic-t2i": "argrpo_cli.rewards.nano:NanoCriticT2I",
    "clip": "argrpo_cli.rewards.clip:Clip",
    "clip-quantized": "argrpo_cli.rewards.clip:ClipQuantized",
    "hpsv2": "argrpo_cli.rewards.clip:HPSv2",
    "hpsv2-quantized": "argrpo_cli.rewards.clip:HPSv2Quantized",
    "maniqa": "argrpo_cli.rewards.maniqa:Maniqa",
    "judge-quality": "argrpo_cli.rewards.judge:JudgeQuality",
    "judge-fake": "argrpo_cli.rewards.judge:JudgeFake",
    "judge-weird": "argrpo_cli.rewards.judge:JudgeWeird",
    "aesthetic": "argrpo_cli.rewards.clip:Aesthetic",
    "imagereward": "argrpo_cli.rewards.imagereward:ImageReward",
    "pickscore": "argrpo_cli.rewards.clip:PickScore",
    "deqa": "argrpo_cli.rewards.judge.deqa:Deqa",
    "unified-reward": "argrpo_cli.rewards.judge:UnifiedReward",
    "geneval": "argrpo_cli.rewards.geneval:GenEval",
    "geneval2": "argrpo_cli.rewards.geneval2:GenEval2",
    "ocr": "argrpo_cli.rewards.ocr:Ocr",
    "loo-fid": "argrpo_cli.rewards.loo_fid:LooFid",
    "clusters": "argrpo_cli.rewards.clusters:Clusters",
    "stage-entropy": "argrpo_cli.rewards.stage_entropy:StageEntropy",
}

OPERATIONAL = ("url", "timeout", "concurrency", "attempts", "backoff")  # options that change no score
LIBRARIES = {"builtins", "torch", "transformers", "tokenizers", "open_clip", "httpx2", "PIL", "numpy"}


def check_reward(name: str) -> type[Reward]:
    """The class of a reward, which says what is to be known of it (see `Reward`); torch is not imported.

    A reward of one's own is `module:function`, or the name of an entry point of the group `argrpo.rewards`.

    Raises:
        UserError: there is no such reward, or one's own cannot be imported.
    """
    if name in REWARDS:
        module, _, attribute = REWARDS[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    from argrpo_cli.rewards.custom import find_function, reward_of

    if (function := find_function(name)) is not None:
        return reward_of(name, function)
    how = ", or module:function, or file.py:function, for one of your own"
    raise UserError(f"reward {name!r} is unknown{offer(name, REWARDS, 'rewards', more=how)}")


def published_factor(name: str) -> float:
    """What brings a reward's raw score to the scale of the others where nobody says so; 1 for one of one's own."""
    return check_reward(name).factor if name in REWARDS else 1.0


def check_options(name: str, options: Mapping[str, Any]) -> type[Reward]:
    """The class of a reward, which takes these options; UserError for an unknown reward or option, or another type."""
    refuse_secrets(options, f"reward {name}")
    try:
        json.dumps(options, default=str, allow_nan=False)
    except ValueError as error:  # what is kept of a run or of scores is JSON
        raise UserError(f"reward {name}: an option is inf or nan, and options are finite numbers") from error
    reward = check_reward(name)
    reward.check_options(options)
    return reward


def check_weights(name: str, options: Mapping[str, Any]) -> None:
    """UserError, before torch is loaded, for a reward whose files are neither on this machine nor can be fetched."""
    if name not in REWARDS:
        return  # one's own fetches what it likes
    reward = check_reward(name)
    for file in reward.needs(options).files:
        if in_cache(file.repo):  # of what is there in part, it is seen when it is opened whether that is enough
            continue
        option = next((key for key, one in reward.files.items() if one == file), None)
        try:
            check_fetched(file.repo, file.file if option else "")
        except UserError as error:
            mend = f"give it as the option {option} (--set {name}.{option}=FILE)"
            raise UserError(str(error).replace("give the file instead", mend)) from error


def load_reward(
    name: str, device: str = "cpu", options: Mapping[str, Any] | None = None, basis: Reward | None = None
) -> Reward:
    """Load one reward model by name, with options of its own.

    Args:
        basis: the loaded one that `Reward.derived` names, whose network then serves both.

    Raises:
        UserError: no such reward or option, weights that are missing or do not fit, a package that is not installed.
    """
    reward = check_options(name, options or {})
    try:
        return reward(device, *([] if basis is None else [basis]), **options or {})
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "argrpo_cli" or name not in REWARDS:
            raise
        raise UserError(f"reward {name} needs the package {missing}; install it: pip install {missing}") from error


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
        return {name: _identity(name, options or {}, reward) for name, reward in self.rewards.items()}

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
            why = self._why.pop(name, "") or self.rewards[name].last_error
            self.last_error[name] = (math.isnan(value) and why) or f"a score of {value:g}"
        return scores.masked_fill(wrong, math.nan)


def refuse_comparing(names: Sequence[str]) -> None:
    """UserError for a reward that compares the images of an update, where each image is scored by itself."""
    for name in names:
        if (scope := check_reward(name).scope) != "image":
            raise UserError(
                f"reward {name} compares the images of a {scope} with each other, and says nothing of one by itself; "
                "`argrpo train` and `argrpo score` can use it"
            )


def load_rewards(
    names: Sequence[str], device: str = "cpu", options: Mapping[str, Mapping[str, Any]] | None = None
) -> RewardSet:
    """Load reward models by name; all names are checked before anything is loaded.

    Args:
        options: name to the options of that reward.

    Raises:
        UserError: a name or option is unknown, or weights are missing.
    """
    options = options or {}
    for name in names:
        check_options(name, options.get(name, {}))
    rewards, bases = {}, {}
    for name in sorted(names, key=lambda name: check_reward(name).derived({}) is not None):  # what others need first
        basis, its_options = check_reward(name).derived(options.get(name, {})) or ("", {})
        if basis in rewards and its_options == options.get(basis, {}):
            bases[name] = basis
        rewards[name] = load_reward(name, device, options.get(name), rewards.get(bases.get(name)))
    return RewardSet({name: rewards[name] for name in names}, device, bases)


def identity(names: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
    """What decides the scores of each reward as far as it is known before anything is loaded, plain data.

    Name to "options" (those that change a score), "files" (stamps of those that options name), "code" (a digest of a
    function of one's own) and "argrpo" (the version). `RewardSet.identity` adds a hash of the networks.
    """
    return {name: _identity(name, options or {}) for name in names}


def _identity(name: str, options: Mapping[str, Mapping[str, Any]], loaded: Reward | None = None) -> dict[str, Any]:
    reward = check_reward(name)
    own = options.get(name, {})
    known = {
        "options": {key: value for key, value in own.items() if key not in OPERATIONAL},
        "files": _file_stamps(own),
        "code": None if name in REWARDS else _source_digest(reward.function),
        "argrpo": __version__,
    }
    if loaded is None:
        return known
    from argrpo_cli.networks.weights import fingerprint

    networks = _networks(loaded, set())
    return {**known, "weights": fingerprint(networks) if networks else None}


def _file_stamps(options: Mapping[str, Any]) -> dict[str, str]:
    """Size and time of the files that options name, and of those in folders that they name."""
    named = [Path(value) for value in options.values() if isinstance(value, str | Path) and str(value)]
    files = [
        file for path in named for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()
    ]
    return {str(file): f"{file.stat().st_size} {file.stat().st_mtime_ns}" for file in files}


def _source_digest(function: Callable[..., Any]) -> str:
    """A hash of the file that a function is in, "" where there is none: scores of other code are others."""
    try:
        return hashlib.sha256(Path(inspect.getsourcefile(function)).read_bytes()).hexdigest()[:16]
    except (TypeError, OSError):
        return ""


def _networks(value: object, seen: set[int]) -> list[nn.Module]:
    """The networks in an object of ours or of the user's, in its parts, and in lists and dictionaries of them."""
    from torch import nn

    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, nn.Module):
        return [value]
    if isinstance(value, list | tuple | dict):
        parts = list(value.values()) if isinstance(value, dict) else list(value)
    elif type(value).__module__.split(".")[0] in LIBRARIES or isinstance(value, type | ModuleType):
        parts = []
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    return [network for part in parts for network in _networks(part, seen)]


def reward_weights(section: RewardSection, family: Mapping[str, str]) -> dict[str, float]:
    """What each raw score is multiplied by before the sum of equation 10: lambda_family * weight * factor.

    Args:
        section: `rewards` of a recipe, whose order is kept.
        family: name of a reward to "conditional", "quality" or "realism".

    Raises:
        UserError: all products are 0, so that nothing would be trained.
    """
    weights = {}
    for term in section.terms:
        factor = published_factor(term.name) if term.factor is None else term.factor
        weights[term.name] = getattr(section, f"lambda_{family[term.name]}") * term.weight * factor
    if not any(weights.values()):
        raise UserError(
            "rewards: every reward has weight 0 (lambda x weight x factor), so there is nothing to train; "
            "set one of rewards.lambda_conditional, lambda_quality, lambda_realism above 0"
        )
    return weights
