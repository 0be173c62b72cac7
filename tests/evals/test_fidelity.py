"""IS, Fréchet distance, precision and recall: ADM's own numbers, cases done by hand, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from argrpo_cli.evals import fidelity
from argrpo_cli.evals.fidelity import (
    Gaussian,
    frechet_distance,
    frechet_measure,
    inception_score,
    load_statistics,
    precision_recall,
    save_statistics,
    shuffled,
    squared_radii,
)
from argrpo_cli.system.errors import UserError

# Inputs, numbers of the published script ("official") and of an independent float64 computation ("exact").
DATA = Path(__file__).parents[1] / "data" / "adm"
CASES = json.loads((DATA / "expected.json").read_text())


def arrays(case: str) -> dict[str, torch.Tensor]:
    with np.load(DATA / f"{case}.npz") as held:
        return {key: torch.from_numpy(held[key]) for key in held.files}


def having(*keys: str) -> list[str]:
    return [case for case, expected in CASES.items() if set(keys) <= set(expected)]


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_there_are_cases_of_every_metric():
    assert len(having("fid")) == 5 and len(having("sfid")) == 2 and len(having("precision_exact64")) == 6
    assert len(having("inception_score_exact")) == 3 and len(having("inception_score_split128")) == 1


# Fréchet distance


@pytest.mark.parametrize("case", having("fid"))
def test_fid_and_sfid_are_adms(case):
    held, expected = arrays(case), CASES[case]
    for key, kind in (("fid", "pool"), ("sfid", "spatial")):
        if key in expected:
            found = frechet_distance(Gaussian.of(held[f"sample_{kind}"]), Gaussian.of(held[f"ref_{kind}"]))
            assert found == pytest.approx(expected[f"{key}_exact"], rel=1e-5, abs=1e-4)
            assert found == pytest.approx(expected[key], rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("block", [fidelity.BLOCK, 97])
def test_statistics_are_those_of_adms_files(block, monkeypatch):
    monkeypatch.setattr(fidelity, "BLOCK", block)
    held = arrays("relu_gauss_shifted")
    found = Gaussian.of(held["ref_pool"])
    assert found.mean.dtype == torch.float32 and found.covariance.dtype == torch.float64
    torch.testing.assert_close(found.mean, held["ref_mu"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.covariance, held["ref_sigma"], rtol=0, atol=1e-12)


def test_the_frechet_distance_of_two_gaussians_on_a_line():
    # Means 1 and 5, variances (ddof 1) 2 and 18: 16 + (sqrt(18) - sqrt(2))^2 = 24.
    assert frechet_distance(Gaussian.of(column(0, 2)), Gaussian.of(column(2, 8))) == pytest.approx(24)


@pytest.mark.parametrize(("rows", "others"), [(12, 15), (12, 200), (3, 2)])
def test_the_frechet_distance_is_exact_with_fewer_rows_than_dimensions(rows, others):
    a, b = noise(rows, 40).double(), 2 * noise(others, 40, seed=1).double() + 1
    x = (a - a.mean(0)) / (rows - 1) ** 0.5
    y = (b - b.mean(0)) / (others - 1) ** 0.5
    overlap = torch.linalg.matrix_norm(x @ y.T, "nuc")  # of the rows themselves: no root of a singular matrix
    exact = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * overlap
    assert frechet_distance(Gaussian.of(a), Gaussian.of(b)) == pytest.approx(exact.item(), rel=1e-6)


def test_a_set_is_at_no_distance_from_itself_even_when_singular():
    sets = [noise(50, 8, seed=seed) for seed in range(20)]  # rounding alone would leave some below zero
    for features in (*sets, noise(5, 20), torch.full((4, 3), 7.0)):
        held = Gaussian.of(features)
        assert 0 <= frechet_distance(held, held) < 1e-9


def test_a_large_common_offset_does_not_swallow_the_covariance():
    features = noise(300, 5)
    moved = Gaussian.of(features.double() + 1e6)
    torch.testing.assert_close(moved.covariance, Gaussian.of(features).covariance, rtol=1e-6, atol=1e-8)


# In batches, with an error

WIDTH = 8


def correlated(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=generator)
    return torch.randn(count, WIDTH, generator=generator) @ mix + 100 + seed  # far from zero: sums must not lose digits


# More rows than numbers in a row are summed up, fewer are kept; both kinds on either side.
@pytest.mark.parametrize("count", [200, 6])
@pytest.mark.parametrize("reference", [150, 5])
def test_batches_give_the_distance_of_the_whole_and_the_jackknife_of_its_groups(count, reference, monkeypatch):
    monkeypatch.setattr(fidelity, "BLOCK", 20)
    ours, theirs = correlated(count, 1), correlated(reference, 2)
    groups = torch.arange(count) % 5
    against = Gaussian.of(theirs)
    held = Gaussian.of_batches(iter(theirs.split(11)), reference)
    found, corrected = frechet_measure(iter(ours.split(7)), groups, held)
    whole = frechet_distance(Gaussian.of(ours), against)
    assert found.value == pytest.approx(whole, rel=1e-6)
    left = torch.tensor(
        [frechet_distance(Gaussian.of(ours[groups != one]), against) for one in range(5)], dtype=torch.float64
    )
    by_hand = (4 / 5 * (left - left.mean()).square().sum()).sqrt()
    assert found.error == pytest.approx(by_hand.item(), rel=1e-3)
    assert found.strata[0].mean().item() == pytest.approx(found.value, rel=1e-9)
    assert found.value - corrected.value == pytest.approx(4 * (left.mean().item() - whole), rel=1e-2)


def test_stored_statistics_are_as_good_as_the_features_behind_them():
    ours, theirs = Gaussian.of(correlated(50, 1)), Gaussian.of(correlated(6, 2))
    stored = Gaussian(theirs.mean, theirs.covariance)
    torch.testing.assert_close(stored.root @ stored.root.T, theirs.covariance)
    assert frechet_distance(ours, stored) == pytest.approx(frechet_distance(ours, theirs), rel=1e-9)


def test_equal_sets_are_at_no_distance():
    rows = correlated(40, 1)
    found, _ = frechet_measure(iter([rows]), torch.arange(40) % 4, Gaussian.of_batches(iter([rows]), 40))
    assert found.value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("count", [200, 6])
def test_features_that_are_not_finite_are_refused(count):
    rows = correlated(count, 1)
    rows[3, 2] = torch.nan
    with pytest.raises(UserError, match=r"generated image 3 .*not finite"):
        frechet_measure(iter([rows]), torch.zeros(count, dtype=torch.int64), Gaussian.of(correlated(9, 2)))


# Inception score


@pytest.mark.parametrize("case", having("inception_score_exact"))
def test_the_inception_score_of_given_probabilities_is_adms(case):
    expected = CASES[case]
    found = inception_score(arrays(case)["sample_softmax"], expected["split_size"])
    assert found == pytest.approx(expected["inception_score_exact"], rel=3e-6)
    if expected["inception_score"] is not None:  # 0 log 0 is not a number in the published script
        assert found == pytest.approx(expected["inception_score"], rel=1e-5)


def test_the_inception_score_of_both_split_sizes_is_adms():
    held, expected = arrays("low_dim_8"), CASES["low_dim_8"]
    probabilities = (held["sample_pool"] @ held["softmax_weight"]).softmax(-1)
    for size in (5000, 128):
        found = inception_score(probabilities, size)
        assert found == pytest.approx(expected[f"inception_score_split{size}_exact"], rel=3e-6)
        assert found == pytest.approx(expected[f"inception_score_split{size}"], rel=1e-5)
    assert inception_score(probabilities) == inception_score(probabilities, 5000)


def test_the_inception_score_depends_on_the_order_and_the_last_split_may_be_short():
    sorted_by_class = torch.eye(2)[[0, 0, 0, 1, 1]]
    assert inception_score(sorted_by_class, 3) == 1, "one class a split"
    assert inception_score(torch.eye(2)[[0, 1, 0, 1]], 2) == pytest.approx(2)
    mixed = math.exp(math.log(3) - 2 / 3 * math.log(2))  # two of one class and one of another
    assert inception_score(torch.eye(2)[[0, 1, 0, 1]], 3) == pytest.approx((mixed + 1) / 2)
    assert inception_score(torch.eye(2)[[0]]) == 1


def test_shuffling_is_a_permutation_that_the_seed_decides():
    rows = torch.arange(50)
    assert torch.equal(shuffled(rows, 3), shuffled(rows, 3)) and not torch.equal(shuffled(rows, 3), shuffled(rows, 4))
    assert not torch.equal(shuffled(rows), rows) and torch.equal(shuffled(rows).sort().values, rows)


# Precision and recall


@pytest.mark.parametrize("block", [fidelity.BLOCK, 97])
@pytest.mark.parametrize("case", having("precision_exact64"))
def test_precision_and_recall_are_exact_and_near_adms_half_precision(case, block, monkeypatch):
    monkeypatch.setattr(fidelity, "BLOCK", block)
    held, expected = arrays(case), CASES[case]
    found = precision_recall(held["sample_pool"], held["ref_pool"])
    for key, rows, name in zip(("precision", "recall"), found, ("sample_pool", "ref_pool"), strict=True):
        assert rows.dtype == torch.bool and rows.shape == held[name].shape[:1]
        share = rows.double().mean().item()
        assert share == pytest.approx(expected[f"{key}_exact64"], abs=1e-12)
        assert share == pytest.approx(expected[key], abs=0.03)


@pytest.mark.parametrize("case", ["low_dim_8", "fewer_rows_than_dims"])
def test_neighbour_distances_are_exact(case):
    held = arrays(case)
    for name in ("ref", "sample"):
        torch.testing.assert_close(
            squared_radii(held[f"{name}_pool"]), held[f"radii_{name}_exact64"], rtol=1e-12, atol=0
        )


def test_precision_and_recall_of_a_case_done_by_hand():
    reference, generated = column(0, 1, 2, 10), column(0.5, 1.5, 3.1, 30)
    # k = 1: reference radii 1, 1, 1, 8 reach [-1, 3] and [2, 18]; generated radii 1, 1, 1.6, 26.9.
    precision, recall = precision_recall(generated, reference, k=1)
    assert precision.tolist() == [True, True, True, False]
    assert recall.tolist() == [True, True, True, True]
    near_only = precision_recall(generated[:3], reference, k=1)[1]
    assert near_only.tolist() == [True, True, True, False]


def test_the_bound_is_included_and_distances_are_squared():
    line = column(0, 2, 5)
    assert squared_radii(line, 1).tolist() == [4.0, 4.0, 9.0]
    assert squared_radii(line, 2).tolist() == [25.0, 9.0, 25.0]
    precision, _ = precision_recall(column(-2, -2.01, 9), line, k=1)
    assert precision.tolist() == [True, False, False]


def test_a_tie_stays_a_tie_far_from_the_origin_and_in_many_dimensions():
    step = torch.eye(300)[0]
    rows = (1000 + 10 * noise(40, 300)).round()  # whole numbers, so distances are exact
    reference = torch.cat([rows, rows + step])  # each has its twin at distance 1
    precision, recall = precision_recall(torch.cat([rows - step, rows - 2 * step]), reference, k=1)
    assert precision.tolist() == [True] * 40 + [False] * 40
    assert recall.tolist() == [True] * 40 + [False] * 40


def test_duplicates_have_distance_zero_wherever_they_are():
    heaps = (1e4 * noise(3, 64))[torch.arange(60) % 3]
    assert squared_radii(heaps).tolist() == [0.0] * 60
    precision, recall = precision_recall(heaps, heaps)
    assert precision.all() and recall.all()


def test_the_smallest_step_away_from_duplicates_is_outside():
    heaps = (1e4 * noise(40, 64)).repeat(4, 1)  # squares of 1e10, in which a matrix product loses the step
    beside = heaps.clone()
    beside[:, 0] = torch.nextafter(heaps[:, 0], torch.tensor(torch.inf))
    precision, recall = precision_recall(beside, heaps)
    assert not precision.any() and not recall.any()


def test_a_sample_of_the_reference_itself_is_fully_precise():
    points = noise(60, 4)
    precision, recall = precision_recall(points, points)
    assert precision.all() and recall.all()


def test_only_tiles_of_the_block_size_are_held(monkeypatch):
    shapes, tile = [], fidelity._tile

    def watched(a, b, origin):
        shapes.append((len(a), len(b)))
        return tile(a, b, origin)

    monkeypatch.setattr(fidelity, "_tile", watched)
    monkeypatch.setattr(fidelity, "BLOCK", 16)
    small = precision_recall(noise(50, 6), noise(70, 6, seed=1))
    assert max(max(shape) for shape in shapes) == 16
    monkeypatch.undo()
    for some, whole in zip(small, precision_recall(noise(50, 6), noise(70, 6, seed=1)), strict=True):
        assert torch.equal(some, whole) and 0 < whole.sum() < len(whole)


# What is refused


def test_too_few_images_are_told_with_the_number_needed():
    few, many = noise(3, 2), noise(9, 2)
    with pytest.raises(UserError, match="needs at least 4 generated images; there are 3"):
        precision_recall(few, many)
    with pytest.raises(UserError, match="needs at least 4 reference images; there are 3"):
        precision_recall(many, few)
    assert precision_recall(noise(4, 2), many)[0].shape == (4,)
    with pytest.raises(UserError, match="Fréchet distance needs at least 2 reference images; there is 1"):
        Gaussian.of(few[:1], "reference")
    with pytest.raises(UserError, match="inception score needs at least 1 generated image; there are 0"):
        inception_score(few[:0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_named(value):
    good, bad = noise(9, 2), noise(9, 2)
    bad[7, 1] = value
    for call in (
        lambda: Gaussian.of(bad),
        lambda: inception_score(bad),
        lambda: precision_recall(bad, good),
    ):
        with pytest.raises(UserError, match=r"features of generated image 7 .* not finite"):
            call()
    with pytest.raises(UserError, match="reference image 7"):
        precision_recall(good, bad)


def test_features_of_different_widths_are_refused():
    with pytest.raises(UserError, match="different widths cannot be compared: 2 and 3"):
        precision_recall(noise(9, 2), noise(9, 3))
    with pytest.raises(UserError, match="different widths cannot be compared: 2 and 3"):
        frechet_distance(Gaussian.of(noise(9, 2)), Gaussian.of(noise(9, 3)))


def statistics(width: int, seed: int) -> Gaussian:
    return Gaussian.of(torch.randn(30, width, generator=torch.Generator().manual_seed(seed)))


def test_statistics_come_back_as_they_were_and_as_adm_names_them(tmp_path):
    pool, spatial = statistics(5, 0), statistics(3, 1)
    save_statistics(tmp_path / "reference", pool, spatial)  # the name as given, with or without .npz
    assert [path.name for path in tmp_path.iterdir()] == ["reference"]
    for saved, loaded in zip((pool, spatial), load_statistics(tmp_path / "reference"), strict=True):
        assert torch.equal(saved.mean, loaded.mean) and torch.equal(saved.covariance, loaded.covariance)
        assert loaded.mean.dtype == torch.float32 and loaded.covariance.dtype == torch.float64
    with np.load(tmp_path / "reference") as held:
        assert {key: held[key].shape for key in held.files} == {
            "mu": (5,), "sigma": (5, 5), "mu_s": (3,), "sigma_s": (3, 3)
        }  # fmt: skip


def test_statistics_beside_images_are_found(tmp_path):
    pool, spatial = statistics(5, 0), statistics(3, 1)
    held = {"mu": pool.mean, "sigma": pool.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
    held["arr_0"] = torch.zeros(7, 6, 5, 3, dtype=torch.uint8)
    np.savez(tmp_path / "ref.npz", **{key: value.numpy() for key, value in held.items()})
    assert torch.equal(load_statistics(tmp_path / "ref.npz")[1].mean, spatial.mean)


def test_statistics_that_do_not_fit_are_refused(tmp_path):
    path, good = (
        tmp_path / "ref.npz",
        {"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(3), "sigma_s": np.eye(3)},
    )
    for change, message in (
        ({"sigma": np.eye(3)}, r"mu, sigma have the shapes \[2\], \[3, 3\]; expected \[D\], \[D, D\]"),
        ({"sigma_s": np.full((3, 3), np.nan)}, "mu_s, sigma_s are not finite"),
        ({"mu": np.array(["a", "b"])}, r"mu is <U1 \[2\]; expected numbers"),
        ({"mu": np.array([{}, {}], dtype=object)}, r"mu is object \[2\]; expected numbers"),
    ):
        np.savez(path, **{**good, **change})
        with pytest.raises(UserError, match=message):
            load_statistics(path)
    np.savez(path, mu=good["mu"], sigma=good["sigma"])
    with pytest.raises(UserError, match=r"holds mu, sigma; expected arr_0 \(images\), or mu, sigma, mu_s, sigma_s"):
        load_statistics(path)
    np.save(tmp_path / "one.npy", np.eye(2))
    with pytest.raises(UserError, match=r"nor an \.npz file"):
        load_statistics(tmp_path / "one.npy")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="cannot read"):
        load_statistics(path)
    np.savez(path, arr_0=np.zeros((1, 2, 2, 3), np.uint8))
    assert load_statistics(path) is None, "the images alone"
    with pytest.raises(UserError, match=r"cannot read .*no such file"):
        load_statistics(tmp_path / "nowhere.npz")
