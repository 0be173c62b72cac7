"""GenEval's prompts: the language that they are written in, the benchmark's 553, and the sets of the nano world.

`compose` writes a prompt by the benchmark's templates, `parse_prompt` reads one; the captions of the nano world are
written in the same language. `geneval` is the official list, built from a table of facts (prompts.txt): serialised, it
has the official file's hash. `geneval-nano` are those official prompts that the nano world has the objects and colours
for. `geneval-nano-extra` are further compositions of nano objects under the same templates, so that the two nano sets
together can tell policies apart in every category.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from argrpo_cli.shapes import with_article
from argrpo_cli.system.errors import UserError, did_you_mean

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
OFFICIAL_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"  # of evaluation_metadata.jsonl


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


def official_jsonl(prompts: Iterable[Prompt]) -> str:
    """Prompts in the format of the official evaluation_metadata.jsonl."""
    return "".join(json.dumps(prompt.metadata()) + "\n" for prompt in prompts)


@cache
def official_prompts() -> tuple[Prompt, ...]:
    """The 553 prompts in official order, checked against the hash of the official file."""
    facts = _read_facts(Path(__file__).with_name("prompts.txt"))
    prompts = tuple(compose(tag, _requirements(tag, fact), index) for index, (tag, fact) in enumerate(facts))
    if hashlib.sha256(official_jsonl(prompts).encode()).hexdigest() != OFFICIAL_SHA256:
        raise UserError("GenEval's prompts in this installation are not the official ones: install argrpo-cli again")
    return prompts


@cache
def nano_prompts() -> tuple[Prompt, ...]:
    """The official prompts, under their official indices, whose objects and colours the nano world has."""

    def known(part: Requirement) -> bool:
        return part.name in NANO_OBJECTS and (part.color is None or part.color in NANO_COLORS)

    return tuple(prompt for prompt in official_prompts() if all(known(part) for part in prompt.include))


@cache
def nano_extra_prompts() -> tuple[Prompt, ...]:
    """Compositions of the nano world that the official list lacks, numbered after it."""
    facts = _read_facts(Path(__file__).with_name("prompts_nano.txt"))
    first = len(official_prompts())
    return tuple(compose(tag, _requirements(tag, fact), index) for index, (tag, fact) in enumerate(facts, first))


SETS = {"geneval": official_prompts, "geneval-nano": nano_prompts, "geneval-nano-extra": nano_extra_prompts}


def prompt_set(name: str) -> tuple[Prompt, ...]:
    """The prompts of a set by its name."""
    if name not in SETS:
        raise UserError(f"prompt set {name!r} is unknown: choose {', '.join(SETS)}{did_you_mean(name, SETS)}")
    return SETS[name]()


def _read_facts(path: Path) -> Iterator[tuple[str, str]]:
    """(tag, fact) in the order of the file."""
    tag = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            tag = line.strip("[]")
        elif not line.startswith("#"):
            yield from ((tag, fact.strip()) for fact in line.split(",") if fact.strip())


def _requirements(tag: str, fact: str) -> tuple[Requirement, ...]:
    """What an entry of the table asks for."""
    if tag == "counting":
        count, name = fact.split(" ", 1)
        return (Requirement(name, int(count)),)
    if tag == "position":
        relation = next(relation for relation in RELATIONS if f" {relation} " in fact)
        subject, target = fact.split(f" {relation} ")
        return Requirement(target), Requirement(subject, position=(relation, 0))
    parts = fact.split(" + ")
    if tag in ("colors", "color_attr"):
        return tuple(Requirement(name, color=color) for color, name in (part.split(" ", 1) for part in parts))
    return tuple(Requirement(name) for name in parts)
