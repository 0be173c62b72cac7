"""clusters: the bonus by hand, and clusters by what is connected."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from argrpo_cli.recipe import Recipe
from argrpo_cli.rewards import load_reward
from argrpo_cli.rewards.clusters import k_means, spectral_clusters
from argrpo_cli.rewards.features import Features
from argrpo_cli.system.errors import UserError


def parts(labels: Tensor) -> set[frozenset[int]]:
    """Clusters without their names."""
    return {frozenset((labels == one).nonzero().flatten().tolist()) for one in labels.unique()}


def looking(degrees: list[float], monkeypatch: pytest.MonkeyPatch, **options: object) -> list[float]:
    """Scores of images whose features point in these directions."""
    monkeypatch.setattr(Features, "__init__", lambda self, kind, device, weights: None)
    monkeypatch.setattr(Features, "__call__", lambda self, images: images)
    angle = torch.tensor(degrees) * math.pi / 180
    some = load_reward("clusters", options=options)
    lengths = 1 + torch.arange(len(degrees))  # a direction has none
    return some.compare(some.look(torch.stack([angle.cos(), angle.sin()], 1) * lengths[:, None], []), []).tolist()


def test_the_bonus_by_hand(monkeypatch):
    """Three look alike, two do, and one is like no other: sqrt(6/3), sqrt(6/2), sqrt(6/1)."""
    got = looking([0, 120, 3, 240, 123, 5], monkeypatch, clusters=3)
    three, two, one = math.sqrt(2), math.sqrt(3), math.sqrt(6)
    assert got == pytest.approx([three, two, three, one, two, three])
    assert looking([240, 5, 3, 123, 120, 0], monkeypatch, clusters=3) == pytest.approx(
        [one, three, three, two, two, three]
    )
    assert looking([0, 1, 2, 180], monkeypatch, clusters=2) == pytest.approx([math.sqrt(4 / 3)] * 3 + [2])


def test_images_that_are_all_the_same_have_no_bonus(monkeypatch):
    assert looking([30] * 5, monkeypatch) == [1] * 5
    assert looking([30], monkeypatch) == [1]
    assert looking([0, 90], monkeypatch, clusters=4) == pytest.approx([math.sqrt(2)] * 2)
    assert looking([0, 0, 0, 90], monkeypatch, clusters=3) == pytest.approx([math.sqrt(4 / 3)] * 3 + [2]), (
        "no empty one"
    )


def test_clusters_are_what_is_connected_not_what_lies_around_a_middle():
    """A chain of eight, one step apart, and three points beside its middle: k-means would cut the chain."""
    chain = [(float(x), 0.0) for x in range(8)]
    points = torch.tensor([*chain, (3.0, 3.0), (3.5, 3.0), (4.0, 3.0)], dtype=torch.float64)
    apart = {frozenset(range(8)), frozenset({8, 9, 10})}
    assert parts(spectral_clusters(torch.cdist(points, points), 2, sigma=0.7)) == apart
    assert parts(k_means(points, 2)) != apart


@pytest.mark.parametrize("seed", [0, 1, 2, 6, 8])
def test_clusters_are_those_of_the_formula_at_any_scale(seed):
    """By numpy, and by trying all partitions. The width is the mean distance: a scale of distances changes nothing."""
    points = np.random.default_rng(seed).standard_normal((7, 2))
    d = np.linalg.norm(points[:, None] - points, axis=-1)
    affinity = np.exp(-(d**2) / (2 * (d.sum() / 42) ** 2))
    root = np.diag(1 / np.sqrt(affinity.sum(1)))
    rows = np.linalg.eigh(root @ affinity @ root)[1][:, -3:]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)

    def within(labels: tuple[int, ...]) -> float:
        return sum(len(own) * own.var(0).sum() for one in set(labels) if len(own := rows[np.array(labels) == one]))

    best = parts(torch.tensor(min(itertools.product(range(3), repeat=7), key=within)))
    for scale in (1e-3, 1.0, 1e3):
        assert parts(spectral_clusters(torch.from_numpy(scale * d), 3)) == best


@pytest.mark.parametrize("seed", range(2))
def test_k_means_finds_the_best_of_all_partitions(seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(6, 2, dtype=torch.float64, generator=generator)

    def within(labels: tuple[int, ...]) -> float:
        groups = [points[torch.tensor(labels) == one] for one in set(labels)]
        return sum((group - group.mean(0)).square().sum().item() for group in groups)

    best = min(itertools.product(range(3), repeat=6), key=within)
    assert within(tuple(k_means(points, 3).tolist())) == pytest.approx(within(best))


def test_as_many_clusters_as_images_are_refused_before_anything_is_loaded():
    keys = {"name": "one", "rewards": {"terms": [{"name": "clusters", "options": {"features": "nano"}}]}}
    Recipe.model_validate(keys | {"grpo": {"group_size": 8}})
    with pytest.raises(ValueError, match="clusters 4 leaves groups of 4 images nothing to tell apart"):
        Recipe.model_validate(keys | {"grpo": {"group_size": 4}})
    with pytest.raises(UserError, match="clusters is 0"):
        load_reward("clusters", options={"features": "nano", "clusters": 0})


def test_the_nano_judge_tells_classes_apart():
    """Three of one colour, one of another, as any network sees."""
    images = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    images[:3, 0], images[3, 2] = 250, 250
    some = load_reward("clusters", options={"features": "nano", "clusters": 2})
    seen = some.look(images, [])
    assert seen.shape == (4, 128) and seen.norm(dim=1).tolist() == pytest.approx([1] * 4, rel=1e-5)
    assert some.compare(seen, []).tolist() == pytest.approx([math.sqrt(4 / 3)] * 3 + [2])
