"""A reward of one's own in any file, by its path; in a recipe the path counts from the recipe's folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from argrpo_cli.recipe import dump_recipe, load_recipe
from argrpo_cli.rewards import check_reward, load_rewards
from argrpo_cli.rewards.custom import find_function
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import make_dir
from argrpo_cli.system.references import relative_to, title

SOURCE = """
from beside import FACTOR


def reward(images, conditions):
    return images.float().mean((1, 2, 3)) * FACTOR


reward.family = "quality"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Elsewhere than the working directory: mine/json.py, called like a module of Python's, and what it imports."""
    folder = make_dir(tmp_path / "mine")
    (folder / "json.py").write_text(SOURCE)
    (folder / "beside.py").write_text("FACTOR = 2")
    monkeypatch.chdir(make_dir(tmp_path / "here"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield folder
    sys.modules.pop("beside", None)
    find_function.cache_clear()


def test_it_scores_and_takes_no_other_modules_place(folder: Path) -> None:
    name = f"{folder}/json.py:reward"
    images = torch.full((2, 3, 4, 4), 3, dtype=torch.uint8)
    rewards = load_rewards([name])
    assert rewards.score(images, [Condition("a"), Condition("b")])[name].tolist() == [6, 6]
    assert rewards.family == {name: "quality"} and title(name) == "json.py:reward" and title("clip") == "clip"
    import json

    assert json.loads("[1]") == [1]
    assert check_reward("../mine/json.py:reward").function(images, []).tolist() == [6, 6], "relative to where one is"


def test_in_a_recipe_it_counts_from_the_recipes_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "base.yaml").write_text("extends: nano/c2i\nrewards:\n  terms:\n    - name: json.py:reward\n")
    (make_dir(tmp_path / "there") / "run.yaml").write_text(
        "extends: ../mine/base.yaml\nrewards:\n  add: ../mine/json.py:b\n"
    )
    recipe = load_recipe(tmp_path / "there" / "run.yaml", tell=lambda line: None)
    names = [term.name for term in recipe.rewards.terms]
    assert names == [f"{folder}/json.py:reward", f"{folder}/json.py:b"]
    (tmp_path / "here" / "resolved.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "here" / "resolved.yaml", tell=lambda line: None) == recipe, "from anywhere"
    there = load_recipe("nano/c2i", ["rewards.terms=[{name: x/y.py:z}]"], tell=lambda line: None)
    assert there.rewards.terms[0].name == f"{tmp_path}/here/x/y.py:z", "of the command line from where one is"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, r"no file .*/mine/own\.py"),
        ("1 / 0", r"cannot import .*own\.py: ZeroDivisionError: division by zero \(own.py, line 1\)"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("x = 1", r"own\.py has no function 'reward'"),
        ("def reward(:", "SyntaxError"),
    ],
)
def test_what_is_wrong_with_it_is_one_line(folder: Path, source: str | None, message: str) -> None:
    if source is not None:
        (folder / "own.py").write_text(source)
    with pytest.raises(UserError, match=message) as told:
        check_reward(f"{folder}/own.py:reward")
    assert "\n" not in str(told.value)


def test_names_without_a_file_are_left_alone() -> None:
    assert [relative_to(name, "/x") for name in ("clip", "a.b:c", "a.py:c")] == ["clip", "a.b:c", "/x/a.py:c"]
