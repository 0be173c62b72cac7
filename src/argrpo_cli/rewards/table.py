"""The one table of the rewards' names, and what is known of a reward before anything heavy is loaded."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from argrpo_cli import __version__
from argrpo_cli.rewards.base import Reward
from argrpo_cli.system.errors import UserError, offer, refuse_secrets
from argrpo_cli.system.files import check_fetched, in_cache, stamp_of

if TYPE_CHECKING:
    from torch import nn

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
    """UserError, before torch is loaded, for a reward that lacks what the user has to supply, or whose files are
    neither on this machine nor can be fetched."""
    if name not in REWARDS:
        return  # one's own fetches what it likes
    reward = check_reward(name)
    needs = reward.needs(options)
    if needs.missing:
        raise UserError(f"reward {name} needs {needs.missing}")
    for file in needs.files:
        if in_cache(file.repo):  # of what is there in part, it is seen when it is opened whether that is enough
            continue
        option = next((key for key, one in reward.files.items() if one == file), None)
        try:
            check_fetched(file.repo, file.file if option else "")
        except UserError as error:
            mend = f"give it as the option {option} (--set {name}.{option}=FILE)"
            raise UserError(str(error).replace("give the file instead", mend)) from error


def refuse_comparing(names: Sequence[str]) -> None:
    """UserError for a reward that compares the images of an update, where each image is scored by itself."""
    for name in names:
        if (scope := check_reward(name).scope) != "image":
            raise UserError(
                f"reward {name} compares the images of a {scope} with each other, and says nothing of one by itself; "
                "`argrpo train` and `argrpo score` can use it"
            )


def identity(names: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
    """What decides the scores of each reward as far as it is known before anything is loaded, plain data.

    Name to "options" (those that change a score), "files" (stamps of those that options name), "code" (a digest of a
    function of one's own) and "argrpo" (the version). `RewardSet.identity` adds a hash of the networks.
    """
    return {name: identity_of(name, options or {}) for name in names}


def identity_of(name: str, options: Mapping[str, Mapping[str, Any]], loaded: Reward | None = None) -> dict[str, Any]:
    """As `identity`, of one reward; with a hash of its networks as "weights" where it is loaded."""
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
    return {str(file): stamp_of(file) for file in files}


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
