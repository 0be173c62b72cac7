"""Rewards on their way to TRL: weights, one scoring per batch, missing scores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from argrpo_cli.system.errors import UserError
from argrpo_cli.training.rollout import Stopwatch
from argrpo_cli.training.scorer import LEFT_OUT, WITHIN_GROUP_STD, BatchScorer
from tests.training.objective import group_std
from tests.training.tiny import FakeRewards

NAN = float("nan")


def scored(
    weights: dict[str, float], group_size: int | None = None, **columns: list[float]
) -> tuple[dict[str, list[float | None]], dict[str, float]]:
    """What TRL gets from each function for images with these raw scores (one group by default), and what was logged."""
    rewards = FakeRewards(
        **{name: lambda images, column=column: torch.tensor(column) for name, column in columns.items()}
    )
    count = len(next(iter(columns.values())))
    scorer = BatchScorer(rewards, weights, group_size or count, Stopwatch())
    images = list(torch.zeros(count, 3, 2, 2, dtype=torch.uint8))
    logged: dict[str, float] = {}
    results = {
        function.__name__: function(
            images=images, conditions=[None] * len(images), log_metric=logged.__setitem__, completions=[], prompts=[]
        )
        for function in scorer.functions()
    }
    assert rewards.calls == 1  # for all functions together
    return results, logged


def test_functions_return_raw_scores_under_their_names() -> None:
    results, logged = scored({"a": 10.0, "b": 1.5}, a=[0.25, 0.5], b=[1.0, -1.0])
    assert results == {"a": [0.25, 0.5], "b": [1.0, -1.0]}
    total = torch.tensor([[10 * 0.25 + 1.5, 10 * 0.5 - 1.5]])
    assert logged[WITHIN_GROUP_STD] == pytest.approx(group_std(total).item())
    assert logged[LEFT_OUT] == 0


def test_logged_deviation_is_the_mean_of_those_within_groups() -> None:
    _, logged = scored({"a": 1.0}, group_size=2, a=[0.0, 1.0, 10.0, 13.0])
    assert logged[WITHIN_GROUP_STD] == pytest.approx((math.sqrt(0.5) + math.sqrt(4.5)) / 2)


def test_one_missing_score_leaves_the_image_out_of_all() -> None:
    results, logged = scored({"a": 1.0, "b": 1.0}, a=[1.0, 2.0, 3.0], b=[0.0, NAN, math.inf])
    assert results == {"a": [1.0, None, None], "b": [0.0, None, None]}
    assert logged[LEFT_OUT] == 2
    assert WITHIN_GROUP_STD not in logged  # one image is no group


def test_missing_score_of_a_reward_that_does_not_count_costs_nothing() -> None:
    results, logged = scored({"a": 1.0, "b": 0.0}, a=[1.0, 2.0], b=[0.0, NAN])
    assert results == {"a": [1.0, 2.0], "b": [0.0, None]}
    assert logged[LEFT_OUT] == 0
    assert logged[WITHIN_GROUP_STD] == pytest.approx(math.sqrt(0.5))


def test_every_batch_is_scored_anew() -> None:
    rewards = FakeRewards(a=lambda images: images.float().mean(dim=(1, 2, 3)))
    scorer = BatchScorer(rewards, {"a": 1.0}, 2, Stopwatch())
    (function,) = scorer.functions()

    def ask(value: int) -> list[float | None]:
        images: list[Tensor] = list(torch.full((2, 3, 2, 2), value, dtype=torch.uint8))
        return function(images=images, conditions=[None] * 2, log_metric=lambda name, number: None)

    assert (ask(1), ask(2)) == ([1.0, 1.0], [2.0, 2.0])
    assert rewards.calls == 2


def watched(max_missing: float, *columns: list[float], weight: float = 1.0) -> list[str]:
    """What the scorer says while it scores one batch after the other."""
    batches = iter(columns)
    rewards = FakeRewards(a=lambda images: torch.tensor(next(batches)), b=lambda images: torch.ones(2))
    rewards.last_error = {"a": "the server said 500"}
    failures: list[str] = []
    scorer = BatchScorer(rewards, {"a": weight, "b": 1.0}, 2, Stopwatch(), max_missing, failures.append)
    function = scorer.functions()[0]
    for _ in columns:
        function(
            images=[torch.zeros(3, 2, 2, dtype=torch.uint8)] * 2,
            conditions=[None] * 2,
            log_metric=lambda name, number: None,
        )
    return failures


def test_a_reward_that_fails_too_often_is_named_with_its_last_error() -> None:
    bad, half, good = [NAN, NAN], [1.0, NAN], [1.0, 2.0]
    assert watched(0.5, bad, bad, half, good) == [
        "reward a lacks 62% of the scores of the last 4 batches (the latest: the server said 500)"
    ]
    assert not watched(0.5, bad, half, half, good), "half of the scores may be missing"
    assert not watched(0.5, bad, bad, bad), "a short outage is no reason"
    assert not watched(0.5, *[good] * 4, bad, bad, good, good), "what was long ago is forgotten"
    assert not watched(0.5, bad, bad, bad, bad, weight=0.0), "one that is only measured stops nothing"


def test_a_reward_that_cannot_be_asked_leaves_every_image_out() -> None:
    def broken(images: Tensor) -> Tensor:
        raise UserError("reward a failed: KeyError")

    failures: list[str] = []
    scorer = BatchScorer(FakeRewards(a=broken), {"a": 1.0}, 2, Stopwatch(), 1.0, failures.append)
    images = [torch.zeros(3, 2, 2, dtype=torch.uint8)] * 2
    result = scorer.functions()[0](images=images, conditions=[None] * 2, log_metric=lambda name, number: None)
    assert result == [None, None] and failures == ["reward a failed: KeyError"]
