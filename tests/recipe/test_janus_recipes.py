"""The recipes of Janus-Pro: what their sources fix."""

from __future__ import annotations

import pytest

from argrpo_cli.policy.published import POLICIES
from argrpo_cli.recipe import list_recipes, load_recipe

NAMES = [name for name in list_recipes() if name.startswith("janus/")]


def test_there_is_one_for_each_setting():
    settings = ["1b_geneval", "1b_geneval2", "1b_unguided", "7b_lora"]
    assert [f"janus/janus_pro_{setting}" for setting in settings] == NAMES
    for name in NAMES:
        recipe = load_recipe(name)
        assert recipe.name == name.removeprefix("janus/").replace("_", "-")
        assert POLICIES[recipe.policy.checkpoint].family == "janus" and recipe.conditions.source == "captions"
        assert recipe.optim.steps == recipe.logging.keep_steps[-1]


def test_gcpo_s_and_stage_s_setting():
    recipe = load_recipe("janus/janus_pro_1b_geneval")
    grpo = recipe.grpo
    assert [(term.name, term.weight) for term in recipe.rewards.terms] == [("geneval", 1.0), ("hpsv2", 0.0)]
    assert (grpo.group_size, grpo.batch_size, grpo.steps, grpo.learning_rate, grpo.beta) == (8, 32, 1600, 3e-6, 0.01)
    assert (grpo.logprob, recipe.sampling.cfg_scale, recipe.policy.trainable) == ("conditional", 5.0, "language_model")
    unguided = load_recipe("janus/janus_pro_1b_unguided")
    keys = {"name", "description"}
    left, right = (one.model_dump(exclude=keys) for one in (recipe, unguided))
    assert {key for key in left if left[key] != right[key]} == {"sampling"} and unguided.sampling.cfg_scale == 1.0


def test_geneval_2s_questions_are_gcpo_s_setting_with_another_reward():
    recipe, gcpo = load_recipe("janus/janus_pro_1b_geneval2"), load_recipe("janus/janus_pro_1b_geneval")
    (term, watch) = recipe.rewards.terms
    assert (term.name, term.weight, term.options["backend"]) == ("geneval2", 1.0, "server") and watch.weight == 0.0
    left, right = (one.model_dump(exclude={"name", "description", "published"}) for one in (recipe, gcpo))
    assert {key for key in left if left[key] != right[key]} == {"rewards"}


def test_unirl_s_setting():
    recipe = load_recipe("janus/janus_pro_7b_lora")
    grpo, lora = recipe.grpo, recipe.policy.lora
    assert (lora.rank, lora.alpha, lora.targets) == (16, 32.0, None)
    assert (grpo.learning_rate, grpo.epsilon, grpo.beta, grpo.scale_rewards) == (1e-4, 0.01, 0.0, "batch")
    assert (grpo.group_size, grpo.batch_size, grpo.steps, grpo.logprob) == (4, 32, 1000, "guided")
    assert recipe.sampling.cfg_scale == 5.0 and [term.name for term in recipe.rewards.terms] == ["pickscore"]


@pytest.mark.parametrize("name", NAMES)
def test_the_published_numbers_are_those_that_it_starts_from(name):
    (one,) = load_recipe(name).published
    assert (one.step, one.measures) == (0, ["overall"]) and one.base == [0.8 if "7b" in name else 0.73]
