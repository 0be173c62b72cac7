"""What is drawn by the rewards so far: conditions by their spread, others in the place of groups without, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from argrpo_cli.shapes import Condition
from argrpo_cli.training.conditions import WeightedConditions
from argrpo_cli.training.grpo import ImageGRPOTrainer
from argrpo_cli.training.selection import Selection
from tests.training.tiny import FakeRewards, count_of_3, tiny_recipe

Build = Callable[..., ImageGRPOTrainer]
NAN = float("nan")


def selection(floor: float | None = 0.25, weights: Sequence[float] = (1.0, 1.0, 1.0)) -> Selection:
    conditions = WeightedConditions(
        tuple(Condition(f"{index}", index) for index in range(len(weights))), tuple(weights)
    )
    return Selection(tiny_recipe(spread_floor=floor, dynamic_sampling=2), conditions)


def test_a_condition_is_drawn_in_proportion_to_its_running_spread_above_a_floor() -> None:
    one = selection()
    assert one.probabilities() == pytest.approx([1 / 3] * 3)
    one.observe([0, 1, 1, 2], torch.tensor([1.0, 2.0, 4.0, NAN]))
    assert one.spreads == {0: 1.0, 1: 3.0}  # 2 + (4 - 2) / 2; what is not known is not observed
    assert one.probabilities() == pytest.approx([1 / 12 + 0.75 / 6, 1 / 12 + 0.75 / 2, 1 / 12 + 0.75 / 3])
    assert selection(floor=None, weights=(1.0, 3.0)).probabilities() == pytest.approx([0.25, 0.75])
    weighted = selection(floor=0.0, weights=(2.0, 1.0))
    weighted.observe([0, 1], torch.tensor([1.0, 2.0]))
    assert weighted.probabilities() == pytest.approx([0.5, 0.5])
    weighted.observe([0, 1, 0, 1], torch.zeros(4))
    assert weighted.draw(30, 5).count(0) in (15, 16, 14)


def test_what_is_drawn_depends_on_seed_step_and_number_and_follows_the_shares() -> None:
    one = selection(weights=(1.0, 2.0, 5.0))
    assert sorted(one.draw(8, 3)) == [0, 1, 1, 2, 2, 2, 2, 2]
    assert one.draw(8, 3) == selection(weights=(1.0, 2.0, 5.0)).draw(8, 3)
    assert len({tuple(one.draw(8, step, number)) for step in range(3) for number in range(3)}) > 5


def test_the_running_deviation_weighs_later_batches_more_and_is_kept(tmp_path: Path) -> None:
    one = selection()
    assert one.deviation(torch.tensor([1.0, -1.0])) == pytest.approx(1)
    assert one.deviation(torch.tensor([2.0, -2.0])) == pytest.approx(math.sqrt((0.9 * 1 + 4) / 1.9))
    one.observe([1], torch.tensor([0.1]))
    one.save(tmp_path)
    again = selection()
    again.load(tmp_path)
    assert vars(again) == vars(one)


class ByCondition(FakeRewards):
    """Token 3 is rewarded, but for classes 0 and 1, whose images are all the same to it."""

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        scores = super().score(images, conditions)["threes"]
        alike = torch.tensor([condition.class_id < 2 for condition in conditions])
        return {"threes": (scores + torch.arange(len(images)) / 64).masked_fill(alike, 1.0)}


def test_groups_without_spread_are_replaced(new_trainer: Build) -> None:
    rewards = ByCondition(threes=count_of_3)
    trainer = new_trainer(rewards, dynamic_sampling=20, batch_size=16)
    drawn = trainer.rollout_func(["0"] * 4 + ["2"] * 4 + ["1"] * 4 + ["3"] * 4, trainer)
    classes = [condition.class_id for condition in drawn["conditions"]]
    assert classes[4:8] == [2] * 4 and classes[12:] == [3] * 4  # as asked
    assert set(classes) <= {2, 3} and len(set(classes[:4])) == len(set(classes[8:12])) == 1
    assert trainer.encoded.condition.tolist() == classes
    logged: dict[str, float] = {}
    calls = rewards.calls
    (function,) = trainer.reward_funcs
    scores = function(list(drawn["images"]), drawn["conditions"], logged.__setitem__)
    assert rewards.calls == calls, "scored once"
    assert torch.tensor(scores).view(4, 4).std(1).min() > 0.01
    assert logged["groups_replaced"] == 0.5 and logged["images_extra"] >= 8
    assert logged["groups_without_spread"] == 0
    assert trainer.rollout_func.selection.spreads[0] == 0
    again = trainer.rollout_func(["0"] * 4 + ["2"] * 4 + ["1"] * 4 + ["3"] * 4, trainer)
    assert again["completion_ids"] == drawn["completion_ids"]


def test_no_more_images_are_drawn_than_allowed(new_trainer: Build) -> None:
    rewards = FakeRewards(threes=lambda images: torch.ones(len(images)))
    trainer = new_trainer(rewards, dynamic_sampling=2.5)
    drawn = trainer.rollout_func(["0"] * 4 + ["1"] * 4, trainer)
    logged: dict[str, float] = {}
    trainer.reward_funcs[0](drawn["images"], drawn["conditions"], logged.__setitem__)
    assert logged["images_extra"] == 12  # 1.5 x 8: two groups, then one
    assert logged["groups_without_spread"] == logged["groups_replaced"] == 1


def last_batch(trainer: ImageGRPOTrainer) -> tuple[Tensor, Tensor]:
    """Advantages of the latest batch as the update had them, and rewards [images, terms] as TRL saw them."""
    trainer.train()
    size = trainer.args.generation_batch_size
    rewards = torch.stack([torch.tensor(list(column)[-size:]) for column in trainer._logs["rewards"].values()], 1)
    parts = trainer._buffered_inputs
    rows = torch.cat([part["prompt_ids"][:, 0] for part in parts])
    return torch.cat([part["advantages"] for part in parts])[rows.argsort()], rewards


def test_advantages_are_divided_by_the_deviation_over_updates(new_trainer: Build) -> None:
    got, rewards = last_batch(new_trainer(scale_rewards="global", steps=1))
    centred = rewards.view(2, 4) - rewards.view(2, 4).mean(1, keepdim=True)
    assert got == pytest.approx((centred / (centred.square().mean().sqrt() + 1e-4)).flatten(), abs=1e-5)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_rewards_are_normalised_before_their_sum(new_trainer: Build, scale: str) -> None:
    """One image lacks a score, and counts in neither reward. The sum is normalised over the batch, or left."""

    def first_missing(images: Tensor) -> Tensor:
        return torch.cat([torch.tensor([NAN]), images[1:].float().mean((1, 2, 3))])

    rewards = FakeRewards(threes=count_of_3, mean=first_missing)
    keys = {"aggregation": "normalize_then_sum", "scale_rewards": scale}
    trainer = new_trainer(rewards, **keys, steps=1, weights={"mean": 2.0})
    got, table = last_batch(trainer)
    assert table[0].isnan().all()
    z = torch.cat([(group - group.mean(0)) / (group.std(0) + 1e-4) for group in (table[1:4], table[4:])])
    total = z @ torch.tensor([1.0, 2.0])
    assert got[0] == 0
    expected = (total - total.mean()) / (total.std() + 1e-4) if scale == "group" else total
    assert got[1:] == pytest.approx(expected, abs=1e-4)
