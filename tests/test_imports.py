"""Imports point one way: no circle between files or rooms, whether they import at the top or inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import argrpo_cli

ROOT = "argrpo_cli"
SOURCE = Path(argrpo_cli.__file__).parent
Graph = dict[str, set[str]]


def module_name(path: Path) -> str:
    """`argrpo_cli.policy.protocol`; a package is known by its own name."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join([ROOT, *(parts[:-1] if parts[-1] == "__init__" else parts)])


FILES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that code names: imports anywhere but under TYPE_CHECKING, and texts for importlib
    ("module" or "module:name")."""
    if isinstance(tree, ast.If) and isinstance(tree.test, ast.Name) and tree.test.id == "TYPE_CHECKING":
        for node in tree.orelse:
            yield from imported(node)
        return
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    elif isinstance(tree, ast.ImportFrom):
        assert not tree.level, "imports of the package are written in full"
        for alias in tree.names:
            inner = f"{tree.module}.{alias.name}"
            yield inner if inner in FILES else str(tree.module)
    elif isinstance(tree, ast.Constant) and isinstance(tree.value, str) and tree.value.split(":")[0] in FILES:
        yield tree.value.split(":")[0]
    for node in ast.iter_child_nodes(tree):
        yield from imported(node)


def graph_of_files() -> Graph:
    graph = {}
    for name, path in FILES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] = {one for one in imported(tree) if one in FILES and one not in (name, ROOT)}
    return graph


FILE_GRAPH = graph_of_files()


def graph_of_children(package: str) -> Graph:
    """Who imports whom among the files and rooms directly below a package, each room as one."""
    graph: Graph = {}

    def child(name: str) -> str | None:
        inside = name.removeprefix(package + ".")
        return inside.split(".")[0] if name.startswith(package + ".") else None

    for name, targets in FILE_GRAPH.items():
        if own := child(name):
            graph.setdefault(own, set()).update(to for to in map(child, targets) if to not in (None, own))
    return graph


def circles(graph: Graph) -> list[str]:
    """Circles, each in words; every one that is left when the last link of those before is cut."""
    graph, result = {name: set(targets) for name, targets in graph.items()}, []
    while True:
        try:
            TopologicalSorter(graph).prepare()
            return result
        except CycleError as error:
            circle = error.args[1][::-1]  # each imports the next
            result.append(" → ".join(circle))
            graph[circle[-2]].discard(circle[-1])


def test_a_circle_is_seen_and_named():
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert sorted(circles({"a": {"b"}, "b": {"a", "c"}, "c": {"c"}})) in (
        ["a → b → a", "c → c"],
        ["b → a → b", "c → c"],
    )


def test_late_imports_count_and_those_for_types_do_not():
    code = """
if TYPE_CHECKING:
    from argrpo_cli.shapes import Condition
else:
    import argrpo_cli.seeds
def late():
    from argrpo_cli.system import errors
    from argrpo_cli.kept import kept
    return importlib.import_module("argrpo_cli.images")
TABLE = {"name": "argrpo_cli.draw:draw"}
"""
    names = {"seeds", "system.errors", "kept", "images", "draw"}
    assert set(imported(ast.parse(code))) == {f"{ROOT}.{name}" for name in names}


def test_files_import_each_other_in_no_circle():
    found = circles(FILE_GRAPH)
    assert not found, "\n".join(["circles of files:", *found])


def test_rooms_import_each_other_in_no_circle():
    packages = [name for name, path in FILES.items() if path.name == "__init__.py"]
    found = [f"in {name}: {circle}" for name in packages for circle in circles(graph_of_children(name))]
    assert not found, "\n".join(["circles of rooms:", *found])


GROUND = {  # room or file to all that it may import of the package
    "system": set(),
    "shapes": {"system"},
    "seeds": {"system"},
    "networks": {"system", "shapes"},
    "kept": {"system", "shapes"},
}


@pytest.mark.parametrize("room", GROUND)
def test_the_ground_knows_nobody_above(room):
    assert graph_of_children(ROOT)[room] <= GROUND[room]


def test_nothing_imports_the_command_line():
    assert {name for name, targets in graph_of_children(ROOT).items() if "cli" in targets} <= {"__main__"}


def test_policy_and_rewards_do_not_know_each_other():
    rooms = graph_of_children(ROOT)
    assert "rewards" not in rooms["policy"] and "policy" not in rooms["rewards"]
