"""What a recipe is made of: the keys of the files that it extends, its own and those of the command line, one laid
over the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from argrpo_cli.recipe.schema import Recipe, merge, with_whole_start
from argrpo_cli.recipe.sections import METHODS
from argrpo_cli.recipe.text import MOST_LEVELS, parse_yaml
from argrpo_cli.system.errors import UserError, refuse_secrets

# Options of `argrpo train` that stand for a key.
OPTIONS = {"steps": "{method}.steps", "lr": "{method}.learning_rate", "seed": "seed", "device": "policy.device"}
SET = "--set "
LONGEST_SOURCE = 100  # characters of a --set that messages repeat


class Layer(NamedTuple):
    """Some of a recipe's keys and where they were said: a file, a --set or another option."""

    source: str
    tree: dict[str, Any]

    @property
    def of_a_file(self) -> bool:
        """Whether it was said in a file, and not on the command line."""
        return not self.source.startswith("--")


class Layers:
    """Layers, the first at the bottom, and the tree that they make together.

    Args:
        name: of the run where no layer says it.
        quiet: a folder; what recipes in it replace is not told.
        tell: takes lines for the terminal.
    """

    def __init__(self, name: str, quiet: Path, tell: Callable[[str], None]):
        self.layers: list[Layer] = []
        self.tree: dict[str, Any] = {"name": name}
        self.quiet, self.tell = quiet, tell

    def lay(self, layers: Iterable[Layer]) -> None:
        """Lay further ones over these; UserError for one with a secret in it, since recipes are printed and kept."""
        for layer in layers:
            refuse_secrets(layer.tree, layer.source)
            for start in ((), ("start",)):
                self._tell_replaced(layer, (*start, "rewards", "terms"))
                layer = self._with_added(layer, (*start, "rewards"))
            self.layers.append(layer)
            self.tree = merge(self.tree, layer.tree)

    def _tell_replaced(self, layer: Layer, keys: Sequence[str]) -> None:
        """Say which terms a file has replaced by its own."""
        old, new = value_at(self.tree, keys), value_at(layer.tree, keys)
        if not layer.of_a_file or Path(layer.source).resolve().is_relative_to(self.quiet):
            return
        if isinstance(old, list) and isinstance(new, list) and old != new:
            names = ", ".join(str(value_at(term, ["name"])) for term in old)
            self.tell(
                f"{layer.source}: {'.'.join(keys)} takes the place of the terms {names} that it extends; to keep them "
                f"and add to them, say {'.'.join(keys[:-1])}.add"
            )

    def _with_added(self, layer: Layer, keys: Sequence[str]) -> Layer:
        """The layer with the terms of `rewards.add` after those of `rewards.terms`; one of the same name is changed."""
        section = value_at(layer.tree, keys)
        if not isinstance(section, dict) or "add" not in section:
            return layer
        section = dict(section)
        added = section.pop("add")
        terms = section.get("terms", value_at(whole(self.tree), (*keys, "terms")))
        terms = list(terms) if isinstance(terms, list) else []
        for new in added if isinstance(added, list) else [added]:
            new = {"name": new} if isinstance(new, str) else new
            name = value_at(new, ["name"])
            places = [place for place, old in enumerate(terms) if value_at(old, ["name"]) == name]
            terms = [merge(old, new) if place in places else old for place, old in enumerate(terms)]
            terms += [] if places else [new]
        return Layer(layer.source, merge(without(layer.tree, (*keys, "add")), nested(keys, {"terms": terms})))

    def fit_warmups(self) -> None:
        """Give a warm-up that is longer than the run the same share of it as before, where a lower layer said it."""
        for keys in ((*start, method) for start in ((), ("start",)) for method in METHODS):
            section = value_at(whole(self.tree), keys)
            warmup, steps = (value_at(section, [key]) for key in ("warmup_steps", "steps"))
            if not (type(warmup) is type(steps) is int and warmup > steps > 0):
                continue
            said, shortened = (self._last(*keys, key) for key in ("warmup_steps", "steps"))
            if said >= shortened or not self.layers[said].of_a_file:
                continue
            below = {}
            for layer in self.layers[: said + 1]:
                below = merge(below, layer.tree)
            before = value_at(whole(below), (*keys, "steps"))
            share = warmup * steps // before if type(before) is int and before >= warmup else steps
            name = ".".join((*keys, "warmup_steps"))
            self.tell(f"{name}: {share} of {steps} updates, in the place of {warmup} of {before}")
            self.tree = merge(self.tree, nested(keys, {"warmup_steps": share}))

    def _last(self, *keys: str) -> int:
        """The number of the last layer that says a key, -1 where none does; a start has it also from around it."""
        ways = [keys, keys[1:]] if keys[0] == "start" else [keys]
        saying = [n for n, layer in enumerate(self.layers) if any(reach(way, layer.tree) == len(way) for way in ways)]
        return max(saying, default=-1)


def of_override(text: str, tree: dict[str, Any]) -> Layer:
    """The layer of one `key=value`; `tree` is what it overrides, needed for keys that count into a list."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    source = SET + (text if len(text) <= LONGEST_SOURCE else text[:LONGEST_SOURCE] + "...")
    if not equals or not all(parts):
        raise UserError(f"{source}: expected key=value, for instance grpo.beta=0.02")
    if len(parts) > MOST_LEVELS:
        raise UserError(f"{source}: a key of {len(parts)} levels, and there are {MOST_LEVELS} at most")
    return Layer(source, _within(whole(tree), parts, 0, parse_yaml(value, source), source))


def of_option(option: str, value: Any, below: Layers) -> Layer:
    """The layer of an option that stands for a key; UserError where a --set says something else."""
    method = said if (said := below.tree.get("method")) in METHODS else "grpo"
    keys = OPTIONS[option].format(method=method).split(".")
    for layer in (one for one in below.layers if one.source.startswith(SET)):
        if reach(keys, layer.tree) == len(keys) and value_at(layer.tree, keys) != value:
            raise UserError(f"--{option} {value} and {layer.source} say two things; leave one of them out")
    return Layer(f"--{option} {value}", nested(keys, value))


def whole(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree with the defaults under it, and a start that says all of its keys."""
    # Not checked: there are no factors yet, which the names of rewards decide.
    held = merge(Recipe.model_construct(name="x").model_dump(mode="json"), tree)
    return with_whole_start({**held, "start": held["start"] or {}})


def nested(keys: Sequence[str], value: Any) -> Any:
    """A value under keys: {"a": {"b": value}}."""
    for key in reversed(keys):
        value = {key: value}
    return value


def without(tree: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A tree without the value under keys that it has."""
    inner = {} if len(keys) == 1 else {keys[0]: without(tree[keys[0]], keys[1:])}
    return {key: value for key, value in tree.items() if key != keys[0]} | inner


def reach(keys: Sequence[Any], held: Any) -> int:
    """How many of `keys` lead into the nested mappings and lists of `held`."""
    for depth, key in enumerate(keys):
        try:
            held = held[key]
        except (KeyError, IndexError, TypeError):
            return depth
    return len(keys)


def value_at(held: Any, keys: Sequence[Any]) -> Any:
    """The value under keys in nested mappings; None where there is none."""
    for key in keys:
        held = held.get(key) if isinstance(held, dict) else None
    return held


def _within(held: Any, parts: list[str], depth: int, value: Any, source: str) -> Any:
    """`value` under the keys from `depth` on; where one counts into a list, the whole list with the change in it, for
    lists do not merge. `held` is what is there now."""
    if depth == len(parts):
        return value
    key, name = parts[depth], ".".join(parts[:depth])
    if not key.isdecimal() or isinstance(held, dict):
        inner = held.get(key) if isinstance(held, dict) else None
        return {key: _within(inner, parts, depth + 1, value, source)}
    if not isinstance(held, list):
        raise UserError(f"{source}: {name} is not a list")
    if int(key) >= len(held):
        raise UserError(f"{source}: {name} has {len(held)} entries, counted from 0")
    old = held[int(key)]
    changed = merge(old, _within(old, parts, depth + 1, value, source))
    return [*held[: int(key)], changed, *held[int(key) + 1 :]]
