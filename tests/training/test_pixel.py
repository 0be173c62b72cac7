"""VA-pi: context noise, advantages and loss by hand, and whole runs along real images."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from argrpo_cli.policy import Policy, load_policy
from argrpo_cli.policy import tokens as shared
from argrpo_cli.policy.tokens import inverse_cdf
from argrpo_cli.runs import curves
from argrpo_cli.training.image_trainer import build
from argrpo_cli.training.pixel import PixelTrainer, advantages, policy_loss, replaced
from argrpo_cli.training.real import open_images
from argrpo_cli.training.rollout import Rollout
from tests.training.reals import real_recipe, save_codes
from tests.training.test_cca import at_fetch
from tests.training.test_train import Stopped, assert_same_run, die, metrics, train
from tests.training.tiny import CLASSES, CODES, TOKENS, paint


def test_a_share_of_the_codes_is_replaced_by_any_of_them() -> None:
    tokens = torch.full((20_000,), 5)

    def noisy(share: float) -> Tensor:
        return replaced(tokens, share, CODES, torch.Generator().manual_seed(0))

    assert torch.equal(noisy(0.0), tokens)
    counts = torch.bincount(noisy(0.5), minlength=CODES) / 20_000
    assert counts[5].item() == pytest.approx(0.5 + 0.5 / CODES, abs=0.01)
    assert counts[torch.arange(CODES) != 5].tolist() == pytest.approx([0.5 / CODES] * (CODES - 1), abs=0.004)
    assert torch.bincount(noisy(1.0), minlength=CODES).min() > 500


def test_advantages_by_hand_and_none_where_all_draws_are_alike() -> None:
    rewards = torch.tensor([[-0.3, -0.1, -0.2, -0.2], [-0.7, -0.7, -0.7, -0.7]], dtype=torch.float64)
    deviation = math.sqrt((0.01 + 0.01) / 3)
    found = advantages(rewards)
    assert found[0].tolist() == pytest.approx([-0.1 / deviation, 0.1 / deviation, 0, 0], rel=1e-5)
    assert torch.equal(found[1], torch.zeros(4, dtype=torch.float64))


def test_the_gradient_is_that_of_log_probabilities_times_advantages() -> None:
    logp = torch.randn(2, 3, 4, requires_grad=True)
    advantage = torch.tensor([[1.0, -1.0, 0.5, 0.0], [0.0, 0.0, 2.0, -2.0]])
    loss = policy_loss(logp, advantage)
    loss.backward()
    torch.testing.assert_close(logp.grad, -advantage[:, None].expand(2, 3, 4) / 24)  # descent makes the better likelier
    assert loss.item() == pytest.approx(-0.5 / 8)


@pytest.fixture
def new(policy: Policy, tmp_path: Path) -> Callable[..., PixelTrainer]:
    def new_trainer(distance: Any = None, **keys: Any) -> PixelTrainer:
        recipe = real_recipe("pixel", "tiny", save_codes(tmp_path / "codes.npz"), **keys)
        policy.decode = paint
        real = open_images(recipe.real, policy)
        real.distance = distance
        rollout = Rollout(recipe, policy.conditions(range(CLASSES)), policy)
        return build(PixelTrainer, recipe, policy, rollout, real, tmp_path / "trainer", [])

    return new_trainer


def mean_gap(images: Tensor, others: Tensor) -> Tensor:
    """A distance that is easy to compute: of the means."""
    return (images.float().mean((1, 2, 3)) - others.float().mean((1, 2, 3))).abs()


@pytest.mark.parametrize("parts", [None, 5 * CODES])  # logits at once
def test_the_loss_of_a_batch_is_that_of_its_logits(
    new: Callable[..., PixelTrainer], monkeypatch: pytest.MonkeyPatch, parts: int | None
) -> None:
    """Draws from the very distributions along the noise, compared by pixels (`paint` writes codes as pixels)."""
    if parts:
        monkeypatch.setattr(shared, "LOGITS_AT_ONCE", parts)
    weights = {"mse_weight": 2.0, "perceptual_weight": 0.5, "cross_entropy_weight": 0.3}
    trainer = new(mean_gap, samples=3, noise=0.5, **weights)
    inputs = encoded, tokens, noisy, uniforms, images = trainer.update()[0]
    assert torch.equal(images[:, 0].flatten(1), tokens.to(torch.uint8)), "the image is what its codes decode to"
    assert 0.3 < (noisy != tokens).float().mean() < 0.7 and uniforms.shape == (4, TOKENS, 3)
    logp = trainer.model.logits(encoded, noisy).log_softmax(-1)  # token t reads the noisy ones before it
    drawn = torch.stack([inverse_cdf(logp.detach(), uniforms[..., g]) for g in range(3)], -1)
    gaps = (drawn - tokens[..., None]).float()
    rewards = -(2.0 * (gaps / 127.5).square().mean(1) + 0.5 * gaps.mean(1).abs()).double()
    advantage = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-8)
    own = logp.gather(-1, tokens[..., None])[..., 0]
    surrogate = -(advantage[:, None] * logp.gather(-1, drawn)).mean().float() - 0.3 * own.mean()
    expected = torch.autograd.grad(surrogate, trainer.model.lm_head.weight)[0]
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert loss.item() == pytest.approx(-0.3 * own.mean().item(), rel=1e-4)  # advantages sum to 0
    torch.testing.assert_close(trainer.model.lm_head.weight.grad, expected, rtol=1e-3, atol=1e-6)
    trainer.log(logs := {"loss": 1.0})
    assert logs["reward"] == pytest.approx(rewards.mean().item(), rel=1e-5)
    assert logs["rewards/mse/mean"] == pytest.approx((gaps / 127.5).square().mean().item(), rel=1e-5)
    assert logs["rewards/perceptual/mean"] == pytest.approx(gaps.mean(1).abs().mean().item(), rel=1e-5)
    assert logs["cross_entropy"] == pytest.approx(-own.mean().item(), rel=1e-5)
    assert logs["reward_within_group_std"] == pytest.approx(rewards.std(1).mean().item(), rel=1e-4)


def test_every_image_of_every_update_has_noise_of_its_own(new: Callable[..., PixelTrainer]) -> None:
    trainer, drawn, replaced_at = new(samples=2, noise=0.5), set(), set()
    for trainer.state.global_step in (0, 1):
        for _, tokens, noisy, uniforms, _ in trainer.update():
            drawn |= {tuple(one.flatten().tolist()) for one in uniforms}
            replaced_at |= {tuple(one.tolist()) for one in noisy != tokens}
    assert len(drawn) == len(replaced_at) == 16


def test_training_draws_what_looks_more_like_the_images(new: Callable[..., PixelTrainer]) -> None:
    trainer = new(steps=20, learning_rate=5e-3, samples=6, cross_entropy_weight=0.0, noise=0.2)
    trainer.train()
    rewards = [one["reward"] for one in trainer.state.log_history if "reward" in one]
    assert sum(rewards[-4:]) > 0.7 * sum(rewards[:4]), "they are negative"


# --- runs


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_codes(tmp_path_factory.mktemp("images") / "codes.npz")


@pytest.fixture(scope="module")
def finished(policy_folder: Path, codes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("pixel") / "run"
    shown = train(real_recipe("pixel", policy_folder, codes), out)
    assert f"tiny: 4 updates of 8 images (of 20 real ones) in {out}\n" in shown and "perceptual 0.000" in shown
    return out


def test_interrupted_it_goes_on_as_if_nothing_had_been(
    finished: Path, policy_folder: Path, codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, recipe = tmp_path / "run", real_recipe("pixel", policy_folder, codes)
    with pytest.raises(Stopped):
        at_fetch(6, die, monkeypatch)  # twice in an update: pixels are made of codes here
        train(recipe, out)
    monkeypatch.undo()
    train(recipe, out, resume=True)
    assert_same_run(finished, out, step=4)


def test_its_records_are_those_of_rewards(finished: Path, policy_folder: Path) -> None:
    assert load_policy(finished).card.sampling == load_policy(policy_folder).card.sampling == {}
    for record in metrics(finished):
        assert record["reward"] == pytest.approx(-record["rewards"]["mse"]["mean"], rel=1e-4)
        assert record["cross_entropy"] > 0 and record["groups_without_spread"] == 0 and record["grad_norm"] > 0
        assert record["kl"] is None and record["ratio"] is None
        assert record.get("gain") is None, "images differ more than draws of one"
    titles = [panel.title for panel in curves.panels(metrics(finished), {})]
    assert titles[:2] == ["reward, weighted total", "reward: mse"]
