"""GenEval's language: what a prompt asks for, and the words it asks in.

`compose` writes a prompt by the benchmark's templates, `parse_prompt` reads one. The captions of the nano world are
written in the same language.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from argrpo_cli.shapes import with_article
from argrpo_cli.system.errors import UserError

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# How many objects, and how many of them in a colour, the categories without counts and relations ask for.
OBJECTS_AND_COLORS = {(1, 0): "single_object", (1, 1): "colors", (2, 0): "two_object", (2, 2): "color_attr"}
COUNTS = {2: "two", 3: "three", 4: "four"}
# The 80 classes of COCO in COCO's order, some under clearer names (COCO's "mouse" is "computer mouse" here).
_OBJECTS = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking
meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie,
suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis
racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot
dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv
remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
teddy bear, hair drier, toothbrush
"""
OBJECT_NAMES = tuple(" ".join(_OBJECTS.split()).split(", "))
# Those that the nano world draws, in the order of its class ids.
_NANO_OBJECTS = """
bicycle, car, airplane, bus, train, boat, traffic light, bird, cat, dog, horse, sheep, elephant, zebra, giraffe,
backpack, umbrella, banana, apple, pizza, donut, cake, clock, teddy bear
"""
NANO_OBJECTS = tuple(" ".join(_NANO_OBJECTS.split()).split(", "))
NANO_COLORS = COLORS[:8]  # distinct on 64 pixels; black and white would vanish into outlines and highlights


def plural(name: str) -> str:
    """GenEval's plural: 'buses' and 'wine glasses', but also 'sheeps', 'knifes' and 'sandwichs'."""
    return name + ("es" if name.endswith("s") else "s")


@dataclass(frozen=True)
class Requirement:
    """`count` objects of a class, perhaps of a colour, perhaps (relation, index of the requirement it relates to)."""

    name: str
    count: int = 1
    color: str | None = None
    position: tuple[str, int] | None = None

    def metadata(self) -> dict[str, Any]:
        """The requirement as the official file writes it."""
        row: dict[str, Any] = {"class": self.name, "count": self.count}
        if self.color is not None:
            row["color"] = self.color
        if self.position is not None:
            row["position"] = list(self.position)
        return row

    @classmethod
    def from_metadata(cls, row: dict[str, Any]) -> Requirement:
        position = row.get("position")
        return cls(row["class"], row["count"], row.get("color"), tuple(position) if position else None)


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its image must show: all of `include`, and of each `exclude` fewer than its count."""

    index: int
    tag: str
    text: str
    include: tuple[Requirement, ...]
    exclude: tuple[Requirement, ...] = ()

    def metadata(self) -> dict[str, Any]:
        """The prompt as the official file writes it."""
        row: dict[str, Any] = {"tag": self.tag, "include": [requirement.metadata() for requirement in self.include]}
        if self.exclude:
            row["exclude"] = [requirement.metadata() for requirement in self.exclude]
        return {**row, "prompt": self.text}

    @classmethod
    def from_metadata(cls, row: dict[str, Any], index: int = 0) -> Prompt:
        include, exclude = (
            tuple(Requirement.from_metadata(part) for part in row.get(key, ())) for key in ("include", "exclude")
        )
        return cls(index, row["tag"], row["prompt"], include, exclude)


def compose(tag: str, include: tuple[Requirement, ...], index: int = -1) -> Prompt:
    """The prompt of a category that asks for `include`, in the benchmark's words; -1 is the index of none in a list."""
    if tag == "counting":
        (wanted,) = include
        text = f"a photo of {COUNTS[wanted.count]} {plural(wanted.name)}"
        return Prompt(index, tag, text, include, (Requirement(wanted.name, wanted.count + 1),))
    words = [with_article(f"{part.color} {part.name}" if part.color else part.name) for part in include]
    if tag == "position":
        relation, target = include[1].position
        return Prompt(index, tag, f"a photo of {words[1]} {relation} {words[target]}", include)
    return Prompt(index, tag, f"a photo of {' and '.join(words)}", include)


def parse_prompt(text: str) -> Prompt:
    """The prompt behind a text in the benchmark's words, official or not (index -1); the inverse of `compose`.

    Raises:
        UserError: a text that no template makes.
    """
    words = text.strip().lower().removeprefix("a photo of ")
    tag, include = None, ()
    counted = re.fullmatch(rf"({'|'.join(COUNTS.values())}) (.+)", words)
    related = re.fullmatch(rf"(.+) ({'|'.join(RELATIONS)}) (.+)", words)
    if counted:
        count = next(number for number, word in COUNTS.items() if word == counted[1])
        names = [name for name in OBJECT_NAMES if plural(name) == counted[2]]
        tag, include = "counting", tuple(Requirement(name, count) for name in names)
    elif related:
        subject, target = _object(related[1]), _object(related[3])
        if subject.color is None and target.color is None:
            tag, include = "position", (target, replace(subject, position=(related[2], 0)))
    else:
        include = tuple(_object(part) for part in words.split(" and "))
        colored = sum(part.color is not None for part in include)
        tag = OBJECTS_AND_COLORS.get((len(include), colored))
    known = tag is not None and include and all(part.name in OBJECT_NAMES for part in include)
    prompt = compose(tag, include) if known else None
    if prompt is None or prompt.text != text.strip().lower():
        raise UserError(f"GenEval has no such prompt: {text!r}; one it has is 'a photo of a red car and a blue dog'")
    return prompt


def _object(words: str) -> Requirement:
    """'a red car' as a requirement; what is left after article and colour is taken for a name."""
    name = words.removeprefix("an ").removeprefix("a ")
    color, _, rest = name.partition(" ")
    return Requirement(rest, color=color) if color in COLORS and rest else Requirement(name)


def content(prompt: Prompt) -> tuple[str, frozenset[Requirement]]:
    """What a prompt asks for, whatever the order: 'a cat and a dog' is 'a dog and a cat'."""
    return prompt.tag, frozenset(prompt.include)


def mirrored(prompt: Prompt) -> Prompt:
    """A prompt of the category position with its objects changed about: 'a left of b' as 'b right of a'."""
    target, subject = prompt.include
    relation = OPPOSITE[subject.position[0]]
    include = (Requirement(subject.name), Requirement(target.name, position=(relation, 0)))
    return compose(prompt.tag, include, prompt.index)
