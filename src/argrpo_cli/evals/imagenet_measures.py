"""IS, FID, sFID, precision and recall of Inception's features in a store, each with units that a standard error needs.

    inception_score   splits of 5,000 as ADM takes them, in the order given; units: jackknife over groups of images
    fid, sfid         `frechet.py`; units: jackknife over groups of images
    precision         share of generated images inside the reference's manifold (k = 3); units: the generated images
    recall            share of reference images inside the generated ones' manifold; units: the reference images

The errors are those of drawing the images, given the reference; that of recall is of drawing the reference images
instead, given the generated ones. The upward bias of FID and sFID in few images is no part of them: compare equal
numbers. Two policies drawn with the same seeds share their units, so the error of their difference is paired.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from argrpo_cli.evals.feature_store import POOL, PROBABILITIES, SPATIAL, FeatureStore
from argrpo_cli.evals.fidelity import SPLIT_SIZE, inception_score, precision_recall, shuffled
from argrpo_cli.evals.frechet import Gaussian, distance_values, jackknife_values

INCEPTION_SCORE, FID, SFID, PRECISION, RECALL = "inception_score", "fid", "sfid", "precision", "recall"
MEASURES = (INCEPTION_SCORE, FID, SFID, PRECISION, RECALL)  # in the order of the paper's tables
SORTED_LOSS = 0.05  # of the IS, from which on images count as sorted by class


@dataclass(frozen=True)
class Measure:
    """A number of a whole set, and the units whose spread tells its error, float64 [U]."""

    value: float
    units: Tensor

    def summary(self) -> dict[str, float | None]:
        """`value` and its standard `error`, None where one unit tells none; for JSON."""
        error = (self.units.double().std() / len(self.units) ** 0.5).item() if len(self.units) > 1 else math.nan
        return {"value": self.value, "error": error if math.isfinite(error) else None}

    def minus(self, other: Measure) -> Measure:
        """The difference of two policies on the same units."""
        return Measure(self.value - other.value, self.units.double() - other.units.double())


def measure_set(
    store: FeatureStore,
    groups: Tensor,
    pool: Gaussian,
    spatial: Gaussian,
    manifold: Tensor | None,
    keep_order: bool,
    device: str = "cpu",
) -> dict[str, Measure]:
    """All measures of a store of features against a reference.

    Args:
        groups: int64 [N], the jackknife's group of each image.
        pool, spatial: of the reference.
        manifold: the reference's pool features float32 [R, 2048]; None leaves precision and recall out.
        keep_order: take IS's splits of the images as they come, not shuffled by a fixed seed.
        device: of precision and recall.
    """
    measures = {INCEPTION_SCORE: _inception_score(store.read(PROBABILITIES), groups, keep_order)}
    for key, kind, reference in ((FID, POOL, pool), (SFID, SPATIAL, spatial)):
        measures[key] = Measure(*distance_values(store.shards(kind), groups, reference))
    if manifold is not None:
        features = store.read(POOL).to(device)
        for key, inside in zip((PRECISION, RECALL), precision_recall(features, manifold.to(device)), strict=True):
            inside = inside.cpu().double()
            measures[key] = Measure(inside.mean().item(), inside)
    return measures


def sorted_by_class(store: FeatureStore) -> bool:
    """Whether IS in the order of the images is well below that of the same images shuffled."""
    if store.count <= SPLIT_SIZE:
        return False
    probabilities = store.read(PROBABILITIES)
    return inception_score(probabilities, SPLIT_SIZE) < (1 - SORTED_LOSS) * inception_score(
        shuffled(probabilities), SPLIT_SIZE
    )


def _inception_score(probabilities: Tensor, groups: Tensor, keep_order: bool) -> Measure:
    if not keep_order:
        probabilities, groups = shuffled(probabilities), shuffled(groups)
    splits = math.ceil(len(groups) / SPLIT_SIZE)
    without = []
    for group in range(int(groups.max()) + 1):
        left = probabilities[groups != group]
        without.append(inception_score(left, math.ceil(len(left) / splits)))
    value = inception_score(probabilities, SPLIT_SIZE)
    return Measure(value, jackknife_values(value, without))
