"""Our reading of eq. 3 to 6 against the golden numbers and against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from argrpo_cli.training import scorer
from tests.training.objective import advantages, group_std, grpo_objective, kl_estimate, ratio, surrogate

GOLDENS = Path(__file__).parents[1] / "data" / "grpo" / "H_grpo.safetensors"
EPSILON, BETA = 0.2, 0.1


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS)


def close(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    return ours.dtype == torch.float64 and torch.allclose(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "ddof"), [("pop", 0), ("sample", 1)])
def test_every_golden_number_is_reproduced(golden: dict[str, torch.Tensor], kind: str, ddof: int) -> None:
    logp = golden["in/logp"].requires_grad_()
    old, ref = golden["in/old_logp"], golden["in/ref_logp"]
    advantage = advantages(golden["in/rewards"], ddof)
    per_token = advantage.flatten()[:, None]
    gain = surrogate(ratio(logp, old), per_token, EPSILON)
    kl = kl_estimate(logp, ref)
    objective = grpo_objective(logp, old, ref, advantage.flatten(), EPSILON, BETA)
    objective.loss.backward()

    assert close(advantage, golden[f"out/advantages_{kind}"])
    assert close(ratio(logp, old), golden["out/ratio"])
    assert close(kl, golden["out/kl_k3"])
    assert close(-gain, golden[f"out/policy_token_loss_{kind}"])
    assert close(-gain + BETA * kl, golden[f"out/token_loss_{kind}"])
    assert close(objective.policy_loss, golden[f"out/policy_loss_{kind}"].squeeze())
    assert close(objective.loss, golden[f"out/loss_{kind}"].squeeze())
    assert close(objective.kl, golden["out/kl_mean"].squeeze())
    assert close(objective.clip_low + objective.clip_high, golden[f"out/clip_fraction_{kind}"].squeeze())
    assert close(logp.grad, golden[f"out/dloss_dlogp_{kind}"])
    logp.grad = None


def test_group_normalisation_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]], dtype=torch.float64)
    # mean 3, deviations -2 -1 0 3, squares sum to 14: std sqrt(14 / 3) as a sample, sqrt(14 / 4) as a population
    std = math.sqrt(14 / 3)
    expected = [-2 / (std + 1e-4), -1 / (std + 1e-4), 0.0, 3 / (std + 1e-4)]
    assert advantages(rewards)[0].tolist() == pytest.approx(expected, abs=1e-12)
    assert advantages(rewards)[1].tolist() == [0.0] * 4
    assert group_std(rewards, ddof=0)[0].item() == pytest.approx(math.sqrt(14 / 4))


def test_missing_reward_stays_out_of_its_group() -> None:
    nan = float("nan")
    rewards = torch.tensor([[1.0, nan, 3.0], [nan, nan, 2.0], [nan, nan, nan]])
    expected = 1 / (math.sqrt(2) + 1e-4)  # of 1 and 3: mean 2, sample std sqrt(2)
    assert advantages(rewards)[0].tolist() == pytest.approx([-expected, 0.0, expected])
    assert advantages(rewards)[1:].tolist() == [[0.0] * 3] * 2  # one reward alone says nothing
    assert group_std(rewards).isnan().tolist() == [False, True, True]
    assert torch.equal(scorer.group_std(rewards).nan_to_num(-1), group_std(rewards).nan_to_num(-1))  # what a run logs


def test_clipping_by_hand() -> None:
    r = torch.tensor([0.5, 0.5, 1.1, 1.5, 1.5])
    advantage = torch.tensor([2.0, -2.0, 2.0, 2.0, -2.0])
    # min(r A, clip(r) A): a gain is cut at 1.2 A, a loss at 0.8 A; the other sides are not cut
    assert surrogate(r, advantage, EPSILON).tolist() == pytest.approx([1.0, -1.6, 2.2, 2.4, -3.0])
    logp = r.log()[:, None]
    objective = grpo_objective(logp, torch.zeros(5, 1), None, advantage, EPSILON, beta=0.0)
    assert objective.clip_low.item() == pytest.approx(1 / 5)  # ratio 0.5 with a negative advantage
    assert objective.clip_high.item() == pytest.approx(1 / 5)  # ratio 1.5 with a positive one
    assert objective.loss.item() == pytest.approx(-(1.0 - 1.6 + 2.2 + 2.4 - 3.0) / 5)


def test_kl_estimate_by_hand() -> None:
    logp, ref = torch.tensor([math.log(0.5), math.log(0.25)]), torch.tensor([math.log(0.25), math.log(0.5)])
    assert kl_estimate(logp, ref).tolist() == pytest.approx([0.5 - math.log(0.5) - 1, 2 - math.log(2) - 1])
    assert kl_estimate(logp, logp).tolist() == [0.0, 0.0]
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert (kl_estimate(noise, torch.zeros(1000)) >= 0).all()


def test_long_and_short_images_would_count_the_same() -> None:
    """The mean over tokens is taken within each image first (eq. 4), so the loss does not grow with T."""
    logp = torch.full((2, 4), -1.0)
    once = grpo_objective(logp, logp, None, torch.tensor([1.0, -3.0]), EPSILON, 0.0)
    twice = grpo_objective(logp.repeat(1, 2), logp.repeat(1, 2), None, torch.tensor([1.0, -3.0]), EPSILON, 0.0)
    assert once.loss.item() == twice.loss.item() == pytest.approx(1.0)
