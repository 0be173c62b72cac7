"""What is measured of a run: gradients of known noise, weights that were moved, a run with everything switched on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from argrpo_cli.policy import load_policy
from argrpo_cli.shapes import Condition, Sampling
from argrpo_cli.training.instruments import GradientMeter, Start, group_of, samplings, transfer_shots
from argrpo_cli.training.saving import spread
from tests.training.test_train import metrics, train
from tests.training.tiny import FakeRewards, tiny_recipe


def update(meter: GradientMeter, weight: nn.Parameter, images: torch.Tensor, micro: int) -> tuple[float, float] | None:
    """One update of the mean of |weight - image|² / 2 over images [B, D], as a trainer accumulates it."""
    weight.grad = None
    meter.on_step_begin(None, None, None)
    for part in images.split(micro):
        loss = (weight - part).square().sum(-1).mean() / 2
        (loss * micro / len(images)).backward()
        meter.on_substep_end(None, None, None)
    return meter.take(weight.grad.norm().item())


@pytest.mark.parametrize(("micro", "tolerance"), [(4, 0.05), (2, 0.1)])
def test_noise_of_a_quadratic(micro: int, tolerance: float) -> None:
    """The gradient of an image is weight - image: |G|² = 0.3² D, S = D for images of deviation 1 in D numbers."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.full((50,), 0.3))
    meter = GradientMeter(micro, share=16, group_size=4, batch_size=16)
    meter.watch([weight])
    found = torch.tensor([update(meter, weight, torch.randn(16, 50), micro) for _ in range(400)])
    signal, noise = found.mean(0).tolist()
    assert signal == pytest.approx(0.09 * 50, rel=tolerance)
    assert noise == pytest.approx(50, rel=tolerance)
    meter.unwatch()
    meter.on_step_begin(None, None, None)
    assert meter.take(1.0) is None


@pytest.mark.parametrize(
    ("micro", "share", "batch", "usable"),
    [
        (16, 16, 16, False),
        (8, 16, 16, True),
        (16, 16, 32, True),
        (4, 4, 8, False),
        (2, 8, 16, True),
        (6, 12, 12, False),
    ],
)
def test_noise_needs_whole_groups_and_two_blocks(micro: int, share: int, batch: int, usable: bool) -> None:
    assert GradientMeter(micro, share, group_size=8, batch_size=batch).usable == usable


def test_drift_of_a_known_change(policy_folder: Path) -> None:
    policy = load_policy(policy_folder)
    policy.model.lm_head.weight.requires_grad_(False)
    start = Start.of(policy, policy.model)
    with torch.no_grad():
        for parameter in policy.model.model.layers[1].parameters():
            parameter.mul_(1.25)
        policy.model.model.class_embedding.weight.neg_()
    drift = start.drift()
    assert drift["layers.1"] == pytest.approx(0.25)
    assert drift["class_embedding"] == pytest.approx(2)
    assert drift["layers.0"] == 0
    assert "lm_head" not in drift


def test_parts_are_named_by_rule() -> None:
    assert group_of("model.layers.4.attention.wqkv.weight") == "layers.4"
    assert group_of("base_model.model.blocks.11.mlp.up") == "blocks.11"
    assert group_of("model.caption_mlp.fc1.weight") == "caption_mlp.fc1"
    assert group_of("lm_head.weight") == "lm_head"
    assert group_of("pos_embedding") == "pos_embedding"


def test_samplings_are_distinct_and_the_trained_one_is_first() -> None:
    assert list(samplings(Sampling(cfg_scale=1.0))) == [
        "as trained", "guided at 2", "guided at 4", "greedy", "temperature 0.8", "temperature 1.2",
    ]  # fmt: skip
    assert list(samplings(Sampling(cfg_scale=3.0)))[:4] == ["as trained", "unguided", "guided at 2", "guided at 4"]


def test_compared_images_spread_over_the_conditions() -> None:
    conditions = [Condition(name) for name in "abcd"]
    assert [shot.condition.prompt for shot in transfer_shots(spread(conditions, 2), seed=0)] == ["a", "c"]
    shots = transfer_shots(spread(conditions, 6), seed=0)
    assert [shot.condition.prompt for shot in shots] == list("aabbcd")
    assert len({shot.seed for shot in shots}) == 6


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4.0}])
def test_a_run_is_measured_against_its_start(
    policy_folder: Path, tmp_path: Path, lora: dict[str, float] | None
) -> None:
    recipe = tiny_recipe(
        policy_folder, steps=2, beta=0.0, micro_batch_size=4, learning_rate=1e-2, lora=lora, grid_every=1,
        transfer_images=6,
    )  # fmt: skip
    train(recipe, tmp_path)
    first, second = metrics(tmp_path)
    assert second["kl_start"] > first["kl_start"] > 0
    assert first["kl"] is None
    for part in ("layers.0", "layers.1"):
        assert second["drift"][part] > first["drift"][part] > 0
    notes = json.loads((tmp_path / "run.json").read_text())
    assert [row["images"] for row in notes["transfer"]] == [6, 6, 6, 4, 6, 6]  # greedy ones of each class alone
    assert notes["transfer"][0]["gain"] != 0


def test_a_signal_leaves_the_comparison_out_and_the_run_is_finished(policy_folder: Path, tmp_path: Path) -> None:
    rewards = FakeRewards()
    rewards.on_batch = lambda _: (tmp_path / "policy").is_dir() and os.kill(os.getpid(), signal.SIGINT)
    shown = train(tiny_recipe(policy_folder, steps=1, transfer_images=2), tmp_path, rewards=rewards)
    assert "comparing start and result" in shown
    assert "the comparison is left out; the run is finished without it" in shown
    assert "finished at the last step: 1 updates" in shown
    notes = json.loads((tmp_path / "run.json").read_text())
    assert notes["finished"]["step"] == 1
    assert "transfer" not in notes
