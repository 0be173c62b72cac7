"""Plain data as text: JSON that is read strictly and checked, lines, cells of tables."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Predicate

from argrpo_cli.system.errors import UserError, printable, shortened

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Index = Annotated[str, Predicate(lambda text: text.isdecimal() and len(text) < 19)]  # a whole number as JSON's keys are
DEEPEST = 64  # levels of objects and lists in a JSON file; ours have five
TOO_DEEP = f"more than {DEEPEST} levels of objects and lists"
ODD = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # what JSON may hold as it is and others misread
FORMULA = re.compile("'*[=+@\\-\t\r\n\uff1d\uff0b\uff0d\uff20]")  # the last are the wide ones


def parse_json(text: str) -> Any:
    """The value of a JSON text, read everywhere alike and more strictly than Python's own reader does.

    A whole number beyond 64 bits is the nearest float.

    Raises:
        ValueError: why there is none, in a few words: no JSON, NaN, a number beyond the floats, a key that an object
            has twice, more than `DEEPEST` levels.
    """
    try:
        value = json.loads(
            text, parse_int=_whole, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_object
        )
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if text.count("[") + text.count("{") > DEEPEST:
        level = [value]
        for _ in range(DEEPEST + 1):
            parts = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
            level = [part for one in parts for part in one]
        if level:
            raise ValueError(TOO_DEEP)
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]}{'...' if len(text) > 20 else ''} is no finite number")
    return number


def _whole(text: str) -> int | float:
    exact = len(text) <= 20 and -(2**63) <= int(text) < 2**63
    return int(text) if exact else _finite(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice in an object")
    return value


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON in which `read_text` and every other reader find the lines that were written.

    Letters stand as they are. What some readers take for the end of a line or for a command of the terminal, and the
    bytes of a file name that are no UTF-8, are escaped: they come back as they were. What is no finite number is null.
    """
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite_or_none(value), indent=indent, ensure_ascii=False)
    return ODD.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


@cache
def _adapter(shape: Any) -> TypeAdapter:
    from pydantic import TypeAdapter

    return TypeAdapter(shape)


def check_shape(value: Any, shape: Any, where: str) -> Any:
    """`value`, plain data, where it is of a type such as a TypedDict; keys that the type does not name may be anything.

    Raises:
        UserError: it is not; `where` it stands, and which key is what in place of what.
    """
    from pydantic import ValidationError

    try:
        _adapter(shape).validate_python(value, strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        what = f"{key} is {shortened(fault['input'])}: " if fault["type"] != "missing" else f"{key}: "
        raise UserError(f"{where} is damaged: {what}{fault['msg'].lower()}") from error
    return value


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_none(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_none(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def lines_of(text: str) -> list[str]:
    """The lines of a text, which end at a line feed (or Windows' two characters) and at nothing else.

    `str.splitlines` ends them at U+2028, U+0085 and others too, which JSON and people write within a line.
    """
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def guarded(cell: Any) -> Any:
    """A cell of a table of commas for which no spreadsheet computes anything, and in which nothing is unprintable.

    A text that begins as a formula does gets an apostrophe in front, one of apostrophes and such a beginning another:
    `unguarded` takes it away.
    """
    if not isinstance(cell, str):
        return cell
    return printable(f"'{cell}" if FORMULA.match(cell) else cell, but="\t\n\r\u2028\u2029")


def unguarded(cell: Any) -> Any:
    """A cell as it was before `guarded`."""
    return cell[1:] if isinstance(cell, str) and cell.startswith("'") and FORMULA.match(cell) else cell
