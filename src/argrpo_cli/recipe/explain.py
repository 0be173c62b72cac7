"""What is wrong with a recipe, in one line: where it was said, the key, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from argrpo_cli.recipe.schema import Recipe
from argrpo_cli.system.errors import did_you_mean

# Keys that take values of several kinds, for which pydantic reports one fault per kind.
UNIONS = {
    "conditions.classes": "must be 'all' or a list of class names or ids",
    "conditions.captions": "must be a name, a file or a list of captions",
    "policy.trainable": "must be 'all', a part of the parameters' names or a list of such parts",
}


@dataclass(frozen=True)
class Layer:
    """Some of a recipe's keys and where they were said: a file or a --set."""

    source: str
    tree: dict[str, Any]


def explain(error: ValidationError, layers: Sequence[Layer]) -> str:
    """One line for the first fault that pydantic found, and how many more there are."""
    faults = error.errors(include_url=False)
    # The cause before its consequences: an unknown key is reported ahead of a missing one.
    fault = min(faults, key=lambda one: one["type"] == "missing")
    keys = [part for part in fault["loc"] if _is_key(part)]
    dotted = ".".join(str(part) for part in keys)
    source = _source(keys, layers)
    more = len({tuple(p for p in one["loc"] if _is_key(p)) for one in faults}) - 1
    tail = f" (and {more} more)" if more else ""
    if fault["type"] == "extra_forbidden":
        allowed = _allowed_keys(keys[:-1])
        inside = f"the keys of {'.'.join(map(str, keys[:-1]))}" if keys[:-1] else "the keys"
        hint = did_you_mean(keys[-1], allowed)
        return f"{source}: unknown key {dotted!r}; {inside} are {', '.join(allowed)}{hint}{tail}"
    if fault["type"] == "missing":
        return f"{source}: the key {dotted!r} is missing{tail}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":  # our own checks, which name their values themselves
        return f"{source}: {dotted + ': ' if dotted else ''}{message}{tail}"
    message = message.replace("Input should be", "must be").replace("a valid ", "a ").replace("a integer", "an integer")
    if fault["type"] in ("model_type", "dict_type", "model_attributes_type"):
        message = f"must be a mapping with the keys {', '.join(_allowed_keys(keys))}"
    if fault["type"] == "string_pattern_mismatch":
        message = "must be made of letters, digits, '.', '_' and '-'"
    if fault["type"] in ("too_short", "too_long"):
        least = fault["ctx"].get("min_length")
        count = f"at least {least}" if least is not None else f"at most {fault['ctx']['max_length']}"
        message = f"must have {count} entries"
    message = UNIONS.get(dotted, message)
    hint = ""
    if fault["type"] == "literal_error" and isinstance(fault["input"], str):
        hint = did_you_mean(fault["input"], fault["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", "))
    return f"{source}: {dotted} = {shown(fault['input'])}: {message}{hint}{tail}"


def _is_key(part: str | int) -> bool:
    """Whether a part of pydantic's location is ours; it also names the branches of a union there."""
    if isinstance(part, int):
        return True
    return part not in ("str", "int", "constrained-str") and "[" not in part and "(" not in part


def _source(keys: list[Any], layers: Sequence[Layer]) -> str:
    """The layer that said the value at `keys`: the last one that reaches deepest into it."""
    return max(reversed(layers), key=lambda layer: _reach(keys, layer.tree)).source


def _reach(keys: list[Any], held: Any) -> int:
    """How many of `keys` lead into the nested mappings and lists of `held`."""
    for depth, key in enumerate(keys):
        try:
            held = held[key]
        except (KeyError, IndexError, TypeError):
            return depth
    return len(keys)


def _allowed_keys(keys: list[Any]) -> list[str]:
    """The key names that the schema has at `keys`."""
    model: type[BaseModel] = Recipe
    for key in keys:
        if isinstance(key, int):
            continue
        annotation = model.model_fields[key].annotation if key in model.model_fields else None
        while annotation is not None and get_origin(annotation) is not None:
            annotation = next((arg for arg in get_args(annotation) if arg is not type(None)), None)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def shown(value: Any) -> str:
    """A value, short enough for one line."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."
