"""IS, FID, sFID, precision and recall of features whose figures are known, and their errors by hand."""

from __future__ import annotations

import math

import pytest
import torch

from argrpo_cli.evals import imagenet as m
from argrpo_cli.evals.fidelity import Gaussian, inception_score, shuffled
from argrpo_cli.evals.imagenet_reference import HASHES, POOL, PROBABILITIES, SPATIAL, Features, Reference
from argrpo_cli.evals.statistics import Measure
from argrpo_cli.shapes import Condition, Shot, Value
from tests.evals.stub_inception import StubInception

WIDTH, CLASSES, N, GROUPS = 6, 4, 60, 5


def normal(count: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.fixture
def probabilities():
    """Sorted by class: 15 rows that are nearly sure of each."""
    logits = torch.eye(CLASSES).repeat_interleave(N // CLASSES, 0) * 4
    return (logits + 0.3 * torch.randn(N, CLASSES, generator=torch.Generator().manual_seed(9))).softmax(1)


@pytest.fixture
def stored(tmp_path, monkeypatch, probabilities):
    """N rows of normal features, `scale` their spread, kept in batches of 25."""
    monkeypatch.setattr(m, "SPLIT_SIZE", 20)

    def store(scale: float = 1.0) -> Features:
        shots = [Shot(Condition(""), index, str(index)) for index in range(N)]
        features = Features(tmp_path / f"{scale}", shots, StubInception(), 25)
        parts = {POOL: normal(N, 1, scale), SPATIAL: normal(N, 2, scale), PROBABILITIES: probabilities}
        parts[HASHES] = torch.arange(N)
        for place, batch in enumerate(features.batches):
            features.store.write(batch, {key: rows[25 * place :][: len(batch)] for key, rows in parts.items()})
        return features

    return store


def measured(features: Features, keep_order: bool = True, spatial: Gaussian | None = None) -> dict[str, Measure]:
    rows = normal(200, 3)
    pool = Gaussian.of(rows)
    reference = Reference(pool, spatial or pool, rows, None)
    return m.measure_set(features, torch.arange(N) % GROUPS, reference, keep_order)


def test_narrow_pictures_are_precise_and_wide_ones_have_the_recall(stored):
    """A set in the middle of the reference lies inside its manifold but does not cover it, a wide one covers it."""
    narrow, wide = measured(stored(0.3)), measured(stored(2.0))
    assert narrow[m.PRECISION].value == 1 and narrow[m.RECALL].value < 0.3
    assert wide[m.PRECISION].value < 0.5 and wide[m.RECALL].value > 0.9
    assert len(narrow[m.PRECISION].strata[0]) == N and len(narrow[m.RECALL].strata[0]) == 200
    share = narrow[m.RECALL].value
    expected = math.sqrt(share * (1 - share) / 199)
    assert narrow[m.RECALL].value == share and narrow[m.RECALL].error == pytest.approx(expected, rel=1e-6)


def test_fid_and_sfid_are_of_their_own_features(stored):
    far = Gaussian.of(normal(200, 3) + 10)
    found = measured(stored(), spatial=far)
    assert found[m.FID].value < 2 and found[m.SFID].value == pytest.approx(WIDTH * 100, rel=0.1)


def test_the_inception_score_takes_rows_as_they_come_or_shuffled(stored, probabilities):
    as_they_come, mixed = (measured(stored(), keep)[m.INCEPTION_SCORE].value for keep in (True, False))
    assert as_they_come == pytest.approx(inception_score(probabilities, 20), rel=1e-9)
    assert mixed == pytest.approx(inception_score(shuffled(probabilities), 20), rel=1e-9)
    assert as_they_come < 0.6 * mixed
    assert m.sorted_by_class(probabilities)


def test_the_inception_scores_error_is_the_jackknife_without_each_group(stored, probabilities):
    """Of three splits still, each a little shorter without the group."""
    found = measured(stored())[m.INCEPTION_SCORE]
    groups = torch.arange(N) % GROUPS
    left = torch.tensor([inception_score(probabilities[groups != one], 16) for one in range(GROUPS)])
    by_hand = (((GROUPS - 1) / GROUPS) * (left - left.mean()).square().sum()).sqrt().item()
    assert found.error == pytest.approx(by_hand, rel=1e-3)


def test_a_difference_is_paired_by_its_units():
    ours, theirs = Measure(3.0, (torch.tensor([1.0, 3.0, 5.0]),), 3), Measure(2.0, (torch.tensor([0.0, 2.0, 4.0]),), 3)
    assert ours.error == pytest.approx(2 / math.sqrt(3))
    assert ours.minus(theirs).summary() == Value(1.0, 0.0, 3)
    assert Measure(1.0, (torch.tensor([math.nan]),), 1).summary() == Value(1.0, None, 1)


def test_shuffled_images_keep_the_groups_that_they_are_of(stored, probabilities):
    """Groups that are classes; the jackknife by hand, of three splits still."""
    each = N // CLASSES
    groups = torch.arange(N) // each
    pool = Gaussian.of(normal(200, 3))
    found = m.measure_set(stored(), groups, Reference(pool, pool, None, None), keep_order=False)[m.INCEPTION_SCORE]

    order = shuffled(torch.arange(N))
    left = [inception_score(probabilities[order[order // each != one]], each) for one in range(CLASSES)]
    left = torch.tensor(left, dtype=torch.float64)
    by_hand = ((CLASSES - 1) / CLASSES * (left - left.mean()).square().sum()).sqrt()
    assert found.error == pytest.approx(by_hand.item(), rel=1e-9)


def test_images_in_the_reference_are_counted_by_the_images_that_were_made():
    told = m.set_warnings("mine", torch.tensor([7, 7, 1, 2]), torch.tensor([7, 8, 9, 10, 11, 12]), False)
    assert told == ["mine: 1 of 4 images are copies of others", "mine: 2 of 4 images are in the reference"]
    told = m.set_warnings("mine", torch.tensor([7, 1, 2]), torch.tensor([7, 7, 7, 8]), False)
    assert told == ["mine: 1 of 3 images are in the reference"]
