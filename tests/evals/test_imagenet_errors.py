"""The inception score's error where the images are shuffled, and images that are in the reference."""

from __future__ import annotations

import torch

from argrpo_cli.evals import imagenet_measures as m
from argrpo_cli.evals.fidelity import inception_score, shuffled
from argrpo_cli.evals.frechet import Gaussian
from argrpo_cli.evals.imagenet_warnings import set_warnings
from tests.evals.test_imagenet_measures import (  # noqa: F401
    CLASSES,
    N,
    normal,
    probabilities,
    stored,
)

EACH = N // CLASSES


def test_shuffled_images_keep_the_groups_that_they_are_of(stored, probabilities):  # noqa: F811
    """Groups that are classes; the jackknife by hand, of three splits still."""
    groups = torch.arange(N) // EACH
    pool = Gaussian.of_rows(normal(200, 3))
    found = m.measure_set(stored(), groups, pool, pool, None, keep_order=False)[m.INCEPTION_SCORE]

    order = shuffled(torch.arange(N))
    left = [inception_score(probabilities[order[order // EACH != one]], EACH) for one in range(CLASSES)]
    left = torch.tensor(left, dtype=torch.float64)
    by_hand = ((CLASSES - 1) / CLASSES * (left - left.mean()).square().sum()).sqrt()
    torch.testing.assert_close(found.summary()["error"], by_hand.item(), rtol=1e-9, atol=0)


def test_images_in_the_reference_are_counted_by_the_images_that_were_made():
    told = set_warnings("mine", torch.tensor([7, 7, 1, 2]), torch.tensor([7, 8, 9, 10, 11, 12]), False)
    assert told == ["mine: 1 of 4 images are copies of others", "mine: 2 of 4 images are in the reference"]
    told = set_warnings("mine", torch.tensor([7, 1, 2]), torch.tensor([7, 7, 7, 8]), False)
    assert told == ["mine: 1 of 3 images are in the reference"]
