"""IS, FID, sFID, precision and recall of features whose figures are known, and their errors by hand."""

from __future__ import annotations

import math

import pytest
import torch

from argrpo_cli.evals import feature_store
from argrpo_cli.evals import imagenet_measures as m
from argrpo_cli.evals.feature_store import HASHES, POOL, PROBABILITIES, SPATIAL, FeatureStore
from argrpo_cli.evals.fidelity import inception_score, shuffled
from argrpo_cli.evals.frechet import Gaussian

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
    """A store of N rows of normal features, `scale` their spread."""
    monkeypatch.setattr(feature_store, "WIDTHS", {POOL: WIDTH, SPATIAL: WIDTH, PROBABILITIES: CLASSES})
    monkeypatch.setattr(m, "SPLIT_SIZE", 20)

    def store(scale: float = 1.0) -> FeatureStore:
        made = FeatureStore(tmp_path / f"{scale}", N, N)
        parts = {POOL: normal(N, 1, scale), SPATIAL: normal(N, 2, scale), PROBABILITIES: probabilities}
        made.write((0, N), [parts | {HASHES: torch.arange(N)}])
        return made

    return store


def measured(store: FeatureStore, keep_order: bool = True, spatial: Gaussian | None = None) -> dict[str, m.Measure]:
    reference = normal(200, 3)
    pool = Gaussian.of_rows(reference)
    return m.measure_set(store, torch.arange(N) % GROUPS, pool, spatial or pool, reference, keep_order)


def test_narrow_pictures_are_precise_and_wide_ones_have_the_recall(stored):
    """A set in the middle of the reference lies inside its manifold but does not cover it, a wide one covers it."""
    narrow, wide = measured(stored(0.3)), measured(stored(2.0))
    assert narrow[m.PRECISION].value == 1 and narrow[m.RECALL].value < 0.3
    assert wide[m.PRECISION].value < 0.5 and wide[m.RECALL].value > 0.9
    assert len(narrow[m.PRECISION].units) == N and len(narrow[m.RECALL].units) == 200
    share = narrow[m.RECALL].value
    expected = math.sqrt(share * (1 - share) / 199)
    assert narrow[m.RECALL].summary() == {"value": share, "error": pytest.approx(expected, rel=1e-6)}


def test_fid_and_sfid_are_of_their_own_features(stored):
    far = Gaussian.of_rows(normal(200, 3) + 10)
    found = measured(stored(), spatial=far)
    assert found[m.FID].value < 2 and found[m.SFID].value == pytest.approx(WIDTH * 100, rel=0.1)


def test_the_inception_score_takes_rows_as_they_come_or_shuffled(stored, probabilities):
    as_they_come, mixed = (measured(stored(), keep)[m.INCEPTION_SCORE].value for keep in (True, False))
    assert as_they_come == pytest.approx(inception_score(probabilities, 20), rel=1e-9)
    assert mixed == pytest.approx(inception_score(shuffled(probabilities), 20), rel=1e-9)
    assert as_they_come < 0.6 * mixed
    assert m.sorted_by_class(stored())


def test_the_inception_scores_error_is_the_jackknife_without_each_group(stored, probabilities):
    """Of three splits still, each a little shorter without the group."""
    found = measured(stored())[m.INCEPTION_SCORE]
    groups = torch.arange(N) % GROUPS
    left = torch.tensor([inception_score(probabilities[groups != one], 16) for one in range(GROUPS)])
    by_hand = (((GROUPS - 1) / GROUPS) * (left - left.mean()).square().sum()).sqrt().item()
    assert found.summary()["error"] == pytest.approx(by_hand, rel=1e-3)


def test_a_difference_is_paired_by_its_units():
    ours, theirs = m.Measure(3.0, torch.tensor([1.0, 3.0, 5.0])), m.Measure(2.0, torch.tensor([0.0, 2.0, 4.0]))
    assert ours.summary()["error"] == pytest.approx(2 / math.sqrt(3))
    assert ours.minus(theirs).summary() == {"value": 1.0, "error": 0.0}
    assert m.Measure(1.0, torch.tensor([math.nan])).summary() == {"value": 1.0, "error": None}
