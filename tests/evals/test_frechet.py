"""The Fréchet distance in shards: the value of `fidelity.frechet_distance`, and the jackknife done by hand."""

from __future__ import annotations

import pytest
import torch

from argrpo_cli.evals import frechet as module
from argrpo_cli.evals.fidelity import Statistics, frechet_distance
from argrpo_cli.evals.frechet import Gaussian, distance, distance_values, gaussian
from argrpo_cli.system.errors import UserError

WIDTH = 8


def features(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=generator)
    return torch.randn(count, WIDTH, generator=generator) @ mix + 100 + seed  # far from zero: sums must not lose digits


# More rows than numbers in a row are summed up, fewer are kept; both kinds on either side.
@pytest.mark.parametrize("count", [200, 6])
@pytest.mark.parametrize("reference", [150, 5])
def test_shards_give_the_distance_of_the_whole_and_the_jackknife_of_its_groups(count, reference, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 40)
    ours, theirs = features(count, 1), features(reference, 2)
    groups = torch.arange(count) % 5
    against = Statistics.of(theirs)
    value, units = distance_values(iter(ours.split(7)), groups, gaussian(iter(theirs.split(11)), reference))
    whole = frechet_distance(Statistics.of(ours), against)
    assert value == pytest.approx(whole, rel=1e-6)
    left = torch.tensor(
        [frechet_distance(Statistics.of(ours[groups != one]), against) for one in range(5)], dtype=torch.float64
    )
    by_hand = (4 / 5 * (left - left.mean()).square().sum()).sqrt()
    assert (units.std() / 5**0.5).item() == pytest.approx(by_hand.item(), rel=1e-3)
    assert units.mean().item() == pytest.approx(value, rel=1e-9)


def test_stored_statistics_are_as_good_as_the_features_behind_them():
    ours, theirs = features(50, 1), features(40, 2)
    stored = Gaussian.of(Statistics.of(theirs))
    again = stored.statistics
    torch.testing.assert_close(again.covariance, Statistics.of(theirs).covariance)
    expected = frechet_distance(Statistics.of(ours), Statistics.of(theirs))
    assert distance(Gaussian.of(Statistics.of(ours)), stored) == pytest.approx(expected, rel=1e-9)


def test_equal_sets_are_at_no_distance():
    rows = features(40, 1)
    value, _ = distance_values(iter([rows]), torch.arange(40) % 4, gaussian(iter([rows]), 40))
    assert value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("count", [200, 6])
def test_features_that_are_not_finite_are_refused(count):
    rows = features(count, 1)
    rows[3, 2] = torch.nan
    with pytest.raises(UserError, match=r"generated image 3 .*not finite"):
        distance_values(iter([rows]), torch.zeros(count, dtype=torch.int64), gaussian(iter([features(9, 2)]), 9))
