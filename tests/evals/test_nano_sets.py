"""IS, FID and sFID of nano pictures, and their jackknife errors."""

from __future__ import annotations

import pytest
import torch

from argrpo_cli.evals.fidelity import Gaussian, frechet_distance, inception_score
from argrpo_cli.evals.nano_sets import class_groups, jackknife, real_set_values, set_values
from argrpo_cli.nano.judge import load_judge


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
    values, bias = jackknife(lambda rows: x[rows].mean().item(), torch.arange(200))
    assert values.mean().item() == pytest.approx(x.mean().item())
    assert values.std() / 200**0.5 == pytest.approx((x.std() / 200**0.5).item())
    assert bias == pytest.approx(0, abs=1e-9)


def test_the_jackknife_takes_the_bias_of_fid_out():
    """Drawn from N(0, sigma^2) in 12 dimensions and held against N(0, 1), whose distance is 12 (1 - sigma)^2."""
    real = Gaussian(torch.zeros(12, dtype=torch.float64), torch.eye(12, dtype=torch.float64))
    for sigma in (0.5, 1.0):
        raw, corrected = [], []
        for seed in range(10):
            x = sigma * torch.randn(400, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            measure = lambda rows, x=x: frechet_distance(Gaussian.of(x[rows]), real)  # noqa: E731
            values, bias = jackknife(measure, class_groups(400))
            raw.append(values.mean().item() - 12 * (1 - sigma) ** 2)
            corrected.append(raw[-1] - bias)
        raw, corrected = torch.tensor(raw), torch.tensor(corrected)
        assert raw.mean() > 3 * raw.std() / 10**0.5
        assert corrected.mean().abs() < 3 * corrected.std() / 10**0.5 + 0.03 * raw.mean()


def test_a_difference_with_the_same_groups_is_paired():
    x = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = class_groups(200)
    one, other = (jackknife(lambda rows, y=y: y[rows].mean().item(), groups)[0] for y in (x, x + 1))
    torch.testing.assert_close(other - one, torch.ones(20, dtype=torch.float64))


def test_the_measures_are_the_metrics_on_the_judges_features():
    judge = load_judge()
    images, ids = judge.reference_images[:120].flip(-2), judge.reference_classes[:120]  # real scenes upside down
    features, spatial = judge.recogniser.features(images), judge.recogniser.spatial_features(images)
    values = set_values(images, features, judge, class_groups(120, ids))
    probabilities = judge.recogniser.probabilities(features)
    real, real_spatial = Gaussian.of(judge.reference_features), Gaussian.of(judge.reference_spatial)
    for key in ("fid", "sfid"):
        assert values.pop(f"{key}_corrected").mean() < values[key].mean()
    means = {key: value.mean().item() for key, value in values.items()}
    assert means == pytest.approx(
        {
            "inception_score": inception_score(probabilities),
            "fid": frechet_distance(Gaussian.of(features), real),
            "sfid": frechet_distance(Gaussian.of(spatial), real_spatial),
        }
    )
    for value in values.values():
        assert value.shape == (20,) and 0 < value.std() / 20**0.5 < 0.5 * value.mean()


def test_real_scenes_are_held_against_the_others():
    judge = load_judge()
    values = real_set_values(judge, slice(480, 960))
    others = torch.cat([judge.reference_features[:480], judge.reference_features[960:]])
    fid = frechet_distance(Gaussian.of(judge.reference_features[480:960]), Gaussian.of(others))
    assert values["fid"].mean().item() == pytest.approx(fid)
    assert 15 < values["inception_score"].mean() < 24
