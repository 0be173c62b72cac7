"""Fixtures of the GRPO tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from argrpo_cli.policy import Policy, load_policy
from argrpo_cli.recipe import Recipe
from argrpo_cli.rewards import reward_weights
from argrpo_cli.training import job as job_module
from argrpo_cli.training.grpo import ImageGRPOTrainer, build_trainer, quiet_libraries
from argrpo_cli.training.rollout import Rollout, Stopwatch
from argrpo_cli.training.scorer import BatchScorer
from argrpo_cli.training.selection import Selection
from tests.training.tiny import CLASSES, FakeRewards, count_of_3, paint, save_tiny_policy, tiny_recipe


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("tiny") / "policy")


@pytest.fixture
def policy(policy_folder: Path) -> Policy:
    return load_policy(policy_folder)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with quiet_libraries():
        yield


@pytest.fixture
def pages() -> None:
    """For tests that look at a run's page or curves."""


@pytest.fixture(autouse=True)
def no_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run draws neither page nor curves, which takes three times as long as a tiny run itself."""
    if "pages" not in request.fixturenames:
        monkeypatch.setattr(job_module, "refresh_report", lambda *args, **keys: None)


@pytest.fixture
def new_trainer(policy: Policy, tmp_path: Path) -> Callable[..., ImageGRPOTrainer]:
    """Builds the trainer that a run uses, without the run: painted images, and token 3 rewarded unless said otherwise.

    Keyword arguments override keys of the recipe's grpo section (see `tiny_recipe`).
    """

    def build(rewards: FakeRewards | None = None, **grpo: Any) -> ImageGRPOTrainer:
        rewards = rewards or FakeRewards(threes=count_of_3)
        recipe: Recipe = tiny_recipe(rewards=rewards.names, **grpo)
        policy.decode = paint
        conditions = policy.conditions(range(CLASSES))
        scorer = BatchScorer(
            rewards,
            reward_weights(recipe.rewards, rewards.family),
            recipe.grpo.group_size,
            Stopwatch(),
            aggregation=recipe.grpo.aggregation,
        )
        selection = Selection(recipe, conditions) if recipe.selects or recipe.scales_globally else None
        rollout = Rollout(recipe, conditions, policy, scorer=scorer, selection=selection)
        return build_trainer(recipe, policy, rollout, scorer, tmp_path / "trainer", callbacks=[])

    return build
