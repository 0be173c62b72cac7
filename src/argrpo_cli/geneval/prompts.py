"""GenEval's 553 prompts, built from a table of facts (prompts.txt) by the benchmark's templates, and the nano sets.

`geneval` is the official list: serialised, it has the official file's hash. `geneval-nano` are those official prompts
that the nano world has the objects and colours for. `geneval-nano-extra` are further compositions of nano objects
under the same templates, so that the two nano sets together can tell policies apart in every category.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import permutations, product
from pathlib import Path

from argrpo_cli.geneval.grammar import (
    COUNTS,
    NANO_COLORS,
    NANO_OBJECTS,
    RELATIONS,
    TAGS,
    Prompt,
    Requirement,
    compose,
    content,
)
from argrpo_cli.system.errors import UserError, did_you_mean

OFFICIAL_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"  # of evaluation_metadata.jsonl
NANO_PROMPTS_PER_TAG = 40  # in geneval-nano and geneval-nano-extra together


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
    """Compositions of the nano world that the official list lacks, numbered after it.

    They fill each category up to NANO_PROMPTS_PER_TAG, except single_object: the 24 nano objects are all official.
    Each next one is the composition whose classes, colours, count and relation have been asked for least so far in
    its category; ties go by the SHA-256 of the prompt, which is the same on every machine and with every library.
    """
    extra: list[Prompt] = []
    official = {content(prompt) for prompt in official_prompts()}
    for tag in TAGS:
        compositions: dict[object, Prompt] = {}
        for prompt in sorted(_nano_compositions(tag), key=lambda prompt: hashlib.sha256(prompt.text.encode()).digest()):
            compositions.setdefault(content(prompt), prompt)
        candidates = [prompt for content, prompt in compositions.items() if content not in official]
        del candidates[1000:]  # plenty to choose from; the pairs of coloured objects are 15,456
        chosen = [prompt for prompt in nano_prompts() if prompt.tag == tag]
        used = Counter(word for prompt in chosen for word in _words(prompt))
        for _ in range(min(NANO_PROMPTS_PER_TAG - len(chosen), len(candidates))):
            best = min(candidates, key=lambda prompt: sum(used[word] for word in _words(prompt)))
            candidates.remove(best)
            used.update(_words(best))
            extra.append(compose(tag, best.include, len(official_prompts()) + len(extra)))
    return tuple(extra)


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


def _nano_compositions(tag: str) -> Iterator[Prompt]:
    """Everything that a category can ask of the nano world."""
    names, colors = NANO_OBJECTS, NANO_COLORS
    includes: Iterable[tuple[Requirement, ...]]
    if tag == "single_object":
        includes = ((Requirement(name),) for name in names)
    elif tag == "counting":
        includes = ((Requirement(name, count),) for name, count in product(names, COUNTS))
    elif tag == "colors":
        includes = ((Requirement(name, color=color),) for name, color in product(names, colors))
    elif tag == "position":
        includes = (
            (Requirement(target), Requirement(subject, position=(relation, 0)))
            for (target, subject), relation in product(permutations(names, 2), RELATIONS)
        )
    else:
        palette = permutations(colors, 2) if tag == "color_attr" else [(None, None)]
        includes = (
            (Requirement(first, color=one), Requirement(second, color=two))
            for (first, second), (one, two) in product(permutations(names, 2), palette)
        )
    return (compose(tag, include) for include in includes)


def _words(prompt: Prompt) -> list[str | int]:
    """The classes, colours, counts and relations of a prompt."""
    parts = [(part.name, part.color, part.count, part.position and part.position[0]) for part in prompt.include]
    return [word for part in parts for word in part if word is not None]
