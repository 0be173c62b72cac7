"""The recipes of the paper's tables: its hyperparameters (section 4.1, appendix D), and what each ablation changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from argrpo_cli.policy.published import POLICIES
from argrpo_cli.recipe import load_recipe
from argrpo_cli.rewards import REWARDS
from argrpo_cli.rewards.shaping import reward_weights

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
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
    assert grpo.steps == (300 if name.startswith("t2i") else 100)
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
    weights = reward_weights(section, {term: REWARDS[term].family for term in PAPER})
    assert weights == {term: factor * lambdas[REWARDS[term].family] for term, factor in PAPER.items()}


def test_every_experiment_of_the_paper_has_one():
    c2i = {"c2i_b256", "c2i_b384", "c2i_l384", "c2i_xl384", "c2i_b256_no_kl", *(f"c2i_b256{end}" for end in LAMBDAS)}
    t2i = {"t2i_xl256", *(f"t2i_xl256{end}" for end in LAMBDAS)}
    assert c2i | t2i | {"c2i_b256_cfg_1", "c2i_b256_cfg_4", "c2i_b256_cfg_7"} == set(NAMES)
    sizes = {name: load_recipe(RECIPES / f"{name}.yaml").policy.checkpoint for name in ("c2i_b384", "c2i_xl384")}
    assert sizes == {"c2i_b384": "c2i-b-384", "c2i_xl384": "c2i-xl-384"}
