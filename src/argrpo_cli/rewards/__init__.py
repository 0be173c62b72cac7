"""Reward models: the one table of their names, and scoring a batch of images with several of them.

from argrpo_cli.rewards import load_rewards
scores = load_rewards(["nano-clip", "nano-quality"]).score(images, conditions)   # name -> float32 [B]
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, get_type_hints

from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError, did_you_mean, first_line, out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = ("conditional", "quality", "realism")  # r_C, r_I, r_R of equations 7 to 9


class Entry(NamedTuple):
    """Where a reward lives (imported when asked for), and what its scores are.

    Attributes:
        family: one of `FAMILIES`; it decides which lambda applies.
        weights: the bundled weights where a class has several.
        low, high: the range of its scores; one outside it is taken for none.
        steps_of: the reward whose scores this one turns into steps (`shaping.quantize`); it has no network of its own.
        factor: what brings the paper's own rewards to a like scale (appendix D).
        reads_prompt: what the image should show is looked at, too.
    """

    module: str
    class_name: str
    family: str
    weights: str | None = None
    low: float = -math.inf
    high: float = math.inf
    steps_of: str | None = None
    factor: float = 1.0
    reads_prompt: bool = False


def _entry(
    module: str, class_name: str, family: str, low: float = -math.inf, high: float = math.inf, factor: float = 1.0
) -> Entry:
    reads_prompt = family == "conditional"
    package = "argrpo_cli.nano.rewards" if module.startswith("nano_") else "argrpo_cli.rewards"
    return Entry(f"{package}.{module}", class_name, family, None, low, high, None, factor, reads_prompt)


_COSINE = (-1.001, 1.001)  # in half precision it passes 1 by a rounding

REWARDS: dict[str, Entry] = {
    "nano-clip": _entry("nano_clip", "NanoClip", "conditional", *_COSINE),
    "nano-geneval": _entry("nano_geneval", "NanoGenEval", "conditional"),
    "nano-quality": _entry("nano_quality", "NanoQuality", "quality"),
    "nano-quality-t2i": _entry("nano_quality", "NanoQuality", "quality")._replace(weights="nano-quality-t2i"),
    "nano-critic": _entry("nano_critic", "NanoCritic", "realism"),
    "nano-critic-t2i": _entry("nano_critic", "NanoCritic", "realism")._replace(weights="nano-critic-t2i"),
    "clip": _entry("clip", "Clip", "conditional", *_COSINE, factor=5),
    "clip-quantized": _entry("clip", "Clip", "conditional")._replace(steps_of="clip"),
    "hpsv2": _entry("hpsv2", "HPSv2", "conditional", *_COSINE, factor=5),
    "hpsv2-quantized": _entry("hpsv2", "HPSv2", "conditional")._replace(steps_of="hpsv2"),
    "maniqa": _entry("maniqa", "Maniqa", "quality", low=0.0, factor=2),  # its last layer is a ReLU
    "judge-quality": _entry("judge.rewards", "JudgeQuality", "realism", 0.0, 5.0, 0.25)._replace(reads_prompt=True),
    "judge-fake": _entry("judge.rewards", "JudgeFake", "realism", 0.0, 1.0, factor=0.25),
    "judge-weird": _entry("judge.rewards", "JudgeWeird", "realism", 0.0, 1.0, factor=0.25),
    "aesthetic": _entry("aesthetic", "Aesthetic", "quality"),
    "imagereward": _entry("imagereward", "ImageReward", "conditional"),
    "pickscore": _entry("pickscore", "PickScore", "conditional", factor=1 / 26),
    "deqa": _entry("deqa", "Deqa", "quality", 1.0, 5.0),
    "unified-reward": _entry("judge.unified_reward", "UnifiedReward", "conditional", 1.0, 5.0, factor=1 / 5),
    "geneval": _entry("geneval", "GenEval", "conditional"),
    "ocr": _entry("ocr", "Ocr", "conditional", 0.0, 1.0),
}


class Reward(Protocol):
    """A reward model: one raw score per image, in the reward's own unit.

    One that cannot read every condition also has `check(conditions)`, which raises UserError for those. One that waits
    for another machine sets `remote = True`, says in `last_error` why a score is missing, and may have `stop()`, which
    breaks off a `score` in another thread.
    """

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, H, W] and B conditions to float32 [B]; NaN where there is no score."""
        ...


def check_reward(name: str) -> Entry:
    """The table's row for a reward, or that of one's own; UserError when there is none.

    A reward of one's own is `module:function`, or the name of an entry point of the group `argrpo.rewards`.
    """
    if name in REWARDS:
        return REWARDS[name]
    from argrpo_cli.rewards.custom import find_function

    function = find_function(name)
    if function is None:
        own = "or module:function for one of your own"
        raise UserError(
            f"reward {name!r} is unknown; there are {', '.join(REWARDS)}, {own}{did_you_mean(name, REWARDS)}"
        )
    family = getattr(function, "family", "conditional")
    if family not in FAMILIES:
        raise UserError(f"reward {name!r}: its family is {family!r}; choose one of {', '.join(FAMILIES)}")
    return _entry("custom", "Custom", family)


def load_reward(name: str, device: str = "cpu", options: Mapping[str, Any] | None = None) -> Reward:
    """Load one reward model by name, with options of its own.

    Raises:
        UserError: no such reward or option, weights that are missing or do not fit.
    """
    entry, options = check_reward(name), dict(options or {})
    if name not in REWARDS:
        from argrpo_cli.rewards.custom import Custom, find_function

        return Custom(name, find_function(name), options)
    reward = check_options(name, options)
    if entry.weights is not None:
        from argrpo_cli.system.files import WEIGHTS

        return reward(WEIGHTS / entry.weights, device)
    return reward(device=device, **options)


def check_options(name: str, options: Mapping[str, Any]) -> type:
    """The class of a reward of the package, which takes these options.

    Raises:
        UserError: no such reward or option, a value of another type, a package that is not installed.
    """
    reward = _class_of(name, check_reward(name))
    known = [key for key in inspect.signature(reward).parameters if key not in ("device", "folder")]
    for key in options:
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"reward {name}: no option {key!r}; {has}{did_you_mean(key, known)}")
    _check_types(name, reward, options)
    return reward


def _check_types(name: str, reward: type, options: Mapping[str, Any]) -> None:
    """UserError for an option of another type than the reward's constructor says."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    hints = get_type_hints(reward.__init__)
    for key, value in options.items():
        try:
            TypeAdapter(hints[key], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            wanted = getattr(hints[key], "__name__", str(hints[key])).replace("pathlib.", "")
            raise UserError(f"reward {name}: {key} is {value!r}; expected {wanted}") from error


def _class_of(name: str, entry: Entry) -> type:
    try:
        return getattr(importlib.import_module(entry.module), entry.class_name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "argrpo_cli":
            raise
        raise UserError(f"reward {name} needs the package {missing}; install it: pip install {missing}") from error


class RewardSet:
    """Several reward models that look at the same images.

    Attributes:
        names: of all rewards, those that are steps of another included.
        family: name to family.
        missing: how many scores of each reward were missing, not finite or out of range.
        last_error: what was wrong with the latest of those.
        tolerated: rewards that may fail altogether: their scores are missing then, instead of an error.
    """

    def __init__(
        self, rewards: dict[str, Reward], device: str = "cpu", steps: Mapping[str, tuple[str, str]] | None = None
    ):
        """`steps` has for a reward that is made of another's scores that other's name and the mapping's."""
        self.rewards, self.device, self.steps = rewards, device, dict(steps or {})
        self.names = [*rewards, *self.steps]
        self.entries = {name: check_reward(name) for name in self.names}
        self.family = {name: entry.family for name, entry in self.entries.items()}
        self.missing: Counter[str] = Counter()
        self.tolerated: set[str] = set()
        self.last_error: dict[str, str] = {}
        self._why: dict[str, str] = {}  # of tolerated ones, why they failed
        self._most: dict[str, int] = {}  # images at a time, of rewards that ran out of memory

    def identity(self, options: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
        """What decides the scores of each reward, plain data: as `identity`, with a hash of its networks as "weights".

        Args:
            options: those that the set was loaded with.
        """
        parts = {name: self.rewards[self.steps[name][0] if name in self.steps else name] for name in self.names}
        return {name: _identity(name, options or {}, [parts[name]]) for name in self.names}

    def check(self, conditions: Sequence[Condition]) -> None:
        """Raise UserError for a condition that a reward cannot read, before anything is scored."""
        for reward in self.rewards.values():
            if hasattr(reward, "check"):
                reward.check(conditions)

    def score(self, images: Tensor, conditions: Sequence[Condition], batch_size: int = 64) -> dict[str, Tensor]:
        """Raw scores of uint8 images [B, 3, H, W]: name to float32 [B], on the device of the models.

        Rewards that wait for another machine do so while the others compute. Those run on `batch_size` images at a
        time, moved to the device once for all, and on half as many as long as memory does not suffice. A score that is
        not finite or lies outside the reward's range is NaN, as a missing one is, and counted in `missing`.
        """
        import torch

        if len(images) != len(conditions):
            raise ValueError(f"{len(images)} images but {len(conditions)} conditions")
        remote = {name: reward for name, reward in self.rewards.items() if getattr(reward, "remote", False)}
        parts: dict[str, list[Tensor]] = {name: [] for name in self.rewards if name not in remote}
        with ThreadPoolExecutor(max_workers=max(1, len(remote))) as waiting:
            asked = {name: waiting.submit(self._asked, name, images, conditions) for name in remote}
            try:
                for start in range(0, len(images), batch_size):
                    chunk = images[start : start + batch_size].to(self.device)
                    for name in parts:
                        parts[name].append(self._asked(name, chunk, conditions[start : start + batch_size]))
                answers = {name: answer.result().to(self.device) for name, answer in asked.items()}
            except BaseException:  # Ctrl-C comes here, and not to the threads that wait for a server
                for reward in remote.values():
                    if hasattr(reward, "stop"):
                        reward.stop()
                raise
        empty = torch.zeros(0, device=self.device)
        raw = {name: torch.cat(chunks) if chunks else empty for name, chunks in parts.items()} | answers
        raw = {name: self._trusted(name, raw[name].float(), len(images)) for name in self.rewards}
        return raw | self._quantized(raw)

    def _asked(self, name: str, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """The scores of one reward; its error is told under its name, or noted where it is tolerated."""
        import torch

        try:
            return self._score(name, images, conditions)
        except (UserError, RuntimeError) as error:
            told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
            told = told if name in told else f"reward {name} failed: {told}"
            if name not in self.tolerated:
                raise UserError(told) from error
            self._why[name] = told
            return torch.full((len(images),), math.nan)

    def _score(self, name: str, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        import torch

        parts, start = [], 0
        while start < len(images):
            most = self._most.get(name, len(images))
            part = slice(start, start + most)
            try:
                parts.append(self.rewards[name].score(images[part], conditions[part]))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                now = len(images[part])
                if now == 1:
                    raise UserError(
                        f"reward {name}: the memory of {self.device} does not suffice for one image"
                    ) from error
                self._most[name] = now // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            start += most
        return torch.cat(parts)

    def _trusted(self, name: str, scores: Tensor, count: int) -> Tensor:
        if scores.shape != (count,):
            raise UserError(f"reward {name} gave scores of shape {list(scores.shape)} for {count} images")
        entry = self.entries[name]
        wrong = ~scores.isfinite() | (scores < entry.low) | (scores > entry.high)
        if wrong.any():
            self.missing[name] += int(wrong.sum())
            value = scores[wrong][-1].item()
            told = self._why.pop(name, "") or getattr(self.rewards[name], "last_error", "")
            self.last_error[name] = (math.isnan(value) and told) or f"a score of {value:g}"
        return scores.masked_fill(wrong, math.nan)

    def _quantized(self, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from argrpo_cli.rewards.shaping import quantize

        steps = {name: quantize(raw[of], mapping) for name, (of, mapping) in self.steps.items()}
        for name, (of, _) in self.steps.items():
            if missing := int(steps[name].isnan().sum()):
                self.missing[name] += missing
                self.last_error[name] = self.last_error.get(of, "a score of 1 or more, for which there is no step")
        return steps


def load_rewards(
    names: Sequence[str], device: str = "cpu", options: Mapping[str, Mapping[str, Any]] | None = None
) -> RewardSet:
    """Load reward models by name; all names are checked before anything is loaded.

    Args:
        options: name to the options of that reward. Those of a quantised reward are those of the reward it is made of,
            and `mapping`, see `shaping.quantize`; the network is loaded once for both.

    Raises:
        UserError: a name or option is unknown, or weights are missing.
    """
    models, steps = networks_of(names, options)
    loaded = {name: load_reward(name, device, given) for name, given in models.items()}
    return RewardSet(loaded, device, steps)


def identity(names: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
    """What decides the scores of each reward as far as it is known before anything is loaded, plain data.

    Name to "options" (those that change a score), "files" (stamps of those that options name), "code" (a digest of a
    function of one's own) and "argrpo" (the version). `RewardSet.identity` adds a hash of the networks.
    """
    return {name: _identity(name, options or {}) for name in names}


def _identity(
    name: str, options: Mapping[str, Mapping[str, Any]], parts: Sequence[object] | None = None
) -> dict[str, Any]:
    from argrpo_cli.rewards.base import identity_of
    from argrpo_cli.rewards.custom import find_function

    of = check_reward(name).steps_of  # options of a quantised reward may stand at its base
    given = {**(options.get(of, {}) if of else {}), **options.get(name, {})}
    return identity_of(given, None if name in REWARDS else find_function(name), parts)


def networks_of(
    names: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[str, str]]]:
    """Which rewards have to be loaded to score with `names`, with their options; and what is made of whose scores.

    Returns:
        name to options of those to load; and, as `RewardSet` takes them, the steps.

    Raises:
        UserError: a name is unknown, or options contradict each other.
    """
    from argrpo_cli.rewards.shaping import MAPPINGS

    options = {name: dict(given) for name, given in (options or {}).items()}
    steps: dict[str, tuple[str, str]] = {}
    for name in names:
        entry = check_reward(name)
        if entry.steps_of is not None:
            mapping = options.get(name, {}).pop("mapping", MAPPINGS[0])
            if mapping not in MAPPINGS:
                raise UserError(f"reward {name}: mapping {mapping!r} is unknown; choose one of {', '.join(MAPPINGS)}")
            steps[name] = (entry.steps_of, mapping)
            given, base = options.pop(name, {}), options.get(entry.steps_of, {})
            if given and base and given != base:
                raise UserError(f"{name} is made of the scores of {entry.steps_of}; give options to one of them")
            options[entry.steps_of] = base or given
    models = dict.fromkeys([*(name for name in names if name not in steps), *(of for of, _ in steps.values())])
    return {name: options.get(name, {}) for name in models}, steps
