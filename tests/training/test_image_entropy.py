"""STAGE's entropy reward: by hand, of the best image of a group, and on the policy and reference of a trainer."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from argrpo_cli.cli.app import run
from argrpo_cli.recipe import Recipe
from argrpo_cli.rewards import RewardSet
from argrpo_cli.rewards.base import Reward
from argrpo_cli.rewards.stage_entropy import StageEntropy
from argrpo_cli.shapes import Sampling
from argrpo_cli.training import run_training
from argrpo_cli.training.grpo import ImageGRPOTrainer
from argrpo_cli.training.image_entropy import image_entropies
from argrpo_cli.training.rollout import Stopwatch
from argrpo_cli.training.scorer import BatchScorer
from tests.policy.test_var_training import tiny_var
from tests.policy.tiny_janus import PROMPTS, tiny_janus
from tests.training.tiny import brightness, count_of_3, tiny_recipe

NAN = float("nan")


def test_the_best_images_of_a_group_are_paid_for_the_reference_s_entropy() -> None:
    """H above or below H_ref by a half is 1 / (1 + 1/4); all others have nothing, also one without a total."""
    seen = torch.tensor([[3.0, 2.5, 1.0], [2.0, 2.5, 1.0], [2.5, 2.5, 0.5], [2.5, 2.5, NAN]])
    assert StageEntropy().compare(seen, []).tolist() == pytest.approx([0.8, 0.8, 0, 0])
    assert StageEntropy().compare(torch.tensor([[1.0, 4.0, -7.0], [1.0, 1.0, -8.0]]), []).tolist() == pytest.approx(
        [0.1, 0]
    )
    below = torch.tensor([[2.0, 2.0, -1.0], [2.0, 2.0, -2.0], [2.0, 2.0, NAN]])
    assert StageEntropy().compare(below, []).tolist() == [1, 0, 0], "an unknown total is none of 0"


class First(Reward):
    def score(self, images: Tensor, conditions: Any) -> Tensor:
        return images[:, 0, 0, 0].float()


class Second(Reward):
    def score(self, images: Tensor, conditions: Any) -> Tensor:
        return images[:, 0, 0, 1].float() / 10


@pytest.mark.parametrize(
    ("aggregation", "best"), [("sum_then_normalize", [0, 1, 0, 0]), ("normalize_then_sum", [0, 0, 1, 0])]
)
def test_best_is_by_all_other_rewards_as_they_are_added(aggregation: str, best: list[int]) -> None:
    """Of 10 + 0.1, 12 + 0, 11 + 0.7, 8 + 0.3 the second is the largest sum; in deviations the third is far ahead. What
    is only measured does not count, nor does the reward itself."""
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    images[:, 0, 0] = torch.tensor([[10, 1], [12, 0], [11, 7], [8, 3]], dtype=torch.uint8)
    some = RewardSet(
        {"stage-entropy": StageEntropy(), "imagereward": First(), "aesthetic": Second(), "pickscore": First()}
    )
    weights = {"stage-entropy": 100.0, "imagereward": 1.0, "aesthetic": 1.0, "pickscore": 0.0}
    scorer = BatchScorer(some, weights, 4, Stopwatch(), aggregation=aggregation)
    scorer.entropies = torch.tensor([[2.0, 2.0]] * 4)
    conditions, log = [None] * 4, lambda name, value: None
    pictures = list(images)
    columns = {one.__name__: one(images=pictures, conditions=conditions, log_metric=log) for one in scorer.functions()}
    assert columns["stage-entropy"] == best


def trainer_with(build: Callable[..., ImageGRPOTrainer], **grpo: Any) -> ImageGRPOTrainer:
    class Threes(Reward):
        def score(self, images: Tensor, conditions: Any) -> Tensor:
            return count_of_3(images)

    rewards = RewardSet({"stage-entropy": StageEntropy(), "imagereward": Threes()})
    return build(rewards, steps=1, weights={"stage-entropy": 0.4}, **grpo)


@pytest.mark.parametrize("adapted", [False, True])
def test_entropies_are_those_of_the_policy_and_of_its_reference(
    new_trainer: Callable[..., ImageGRPOTrainer], adapted: bool
) -> None:
    trainer = trainer_with(new_trainer, beta=0.1, cfg_scale=1.0, lora={"rank": 2} if adapted else None)
    size = trainer.args.generation_batch_size
    moved = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in moved]
    with torch.no_grad():
        for weight in moved:
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    trainer.train()
    after = trainer.scorer.entropies
    assert after.shape == (size, 2) and (after[:, 0] - after[:, 1]).abs().min() > 1e-4
    batch = trainer._buffered_inputs
    tokens = torch.cat([part["completion_ids"] for part in batch])
    rows = torch.cat([part["prompt_ids"][:, 0] for part in batch])
    with torch.no_grad():
        for weight, value in zip(moved, before, strict=True):
            weight.copy_(value)  # the reference
        reference = trainer.model(trainer.encoded[rows], tokens, Sampling(cfg_scale=1.0), True).entropy.mean(1)
    torch.testing.assert_close(after[rows, 1], reference)
    again = image_entropies(trainer, tokens[rows.argsort()].tolist())
    torch.testing.assert_close(again[:, 0], again[:, 1])
    torch.testing.assert_close(again[:, 1], after[:, 1])
    h, reference = after.double().unbind(1)
    table = trainer.scorer.table.view(-1, 4, 2)
    bonus = (1 / (1 + (h - reference).square())).view(-1, 4)
    best = table[..., 1] == table[..., 1].amax(1, keepdim=True)
    torch.testing.assert_close(table[..., 0], torch.where(best, bonus, 0), rtol=1e-6, atol=0)
    assert best.sum() < best.numel()


class Bright(Reward):
    def score(self, images: Tensor, conditions: Any) -> Tensor:
        return brightness(images)


@pytest.mark.parametrize("family", [tiny_var, tiny_janus])
def test_every_family_begins_with_the_reference_s_entropy_and_leaves_it(
    family: Callable[[], Any], tmp_path: Path
) -> None:
    """The best of four images has 1 before the first update, and less after."""
    family().save(tmp_path / "policy")
    captions = {"source": "captions", "captions": list(PROMPTS)} if family is tiny_janus else {}
    recipe = tiny_recipe(
        tmp_path / "policy", ["stage-entropy", "imagereward"], steps=2, beta=0.01, learning_rate=0.05,
        conditions=captions, cfg_scale=1.0, weights={"stage-entropy": 0.4},
    )  # fmt: skip
    rewards = RewardSet({"stage-entropy": StageEntropy(), "imagereward": Bright()})
    run_training(recipe, tmp_path / "run", rewards=rewards, console=Console(file=io.StringIO()))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, second = (line["rewards"]["stage-entropy"]["mean"] for line in lines)
    assert first == pytest.approx(0.25, abs=1e-6) and 0 < second < 0.25 - 1e-6


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"beta": 0.0}, "without a KL term there is none; set grpo.beta above 0"),
        ({"dynamic_sampling": 2.0}, "grpo.dynamic_sampling chooses by scores before"),
        ({"spread_floor": 0.5}, "grpo.spread_floor chooses by scores before"),
    ],
)
def test_what_it_cannot_go_with_is_refused(keys: dict[str, float], words: str) -> None:
    recipe = tiny_recipe().model_dump()
    recipe["rewards"]["terms"].append({"name": "stage-entropy", "weight": 0.4})
    Recipe.model_validate(recipe)
    recipe["grpo"] |= keys
    with pytest.raises(ValueError, match=words):
        Recipe.model_validate(recipe)


def test_images_alone_have_no_such_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for index in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"dog-{index}.png")
    assert run(["score", str(tmp_path), "--rewards", "stage-entropy"]) == 2
    assert "scored none of the 2 images: it reads the policy that `argrpo train` trains" in capsys.readouterr().err
