"""What there is to choose from: policies, recipes, rewards and prompt sets by name, each with a line on what it is.

Nothing heavy is imported. `argrpo list` shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from argrpo_cli.captions import CAPTION_SETS, nano_captions
from argrpo_cli.geneval.prompts import SETS
from argrpo_cli.policy.folder import BUNDLED_POLICIES, glance, published_family
from argrpo_cli.policy.published import POLICIES
from argrpo_cli.recipe import bundled_dir, list_recipes
from argrpo_cli.recipe.text import parse_yaml
from argrpo_cli.rewards import REWARDS, check_reward
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import WEIGHTS, read_json, read_text

Row = dict[str, Any]


def policies() -> list[Row]:
    """Bundled and published ones: what they read, pixels, how they are meant to be sampled, where they lie."""
    rows = []
    for name in (*BUNDLED_POLICIES, *POLICIES):
        seen, entry = glance(name), POLICIES.get(name)
        card = read_json(WEIGHTS / name / "policy.json") if entry is None else {}
        pixels = card["image_size"] if entry is None else entry.image_size
        family = card.get("family", "llamagen") if entry is None else published_family(name)
        source = "bundled" if entry is None else "/".join(filter(None, (entry.repo, entry.file)))
        facts = {"family": family, "reads": seen.reads, "image_size": pixels, "source": source}
        about = f"{facts['family']}, {seen.reads}, {pixels} px, {source}"
        rows.append({"name": name, "about": about, **facts, "sampling": dict(seen.sampling)})
    return rows


def recipes() -> list[Row]:
    """The bundled recipes, for `argrpo train NAME`."""
    rows = []
    for name in list_recipes():
        path = bundled_dir() / f"{name}.yaml"
        tree = parse_yaml(read_text(path), str(path))
        about = {"name": name, "about": " ".join(str(tree.get("description", "")).split())}
        rows.append(about | ({"extends": tree["extends"]} if "extends" in tree else {}))
    return rows


def rewards() -> list[Row]:
    """Those of the package, and those that other packages offer."""
    rows = []
    for name in (*REWARDS, *sorted(point.name for point in entry_points(group="argrpo.rewards"))):
        try:
            one = check_reward(name)
        except UserError as error:  # of another package, that cannot be imported
            rows.append({"name": name, "about": str(error)})
            continue
        facts = {"family": one.family, "reads_prompt": one.reads_prompt}
        files = [f"{file.repo}/{file.file}" for file in one.files.values()]
        rows.append({"name": name, "about": f"{one.family}: {_first_line(one)}", **facts, "files": files})
    return rows


def prompt_sets() -> list[Row]:
    """For --prompts, and `conditions.captions` of a recipe."""
    sets = {name: SETS.get(name, nano_captions) for name in CAPTION_SETS}
    return [{"name": name, "about": _first_line(one)} for name, one in sets.items()]


def _first_line(thing: object) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((thing.__doc__ or "").partition("\n\n")[0].split())


KINDS: dict[str, Callable[[], list[Row]]] = {
    "policies": policies,
    "recipes": recipes,
    "rewards": rewards,
    "prompts": prompt_sets,
}
