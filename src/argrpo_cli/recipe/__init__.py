"""Recipes: the typed description of one training run, read from YAML; and what is wrong with one, in one line.

YAML, bundled names, `extends`, `--set` overrides; the keys are in `schema.py` and `sections.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError

from argrpo_cli.policy.folder import glance
from argrpo_cli.recipe.schema import OWN_KEYS, Recipe, merge, with_whole_start
from argrpo_cli.recipe.sections import section_of
from argrpo_cli.system.errors import UserError, did_you_mean
from argrpo_cli.system.files import read_text

# Keys that take values of several kinds, for which pydantic reports one fault per kind.
UNIONS = {
    "start": "must be null, the name or path of a recipe, or a mapping of a recipe's keys",
    "conditions.classes": "must be 'all' or a list of class names or ids",
    "conditions.captions": "must be a name, a file or a list of captions",
    "distil.cfg_scale": "must be a number above 1, or a list of such numbers",
    "policy.trainable": "must be 'all', a part of the parameters' names or a list of such parts",
}


class Layer(NamedTuple):
    """Some of a recipe's keys and where they were said: a file or a --set."""

    source: str
    tree: dict[str, Any]


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        path_or_name: a YAML file, or the name of a bundled recipe such as `nano/c2i`.
        overrides: `key=value` texts; keys are dotted (`grpo.beta`, `rewards.terms.0.weight`), values YAML.

    Later layers win: the file over what it extends, the overrides over both. Mappings merge, lists replace.
    `name`, `description`, `out` and `published` are not inherited; the name defaults to the file's. Guidance and
    temperature that nobody says are those that the policy is meant to be sampled with, where it says so.

    Raises:
        UserError: one line naming the file or override, the key, the value and what is allowed.
    """
    path = find_recipe(path_or_name)
    layers = list(_file_layers(path, ()))
    tree: dict[str, Any] = {"name": path.stem}
    for layer in layers:
        tree = merge(tree, layer.tree)
    for text in overrides:
        for layer in _override(text, tree):
            layers.append(layer)
            tree = merge(tree, layer.tree)
    try:
        return Recipe.model_validate(_as_the_policy_says(tree))
    except ValidationError as error:
        raise UserError(explain(error, layers)) from error


def _as_the_policy_says(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with sampling's keys that it lacks, where policy.json has them; filters are none of training's."""
    try:
        own = glance(merge(Recipe(name="x").model_dump(mode="json"), tree)["policy"]["checkpoint"]).sampling
    except (UserError, TypeError, AttributeError):  # what is wrong with it is told elsewhere
        own = {}
    if isinstance(tree.get("start"), dict) and with_whole_start(tree)["start"]["method"] == "distil":
        own = {**own, "cfg_scale": 1.0}  # guidance is in the weights by then
    return merge({"sampling": {key: own[key] for key in ("cfg_scale", "temperature") if key in own}}, tree)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every key said; `load_recipe` reads it back to an equal recipe."""
    # Text goes through JSON-like plain values; floats keep Python's shortest exact form.
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def list_recipes() -> list[str]:
    """Names of the bundled recipes, sorted."""
    root = bundled_dir()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def bundled_dir() -> Path:
    """The folder of bundled recipes: in the installed package, or the checkout's for an editable install."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


def find_recipe(path_or_name: str | Path, relative_to: Path | None = None) -> Path:
    """The file that a path or a bundled name stands for; `recipes/…` also works outside a checkout."""
    text = str(path_or_name)
    path = Path(text).expanduser() if relative_to is None else relative_to / Path(text).expanduser()
    try:
        if path.is_file():
            return path
        if path.is_dir() and not _bundled(text):
            raise UserError(f"{text} is a folder, not a recipe (continue a run with `argrpo train --resume {text}`)")
    except (OSError, ValueError) as error:  # a name too long for the file system, a null byte
        raise UserError(f"no recipe {text[:60]!r}: {error}") from error
    bundled = _bundled(text)
    if bundled is None:
        names = list_recipes()
        hint = did_you_mean(text.removesuffix(".yaml").removesuffix(".yml"), names)
        raise UserError(f"no recipe {text!r}: not a file, and the bundled ones are {', '.join(names)}{hint}")
    return bundled


def _bundled(text: str) -> Path | None:
    """The bundled recipe called `text`, with or without `recipes/` before it and `.yaml` after it."""
    root = bundled_dir()
    name = text.removeprefix("./").removeprefix("recipes/").removesuffix(".yaml")
    candidate = root / f"{name}.yaml"
    inside = candidate.resolve().is_relative_to(root.resolve())
    return candidate if inside and candidate.is_file() else None


def _file_layers(path: Path, opened: tuple[Path, ...]) -> Iterator[Layer]:
    """The layers of a file, what it extends first. `opened` are the files that led here."""
    here = path.resolve()
    if here in opened:
        chain = " -> ".join(str(step) for step in (*opened[opened.index(here) :], here))
        raise UserError(f"{path}: 'extends' or 'start' runs in a circle: {chain}")
    tree = parse_yaml(read_text(path), str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, not {shown(tree)}")
    parent = tree.pop("extends", None)
    if parent is not None:
        if not isinstance(parent, str):
            raise UserError(f"{path}: extends = {shown(parent)}: must be the path or the name of a recipe")
        yield from _named(parent, "extends", str(path), path.parent, (*opened, here))
    yield from _own_layers(Layer(str(path), tree), path.parent, (*opened, here))


def _named(name: str, key: str, source: str, folder: Path | None, opened: tuple[Path, ...]) -> Iterator[Layer]:
    """The layers of the recipe that a `key` of `source` names, without what says which run it is."""
    try:
        path = find_recipe(name, relative_to=folder)
    except UserError as error:
        raise UserError(f"{source}: {key}: {error}") from error
    for layer in _file_layers(path, opened):
        yield Layer(layer.source, {key: value for key, value in layer.tree.items() if key not in OWN_KEYS})


def _own_layers(layer: Layer, folder: Path | None, opened: tuple[Path, ...]) -> Iterator[Layer]:
    """A layer, and before it, where its `start` is a name, that recipe's keys in the place of any start so far."""
    start = layer.tree.get("start")
    if isinstance(start, str):
        yield Layer(layer.source, {"start": None})
        for inner in _named(start, "start", layer.source, folder, opened):
            yield Layer(inner.source, {"start": inner.tree})
        layer = Layer(layer.source, {key: value for key, value in layer.tree.items() if key != "start"})
    yield layer


def _override(text: str, tree: dict[str, Any]) -> Iterator[Layer]:
    """The layers of one `key=value`; `tree` is what it overrides, needed for keys that count into a list."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {text!r}: expected key=value, for instance grpo.beta=0.02")
    source = f"--set {text}"
    held = merge(Recipe(name="x").model_dump(mode="json"), tree)
    held = with_whole_start({**held, "start": held["start"] or {}})
    return _own_layers(Layer(source, _within(held, parts, 0, parse_yaml(value, source), source)), None, ())


def _within(held: Any, parts: list[str], depth: int, value: Any, source: str) -> Any:
    """`value` under the keys from `depth` on; where one counts into a list, the whole list with the change in it, for
    lists do not merge. `held` is what is there now."""
    if depth == len(parts):
        return value
    key, name = parts[depth], ".".join(parts[:depth])
    if not key.isdigit() or isinstance(held, dict):
        inner = held.get(key) if isinstance(held, dict) else None
        return {key: _within(inner, parts, depth + 1, value, source)}
    if not isinstance(held, list):
        raise UserError(f"{source}: {name} is not a list")
    if int(key) >= len(held):
        raise UserError(f"{source}: {name} has {len(held)} entries, counted from 0")
    old = held[int(key)]
    changed = merge(old, _within(old, parts, depth + 1, value, source))
    return [*held[: int(key)], changed, *held[int(key) + 1 :]]


class _Loader(yaml.SafeLoader):
    """YAML without 1.1's surprises: 2e-4 is a number, `no` a word, a key given twice an error (1.2's core schema)."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  (PyYAML's own extension point)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


NUMBER = r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"
for _tag, _pattern, _first in (
    ("null", r"^(?:null|Null|NULL|~|)$", ["n", "N", "~", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    ("float", rf"{NUMBER}|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document; UserError names `source`, the line and the fault."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{source}{where}: not valid YAML: {what}") from error
    except RecursionError as error:
        raise UserError(f"{source}: not valid YAML: nested too deeply") from error


def explain(error: ValidationError, layers: Sequence[Layer]) -> str:
    """One line for the first fault that pydantic found, and how many more there are."""
    faults = error.errors(include_url=False)
    said = {fault["loc"] for fault in faults}  # what is wrong in a recipe is so in its start, which takes it from there
    faults = [fault for fault in faults if fault["loc"][:1] != ("start",) or fault["loc"][1:] not in said]
    # The cause before its consequences: an unknown key is reported ahead of a missing one.
    fault = min(faults, key=lambda one: one["type"] == "missing")
    keys = [part for part in fault["loc"] if _is_key(part)]
    dotted = ".".join(str(part) for part in keys)
    # The layer that said the value: the last one that reaches deepest into it.
    source = max(reversed(layers), key=lambda layer: _reach(keys, layer.tree)).source
    more = len({tuple(p for p in one["loc"] if _is_key(p)) for one in faults}) - 1
    tail = f" (and {more} more)" if more else ""
    if fault["type"] == "extra_forbidden":
        allowed, section = _allowed_keys(keys[:-1]), ".".join(map(str, keys[:-1]))
        inside = f"the keys of {section}" if section else "the keys"
        hint = did_you_mean(keys[-1], allowed)
        return f"{source}: unknown key {dotted!r}; {inside} are {', '.join(allowed)}{hint}{tail}"
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
        message = "must be made of letters, digits, '.', '_' and '-'"
    if fault["type"] in ("too_short", "too_long"):
        least = fault["ctx"].get("min_length")
        count = f"at least {least}" if least is not None else f"at most {fault['ctx']['max_length']}"
        message = f"must have {count} entries"
    message = UNIONS.get(dotted.removeprefix("start."), message)
    if fault["type"] == "literal_error" and isinstance(fault["input"], str):
        hint = did_you_mean(fault["input"], fault["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", "))
    return f"{source}: {dotted} = {shown(fault['input'])}: {message}{hint}{tail}"


def _is_key(part: str | int) -> bool:
    """Whether a part of pydantic's location is ours; it also names the branches of a union there."""
    if isinstance(part, int):
        return True
    return part not in ("str", "int", "constrained-str", "constrained-float") and "[" not in part and "(" not in part


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
    model: type[BaseModel] | None = Recipe
    for key in keys:
        if isinstance(key, str):
            field = model.model_fields.get(key)
            model = field and section_of(field.annotation)
        if model is None:
            return []
    return list(model.model_fields)


def shown(value: Any) -> str:
    """A value, short enough for one line."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."
