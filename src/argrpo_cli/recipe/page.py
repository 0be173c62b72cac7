"""All keys of a recipe as a page: `python -m argrpo_cli.recipe.page > docs/recipes.md`.

Written from the schema and its comments, so a key's comment is written for users.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

from argrpo_cli.recipe.schema import Recipe, sections
from argrpo_cli.recipe.sections import Section, section_of

BOUNDS = {Ge: "from {}", Gt: "above {}", Le: "at most {}", Lt: "below {}"}
KINDS = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", Any: "anything", Recipe: "recipe"}
PAGE = """# The keys of a recipe

`python -m argrpo_cli.recipe.page` writes this page from the schema, `src/argrpo_cli/recipe/`. A recipe is a YAML file
of any of these keys; `extends: NAME` takes those of another recipe first, and `--set grpo.beta=0` changes one on the
command line. Mappings merge, lists replace; `rewards: {add: [{name: hpsv2}]}`, or `--set rewards.add=hpsv2`, adds to
`rewards.terms`, or changes the term of that name, and leaves the others as they are. [training.md](training.md) says
what the keys are for.

`--steps`, `--lr`, `--seed` and `--device` stand for `grpo.steps`, `grpo.learning_rate` (of another method in its own
recipes), `seed` and `policy.device`.
"""


def page() -> str:
    """All keys of a recipe as Markdown: a table for each section, with types, ranges and defaults."""
    parts = [PAGE]
    for name, model in sections(Recipe):
        parts.append(f"\n## {f'`{name}`' if name else 'The run'}\n\n{inspect.getdoc(model)}\n")
        parts.append("\n| key | value | default | |\n| --- | --- | --- | --- |\n")
        notes = _comments(model)
        for key, field in model.model_fields.items():
            if section_of(field.annotation) in (None, Recipe):
                default = "" if field.is_required() else f"`{json.dumps(field.default)}`"
                cells = (f"`{key}`", _value(field.annotation, field.metadata), default, notes.get(key, ""))
                parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(parts)


def _value(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words: `whole number from 1`, `` `grpo`, `dapo` ``, `list of text, or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _value(arguments[0], [part for one in arguments[1:] for part in getattr(one, "metadata", [one])])
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in arguments)
    if origin is list:
        return f"list of {_value(arguments[0])}"
    if origin is dict:
        return f"{_value(arguments[0])} to {_value(arguments[1])}"
    if annotation is NoneType:
        return "`null`"
    if arguments:
        return ", or ".join(_value(one) for one in arguments)
    bounds = [
        words.format(f"{bound:g}" if isinstance(bound := getattr(one, kind.__name__.lower()), float) else bound)
        for one in metadata
        for kind, words in BOUNDS.items()
        if isinstance(one, kind)
    ]
    return " ".join([KINDS[annotation], *bounds])


def _comments(model: type[Section]) -> dict[str, str]:
    """What the source says of each key: the comment lines before it and the comment behind it."""
    notes: dict[str, str] = {}
    before: list[str] = []
    family = [one for one in reversed(model.__mro__) if issubclass(one, Section) and one is not Section]
    for line in (line for one in family for line in inspect.getsource(one).splitlines()):
        if comment := re.match(r"    # (.*)", line):
            before.append(comment[1])
            continue
        if key := re.match(r"    (\w+): .*?(?:  # (.*))?$", line):
            notes[key[1]] = " ".join([*before, key[2] or ""]).strip()
        before = []
    return notes


if __name__ == "__main__":
    print(page(), end="")
