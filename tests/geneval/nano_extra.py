"""How the prompts of geneval-nano-extra were chosen."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import permutations, product

from argrpo_cli.geneval.prompts import (
    COUNTS,
    NANO_COLORS,
    NANO_OBJECTS,
    RELATIONS,
    TAGS,
    Prompt,
    Requirement,
    compose,
    content,
    nano_prompts,
    official_prompts,
)

NANO_PROMPTS_PER_TAG = 40  # in geneval-nano and geneval-nano-extra together


def chosen_prompts() -> tuple[Prompt, ...]:
    """The prompts of geneval-nano-extra, chosen among all compositions of the nano world that the official list lacks.

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
