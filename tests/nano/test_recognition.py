"""The classifier's outputs, diversity on its features, and the variations that training uses."""

from __future__ import annotations

import pytest
import torch

from argrpo_cli.nano.judge import diversity, load_judge
from argrpo_cli.nano.make.corrupt import augmented, rank_agreement
from argrpo_cli.networks.pixels import to_unit


def test_probabilities_are_those_of_the_class_that_is_named():
    judge = load_judge()
    probabilities = judge.probabilities(judge.reference_features[:48])
    torch.testing.assert_close(probabilities.sum(1), torch.ones(48))
    assert torch.equal(probabilities.argmax(1), judge.recogniser(to_unit(judge.reference_images[:48])).argmax(1))


def test_spatial_features_say_what_is_in_which_cell(monkeypatch):
    judge = load_judge()
    images = judge.reference_images[:3].clone()
    with monkeypatch.context() as patch:
        patch.setattr("argrpo_cli.nano.judge.AT_ONCE", 2)
        before = judge.spatial_features(images)
    assert before.shape == (3, 7 * 4 * 4)
    images[:, :, :4, :4] = 0  # the corner is seen by the corner's cells only
    changed = (judge.spatial_features(images) - before).abs().unflatten(1, (7, 4, 4)).amax((0, 1))
    assert changed[0, 0] > 0.01 and changed[2:, 2:].max() < 1e-5
    torch.testing.assert_close(judge.reference_spatial[:3], before, atol=1e-5, rtol=0)


def test_diversity_is_the_mean_distance_within_each_class():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0], [1.0, 1.0]])
    assert diversity(features, torch.tensor([0, 0, 1, 1])).tolist() == [5.0, 0.0]


def test_pictures_varied_together_stay_together_and_only_move():
    images = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    first, second = augmented(images, images, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first, second) and first.dtype == torch.uint8

    def shows(picture: torch.Tensor, original: torch.Tensor) -> bool:
        places = ((y, x) for y in range(16, 25) for x in range(16, 25))
        return any(torch.equal(picture[:, 20:40, 20:40], original[:, y : y + 20, x : x + 20]) for y, x in places)

    plain = [shows(a, b) for a, b in zip(first, images, strict=True)]
    mirrored = [shows(a, b.flip(-1)) for a, b in zip(first, images, strict=True)]
    assert all(one != other for one, other in zip(plain, mirrored, strict=True))
    assert any(plain) and any(mirrored)


def test_rank_agreement_is_spearmans():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_agreement(x, x.exp()) == pytest.approx(1)
    assert rank_agreement(x, -x) == pytest.approx(-1)
    assert rank_agreement(x, torch.tensor([2.0, 1.0, 4.0, 3.0])) == pytest.approx(0.6)
