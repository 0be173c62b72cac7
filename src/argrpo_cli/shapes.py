"""The plain records that travel through everything: what is asked for and how, an image, a number, a result.

Nothing heavy is imported here: the command line checks what it was given before torch is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from argrpo_cli.system.errors import UserError, printable
from argrpo_cli.system.files import read_json, write_json
from argrpo_cli.system.plain import to_json

DTYPES = ("float32", "bfloat16", "float16")
RESULT_FORMAT = 2  # of summary.json; files of the first one had a shape for each benchmark


@dataclass(frozen=True)
class Condition:
    """A text prompt (UserError where it is no text) and, for class-conditional policies, the class id behind it."""

    prompt: str
    class_id: int | None = None

    def __post_init__(self) -> None:
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt {self.prompt!r} is not text: it has bytes that are no UTF-8") from error


def with_article(name: str) -> str:
    """`a dog`, `an apple`."""
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def class_prompt(name: str) -> str:
    """The text of a class condition, for rewards that read: `a photo of a dog`, `a photo of an orange`."""
    return f"a photo of {with_article(name)}"


@dataclass(frozen=True)
class Sampling:
    """The distribution that images are drawn from, and the number format it is computed in.

    Attributes:
        cfg_scale: s in l_u + s (l_c - l_u), 1 or more; 1 is no guidance.
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens up to this probability; 1 keeps all.
        cfg_interval: the last decoding step that is guided; -1 guides all.
        dtype: one of `DTYPES`, of the policy.
    """

    cfg_scale: float = 2.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    cfg_interval: int = -1
    dtype: str = "float32"

    def check(self, prefix: str = "--") -> Sampling:
        """These settings.

        Args:
            prefix: how a setting is called in a message: "--..." for options, "sampling." for the keys of a recipe.

        Raises:
            UserError: a number out of range; it names the setting, the value and what is allowed.
        """
        allowed = {
            "cfg_scale": (self.cfg_scale >= 1, "1 or more"),
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "cfg_interval": (self.cfg_interval >= -1, "-1 or more"),
            "dtype": (self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
        }
        for key, (good, words) in allowed.items():
            value = getattr(self, key)
            if isinstance(value, float) and not math.isfinite(value):
                good, words = False, "a number, not infinite"
            if not good:
                name = key.replace("_", "-") if prefix.startswith("--") else key
                raise UserError(f"{prefix}{name} {_plain(value)}: must be {words}")
        return self

    def words(self, keys: Iterable[str]) -> str:
        """Some of these settings as a person says them: `guidance 1, top-k 20`."""
        named = {key: "guidance" if key == "cfg_scale" else key.replace("_", "-") for key in keys}
        return ", ".join(f"{name} {_plain(getattr(self, key))}" for key, name in named.items())

    def departures(self, paper: Sampling) -> list[str]:
        """Where these settings differ from a paper's, in words; the number format is no such matter."""
        return [
            f"{one.name.replace('_', '-')} {_plain(getattr(self, one.name))} (paper {_plain(getattr(paper, one.name))})"
            for one in fields(self)
            if one.name != "dtype" and getattr(self, one.name) != getattr(paper, one.name)
        ]


def shared_settings(each: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of several mappings with the same keys what is alike in all, and what each has otherwise."""
    alike = {key: value for key, value in each[0].items() if all(one[key] == value for one in each)}
    return alike, [{key: value for key, value in one.items() if key not in alike} for one in each]


@dataclass(frozen=True)
class Shot:
    """One image to draw: what it shows, the seed of its noise (see `seeds.py`), and its file in a folder."""

    condition: Condition
    seed: int
    file: str = ""


@dataclass(frozen=True)
class Value:
    """A number, its standard error, and how many images it is of; None where it could not be measured."""

    value: float | None
    error: float | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        for name in ("value", "error"):  # JSON has no NaN
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                object.__setattr__(self, name, None)

    def text(self, digits: int = 3, percent: bool = False, sign: str = "") -> str:
        """`0.123 ± 0.004`, or `12.3 ± 0.4 %`; an en dash where there is no value."""
        if self.value is None:
            return "–"
        scale = 100 if percent else 1
        error = "" if self.error is None else f" ± {scale * self.error:.{digits}f}"
        return f"{scale * self.value:{sign}.{digits}f}{error}{' %' if percent else ''}"


@dataclass(frozen=True)
class Column:
    """How a number of a result is called and printed.

    Attributes:
        better: "higher", "lower" or "" where neither is better.
        group: columns that belong together, such as a set of prompts.
        counted: what its numbers are of, where not of images.
    """

    label: str
    unit: str = ""
    better: str = ""
    digits: int = 3
    percent: bool = False
    group: str = ""
    counted: str = "images"


@dataclass(frozen=True)
class Result:
    """What every evaluation, `score` and `entropy` find out; `summary.json` is this and nothing else.

    Attributes:
        benchmark: its name, as on the command line.
        columns: what was measured, in the order to show it.
        rows: policy (or set of images) to column to value; the first is what was asked for, a baseline comes second.
        difference: column to the first row minus the second, with the error of pairs; empty for one row.
        paper: row to column to the number that the paper reports.
        protocol: all that a reader needs to repeat the numbers or to compare them.
        departures: where that is not the paper's protocol.
        warnings: what to know before believing the numbers.
    """

    benchmark: str
    columns: Mapping[str, Column]
    rows: Mapping[str, Mapping[str, Value]]
    difference: Mapping[str, Value] = field(default_factory=dict)
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)
    departures: Sequence[str] = ()
    warnings: Sequence[str] = ()

    def plain(self) -> dict[str, Any]:
        """Plain data, as it is saved."""
        return {"format": RESULT_FORMAT, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write it as JSON, atomically."""
        write_json(path, self.plain())

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing, damaged, of an earlier version, or something else.
        """
        content = _printable(read_json(path))
        if content.get("format") != RESULT_FORMAT:
            earlier = {"scores", "policies", "rewards"} & content.keys()
            what = "a result of an earlier version" if earlier else "no result of argrpo"
            raise UserError(f"{path} is {what}; measure again with this version, into another --out")
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(cls).validate_json(to_json(content), strict=True)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"]))
            raise UserError(f"{path} is a damaged result ({where}: {fault['msg']}); measure again") from error


def _printable(value: Any) -> Any:
    """Plain data with all its texts, keys too, made `printable`: they go into tables."""
    if isinstance(value, dict):
        return {printable(key): _printable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_printable(one) for one in value]
    return printable(value) if isinstance(value, str) else value


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
