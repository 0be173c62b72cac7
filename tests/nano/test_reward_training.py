"""A few steps of the losses that nano-quality and nano-critic are trained with: they learn the right thing, not its
opposite."""

from __future__ import annotations

import pytest
import torch

from argrpo_cli.nano.judge import load_judge
from argrpo_cli.nano.make.corrupt import damage_of
from argrpo_cli.nano.make.rewards import critic_loss, local_damage, quality_loss
from argrpo_cli.networks.nano import CriticNet, QualityNet
from argrpo_cli.networks.pixels import to_unit

STEPS = 40


@pytest.fixture(scope="module")
def pictures() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean scenes, the same with a grey block in the middle, and class ids."""
    judge = load_judge()
    clean, ids = judge.reference_images[:48], judge.reference_classes[:48]
    broken = clean.clone()
    broken[:, :, 20:44, 20:44] = 128
    return clean, broken, ids


def fit(network: torch.nn.Module, loss_of) -> list[float]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    losses = []
    for _ in range(STEPS):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    network.eval()
    return losses


def test_the_critic_learns_that_real_is_real(pictures):
    clean, broken, _ = pictures
    torch.manual_seed(0)
    network = CriticNet(widths=(8, 16, 16), blocks=(1, 1, 1)).train()
    generator = torch.Generator().manual_seed(0)
    losses = fit(network, lambda: critic_loss(network, clean[:24], broken[:18], broken[18:24], generator))
    assert losses[-1] < 0.7 * losses[0]
    with torch.inference_mode():
        real, generated = network(to_unit(clean[24:])), network(to_unit(broken[24:]))
    assert (real > generated).float().mean() > 0.9


def test_the_quality_net_learns_how_good_a_picture_is_and_where_it_is_broken(pictures):
    clean, broken, ids = pictures
    torch.manual_seed(0)
    network = QualityNet(widths=(8, 16, 16), blocks=(1, 1, 1), classes=24).train()
    images, truth = torch.cat([clean[:24], broken[:24]]), torch.cat([clean[:24], clean[:24]])
    quality = torch.cat([torch.ones(24), 1 - damage_of(torch.full((24,), 0.5))])
    losses = fit(network, lambda: quality_loss(network, images, truth, quality, ids[:24].repeat(2)))
    assert losses[-1] < 0.8 * losses[0]
    with torch.inference_mode():
        assert (network(to_unit(clean[24:])) > network(to_unit(broken[24:]))).float().mean() > 0.9
        cells = network.lessons(to_unit(broken[24:]))[1]
    inside = local_damage(broken[24:], clean[24:]) > 0.3
    assert cells[inside].mean() > cells[~inside].mean() + 0.3
