"""Reading recipes: YAML, bundled names, `extends`, `--set` overrides."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from argrpo_cli.recipe.explain import Layer, explain, shown
from argrpo_cli.recipe.schema import Recipe
from argrpo_cli.system.errors import UserError, did_you_mean
from argrpo_cli.system.files import read_text

OWN_KEYS = ("name", "description", "out", "published")  # say which run this is, so `extends` does not hand them on


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        path_or_name: a YAML file, or the name of a bundled recipe such as `nano/c2i`.
        overrides: `key=value` texts; keys are dotted (`grpo.beta`, `rewards.terms.0.weight`), values YAML.

    Later layers win: the file over what it extends, the overrides over both. Mappings merge, lists replace.
    `name`, `description`, `out` and `published` are not inherited; the name defaults to the file's.

    Raises:
        UserError: one line naming the file or override, the key, the value and what is allowed.
    """
    path = find_recipe(path_or_name)
    layers = list(_file_layers(path, ()))
    tree: dict[str, Any] = {"name": path.stem}
    for layer in layers:
        tree = _merge(tree, layer.tree)
    for text in overrides:
        layer = _override(text, tree)
        layers.append(layer)
        tree = _merge(tree, layer.tree)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, layers)) from error


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
        raise UserError(f"{path}: 'extends' runs in a circle: {chain}")
    tree = parse_yaml(read_text(path), str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, not {shown(tree)}")
    parent = tree.pop("extends", None)
    if parent is not None:
        if not isinstance(parent, str):
            raise UserError(f"{path}: extends = {shown(parent)}: must be the path or the name of a recipe")
        try:
            parent_path = find_recipe(parent, relative_to=path.parent)
        except UserError as error:
            raise UserError(f"{path}: extends: {error}") from error
        for layer in _file_layers(parent_path, (*opened, here)):
            kept = {key: value for key, value in layer.tree.items() if key not in OWN_KEYS}
            yield Layer(layer.source, kept)
    yield Layer(str(path), tree)


def _override(text: str, tree: dict[str, Any]) -> Layer:
    """The layer of one `key=value`; `tree` is what it overrides, needed for keys that count into a list."""
    key, equals, value_text = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {text!r}: expected key=value, for instance grpo.beta=0.02")
    value = parse_yaml(value_text, f"--set {text}")
    if len(parts) > 2 and any(part.isdigit() for part in parts):
        return Layer(f"--set {text}", _set_in_list(parts, value, tree, text))
    for part in reversed(parts):
        value = {part: value}
    return Layer(f"--set {text}", value)


def _set_in_list(parts: list[str], value: Any, tree: dict[str, Any], text: str) -> dict[str, Any]:
    """`rewards.terms.0.weight=2` as a mapping with the whole changed list, for lists do not merge."""
    at = next(index for index, part in enumerate(parts) if part.isdigit())
    held: Any = Recipe(name="x").model_dump(mode="json")
    held = _merge(held, tree)
    for part in parts[:at]:
        held = held.get(part) if isinstance(held, dict) else None
    position = int(parts[at])
    if not isinstance(held, list):
        raise UserError(f"--set {text}: {'.'.join(parts[:at])} is not a list")
    if position >= len(held):
        raise UserError(f"--set {text}: {'.'.join(parts[:at])} has {len(held)} entries, counted from 0")
    for part in reversed(parts[at + 1 :]):
        value = {part: value}
    changed = list(held)
    old = changed[position]
    changed[position] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    result: Any = changed
    for part in reversed(parts[:at]):
        result = {part: result}
    return result


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on it: mappings merge, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


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


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:null|Null|NULL|~|)$"), ["n", "N", "~", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), "-+0123456789")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    "-+.0123456789",
)


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
