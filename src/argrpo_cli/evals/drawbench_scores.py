"""Scoring DrawBench's pictures: one reward in memory at a time, every score on disk as soon as it is there.

POLICY/scores/REWARD.jsonl has a first line that says what scores (options, weights), then one line for each picture.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from argrpo_cli import __version__
from argrpo_cli.images import Item
from argrpo_cli.networks.loading import fingerprint
from argrpo_cli.rewards import REWARDS, Reward, RewardSet, load_rewards
from argrpo_cli.system.errors import UserError, first_line
from argrpo_cli.system.files import cannot_write, make_dir
from argrpo_cli.system.progress import progress


@dataclass(frozen=True)
class Column:
    """A column of table 4: its heading, and what a raw score is divided by to come into the paper's unit."""

    label: str
    divisor: float = 1.0
    unit: str = "raw"


TABLE_4 = {
    "clip": Column("CLIP score", unit="cosine"),
    "hpsv2": Column("HPSv2", unit="cosine"),
    "aesthetic": Column("Aesthetic", unit="1 to 10"),
    "deqa": Column("DeQA", 5.0, "score / 5"),
    "imagereward": Column("ImageReward", unit="standardised"),
    "pickscore": Column("PickScore", 26.0, "logit / 26"),
    "unified-reward": Column("UnifiedReward", 5.0, "score / 5, images at 512 pixels"),
}

LIBRARIES = {"builtins", "torch", "transformers", "tokenizers", "open_clip", "httpx", "httpx2", "PIL", "numpy"}
OPERATIONAL = ("url", "timeout", "concurrency", "attempts", "backoff")  # options of a reward that change no score


def column_of(reward: str) -> Column:
    """The column of a reward; one that is not in table 4 stands there raw, under its own name."""
    return TABLE_4.get(reward, Column(reward))


@dataclass
class Scores:
    """Raw scores of one reward: policy to a list with None where there is no score.

    Attributes:
        weights: hash of the reward's networks, None where it has none here (a server).
        fault: why it did not finish, or "".
        missing: why the latest of the pictures without a score has none, or "".
    """

    values: dict[str, list[float | None]] = field(default_factory=dict)
    weights: str | None = None
    fault: str = ""
    missing: str = ""


def score_reward(
    reward: str,
    pictures: Mapping[str, Sequence[Item]],
    folders: Mapping[str, Path],
    options: Mapping[str, Any],
    batch_size: int,
    device: str,
) -> Scores:
    """Score the pictures of each policy with one reward; what an earlier call scored is kept.

    A reward that cannot be loaded, or fails on the way, gives a `fault` and no error.
    """
    question = {
        "reward": reward,
        "options": choices(options),
        "files": _stamps(options),
        "code": _code(reward),
        "argrpo": __version__,
    }
    journals = {name: Journal(folders[name] / f"{reward.replace(':', '-')}.jsonl", question) for name in pictures}
    scores = Scores()
    try:
        if not all(journals[name].complete(items) for name, items in pictures.items()):
            rewards = load_rewards([reward], device, {reward: options} if options else None)
            weights = reward_fingerprint(rewards.rewards)
            for name, items in pictures.items():
                journals[name].begin(weights)
                _score_policy(rewards, reward, name, items, journals[name], batch_size)
            scores.missing = rewards.last_error.get(reward, "")
    except (UserError, RuntimeError) as error:  # memory that does not suffice for a network is a RuntimeError
        scores.fault = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
    finally:
        for journal in journals.values():
            journal.close()
    scores.values = {name: [journals[name].score(item) for item in items] for name, items in pictures.items()}
    scores.weights = next((journal.weights for journal in journals.values()), None)
    return scores


def choices(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of a reward's options those that may change a score."""
    return {key: value for key, value in options.items() if key not in OPERATIONAL}


def reward_fingerprint(rewards: Mapping[str, Reward]) -> str | None:
    """A hash of the networks of rewards, theirs or of their parts; None where they have none."""
    modules = _networks(list(rewards.values()), set())
    return fingerprint(modules) if modules else None


def _networks(value: object, seen: set[int]) -> list[nn.Module]:
    """The networks in an object of ours or of the user's, in its parts, and in lists and dictionaries of them."""
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


def _score_policy(
    rewards: RewardSet, reward: str, name: str, items: Sequence[Item], journal: Journal, batch_size: int
) -> None:
    left = [item for item in items if journal.score(item) is None]
    if not left:
        return
    rewards.check([item.condition for item in left])
    with progress(f"{reward} of {name}", len(left)) as advance:
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            images = torch.from_numpy(np.stack([item.read() for item in batch]))
            raw = rewards.score(images, [item.condition for item in batch], batch_size)[reward]
            journal.add(batch, raw.tolist())
            advance(len(batch))


class Journal:
    """The scores of one reward over one policy's pictures, on disk line by line."""

    def __init__(self, path: Path, question: dict[str, Any]):
        self.path, self.question = path, json.loads(json.dumps(question))
        self.weights: str | None = None
        self._known: dict[tuple[str, str], float] = {}
        self._file: Any = None
        lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
        rows = [row for row in map(_parsed, lines) if row]
        self._continues = bool(rows) and {**rows[0], "weights": None} == {**self.question, "weights": None}
        if self._continues:
            self.weights = rows[0].get("weights")
            self._known = {(row["file"], row["stamp"]): row["score"] for row in rows[1:] if "score" in row}

    def begin(self, weights: str | None) -> None:
        """Go on with these weights; scores of another question or by others are laid aside, in one file."""
        if self._continues and self.weights != weights:
            self._continues, self._known = False, {}
        self.weights = weights
        try:
            make_dir(self.path.parent)
            if not self._continues and self.path.is_file():
                os.replace(self.path, self.path.with_name(f"{self.path.name}.old"))
            self._file = open(self.path, "a" if self._continues else "w", encoding="utf-8")  # noqa: SIM115
            # A line that was cut off ends here.
            self._file.write("\n" if self._continues else json.dumps({**self.question, "weights": weights}) + "\n")
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def add(self, items: Sequence[Item], scores: Sequence[float]) -> None:
        """Note scores, on disk when this returns; a missing one (NaN) is left out and asked for again."""
        try:
            for item, score in zip(items, scores, strict=True):
                if math.isfinite(score):
                    self._known[item.file, item.stamp] = score
                    self._file.write(json.dumps({"file": item.file, "stamp": item.stamp, "score": score}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def score(self, item: Item) -> float | None:
        """The score of a picture, None where it is not known."""
        return self._known.get((item.file, item.stamp))

    def complete(self, items: Sequence[Item]) -> bool:
        return all(self.score(item) is not None for item in items)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _stamps(options: Mapping[str, Any]) -> dict[str, str]:
    """Size and time of the files that options name, and of those in folders that they name."""
    named = [Path(value) for value in options.values() if isinstance(value, str) and value]
    files = [
        file for path in named for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()
    ]
    return {str(file): f"{file.stat().st_size} {file.stat().st_mtime_ns}" for file in files}


def _code(reward: str) -> str | None:
    """A digest of the source of a reward of one's own."""
    from argrpo_cli.rewards.custom import source_digest

    return None if reward in REWARDS else source_digest(reward)
