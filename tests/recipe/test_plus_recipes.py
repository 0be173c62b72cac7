"""The recipes beside the paper's, recipes/plus: what their sources fix, and how they hang together."""

from __future__ import annotations

import pytest

from argrpo_cli.policy.published import POLICIES
from argrpo_cli.recipe import list_recipes, load_recipe

NAMES = [name.removeprefix("plus/") for name in list_recipes() if name.startswith("plus/")]
POLICY = {"c2i_b256": "c2i-b-256", "c2i_l384": "c2i-l-384", "c2i_xl384": "c2i-xl-384", "t2i_xl256": "t2i-xl-256"}
# Published since, and the recipe without them.
METHODS = {"loo_fid": "c2i_b256", "loo_fid_light": "c2i_b256", "clusters": "t2i_xl256"}
TOKENS = {"gcpo": "gcpo", "stage": "stage", "guidance_contrast": "guidance", "eg_grpo": "eg"}  # grpo.tokens.method
REAL = {"cca_b384": "c2i-b-384", "cca_l384": "c2i-l-384", "cca_xl384": "c2i-xl-384", "pixel": "c2i-xxl-384"}
REAL |= {"pixel_t2i": "t2i-xl-256"}  # learn from real images
GUIDANCE = {"c2i_b256": 2.0, "c2i_l384": 2.0, "c2i_xl384": 1.75, "t2i_xl256": [2.0, 4.0, 7.5]}  # of the teachers


def plus(name):
    return load_recipe(f"plus/{name}")


def test_every_size_has_guidance_first_and_the_two_controls_are_there():
    both = {name for size in POLICY for name in (size, f"{size}_distil")}
    assert both | {
        "c2i_l384_unguided",
        "t2i_xl256_unguided",
        "c2i_l384_cca",
        "loo_fid_whole",
        *METHODS,
        *TOKENS,
        *REAL,
    } == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_all_draw_and_train_one_distribution_without_guidance(name):
    recipe = plus(name)
    assert recipe.name == f"plus-{name.replace('_', '-')}" and recipe.policy.checkpoint in POLICIES
    assert (recipe.sampling.cfg_scale, recipe.sampling.temperature) == (1.0, 1.0)
    assert (recipe.sampling.top_k, recipe.sampling.top_p) == (0, 1.0)
    own = name.partition("_")[0] if name in REAL else "grpo"
    assert recipe.method == ("distil" if name.endswith("_distil") else own)
    assert recipe.optim.steps == recipe.logging.keep_steps[-1] and recipe.optim.batch_size % 64 == 0


@pytest.mark.parametrize("size", POLICY)
def test_guidance_comes_first_in_the_run_itself(size):
    recipe, distil = plus(size), plus(f"{size}_distil")
    assert recipe.policy.checkpoint == distil.policy.checkpoint == POLICY[size]
    assert (recipe.start.method, recipe.start.sampling) == ("distil", distil.sampling)
    assert recipe.start.distil == distil.distil and recipe.start.rewards == distil.rewards
    assert recipe.start.logging == distil.logging
    assert distil.start is None and distil.distil.cfg_scale == GUIDANCE[size]
    assert (distil.distil.lmbda, distil.distil.beta, distil.distil.weight_decay) == (0.3, 0.0, 0.0)


def test_the_controls_differ_from_their_siblings_by_the_start_alone():
    for one, other in (
        ("c2i_l384_unguided", "c2i_l384"), ("t2i_xl256_unguided", "t2i_xl256"), ("c2i_l384_unguided", "c2i_l384_cca"),
    ):  # fmt: skip
        left, right = (plus(name).model_dump(exclude={"name", "description", "published"}) for name in (one, other))
        apart = {key for key in left if left[key] != right[key]}
        assert apart == ({"policy"} if other.endswith("cca") else {"start"})
    assert plus("c2i_l384_cca").policy.checkpoint == "c2i-l-384-cca"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_differs_from_its_sibling_by_its_rewards_and_how_they_are_added(name):
    left, right = (plus(one).model_dump(exclude={"name", "description"}) for one in (name, METHODS[name]))
    apart = {key for key in left if left[key] != right[key]}
    changed = {key for key in left["grpo"] if left["grpo"][key] != right["grpo"][key]}
    assert apart == {"rewards", "grpo", "start"} and changed - {"group_size"} == {"aggregation", "scale_rewards"}
    assert left["start"]["distil"] == right["start"]["distil"]


@pytest.mark.parametrize("name", TOKENS)
def test_weights_of_tokens_are_all_that_a_recipe_of_them_changes(name):
    left, right = (
        plus(one).model_dump(exclude={"name", "description", "published"}) for one in (name, "t2i_xl256_unguided")
    )
    assert left.pop("grpo") == right.pop("grpo") | {
        "tokens": {"method": TOKENS[name], "confidence": 0.5 if name == "gcpo" else 0.0}
    }
    assert left == right


def test_leave_one_out_fid_with_all_that_its_authors_use():
    whole, alone = plus("loo_fid_whole"), plus("loo_fid")
    grpo = whole.grpo
    assert whole.rewards == alone.rewards and whole.start.policy.checkpoint == whole.policy.checkpoint == "c2i-l-256"
    assert (grpo.group_size, grpo.batch_size, grpo.updates_per_batch, grpo.importance) == (12, 1152, 2, "sequence")
    assert (grpo.entropy_controller, grpo.entropy_weight, grpo.entropy_target) == ("loo_fid", 2.2e-3, None)
    assert (grpo.reference_decay, grpo.learning_rate, grpo.betas, grpo.weight_decay) == (0.999, 1e-5, [0.9, 0.95], 0.01)


@pytest.mark.parametrize(("name", "weight"), [("loo_fid", 2.0), ("loo_fid_light", 0.5)])
def test_leave_one_out_fid_is_weighed_as_published_or_by_a_quarter_of_it(name, weight):
    terms = {term.name: term for term in plus(name).rewards.terms}
    assert (terms["loo-fid"].weight, terms["loo-fid"].options) == (weight, {"decay": 0.5})
    assert sum(terms[name].weight * terms[name].factor for name in ("clip", "hpsv2")) == 1.0


def test_gcpo_s_setting_is_as_in_its_authors_configuration():
    recipe = plus("t2i_xl256_unguided")
    grpo = recipe.grpo
    assert [(term.name, term.factor, term.weight, term.options) for term in recipe.rewards.terms] == [
        ("hpsv2", 1.0, 1.0, {})  # v2.1 by default
    ]
    assert (grpo.group_size, grpo.batch_size, grpo.steps * grpo.batch_size) == (8, 64, 120_000)
    assert (grpo.learning_rate, grpo.schedule, grpo.warmup_steps) == (1e-5, "cosine", 188)  # a tenth, rounded up
    assert (grpo.beta, grpo.betas, grpo.weight_decay, grpo.updates_per_batch) == (0.04, [0.9, 0.999], 0.0, 1)


def test_published_numbers_are_of_the_start_where_no_such_run_is_published():
    told = {name: one for name in NAMES for one in plus(name).published}
    assert told.keys() == set(NAMES)
    assert {name for name, one in told.items() if one.trained} == {"t2i_xl256_unguided", "pixel", "pixel_t2i"}
    gcpo, cca = told["t2i_xl256_unguided"], told["c2i_l384_cca"]
    assert (gcpo.step, gcpo.measures, gcpo.base, gcpo.trained) == (1875, ["overall"], [0.306], [0.39])
    assert (cca.step, cca.measures, cca.base) == (0, ["FID"], [3.43])
    guided = told["c2i_l384"]
    assert (guided.table, guided.step, guided.base) == ("table 2", 0, [256.07, 3.08, 6.09, 0.83, 0.52])
    assert told["t2i_xl256_distil"].base[-1] == 0.306  # table 3, overall


def test_what_learns_from_real_images_is_set_as_its_authors_say():
    for name, policy in REAL.items():
        assert plus(name).policy.checkpoint == policy
    for size, weight in (("b", 1000), ("l", 300), ("xl", 1000)):
        recipe = plus(f"cca_{size}384")
        cca = recipe.cca
        assert (cca.beta, cca.lmbda, cca.condition_dropout, cca.batch_size) == (0.02, weight, 0.1, 256)
        assert (cca.learning_rate, cca.steps, cca.betas, cca.weight_decay) == (1e-5, 5000, [0.9, 0.95], 0.05)
    for name, noise in (("pixel", 0.0), ("pixel_t2i", 0.5)):
        recipe = plus(name)
        pixel = recipe.pixel
        assert (pixel.samples, pixel.noise, pixel.cross_entropy_weight, pixel.perceptual) == (8, noise, 0.1, "lpips")
        assert (pixel.mse_weight, pixel.perceptual_weight, pixel.learning_rate) == (1.0, 1.0, 1e-6)
        assert pixel.steps * pixel.batch_size == recipe.real.limit == 12_800
        assert (pixel.betas, pixel.weight_decay) == ([0.9, 0.999], 1e-4)
    started = load_recipe("plus/c2i_l384_unguided", ["start=plus/cca_l384"])
    assert started.start.cca == plus("cca_l384").cca and started.start.real.path == "imagenet/train"
    assert started.sampling.cfg_scale == started.start.sampling.cfg_scale == 1.0
