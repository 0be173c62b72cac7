"""Equation 10: r = lambda_C r_C + lambda_I r_I + lambda_R r_R."""

from __future__ import annotations

import pytest

from argrpo_cli.recipe import Recipe
from argrpo_cli.rewards import reward_weights
from argrpo_cli.system.errors import UserError

FAMILY = {"a": "conditional", "b": "quality", "c": "realism"}


def section(**rewards: object):
    terms = [{"name": "a", "factor": 5.0}, {"name": "b", "weight": 0.5}, {"name": "c"}]
    return Recipe.model_validate({"name": "r", "rewards": {"terms": terms, **rewards}}).rewards


def test_weight_is_lambda_times_weight_times_factor():
    weights = reward_weights(section(lambda_conditional=2.0, lambda_quality=3.0), FAMILY)
    assert weights == {"a": 10.0, "b": 1.5, "c": 1.0}


def test_a_family_is_switched_off_by_its_lambda():
    assert reward_weights(section(lambda_realism=0.0), FAMILY)["c"] == 0.0


def test_weights_that_are_all_zero_are_refused():
    with pytest.raises(UserError, match="nothing to train"):
        reward_weights(section(lambda_conditional=0.0, lambda_quality=0.0, lambda_realism=0.0), FAMILY)
