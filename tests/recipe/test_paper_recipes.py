"""The recipes of the paper's tables: its hyperparameters (section 4.1, appendix D), and what each ablation changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from argrpo_cli import paper_numbers
from argrpo_cli.cli.app import run
from argrpo_cli.policy.published import POLICIES
from argrpo_cli.recipe import load_recipe
from argrpo_cli.rewards import check_reward, reward_weights
from argrpo_cli.system.errors import UserError
from argrpo_cli.training.memory import pass_bytes

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
EVERY = sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml"))
PAPER = {
    "clip": 5, "clip-quantized": 1, "hpsv2": 5, "hpsv2-quantized": 1, "maniqa": 2,
    "judge-quality": 0.25, "judge-fake": 0.25, "judge-weird": 0.25,
}  # fmt: skip
LAMBDAS = {"_a": (0, 1, 1), "_b": (1, 0, 1), "_c": (1, 1, 0)}  # conditional, quality, realism: tables 6 to 8


@pytest.mark.parametrize("name", NAMES)
def test_what_the_paper_says_of_all(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    grpo, sampling, rewards = recipe.grpo, recipe.sampling, recipe.rewards
    assert recipe.policy.checkpoint in POLICIES and recipe.name == name.replace("_", "-")
    assert (grpo.group_size, grpo.batch_size, grpo.epsilon, grpo.updates_per_batch) == (8, 64, 0.2, 1)
    assert (grpo.learning_rate, grpo.betas, grpo.weight_decay) == (1e-5, [0.9, 0.95], 0.05)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1, 0, 1)
    assert [grpo.steps] == recipe.logging.keep_steps == [300 if name.startswith("t2i") else 100]
    assert grpo.beta == (0 if "no_kl" in name else 0.1)
    assert sampling.cfg_scale == (float(name[-1]) if "cfg" in name else 2)
    lambdas = (rewards.lambda_conditional, rewards.lambda_quality, rewards.lambda_realism)
    assert lambdas == next((given for end, given in LAMBDAS.items() if name.endswith(end)), (1, 1, 1))


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_the_published_factors_times_lambda(name):
    section = load_recipe(RECIPES / f"{name}.yaml").rewards
    lambdas = {
        "conditional": section.lambda_conditional, "quality": section.lambda_quality, "realism": section.lambda_realism
    }  # fmt: skip
    weights = reward_weights(section, {term: check_reward(term).family for term in PAPER})
    assert weights == {term: factor * lambdas[check_reward(term).family] for term, factor in PAPER.items()}


def test_every_experiment_of_the_paper_has_one():
    c2i = {"c2i_b256", "c2i_b384", "c2i_l384", "c2i_xl384", "c2i_b256_no_kl", *(f"c2i_b256{end}" for end in LAMBDAS)}
    t2i = {"t2i_xl256", *(f"t2i_xl256{end}" for end in LAMBDAS)}
    assert c2i | t2i | {"c2i_b256_cfg_1", "c2i_b256_cfg_4", "c2i_b256_cfg_7"} == set(NAMES)
    sizes = {name: load_recipe(RECIPES / f"{name}.yaml").policy.checkpoint for name in ("c2i_b384", "c2i_xl384")}
    assert sizes == {"c2i_b384": "c2i-b-384", "c2i_xl384": "c2i-xl-384"}


def test_every_recipe_of_the_paper_has_its_rows():
    told = {(one.table, one.row): one for name in NAMES for one in load_recipe(RECIPES / f"{name}.yaml").published}
    tables = {number: paper_numbers.table(number) for number in range(2, 9)}
    assert told.keys() == {(f"table {number}", name) for number, rows in tables.items() for name in rows}
    for name in NAMES:
        for one in load_recipe(RECIPES / f"{name}.yaml").published:
            assert one.row == name and one.step == (300 if name.startswith("t2i") else 100)
    one = told["table 5", "c2i_b256_no_kl"]
    assert one.measures == ["IS", "FID", "sFID", "precision", "recall"]
    assert one.base == [193.61, 5.46, 7.50, 0.84, 0.46] and one.trained == [220.57, 7.83, 11.72, 0.88, 0.32]


def test_a_row_that_the_paper_has_not_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("published: [{table: table 6, step: 1, row: c2i_b257}]")
    with pytest.raises(UserError, match="the paper has no row 'c2i_b257' in table 6; there are c2i_b256_a"):
        load_recipe(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("published: [{table: t, step: 1, measures: [x], base: [1.0], trained: []}]")
    with pytest.raises(UserError, match="one number for each of measures"):
        load_recipe(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("published: [{table: t, step: 0, measures: [x], base: [1.0], trained: [2.0]}]")
    with pytest.raises(UserError, match="trained none when step is 0"):
        load_recipe(tmp_path / "mine.yaml")


PASSES = {}  # geometry and settings to what a training pass keeps, which many recipes have alike


def remembered(outline, images, sampling, **how):
    key = outline.config.to_json_string(), images, sampling, *how.values()
    if key not in PASSES:
        PASSES[key] = pass_bytes(outline, images, sampling, **how)
    return PASSES[key]


@pytest.mark.parametrize("name", EVERY)
def test_every_recipe_has_a_plan_that_needs_no_network(name, capsys, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a plan asks nobody")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("argrpo_cli.training.memory.pass_bytes", remembered)
    monkeypatch.setattr("argrpo_cli.training.plan.room_here", lambda device: 10**15)  # whatever machine tests
    monkeypatch.chdir(tmp_path)
    assert run(["train", str(RECIPES / name), "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "r.yaml").write_text(printed.out)
    recipe = load_recipe(RECIPES / name)
    assert load_recipe(tmp_path / "r.yaml") == recipe
    size = recipe.grpo.group_size
    groups = f": {recipe.grpo.batch_size // size} groups of {size}" if recipe.method == "grpo" else ""
    assert f"{recipe.optim.batch_size} images{groups}" in printed.err
    asks = recipe.conditions.source == "captions" and recipe.method not in ("cca", "pixel")  # which have their own
    asks &= recipe.conditions.captions == "captions.txt" and recipe.conditions.dataset is None
    assert ("captions.txt is missing" in printed.err) == asks
    assert ("nothing to fetch" in printed.err) == name.startswith("nano/")
    for one in recipe.published:
        when, then = (f"after {one.step} updates", " -> ") if one.step else ("before training", "")
        assert f"{one.table}, {when}: {one.measures[0]} {one.base[0]:g}{then}" in printed.err
