"""The Fréchet distance of a large set to a reference, with a standard error: FID and sFID of `argrpo eval imagenet`.

The value is that of `fidelity.frechet_distance`. The error is a jackknife's over groups of images: the distance is
taken again without each group, from sums over the groups, so that features are read once and need not be in memory.

The jackknife sums up square roots of eigenvalues of a product, which is several times quicker than the singular values
behind the value itself and good to some 1e-4; what it leaves out is the same with every group and cancels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from argrpo_cli.evals.fidelity import Statistics, check_features

BLOCK = 4096  # rows at a time


@dataclass(frozen=True)
class Gaussian:
    """Mean float32 [D] and a root [D, r], float64, of the covariance: covariance = root root^T."""

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, statistics: Statistics) -> Gaussian:
        """From a covariance, by its eigenvectors; eigenvalues that are only rounding are left out."""
        values, vectors = torch.linalg.eigh(statistics.covariance)
        kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1]
        return cls(statistics.mean, vectors[:, kept] * values[kept].sqrt())

    @classmethod
    def of_rows(cls, rows: Tensor) -> Gaussian:
        """From features [N, D] themselves, centred: the small root of few images."""
        mean = rows.double().mean(0)
        return cls(mean.float(), ((rows.double() - mean).T / (len(rows) - 1) ** 0.5).contiguous())

    @property
    def statistics(self) -> Statistics:
        return Statistics(self.mean, self.root @ self.root.T)


def distance(a: Gaussian, b: Gaussian) -> float:
    """`fidelity.frechet_distance` of two roots: their overlap is the sum of the singular values of A^T B."""
    overlap = torch.linalg.svdvals(a.root.T @ b.root).sum()
    return max(_apart(a, b, overlap), 0.0)


def gaussian(shards: Iterable[Tensor], count: int, name: str = "reference") -> Gaussian:
    """Of features in shards, float32 [n, D], `count` rows in all."""
    groups = torch.zeros(count, dtype=torch.int64)
    return _moments(shards, groups, name).gaussian()


def distance_values(shards: Iterable[Tensor], groups: Tensor, reference: Gaussian) -> tuple[float, Tensor]:
    """The distance of features in shards, float32 [n, D], to the reference, and jackknife values of their groups.

    Args:
        groups: int64 [N], the group of each row, 0 to G - 1.

    Returns:
        The distance, and float64 [G], whose standard deviation / sqrt(G) is its standard error.

    Raises:
        UserError: fewer than two rows, or features that are not finite.
    """
    moments = _moments(shards, groups, "generated")
    whole = distance(moments.gaussian(), reference)
    again = moments.fast_distance(reference)
    without = [moments.fast_distance(reference, group) for group in range(int(groups.max()) + 1)]
    return whole, jackknife_values(again, without) + (whole - again)


def jackknife_values(whole: float, without: Iterable[float]) -> Tensor:
    """One value per group, float64 [G], with the whole as mean and std / sqrt(G) as jackknife error; NaN of one group.

    `without` has the measure without each group.
    """
    left = torch.tensor(list(without), dtype=torch.float64)
    return whole + (len(left) - 1) * (left.mean() - left)


def _apart(a: Gaussian, b: Gaussian, overlap: Tensor) -> float:
    shift = (a.mean.double() - b.mean.double()).square().sum()
    return (shift + a.root.square().sum() + b.root.square().sum() - 2 * overlap).item()


@dataclass
class _Rows:
    """Few features: kept as they are, float32 [N, D]."""

    rows: Tensor
    groups: Tensor

    def gaussian(self, without: int | None = None) -> Gaussian:
        return Gaussian.of_rows(self.rows if without is None else self.rows[self.groups != without])

    def fast_distance(self, reference: Gaussian, without: int | None = None) -> float:
        own = self.gaussian(without)
        product = own.root.T @ reference.root
        small = product @ product.T if product.shape[0] <= product.shape[1] else product.T @ product
        return _apart(own, reference, _root_sum(small))


@dataclass
class _Sums:
    """Many features: number, sum [D] and sum of outer products [D, D] of each group, in float64 about an `origin`."""

    origin: Tensor
    counts: Tensor
    sums: Tensor
    products: Tensor

    def statistics(self, without: int | None = None) -> Statistics:
        parts = [self.counts.sum(), self.sums.sum(0), self._all_products()]
        if without is not None:
            held = (self.counts, self.sums, self.products)
            parts = [whole - part[without] for whole, part in zip(parts, held, strict=True)]
        count, shift, products = parts[0], parts[1] / parts[0], parts[2]
        covariance = (products - count * torch.outer(shift, shift)) / (count - 1)
        return Statistics((self.origin + shift).float(), covariance)

    def gaussian(self) -> Gaussian:
        return Gaussian.of(self.statistics())

    def fast_distance(self, reference: Gaussian, without: int | None = None) -> float:
        own = self.statistics(without)
        shift = (own.mean.double() - reference.mean.double()).square().sum()
        overlap = _root_sum(reference.root.T @ own.covariance @ reference.root)
        return (shift + own.covariance.trace() + reference.root.square().sum() - 2 * overlap).item()

    def _all_products(self) -> Tensor:
        whole = torch.zeros_like(self.products[0])
        for one in self.products:  # sum(0) would be slower
            whole += one
        return whole


def _root_sum(symmetric: Tensor) -> Tensor:
    """Sum of the square roots of the eigenvalues of a positive semidefinite matrix."""
    return torch.linalg.eigvalsh(symmetric).clamp(min=0).sqrt().sum()


def _moments(shards: Iterable[Tensor], groups: Tensor, name: str) -> _Rows | _Sums:
    """Whatever is smaller: the rows themselves, or sums over their groups."""
    first, shards = _peek(shards)
    width = first.shape[1]
    if len(groups) <= width:
        rows = torch.cat(list(shards))
        check_features(rows, 2, "the Fréchet distance", name)
        return _Rows(rows, groups)
    count = int(groups.max()) + 1
    origin = first.double().mean(0)  # near the mean, so that little is lost in the difference
    sums = _Sums(
        origin,
        torch.bincount(groups, minlength=count),
        torch.zeros(count, width, dtype=torch.float64),
        torch.zeros(count, width, width, dtype=torch.float64),
    )
    place = 0
    for rows in _merged(shards):
        check_features(rows, 1, "the Fréchet distance", name)
        own, place = groups[place : place + len(rows)], place + len(rows)
        for group in own.unique():
            centred = rows[own == group].double() - origin
            sums.sums[group] += centred.sum(0)
            sums.products[group].addmm_(centred.T, centred)
    return sums


def _merged(shards: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same rows in pieces of at least BLOCK: products of a few rows take as long as those of hundreds."""
    held: list[Tensor] = []
    for rows in shards:
        held.append(rows)
        if sum(map(len, held)) >= BLOCK:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)


def _peek(items: Iterable[Tensor]) -> tuple[Tensor, Iterator[Tensor]]:
    """The first item, and all of them."""
    rest = iter(items)
    first = next(rest)

    def whole() -> Iterator[Tensor]:
        yield first
        yield from rest

    return first, whole()
