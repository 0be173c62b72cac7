"""Rewards that tell nothing apart: advantages of exactly 0, and updates that change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from argrpo_cli.training.rollout import Stopwatch
from argrpo_cli.training.scorer import BatchScorer, Measured
from tests.training.test_guarded_runs import assert_same_state, metrics, train, warnings
from tests.training.test_selection import last_batch
from tests.training.tiny import FakeRewards, brightness, redness, tiny_recipe

NAN = float("nan")
SCALINGS: list[dict[str, Any]] = [
    *({"scale_rewards": scale} for scale in ("group", "batch", "global", "none")),
    {"aggregation": "normalize_then_sum"},
]


def spreads(table: list[list[float]], weights: list[float], **keys: Any) -> list[float]:
    """What the scorer makes of raw scores [2 images of each group, rewards]."""
    named = {str(index): weight for index, weight in enumerate(weights)}
    scorer = BatchScorer(FakeRewards(**dict.fromkeys(named, brightness)), named, 2, Stopwatch(), **keys)
    return scorer.spreads(Measured(torch.tensor(table, dtype=torch.float32).double(), {}, [])).tolist()


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda keys: "-".join(keys.values()))
def test_equal_rewards_have_advantages_of_exactly_0(
    new_trainer: Callable[..., Any], scaling: dict[str, Any], size: int
) -> None:
    """Whatever stands in the other groups, however large the constants are, and whatever float32 can hold of them."""

    def levels(*values: float) -> Callable[[Tensor], Tensor]:
        return lambda images: torch.tensor(values).repeat_interleave(size)

    ramp = torch.cat([torch.full((3 * size,), 0.3), torch.arange(size) / 1000])
    rewards = FakeRewards(a=levels(0.1, 0.9, 5.3, 1e8), b=levels(0.2, 0.3, 1e8, 5.3), c=lambda images: ramp)
    trainer = new_trainer(rewards, steps=1, beta=0.0, group_size=size, batch_size=4 * size, **scaling)
    got = last_batch(trainer)[0].view(4, size)
    assert got.dtype == torch.float32
    assert got[:3].eq(0).all()
    assert (got[3].diff() > 0).all(), "1e8 beside it hides nothing"


def test_what_differs_and_what_rounding_left() -> None:
    third = torch.tensor(1 / 3)
    sums = [(0.1 * third + 0.7 * third + 0.2 * third).item(), ((0.2 + 0.7 + 0.1) * third).item()]
    assert spreads([[value] for value in (*sums, 1e8, 1e8, 1e-9, 2e-9, 0.0, 1e-30)], [1.0]) == pytest.approx(
        [0, 0, 1e-9 / 2**0.5, 1e-30 / 2**0.5], rel=1e-6, abs=0
    )
    jitter_and_tiny = spreads([[1e8, 0.0], [1e8 + 8, 1e-3]], [1.0, 1.0])
    assert jitter_and_tiny == pytest.approx([1e-3 / 2**0.5], rel=1e-4)  # beside 1e8 float64 holds four digits of 1e-3
    assert spreads([[1.0, NAN], [1.0, 2.0], [NAN, 1.0], [NAN, 3.0]], [1.0, 0.0])[0] == 0
    opposed = [[0.1, -0.1], [0.7, -0.7]]
    assert spreads(opposed, [1.0, 1.0]) == [0]
    assert spreads(opposed, [1.0, 1.0], aggregation="normalize_then_sum") == [0]
    assert spreads(opposed, [1.0, 0.5], aggregation="normalize_then_sum")[0] > 0
    pulled = spreads(opposed, [1.0, -1.0], aggregation="normalize_then_sum")
    assert pulled == pytest.approx([2 * 0.6 / 2**0.5]), "less of one is as good as more of the other"


def test_rewards_that_cancel_after_their_normalisation_have_advantages_of_exactly_0(
    new_trainer: Callable[..., Any],
) -> None:
    ramp = torch.arange(16) % 8 / 7
    rewards = FakeRewards(a=lambda images: ramp, b=lambda images: 1 - ramp)
    trainer = new_trainer(rewards, steps=1, beta=0.0, group_size=8, batch_size=16, aggregation="normalize_then_sum")
    assert last_batch(trainer)[0].eq(0).all()


def test_what_rounding_left_of_a_constant_does_not_count_beside_another_reward(new_trainer: Callable[..., Any]) -> None:
    """Normalised by itself it would count as much as the other."""
    images, got = torch.arange(16), []
    for jitter in (0.0, 8.0):
        rewards = FakeRewards(a=lambda _, jitter=jitter: 1e8 + jitter * (images % 3 == 0), b=lambda _: images % 8 / 7.0)
        settings = {"group_size": 8, "batch_size": 16, "aggregation": "normalize_then_sum"}
        got.append(last_batch(new_trainer(rewards, steps=1, beta=0.0, **settings))[0])
    assert got[0].std() > 0.5
    torch.testing.assert_close(got[1], got[0])


def first_alone(images: Tensor) -> Tensor:
    """One image of each group has a score."""
    return redness(images).masked_fill(torch.arange(len(images)) % 4 > 0, NAN)


@pytest.mark.parametrize(
    ("score", "beta"),
    [(lambda images: torch.full((len(images),), 0.1), 0.0), (first_alone, 0.1)],
    ids=["constant", "one of a group"],
)
def test_an_update_that_learns_nothing_changes_nothing(
    policy_folder: Path, tmp_path: Path, score: Callable[[Tensor], Tensor], beta: float
) -> None:
    """Neither weights nor moments nor their mean, whatever momentum the update before has left."""
    out, rewards = (
        tmp_path / "run",
        FakeRewards(red=lambda images: score(images) if rewards.calls > 1 else redness(images)),
    )
    recipe = tiny_recipe(
        policy_folder, rewards=["red"], steps=4, save_every=1, keep_checkpoints=4, beta=beta, ema_decay=0.5,
        schedule="linear", micro_batch_size=4,
    )  # fmt: skip
    recipe = recipe.model_copy(update={"rewards": recipe.rewards.model_copy(update={"max_missing": 1.0})})
    shown = train(recipe, out, rewards=rewards)
    assert_same_state(out, 1, 4)
    means = [load_file(out / "checkpoints" / f"step_{step:06d}" / "ema.safetensors") for step in (1, 4)]
    assert all(torch.equal(means[0][name], means[1][name]) for name in means[0])
    records = metrics(out)
    assert [one["updates_left_out"] for one in records] == [0, 1, 2, 3]
    assert [one["learning_rate"] for one in records] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert "4 updates in" in shown and "3 of which changed nothing" in shown
    assert [(one["step"], one["guard"]) for one in warnings(out) if one["guard"] != "images_left_out"] == [
        (4, "constant_reward")
    ]
    assert "every advantage was exactly 0 in the last 3 updates" in shown


def test_a_kl_term_pulls_back_where_the_rewards_are_constant(policy_folder: Path, tmp_path: Path) -> None:
    """Its gradient is a true one; at the start, where the policy is its reference, there is none."""
    flat = FakeRewards(red=lambda images: redness(images) if flat.calls == 2 else torch.full((len(images),), 0.1))
    train(tiny_recipe(policy_folder, rewards=["red"], steps=3, beta=0.1), tmp_path / "run", rewards=flat)
    assert [one["updates_left_out"] for one in metrics(tmp_path / "run")] == [1, 1, 1]
    longer = tiny_recipe(policy_folder, rewards=["red"], steps=4, beta=0.1)
    assert "1 of which changed nothing" in train(longer, tmp_path / "run", resume=True, rewards=flat)
