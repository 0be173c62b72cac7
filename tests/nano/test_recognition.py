"""Precision, recall and diversity on features, and the variations that training uses."""

from __future__ import annotations

import pytest
import torch

from argrpo_cli.nano.recognition import diversity, nearest_distances, precision_recall
from argrpo_cli.nano.study import augmented, rank_agreement


def test_precision_and_recall_of_a_case_done_by_hand():
    reference = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    generated = torch.tensor([[0.5], [1.5], [3.1], [30.0]])
    # k = 1: reference radii 1, 1, 1, 8 reach [-1, 3] and [2, 18]; generated radii 1, 1, 1.6, 26.9.
    precision, recall = precision_recall(generated, reference, k=1)
    assert precision.tolist() == [True, True, True, False]
    assert recall.tolist() == [True, True, True, True]
    near_only = precision_recall(generated[:3], reference, k=1)[1]
    assert near_only.tolist() == [True, True, True, False]


def test_the_bound_is_included_and_distances_are_squared():
    assert nearest_distances(torch.tensor([[0.0], [2.0], [5.0]]), 1).tolist() == [4.0, 4.0, 9.0]
    precision, _ = precision_recall(torch.tensor([[-2.0], [-2.01], [9.0]]), torch.tensor([[0.0], [2.0], [5.0]]), k=1)
    assert precision.tolist() == [True, False, False]


def test_a_sample_of_the_reference_itself_is_fully_precise():
    points = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    precision, recall = precision_recall(points, points)
    assert precision.all() and recall.all()


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
