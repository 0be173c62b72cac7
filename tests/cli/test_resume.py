"""A run goes on by the recipe that it was started with, whoever has edited recipe.yaml meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from argrpo_cli.recipe import load_recipe
from argrpo_cli.runs.run import open_run, refuse_edited


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run that was started, and died before its first update."""
    (tmp_path / "mine.yaml").write_text("rewards: {terms: [{name: nano-clip}, {name: nano-quality, weight: 0.5}]}\n")
    with open_run(tmp_path / "run", load_recipe(tmp_path / "mine.yaml"), resume=False):
        return tmp_path / "run"


def edit(folder: Path, *changes: tuple[str, str]) -> None:
    file = folder / "recipe.yaml"
    text = file.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    file.write_text(text)


def goes_on(folder: Path, *overrides: str) -> None:
    refuse_edited(folder, load_recipe(folder / "recipe.yaml", overrides))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seed: 0", "seed: 1"), "seed was 0 and is 1"),
        (("beta: 0.1", "beta: 0"), "grpo.beta was 0.1 and is 0.0"),
        (("batch_size: 64", "batch_size: 128"), "grpo.batch_size was 64 and is 128"),
        (("weight: 0.5", "weight: 0.25"), "rewards.terms.1.weight was 0.5 and is 0.25"),
        (("options: {}", "options: {model: x}"), "rewards.terms.0.options.model was None and is 'x'"),
        (("max_missing: 0.5", "max_missing: 1"), "rewards.max_missing was 0.5 and is 1.0"),
        (("start: null", "start: {}"), "start was None and is {"),
    ],
)
def test_what_was_edited_is_named_with_both_values(begun, fails, change, message):
    edit(begun, change)
    line = fails("train", "--resume", begun, "--dry-run")
    assert message in line and "a resumed run keeps its recipe" in line and "guards.*" in line


def test_all_differences_are_named_and_with_a_schedule_steps_are_one(begun, fails):
    edit(begun, ("seed: 0", "seed: 1"), ("steps: 100", "steps: 200"), ("schedule: constant", "schedule: cosine"))
    line = fails("train", "--resume", begun, "--dry-run")
    differences = "seed was 0 and is 1, grpo.steps was 100 and is 200, grpo.schedule was 'constant' and is 'cosine'"
    assert differences in line and "and no steps, by which its cosine learning-rate schedule goes" in line


def test_length_guards_and_logging_may_be_edited_and_a_value_be_said_again(begun):
    edit(begun, ("steps: 100", "steps: 200"), ("time_limit_minutes: null", "time_limit_minutes: 5"))
    edit(begun, ("not_a_number: stop", "not_a_number: skip"), ("log_every: ", "log_every: 1"))
    goes_on(begun, "logging.grid_every=7", "grpo.beta=0.1")


def test_a_run_goes_on_as_it_was_last_continued(begun):
    longer = load_recipe(begun / "recipe.yaml", ["grpo.steps=200"])
    with open_run(begun, longer, resume=True):
        pass
    assert load_recipe(begun / "recipe.yaml").grpo.steps == 200
    goes_on(begun)


def test_a_run_of_an_older_version_is_taken_as_its_recipe_says(begun, fails):
    (begun / "run.json").write_text("{}")
    edit(begun, ("beta: 0.1", "beta: 0.2"))
    goes_on(begun)
    line = fails("train", "--resume", begun, "--set", "grpo.beta=0.1", "--dry-run")
    assert "grpo.beta was 0.2 and is 0.1: a resumed run keeps its recipe" in line


def test_a_record_that_is_no_recipe_is_one_line(begun, fails):
    for recipe in (5, {"name": "x", "seed": "one"}, {"grpo": []}):
        (begun / "run.json").write_text(json.dumps({"recipe": recipe}))
        assert "run.json" in fails("train", "--resume", begun, "--dry-run")
