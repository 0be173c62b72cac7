"""Standard errors of a whole set's numbers: groups of images, and the jackknife over them."""

from __future__ import annotations

import pytest
import torch

from argrpo_cli.evals import fidelity
from argrpo_cli.evals.statistics import class_groups, jackknife, mean_of


def of_means(x, groups):
    """The mean of all, by the jackknife."""
    left = [x[groups != group].mean().item() for group in groups.unique()]
    return jackknife(x.mean().item(), left, len(x))


def test_groups_are_equal_deal_out_the_classes_and_never_change():
    ids = torch.arange(480) % 24
    groups = class_groups(480, ids)
    assert torch.equal(groups, class_groups(480, ids))
    assert groups.bincount().tolist() == [24] * 20
    for group in range(20):
        assert ids[groups == group].bincount(minlength=24).tolist() == [1] * 24
    assert class_groups(50).bincount().tolist() == [3] * 10 + [2] * 10
    assert class_groups(5).sort().values.tolist() == [0, 1, 2, 3, 4]
    assert not torch.equal(class_groups(50), torch.arange(50) % 20), "not the order in which they come"


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measure, corrected = of_means(x, torch.arange(200))
    assert measure.value == x.mean().item() and measure.count == 200
    assert measure.error == pytest.approx((x.std() / 200**0.5).item())
    assert corrected.value == pytest.approx(measure.value, abs=1e-9)


def test_the_jackknife_takes_the_bias_of_fid_out():
    """Drawn from N(0, sigma^2) in 12 dimensions and held against N(0, 1), whose distance is 12 (1 - sigma)^2."""
    real = fidelity.Gaussian(torch.zeros(12), torch.eye(12, dtype=torch.float64))
    for sigma in (0.5, 1.0):
        raw, corrected = [], []
        for seed in range(10):
            x = sigma * torch.randn(400, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            one, less = fidelity.frechet_measure([x], class_groups(400), real)
            raw.append(one.value - 12 * (1 - sigma) ** 2)
            corrected.append(less.value - 12 * (1 - sigma) ** 2)
        raw, corrected = torch.tensor(raw), torch.tensor(corrected)
        assert raw.mean() > 3 * raw.std() / 10**0.5
        assert corrected.mean().abs() < 3 * corrected.std() / 10**0.5 + 0.03 * raw.mean()


def test_a_difference_with_the_same_groups_is_paired():
    x = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = class_groups(200)
    one, other = (of_means(y, groups)[0] for y in (x, x + 1))
    change = other.minus(one)
    assert change.value == pytest.approx(1) and change.error == pytest.approx(0, abs=1e-9)


def test_clusters_may_have_names():
    values = [1.0, 2.0, 4.0, 8.0, 3.0]
    named, numbered = mean_of(values, ["b", "a", "b", "a", "c"]), mean_of(values, [0, 1, 0, 1, 2])
    assert (named.value, named.error) == (numbered.value, numbered.error)
