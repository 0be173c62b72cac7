"""The recipes of VAR: what their sources fix."""

from __future__ import annotations

import pytest

from argrpo_cli.policy.published import POLICIES
from argrpo_cli.recipe import load_recipe


@pytest.mark.parametrize(("name", "fid"), [("var_d16", 3.55), ("var_d30", 1.97)])
def test_var_is_trained_under_its_own_guidance_by_an_aesthetic_predictor_and_clip(name: str, fid: float) -> None:
    recipe = load_recipe(f"var/{name}")
    entry = POLICIES[recipe.policy.checkpoint]
    assert (entry.family, entry.image_size, entry.tokenizer) == ("var", 256, "vq-var")
    assert recipe.sampling.cfg_scale == entry.sampling["cfg_scale"] == 2.5
    assert (recipe.sampling.top_k, recipe.sampling.top_p, recipe.grpo.logprob) == (0, 1.0, "guided")
    assert [term.name for term in recipe.rewards.terms] == ["clip", "aesthetic"] and recipe.grpo.scale_balance == 0.7
    ((one),) = recipe.published
    assert (one.step, one.measures, one.base) == (0, ["FID"], [fid])
