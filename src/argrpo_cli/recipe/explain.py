"""What is wrong with a recipe, in one line: where it was said, the key, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from argrpo_cli.recipe.layers import Layer, reach, value_at
from argrpo_cli.recipe.schema import Recipe, sections
from argrpo_cli.recipe.sections import METHODS, section_of
from argrpo_cli.system.errors import did_you_mean, shortened

# Keys that take values of several kinds, for which pydantic reports one fault per kind.
UNIONS = {
    "start": "must be null, the name or path of a recipe, or a mapping of a recipe's keys",
    "conditions.classes": "must be 'all' or a list of class names or ids",
    "conditions.captions": "must be a name, a file or a list of captions",
    "distil.cfg_scale": "must be a number above 1, or a list of such numbers",
    "policy.trainable": "must be 'all', a part of the parameters' names or a list of such parts",
}

# What other trainers call a key.
SYNONYMS = {
    "lr": "learning_rate", "num_generations": "group_size", "max_steps": "steps", "kl_coef": "beta",
    "clip_range": "epsilon", "guidance_scale": "cfg_scale", "guidance": "cfg_scale", "wd": "weight_decay",
    "max_norm": "max_grad_norm", "warmup": "warmup_steps", "ema": "ema_decay",
}  # fmt: skip


def explain(error: ValidationError, layers: Sequence[Layer], tree: dict[str, Any]) -> str:
    """One line for the first fault that pydantic found, and how many more there are; `tree` is what it looked at."""
    faults = error.errors(include_url=False)
    said = {fault["loc"] for fault in faults}  # what is wrong in a recipe is so in its start, which takes it from there
    faults = [fault for fault in faults if fault["loc"][:1] != ("start",) or fault["loc"][1:] not in said]
    # The cause before its consequences: an unknown key is reported ahead of a missing one.
    fault = min(faults, key=lambda one: one["type"] == "missing")
    keys = _keys(fault, tree)
    dotted = ".".join(str(part) for part in keys)
    # The layer that said the value: the last one that reaches deepest into it.
    source = max(reversed(layers), key=lambda layer: reach(keys, layer.tree)).source
    more = len({tuple(_keys(one, tree)) for one in faults}) - 1
    tail = f" (and {more} more)" if more else ""
    if fault["type"] == "extra_forbidden":
        allowed, section = _allowed_keys(keys[:-1]), ".".join(map(str, keys[:-1]))
        inside = f"the keys of {section}" if section else "the keys"
        hint, meant = _elsewhere(keys, tree), SYNONYMS.get(str(keys[-1]))
        hint = f"; did you mean {meant!r}?" if meant in allowed else hint or did_you_mean(keys[-1], allowed)
        names = f"{inside} are {', '.join(allowed)}"
        names = f"{hint} {names[0].upper()}{names[1:]}" if hint else f"; {names}"
        return f"{source}: unknown key {shortened(dotted)}{names}{tail}"
    if fault["type"] == "missing":
        return f"{source}: the key {dotted!r} is missing{tail}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":  # our own checks, which name their values themselves
        return f"{source}: {dotted + ': ' if dotted else ''}{message}{tail}"
    message = message.replace("Input should be", "must be").replace("a valid ", "a ").replace("a integer", "an integer")
    hint = ""
    if fault["type"] in ("model_type", "dict_type", "model_attributes_type"):
        message = f"must be a mapping with the keys {', '.join(_allowed_keys(keys))}"
    if fault["type"] == "string_pattern_mismatch":
        message = "must be made of letters, digits, '.', '_' and '-', 100 at most"
    if fault["type"] == "string_type" and not isinstance(fault["input"], dict | list):
        message = "must be text; put it in quotes"
    if fault["type"] in ("too_short", "too_long"):
        least = fault["ctx"].get("min_length")
        count = f"at least {least}" if least is not None else f"at most {fault['ctx']['max_length']}"
        message = f"must have {count} entries"
    message = UNIONS.get(dotted.removeprefix("start."), message)
    if fault["type"] == "literal_error" and isinstance(fault["input"], str):
        hint = did_you_mean(fault["input"], fault["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", "))
    return f"{source}: {dotted} = {shortened(fault['input'])}: {message}{hint}{tail}"


def _keys(fault: Any, tree: Any) -> list[Any]:
    """The parts of pydantic's location of a fault that lead into the tree; there are names of types between them."""
    keys: list[Any] = []
    for part in fault["loc"]:
        if reach([part], tree) or (fault["type"] == "missing" and part is fault["loc"][-1]):
            keys.append(part)
            tree = tree[part] if reach([part], tree) else None
    return keys


def _elsewhere(keys: Sequence[Any], tree: Any) -> str:
    """`; did you mean 'grpo.beta'?` where an unknown key is one of another section, of the method's before others."""
    start = "start." if keys[0] == "start" else ""
    own = said if (said := value_at(tree, ["method"])) in METHODS else "grpo"
    names = [name.replace("[]", ".0") for name, model in sections(Recipe) if keys[-1] in model.model_fields]
    if not names:
        return ""
    name = own if own in names else names[0]
    return f"; did you mean {start + f'{name}.{keys[-1]}'.lstrip('.')!r}?"


def _allowed_keys(keys: list[Any]) -> list[str]:
    """The key names that the schema has at `keys`."""
    model: type[BaseModel] | None = Recipe
    for key in keys:
        if isinstance(key, str):
            field = model.model_fields.get(key)
            model = field and section_of(field.annotation)
        if model is None:
            return []
    return list(model.model_fields)
