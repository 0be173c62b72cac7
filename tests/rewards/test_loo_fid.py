"""loo-fid: what the distance to the reference would rise by without an image, by hand and by leaving each out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from argrpo_cli.networks.inception import load_inception
from argrpo_cli.rewards import load_reward
from argrpo_cli.rewards.features import Features
from argrpo_cli.rewards.loo_fid import LooFid, Moments, leave_one_out, read_moments, with_and_without
from argrpo_cli.system.errors import UserError
from tests.evals.inception_weights import save_random_inception

D = 5


def rows(count: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, D, dtype=torch.float64, generator=generator) * torch.arange(1, D + 1) + shift


def distance(mean: Tensor, square: Tensor, deviation: Tensor) -> float:
    """The formula, number by number, of moments less the reference's mean."""
    return sum(
        m**2 + (s - math.sqrt(q - m**2)) ** 2
        for m, q, s in zip(mean.tolist(), square.tolist(), deviation.tolist(), strict=True)
    )


def by_leaving_out(x: Tensor, deviation: Tensor, before: Tensor | None = None, decay: float = 0.0) -> list[float]:
    def fid(some: Tensor) -> float:
        mean, square = some.mean(0), some.square().mean(0)
        if before is not None:
            mean = decay * before.mean(0) + (1 - decay) * mean
            square = decay * before.square().mean(0) + (1 - decay) * square
        return distance(mean, square, deviation)

    return [fid(torch.cat([x[:i], x[i + 1 :]])) - fid(x) for i in range(len(x))]


def test_by_hand():
    """Of 0, 2 and 7, against mean 1 and deviation 2: FID is 4 + 0.944^2; without 7 it is 0 + 1, so 7 costs 3.89."""
    x = torch.tensor([[0.0], [2.0], [7.0]], dtype=torch.float64) - 1
    all_of_them = 4 + (2 - math.sqrt(26 / 3)) ** 2
    got = leave_one_out(x, torch.tensor([2.0], dtype=torch.float64))
    assert got.tolist() == pytest.approx([12.5 - all_of_them, 8.5 - all_of_them, 1 - all_of_them])
    assert got[2] < 0 < got[1] < got[0]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_all_at_once_is_each_left_out_in_turn(decay):
    x, before, deviation = rows(7, 0, 0.3), rows(40, 1, -0.2), rows(9, 2).std(0)
    running = with_and_without(before)[0] if decay else None
    expected = by_leaving_out(x, deviation, before if decay else None, decay)
    assert leave_one_out(x, deviation, running, decay).tolist() == pytest.approx(expected, rel=1e-9)
    assert max(expected) > 0 > min(expected)


def reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> LooFid:
    """On features that are the numbers given, with a reference of mean 1 and deviations 1 to D."""
    mean, deviation = np.ones(D), np.arange(1.0, D + 1)
    np.savez(tmp_path / "reference.npz", mu=mean, sigma=np.diag(deviation**2))
    monkeypatch.setattr(Features, "__init__", lambda self, kind, device, weights: setattr(self, "kind", kind))
    monkeypatch.setattr(Features, "__call__", lambda self, images: images)
    return load_reward("loo-fid", options={"reference": str(tmp_path / "reference.npz"), **options})


def test_running_moments_start_with_the_first_update_and_go_on(tmp_path, monkeypatch):
    some = reward(tmp_path, monkeypatch, decay=0.75)  # what is kept of earlier updates
    first, second = rows(8, 5) + 1, rows(8, 6) + 1
    deviation = torch.arange(1.0, D + 1, dtype=torch.float64)
    assert some.state() == {}
    before = some.compare(first, [])
    assert before.tolist() == pytest.approx(by_leaving_out(first - 1, deviation, first - 1, 0.75), rel=1e-4)
    assert torch.equal(some.compare(first, []), before), "asking changes nothing"
    some.advance(first)
    some.advance(second)
    whole = with_and_without(torch.cat([first, first, first, second]) - 1)[0]
    for name, value in some.state().items():
        torch.testing.assert_close(value, getattr(whole, name))
    again = reward(tmp_path, monkeypatch, decay=0.75)
    again.restore(some.state())
    third = rows(8, 7)
    assert torch.equal(again.compare(third, []), some.compare(third, []))
    assert not torch.allclose(reward(tmp_path, monkeypatch).compare(third, []), some.compare(third, []))


def test_running_moments_start_from_the_base_where_it_is_given(tmp_path, monkeypatch):
    base = rows(50, 8) + 2
    np.savez(tmp_path / "base.npz", mu=base.mean(0).numpy(), sigma_diagonal=base.var(0, correction=0).numpy())
    some = reward(tmp_path, monkeypatch, decay=0.75, base=str(tmp_path / "base.npz"))
    for got, expected in zip(some.running, with_and_without(base - 1)[0], strict=True):
        torch.testing.assert_close(got, expected)
    x, deviation = rows(6, 9) + 1, torch.arange(1.0, D + 1, dtype=torch.float64)
    assert some.compare(x, []).tolist() == pytest.approx(by_leaving_out(x - 1, deviation, base - 1, 0.75), rel=1e-4)


def test_the_mixture_of_moments_is_that_of_all_rows():
    one, other = rows(6, 10), rows(6, 11, 1.0)
    mixed = with_and_without(one)[0].mixed(with_and_without(other)[0], 0.5)
    torch.testing.assert_close(mixed, Moments(*with_and_without(torch.cat([one, other]))[0]))


def test_inception_s_features_are_those_that_fid_takes(tmp_path):
    weights = save_random_inception(tmp_path / "inception.pt")
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2048), sigma_diagonal=np.ones(2048))
    some = load_reward(
        "loo-fid", options={"weights": str(weights), "reference": str(tmp_path / "reference.npz"), "decay": 0.9}
    )
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = some.look(images, [])
    torch.testing.assert_close(seen, load_inception(weights).features(images).pool)
    scores = some.compare(seen, [])
    assert scores.shape == (3,) and scores.dtype == torch.float32 and scores.isfinite().all()
    np.savez(tmp_path / "small.npz", mu=np.zeros(128), sigma_diagonal=np.ones(128))
    some.mean, some.deviation = read_moments(tmp_path / "small.npz")
    with pytest.raises(UserError, match="the reference has 128 numbers, and inception features 2048"):
        some.look(images, [])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, "holds arr_0; expected mu, and sigma or sigma_diagonal"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu and sigma have the shapes \[3\], \[4, 4\]"),
        ({"mu": np.zeros(3), "sigma_diagonal": np.array([1, 1, -1.0])}, "a variance is below 0"),
        ({"mu": np.array(["a"] * 3), "sigma_diagonal": np.ones(3)}, "expected numbers"),
    ],
)
def test_a_file_that_is_no_reference_is_named(tmp_path, arrays, words):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(UserError, match=words):
        read_moments(tmp_path / "wrong.npz")


def test_options_that_make_no_sense_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("argrpo_cli.rewards.loo_fid.user_cache", lambda: tmp_path)
    with pytest.raises(UserError, match="set decay, too"):
        load_reward("loo-fid", options={"base": "moments.npz"})
    with pytest.raises(UserError, match=r"ADM's reference is not at .*`argrpo eval imagenet` fetches it"):
        load_reward("loo-fid", options={"reference": "adm-256"})
    with pytest.raises(UserError, match="decay is 1"):
        load_reward("loo-fid", options={"decay": 1.0})
    assert "which `argrpo eval imagenet` fetches" in LooFid.needs({}).missing
    assert LooFid.needs({"features": "nano"}).missing == LooFid.needs({"reference": "a.npz"}).missing == ""
    (tmp_path / "VIRTUAL_imagenet256_labeled.npz").touch()
    assert LooFid.needs({}).missing == "" and "torch_fidelity" in LooFid.needs({}).packages
