"""Recipes: the typed description of one training run, read from YAML; and what is wrong with one, in one line.

Files, bundled names and `extends`; what is laid over what is in `layers.py`, the keys are in `schema.py` and
`sections.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from argrpo_cli.policy.folder import glance
from argrpo_cli.recipe.explain import explain
from argrpo_cli.recipe.layers import Layer, Layers, of_option, of_override, whole
from argrpo_cli.recipe.schema import OWN_KEYS, Recipe, merge, with_whole_start
from argrpo_cli.recipe.sections import UNGUIDED
from argrpo_cli.recipe.text import parse_yaml, write_yaml
from argrpo_cli.system.errors import UserError, first_line, offer, shortened
from argrpo_cli.system.files import expanded, read_text
from argrpo_cli.system.processes import say
from argrpo_cli.system.references import relative_to

MOST_BYTES, MOST_FILES = 10**6, 50  # of one file, and files that one recipe is made of


def load_recipe(
    path_or_name: str | Path,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = say,
) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        path_or_name: a YAML file, or the name of a bundled recipe such as `nano/c2i`.
        overrides: `key=value` texts; keys are dotted (`grpo.beta`, `rewards.terms.0.weight`), values YAML.
        options: those of the command line that stand for a key, by their names in `OPTIONS`.
        tell: takes what a reader may not expect: terms that are replaced, a warm-up that is shortened.

    Later layers win: the file over what it extends, the overrides over both. Mappings merge, lists replace, and
    `rewards.add` adds to a list. `name`, `description`, `out` and `published` are not inherited; the name defaults to
    the file's. Guidance and temperature that nobody says are those that the policy is meant to be sampled with, where
    it says so. A warm-up that is inherited and longer than the run takes the same share of it as before.

    Raises:
        UserError: one line naming the file or override, the key, the value and what is allowed.
    """
    path = find_recipe(path_or_name)
    stack = Layers(path.stem, bundled_dir().resolve(), tell)
    stack.lay(_file_layers(path, ()))
    for text in overrides:
        stack.lay(_own_layers(of_override(text, stack.tree), None, ()))
    for option, value in (options or {}).items():
        stack.lay([of_option(option, value, stack)])
    stack.fit_warmups()
    tree = _as_the_policy_says(stack.tree)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, stack.layers, with_whole_start(tree))) from error


def _as_the_policy_says(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with sampling's keys that it lacks, where policy.json has them; filters are none of training's."""
    try:
        own = glance(whole(tree)["policy"]["checkpoint"]).sampling
    except (UserError, OSError, TypeError, AttributeError):  # what is wrong with it is told elsewhere
        own = {}
    if isinstance(tree.get("start"), dict) and with_whole_start(tree)["start"]["method"] in UNGUIDED:
        own = {**own, "cfg_scale": 1.0}  # guidance is in the weights by then
    return merge({"sampling": {key: own[key] for key in ("cfg_scale", "temperature") if key in own}}, tree)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every key said; `load_recipe` reads it back to an equal recipe."""
    return write_yaml(recipe.model_dump(mode="json"))


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
    path = (relative_to or Path()) / expanded(text)
    try:
        if path.is_file():
            return path
        bundled = _bundled(text)
        if path.is_dir() and bundled is None:
            raise UserError(f"{text} is a folder, not a recipe (continue a run with `argrpo train --resume {text}`)")
    except (OSError, ValueError) as error:  # a name too long for the file system, a null byte
        raise UserError(f"no recipe {text[:60]!r}: {first_line(error)}") from error
    if bundled is None:
        names = list_recipes()
        near = offer(text.removesuffix(".yaml").removesuffix(".yml"), names, "recipes", "the bundled ones are")
        raise UserError(f"no recipe {text!r}: not a file, nor a bundled one{near}")
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
    if len(opened) > MOST_FILES:
        raise UserError(f"{path}: 'extends' and 'start' lead through more than {MOST_FILES} files")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path}: {path.stat().st_size / 1e6:.1f} MB, and a recipe has less than {MOST_BYTES / 1e6:g}")
    tree = parse_yaml(read_text(path), str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, not {shortened(tree)}")
    parent = tree.pop("extends", None)
    if parent is not None:
        if not isinstance(parent, str):
            raise UserError(f"{path}: extends = {shortened(parent)}: must be the path or the name of a recipe")
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
    layer = Layer(layer.source, _placed(layer.tree, folder or Path()))
    start = layer.tree.get("start")
    if isinstance(start, str):
        yield Layer(layer.source, {"start": None})
        for inner in _named(start, "start", layer.source, folder, opened):
            yield Layer(inner.source, {"start": inner.tree})
        layer = Layer(layer.source, {key: value for key, value in layer.tree.items() if key != "start"})
    yield layer


def _placed(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The tree, in which rewards of one's own files are named from the root: they count from the recipe's folder."""

    def named(term: Any) -> Any:
        if isinstance(term, dict) and isinstance(term.get("name"), str):
            return {**term, "name": relative_to(term["name"], folder)}
        return relative_to(term, folder) if isinstance(term, str) else term

    tree, section = dict(tree), tree.get("rewards")
    if isinstance(section, dict):
        lists = {key: section[key] for key in ("terms", "add") if key in section}
        lists = {key: [*map(named, one)] if isinstance(one, list) else named(one) for key, one in lists.items()}
        tree["rewards"] = {**section, **lists}
    if isinstance(tree.get("start"), dict):
        tree["start"] = _placed(tree["start"], folder)
    return tree
