"""Diversity statistics: numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial.distance import pdist

from argrpo_cli.evals import diversity as d
from argrpo_cli.evals import fidelity
from argrpo_cli.evals.statistics import class_groups
from argrpo_cli.system.errors import UserError

E1, E2, HALF = [1.0, 0.0], [0.0, 1.0], [0.5, 0.75**0.5]  # HALF is 60 degrees from E1
TWO = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))  # entropy of the shares 3/4 and 1/4


def features(*rows, length=1.0):
    return length * torch.tensor(rows)


def test_the_distance_within_a_prompt_is_one_minus_the_cosine_of_its_pairs():
    # 60, 90 and 30 degrees; the other prompt's images are alike, and the third has one image alone.
    rows = features(E1, HALF, E2, E1, E1, E1, E2, length=3.0)
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    one = (0.5 + 1 + 1 - math.cos(math.pi / 6)) / 3
    measure = d.distance_within(rows, groups)
    assert measure.value == pytest.approx(one / 2) and measure.count == 6
    # Two prompts of m and 0: sd / sqrt 2 = m / 2.
    assert measure.error == pytest.approx(one / 2)
    order = torch.tensor([3, 6, 0, 4, 1, 5, 2])
    again = d.distance_within(rows[order], groups[order])
    assert (again.value, again.error) == pytest.approx((measure.value, measure.error))


def test_the_distance_of_many_images_is_scipys():
    torch.manual_seed(0)
    rows = torch.randn(12, 5)
    groups = torch.arange(12) % 3
    own = [pdist(rows[groups == one].double(), "cosine").mean() for one in range(3)]
    assert d.distance_within(rows, groups).value == pytest.approx(sum(own) / 3, rel=1e-12)
    assert d.distance_within(rows, groups).error == pytest.approx(torch.tensor(own).std().item() / 3**0.5)


def test_the_difference_of_two_policies_is_paired_by_prompt():
    groups = torch.tensor([0, 0, 1, 1])
    first = d.distance_within(features(E1, E2, E1, HALF), groups)  # 1 and 0.5
    second = d.distance_within(features(E1, HALF, E1, E1), groups)  # 0.5 and 0
    assert first.minus(second).value == 0.5 and first.minus(second).error == pytest.approx(0, abs=1e-7)
    assert first.error == pytest.approx(0.25)


def test_the_vendi_score_counts_images_that_differ():
    assert d.vendi_score(features(E1, E1, E1)) == pytest.approx(1)
    assert d.vendi_score(torch.eye(4)) == pytest.approx(4)
    # Eigenvalues (1 + c) / 2 and (1 - c) / 2 of two images with the cosine c = 0.5, whether N or D is larger.
    assert d.vendi_score(features(E1, HALF)) == pytest.approx(math.exp(TWO))
    assert d.vendi_score(features(E1, HALF, E1, HALF)) == pytest.approx(math.exp(TWO))
    assert d.vendi_score(features([1.0, 0, 0], [0.5, 0.75**0.5, 0])) == pytest.approx(math.exp(TWO))


def test_the_vendi_score_within_prompts_is_their_mean():
    measure = d.vendi_within(features(E1, HALF, E1, E1, E1, length=2.0), torch.tensor([5, 5, 2, 2, 9]))
    assert measure.value == pytest.approx((math.exp(TWO) + 1) / 2) and measure.count == 4
    assert measure.error == pytest.approx((math.exp(TWO) - 1) / 2)


def test_the_vendi_score_of_all_leaves_whole_prompts_out_for_its_error():
    # Of all: shares 3/4 and 1/4. Without the first prompt 2, without the second 1: units m + 1.5 - 2 and m + 1.5 - 1,
    # so sd / sqrt 2 = 0.5.
    measure = d.vendi_of_all(features(E1, E1, E1, E2), torch.tensor([0, 0, 1, 1]))
    assert (measure.value, measure.error) == pytest.approx((math.exp(TWO), 0.5)) and measure.count == 4
    alone = d.vendi_of_all(features(E1, E1, E1, E2), torch.zeros(4, dtype=torch.int64))
    assert alone.error > 0, "of one prompt it leaves images out"
    many = d.vendi_of_all(torch.eye(50), torch.arange(50) // 2)  # 25 prompts in 20 groups
    assert many.value == pytest.approx(50) and len(many.strata[0]) == 20
    assert len(class_groups(25)) == 25


def test_recall_and_coverage_of_points_on_a_line():
    base = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    policy = torch.tensor([[0.5], [1.5], [30.0]])
    groups = torch.tensor([0, 0, 1, 1])
    # k = 1: the policy's balls are 0.5 +- 1, 1.5 +- 1 and 30 +- 28.5: all of the base but none outside is in them.
    assert d.recall(policy, base, groups, k=1).value == 1
    # The base's are 0 +- 1, 1 +- 1, 3 +- 2 and 10 +- 7: the last is empty.
    measure = d.coverage(policy, base, groups, k=1)
    assert measure.value == 0.75 and measure.count == 4
    assert measure.error == pytest.approx(0.25), "prompts of 1 and 0.5"
    # Without the outlier the base's far points are in no ball, but 3 still has 1.5 in its own.
    assert d.recall(policy[:2], base, groups, k=1).value == 0.5
    assert d.coverage(policy[:2], base, groups, k=1).value == 0.75
    assert d.recall(base, base, groups, k=1).value == d.coverage(base, base, groups, k=1).value == 1


def test_coverage_is_that_of_all_distances_in_blocks_too(monkeypatch):
    torch.manual_seed(1)
    base, policy = torch.randn(23, 3), 0.5 * torch.randn(17, 3) + 0.5
    radii = torch.cdist(base.double(), base.double()).sort(1).values[:, d.COVERING]
    expected = torch.cdist(base.double(), policy.double()).amin(1) <= radii
    for block in (2048, 5):
        monkeypatch.setattr(fidelity, "BLOCK", block)
        assert torch.equal(fidelity.covered(policy, base, d.COVERING), expected)
    assert 0.2 < expected.double().mean() < 0.95


def test_what_cannot_be_compared_is_refused():
    groups = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(UserError, match=r"coverage \(k = 5\) needs at least 6 generated images; there are 4"):
        d.coverage(torch.randn(4, 2), torch.randn(9, 2), groups)
    with pytest.raises(UserError, match=r"the features of generated image 2 .* are not finite"):
        d.distance_within(features(E1, E1, [math.nan, 0.0], E1), groups)
