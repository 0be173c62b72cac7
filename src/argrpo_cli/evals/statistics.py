"""A measured number with what its standard error comes from: units that vary by chance, in strata that are all there.

An error says how far the number would be from this one with other images, and for prompts, other prompts. Two policies
that drew the same prompts with the same seeds share their units, so the error of their difference is paired.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from argrpo_cli.shapes import Value

GROUPS = 20  # of images, for the jackknife


@dataclass(frozen=True)
class Measure:
    """A number of a set of images.

    Attributes:
        strata: float64 [U_s] each; error^2 = sum over strata of var(units, ddof 1) / U_s.
        count: how many images it is of.
        values: float64 [N] of each image, NaN where it has none; None where the number is of all images together.
        clusters: int64 [N], which images belong together; None where each stands for itself.
    """

    value: float
    strata: tuple[Tensor, ...] = ()
    count: int = 0
    values: Tensor | None = None
    clusters: Tensor | None = None

    @property
    def error(self) -> float:
        """The standard error, NaN where a stratum has a single unit or there is none."""
        if not self.strata or any(len(units) < 2 for units in self.strata):
            return math.nan
        return math.sqrt(sum(units.var().item() / len(units) for units in self.strata))

    def minus(self, other: Measure) -> Measure:
        """This less the other, image by image where both have values, else unit by unit."""
        if self.values is not None and other.values is not None:
            return mean_of(self.values - other.values, self.clusters)
        pairs = zip(self.strata, other.strata, strict=True)
        return Measure(self.value - other.value, tuple(a - b for a, b in pairs), min(self.count, other.count))

    def summary(self) -> Value:
        """The number, its error and its count, as results have them."""
        return Value(self.value, self.error, self.count)


def mean_of(values: Tensor | Sequence[float], clusters: Tensor | Sequence[Hashable] | None = None) -> Measure:
    """The mean of a value for each image, NaN for one that has none; images of one cluster are not independent.

    N values of G clusters with mean m have, with e_g the sum of (value - m) over cluster g,

        error^2 = G / (G - 1) * sum_g e_g^2 / N^2

    which is the standard error of the mean of the clusters' means when all have as many values; the units are
    u_g = m + G / N * e_g. Without clusters each image is its own.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    if clusters is None:
        clusters = torch.arange(len(values))
    elif not isinstance(clusters, Tensor):  # names of any kind
        numbers = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
        clusters = torch.tensor([numbers[name] for name in clusters], dtype=torch.int64)
    there = ~values.isnan()
    known, places = values[there], clusters[there].unique(return_inverse=True)[1]
    count = len(known)
    if not count:
        return Measure(math.nan, (), 0, values, clusters)
    mean = math.fsum(known.tolist()) / count
    residuals = torch.zeros(int(places.max()) + 1, dtype=torch.float64).index_add_(0, places, known - mean)
    units = mean + len(residuals) / count * residuals
    return Measure(mean, (units,), count, values, clusters)


def average(parts: Sequence[Measure]) -> Measure:
    """The plain mean of numbers of disjoint images, such as those of categories."""
    share = 1 / len(parts)
    strata = tuple(units * share for part in parts for units in part.strata)
    return Measure(sum(part.value for part in parts) * share, strata, sum(part.count for part in parts))


def weighted(parts: Sequence[Measure], weights: Sequence[float], clusters: int) -> Measure:
    """The weighted mean of means of values, such as shares of several kinds of questions about the same pictures.

    With m_d the mean of part d's n_d values x_i, w_d its weight, and clusters g = 0 to G - 1 (those of the parts),

        e_g = sum_d w_d / n_d sum_(i in d and g) (x_i - m_d),    error^2 = G / (G - 1) sum_g e_g^2

    as for `mean_of`; a cluster in which no value is known has e_g = 0, so that two policies always share their units.
    """
    value = math.fsum(weight * part.value for weight, part in zip(weights, parts, strict=True))
    units = torch.zeros(clusters, dtype=torch.float64)
    for weight, part in zip(weights, parts, strict=True):
        there = ~part.values.isnan()
        residuals = part.values[there] - part.value
        units.index_add_(0, part.clusters[there], weight / max(part.count, 1) * residuals)
    return Measure(value, (value + clusters * units,), sum(part.count for part in parts))


def differences(measured: Mapping[str, Mapping[str, Measure]], columns: Iterable[str]) -> dict[str, Value]:
    """Of two rows the first less the second, in the columns that both have; {} for one row."""
    if len(measured) != 2:
        return {}
    first, second = measured.values()
    return {key: first[key].minus(second[key]).summary() for key in columns if key in first and key in second}


def jackknife(whole: float, without: Iterable[float], count: int) -> tuple[Measure, Measure]:
    """A number of all of `count` images together, such as FID, and the same less the jackknife's estimate of its bias.

    With m the number of all, and m_-g that without group g of G, the units are

        u_g = m + (G - 1) (mean over h of m_-h - m_-g)

    whose mean is m and whose std / sqrt(G) is the jackknife error. The bias is (G - 1) (mean over h of m_-h - m): what
    falls as 1 / N (Quenouille 1956).
    """
    left = torch.tensor(list(without), dtype=torch.float64)
    others = len(left) - 1
    units, bias = whole + others * (left.mean() - left), others * (left.mean().item() - whole)
    return Measure(whole, (units,), count), Measure(whole - bias, (units - bias,), count)


def class_groups(n: int, class_ids: Tensor | None = None, seed: int = 0) -> Tensor:
    """A group for each of n images, int64 [n]: twenty (or n) of equal size to one, classes dealt out evenly."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    if class_ids is not None:
        order = order[torch.argsort(class_ids[order], stable=True)]
    groups = torch.empty(n, dtype=torch.int64)
    groups[order] = torch.arange(n) % min(GROUPS, n)
    return groups
