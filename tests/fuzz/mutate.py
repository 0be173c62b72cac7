"""Damage: what disks, other programs and attackers do to files, drawn from a seeded generator of random numbers."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import yaml

# Values that readers of numbers, names and paths have stumbled over.
HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 10**29, 10**400, -(10**29), 0.0,
    -0.0, 0.1, 1.5, 1e-5, 1e-300, 1e308, float("inf"), float("-inf"), float("nan"), "", " ", "x", "no", "012", "1_0",
    "12:30", "null", "~", "2024-01-01", "1e-5", "1e999", "nan", "0x10", "½", "١٢", "true", "a\u2028b", "a\x85b",
    "a\nb", "a\tb", "a\0b", "\x1b[31m", "\ufeff", "\ud800", "👩‍🚀", "=1+1", "-", "@x", "%", "<<", "*a", "&a", ".",
    "..", "../..", "/", "/dev/zero", "/dev/stdin", "~nosuchuser/x", "http://user:secret@host/", "x" * 5000,
    "../" * 2000, [], {}, [[]], [{}], {"": 0}, {"a": {"b": {}}}, [None], [0, "a"], ["x"] * 3000, {"x": [1]},
    {"start": {}}, {"extends": "x"},
]  # fmt: skip
YAML_TEXTS = [
    "!!int abc", "!!bool maybe", "!!timestamp x", "!!map x", "!!float ''", "!!binary '%'", "!!set {a}", "!!omap [a]",
    "!!null x", "!!python/object/apply:os.system [true]", "!x y", "*nowhere", "&a [*a]", "{<<: *a}", "? x", "- - -",
    "|", ">+9", "%YAML 1.1", "9" * 5000, "-" + "9" * 5000, "0b1_0", "0o17", "1_000", "190:20:30", "1e400", ".inf",
    ".NaN", "+.5", "'", '"', "\"\\ud800\"", '"\\0"', '"\\x07"', "@x", "`x`", "[" * 3000, "{a: " * 800, "#",
    "? [a]\n: b", "\t", "'a\u2028b'", "---", "...", "a: b: c",
    "\n".join(["&a0 [x, x]", *(f"- &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]),
]  # fmt: skip
JSON_TEXTS = [
    "NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "01", "+1", "1.", ".5", "'a'", "nul", "True", '"\\ud800"',
    '"\\x"', "[" * 9000, '{"a":' * 3000, '"\u2028"', "\x00", '"\x00"', "// x", ",", "1,", "{}{}", '{"a": 1, "a": 2}',
    '"' + "x" * 5000 + '"', "\ufeff",
]  # fmt: skip
NUMBERS = (0, 1, 2, 3, 127, 128, 255, 2**15 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
WHOLE = 20


class Damage(Random):
    """The random numbers of one case, the same on every machine.

    Attributes:
        none: nothing is damaged, in one case of `WHOLE`: what is whole must not be refused.
    """

    def __new__(cls, name: str, seed: int, index: int) -> Damage:
        return super().__new__(cls)

    def __init__(self, name: str, seed: int, index: int) -> None:
        super().__init__(f"{name} {seed} {index}")
        self.index, self.none = index, index % WHOLE == 0


# bytes


def damaged(content: bytes, rng: Damage, head: int = 512) -> bytes:
    """One to four changes of bytes; half of them near the start, where headers are."""
    changed = bytearray(content)
    for _ in range(0 if rng.none else rng.choice((1, 1, 2, 4))):
        end = min(len(changed), head) if rng.random() < 0.5 else len(changed)
        place = rng.randrange(end) if end else 0
        rng.choice(BYTE_CHANGES)(changed, place, rng)
    return bytes(changed)


def _flip(content: bytearray, place: int, rng: Damage) -> None:
    content[place : place + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in content[place : place + 1])


def _any_bytes(content: bytearray, place: int, rng: Damage) -> None:
    count = rng.choice((1, 1, 4, 40))
    content[place : place + count] = rng.randbytes(count)


def _number(content: bytearray, place: int, rng: Damage) -> None:
    size = rng.choice((1, 2, 4, 8))
    number = rng.choice(NUMBERS) & (1 << 8 * size) - 1
    content[place : place + size] = number.to_bytes(size, rng.choice(("little", "big")))


def _less(content: bytearray, place: int, rng: Damage) -> None:
    del content[place : place + rng.choice((1, 2, 9, 100))]


def _again(content: bytearray, place: int, rng: Damage) -> None:
    content[place:place] = content[place : place + rng.choice((1, 8, 64, 500))] * rng.choice((1, 1, 30))


def _more(content: bytearray, place: int, rng: Damage) -> None:
    content[place:place] = rng.choice(
        (rng.randbytes(5), bytes(9), b"\xff" * 9, b"\r\n", b"\xef\xbb\xbf", b"\xe2\x80\xa8")
    )


def _cut(content: bytearray, place: int, rng: Damage) -> None:
    del content[place:]


def _moved(content: bytearray, place: int, rng: Damage) -> None:
    other, size = rng.randrange(len(content) + 1), rng.choice((1, 4, 16, 100))
    content[place : place + size] = content[other : other + size]


def _zeros(content: bytearray, place: int, rng: Damage) -> None:
    size = rng.choice((4, 100, 4096))
    content[place : place + size] = bytes(len(content[place : place + size]))


BYTE_CHANGES: tuple[Callable[[bytearray, int, Damage], None], ...] = (
    _flip, _flip, _any_bytes, _number, _number, _number, _less, _again, _more, _cut, _moved, _zeros,
)  # fmt: skip


def sealed_png(content: bytes) -> bytes:
    """The chunks of a PNG with checksums that are right, so that a decoder looks into them."""
    sealed, place = content[:8], 8
    while place + 12 <= len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        body = content[place + 4 : min(place + 8 + size, len(content) - 4)]
        sealed += content[place : place + 4] + body + struct.pack(">I", zlib.crc32(body))
        place += 12 + size
    return sealed


# texts and trees


def damaged_text(text: str, rng: Damage, values: list[str]) -> str:
    """One or two changes: a word or a line becomes another, goes, comes twice, moves in or out."""
    for _ in range(0 if rng.none else rng.choice((1, 1, 2))):
        words = list(re.finditer(r"[^\s,:\[\]{}]+", text))
        lines = text.split("\n")
        row, change = rng.randrange(len(lines)), rng.randrange(8)
        if change < 4 and words:
            word = rng.choice(words)
            text = text[: word.start()] + rng.choice(values) + text[word.end() :]
            continue
        if change == 4:
            del lines[row]
        elif change == 5:
            lines[row:row] = lines[row : row + rng.choice((1, 3))]
        elif change == 6:
            lines[row] = rng.choice((" ", "  ", "\t", "")) + (lines[row] if rng.random() < 0.5 else lines[row].strip())
        else:
            lines[row] += rng.choice(values)
        text = "\n".join(lines)
    return text


def damaged_tree(tree: Any, rng: Damage, values: list[Any] = HOSTILE) -> Any:
    """A copy of plain data in which one or two values are others, are gone, come often, or have another name."""
    tree = [deepcopy(tree)]
    for _ in range(0 if rng.none else rng.choice((1, 1, 2))):
        places = list(_places(tree))[1:] or [(tree, 0)]
        held, key = rng.choice(places)
        change = rng.randrange(10)
        if change < 6:
            held[key] = deepcopy(rng.choice(values))
        elif change == 6 and held is not tree:
            del held[key]
        elif change == 7:
            held[key] = [held[key]] if rng.random() < 0.5 else {"x": held[key]}
        elif isinstance(held, dict):
            other = rng.choice([str(one) for one in values] + [*held, "classes(a)", "a[0]", "str", "int"])
            held[other] = held[key] if change == 8 else held.pop(key)
        else:
            held *= rng.choice((2, 50))
    return tree[0]


def _places(held: Any) -> list[tuple[Any, Any]]:
    """All places within plain data, each as what holds it and its key or number there."""
    keys = list(held) if isinstance(held, dict) else range(len(held)) if isinstance(held, list) else ()
    return [place for key in keys for place in [(held, key), *_places(held[key])]]


def as_json(tree: Any) -> str:
    """Plain data as JSON, whatever JSON has no words for included."""
    return json.dumps(tree, indent=2)


def as_yaml(tree: Any) -> str:
    """Plain data as YAML."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def damaged_json(content: bytes, rng: Damage) -> bytes:
    """A JSON document: other values in it, other words in its text, or other bytes."""
    way = rng.randrange(4)
    if way < 2:
        return as_json(damaged_tree(json.loads(content), rng)).encode()
    if way == 2:
        return damaged_text(content.decode(), rng, JSON_TEXTS).encode("utf-8", "surrogatepass")
    return damaged(content, rng)


def damaged_jsonl(content: bytes, rng: Damage) -> bytes:
    """Lines of JSON, one of them as `damaged_json`, or all of them as bytes."""
    lines = content.decode().split("\n")
    if rng.random() < 0.4:
        return damaged(content, rng)
    row = rng.randrange(max(1, len(lines) - 1))
    line = damaged_json(lines[row].encode(), rng)
    if rng.none or rng.random() < 0.8:  # as one line again, where that is possible
        line = line.replace(b"\n", b" ")
    changed = [one.encode() for one in lines]
    changed[row : row + (rng.none or rng.random() < 0.8)] = [line]
    return rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\n\n")).join(changed)


def damaged_safetensors(content: bytes, rng: Damage) -> bytes:
    """A file of tensors: another header of its right length, or other bytes."""
    if rng.random() < 0.4:
        return damaged(content, rng, head=2048)
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    changed = json.dumps(damaged_tree(header, rng)).encode()
    return len(changed).to_bytes(8, "little") + changed + content[8 + size :]


# files and folders


def damaged_file(path: Path, rng: Damage) -> None:
    """Damage a file in its place, in the way of its kind; one in eight becomes no file at all."""
    if rng.none:
        return
    if rng.random() < 0.125:
        return not_a_file(path, rng)
    content = path.read_bytes()
    ways = {".json": damaged_json, ".jsonl": damaged_jsonl, ".safetensors": damaged_safetensors}
    changed = damaged if not content else ways.get(path.suffix, damaged)
    path.write_bytes(changed(content, rng))


def not_a_file(path: Path, rng: Damage) -> None:
    """Put something else in the place of a file."""
    path.unlink()
    what = rng.randrange(8)
    if what == 0:
        path.mkdir()
    elif what == 1:
        path.symlink_to(path.name)  # to itself
    elif what == 2:
        path.symlink_to("gone")
    elif what == 3:
        path.symlink_to("/dev/zero")
    elif what == 4:
        os.mkfifo(path)
    elif what == 5:
        path.touch()
    elif what == 6:
        path.symlink_to(path.parent)
