"""How near a set of generated images is to a set of real ones: IS, FID, sFID, precision and recall as ADM defines them.

ADM (Dhariwal and Nichol 2021) set the conventions that papers on class-conditional images follow. Everything here works
on features [N, D] of any network; sFID is the Fréchet distance on spatial features flattened to [N, D]. Where two sets
appear, the first is the generated one. Features may lie on a CPU or a CUDA device; the arithmetic is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from argrpo_cli.evals.statistics import Measure, jackknife
from argrpo_cli.images import ARRAY
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import atomic_path
from argrpo_cli.system.npz import Npz

INCEPTION_SCORE, FID, SFID, PRECISION, RECALL = "inception_score", "fid", "sfid", "precision", "recall"  # columns
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # in a file: of the pool features and, _s, of the spatial ones
WIDEST = 4096  # features in such a file; Inception has 2048
NEIGHBOURS = 3
SPLIT_SIZE = 5000
BLOCK = 2048  # rows at a time: tiles of distances and what they are made of take some 300 MB at D = 2048
EPSILON = torch.finfo(torch.float64).eps


class Gaussian:
    """Mean float32 [D] and covariance float64 [D, D] (ddof 1) of features, in the number formats of ADM's files.

    It is made of a covariance, or of a root float64 [D, r] of one: covariance = root root^T. The other is computed when
    it is asked for; from a covariance by its eigenvectors, without eigenvalues that are only rounding.
    """

    def __init__(self, mean: Tensor, covariance: Tensor | None = None, root: Tensor | None = None):
        self.mean = mean
        if covariance is not None:
            self.covariance, self.variance = covariance, covariance.trace()
        else:
            self.root, self.variance = root, root.square().sum()
        self.is_root = covariance is None

    @classmethod
    def of(cls, features: Tensor, name: str = "generated") -> Gaussian:
        """Of features [N, D], in float64; UserError below two rows or when not finite."""
        return cls.of_batches(features.split(BLOCK), len(features), name)

    @classmethod
    def of_batches(cls, batches: Iterable[Tensor], count: int, name: str = "reference") -> Gaussian:
        """Of features in batches [n, D], `count` rows in all, which need not be in memory together."""
        return _gaussians(batches, torch.zeros(count, dtype=torch.int64), name)(None)

    @cached_property
    def covariance(self) -> Tensor:
        return self.root @ self.root.T

    @cached_property
    def root(self) -> Tensor:
        values, vectors = torch.linalg.eigh(self.covariance)
        some = values > len(values) * EPSILON * values[-1]
        return vectors[:, some] * values[some].sqrt()


def frechet_distance(a: Gaussian, b: Gaussian, quick: bool = False) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the squared Fréchet distance of two Gaussians.

    With S_a = A A^T and S_b = B B^T, tr (S_a S_b)^(1/2) is the sum of the singular values of A^T B. This holds for
    singular covariances too (fewer rows than dimensions), where the square root of the product that the published code
    takes can blow up.

    Args:
        quick: sum up square roots of the eigenvalues of (A^T B)^T (A^T B) instead, several times quicker and good to
            some 1e-4; a small error, for differences of distances to one b.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"features of different widths cannot be compared: {len(a.mean)} and {len(b.mean)} numbers")
    shift = (a.mean.double() - b.mean.double()).square().sum()
    apart = shift + a.variance + b.variance
    if not quick:
        overlap = torch.linalg.svdvals(a.root.T @ b.root).sum()
        return max((apart - 2 * overlap).item(), 0.0)  # rounding can leave a little below zero
    if a.is_root:
        product = a.root.T @ b.root
        small = product @ product.T if product.shape[0] <= product.shape[1] else product.T @ product
    else:
        small = b.root.T @ a.covariance @ b.root
    return (apart - 2 * torch.linalg.eigvalsh(small).clamp(min=0).sqrt().sum()).item()


def frechet_measure(batches: Iterable[Tensor], groups: Tensor, reference: Gaussian) -> tuple[Measure, Measure]:
    """The distance of features in batches [n, D] to a reference, with a jackknife's error over groups of images, and
    the same without the jackknife's estimate of its bias (see `statistics.jackknife`).

    The features are read once: the distance without a group comes from sums over the groups.

    Args:
        groups: int64 [N], the group of each row, 0 to G - 1.

    Raises:
        UserError: fewer than two rows, or features that are not finite.
    """
    gaussian = _gaussians(batches, groups, "generated")
    every = gaussian(None)
    again = frechet_distance(every, reference, quick=True)
    whole = frechet_distance(every, reference)
    left = [frechet_distance(gaussian(group), reference, quick=True) for group in range(int(groups.max()) + 1)]
    # What the quick way leaves out is the same with every group, and cancels.
    return jackknife(whole, [one - again + whole for one in left], len(groups))


def _gaussians(batches: Iterable[Tensor], groups: Tensor, name: str) -> Callable[[int | None], Gaussian]:
    """A function that gives the Gaussian of all rows, or of those outside a group.

    It keeps whatever is smaller: the rows, or of each group their number, sum [D] and sum of outer products [D, D]
    about a point near the mean, so that little is lost in the difference.
    """
    rest = iter(batches)
    first = next(rest)
    width, batches = first.shape[1], chain([first], rest)
    if len(groups) <= width:
        rows = torch.cat(list(batches)).cpu()
        check_features(rows, 2, "the Fréchet distance", name)

        def of_rows(without: int | None) -> Gaussian:
            own = rows.double() if without is None else rows[groups != without].double()
            mean = own.mean(0)
            return Gaussian(mean.float(), root=((own - mean).T / (len(own) - 1) ** 0.5).contiguous())

        return of_rows

    count = int(groups.max()) + 1
    origin = first.double().mean(0).cpu()
    counts = groups.bincount(minlength=count)
    sums = torch.zeros(count, width, dtype=torch.float64)
    products = torch.zeros(count, width, width, dtype=torch.float64)
    place = 0
    for rows in _merged(batches):
        check_features(rows, 1, "the Fréchet distance", name, place)
        own, place = groups[place : place + len(rows)], place + len(rows)
        for group in own.unique():
            centred = rows[own == group].double() - origin
            sums[group] += centred.sum(0)
            products[group].addmm_(centred.T, centred)
    total = torch.zeros_like(products[0])
    for one in products:  # sum(0) would be slower
        total += one

    def of_sums(without: int | None) -> Gaussian:
        number, moved, outer = counts.sum(), sums.sum(0), total
        if without is not None:
            number, moved, outer = number - counts[without], moved - sums[without], outer - products[without]
        shift = moved / number
        return Gaussian((origin + shift).float(), (outer - number * torch.outer(shift, shift)) / (number - 1))

    return of_sums


def _merged(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same rows, on the CPU, in pieces of at least 2 BLOCK: products of a few rows take as long as of hundreds."""
    held: list[Tensor] = []
    for rows in batches:
        held.append(rows.cpu())
        if sum(map(len, held)) >= 2 * BLOCK:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)


def inception_score(probabilities: Tensor, split_size: int = SPLIT_SIZE) -> float:
    """exp of the mean KL divergence of p(y|x) from p(y), averaged over splits; probabilities [N, classes].

    The order of the rows matters: splits are taken one after another as the rows come, the last as short as it falls,
    and each has its own p(y). Rows sorted by class make splits of few classes each and so a lower score (`shuffled`
    mixes them). A probability of zero adds nothing.
    """
    check_features(probabilities, 1, "the inception score", "generated")
    scores = []
    for split in probabilities.split(split_size):
        p = split.double()
        divergence = torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))
        scores.append(divergence.sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def inception_score_measure(
    probabilities: Tensor, groups: Tensor, split_size: int = SPLIT_SIZE
) -> tuple[Measure, Measure]:
    """`inception_score` of rows in their order, with the jackknife's error over groups [N] of images, and the same
    without its bias. Without a group there are as many splits, each a little shorter."""
    splits = math.ceil(len(groups) / split_size)
    left = []
    for group in range(int(groups.max()) + 1):
        rows = probabilities[groups != group]
        left.append(inception_score(rows, math.ceil(len(rows) / splits)))
    return jackknife(inception_score(probabilities, split_size), left, len(groups))


def shuffled(rows: Tensor, seed: int = 0) -> Tensor:
    """The rows in an order that depends on nothing but the seed and their number."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order.to(rows.device)]


def precision_recall(generated: Tensor, reference: Tensor, k: int = NEIGHBOURS) -> tuple[Tensor, Tensor]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) on Inception's or any features, row by row.

    Features [G, D] and [R, D] to bool [G]: within the k-th neighbour distance of some reference row (the mean is
    precision); and bool [R]: within that of some generated row (recall). A row is no neighbour of itself; squared
    distances, the bound included. Only tiles of BLOCK x BLOCK distances are held.

    Exact for the features as given. Distances come from float64 matrix products, which run at the processor's full
    speed; whatever their rounding leaves open, ties and duplicates above all, is decided by differences. (ADM rounds
    the same distances to float16, which moves a share by up to some 0.03.) 50,000 generated and 10,000 reference rows
    of 2048 numbers are 1.5e13 operations: minutes on a few cores, seconds on a GPU that is quick at float64.
    """
    centre = _centre(generated, reference, f"precision and recall (k = {k})", k)
    return _covered(generated, reference, squared_radii(reference, k), centre), recalled(generated, reference, k)


def recalled(generated: Tensor, reference: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """The second of `precision_recall` alone, bool [R]."""
    centre = _centre(generated, reference, f"recall (k = {k})", k)
    return _covered(reference, generated, squared_radii(generated, k), centre)


def covered(generated: Tensor, reference: Tensor, k: int) -> Tensor:
    """Which reference rows [R, D] have a generated one [G, D] within their k-th neighbour distance among the reference
    rows: bool [R], whose mean is coverage (Naeem et al. 2020). Computed as `precision_recall`, the bound included."""
    centre = _centre(generated, reference, f"coverage (k = {k})", k)
    return _covered(reference, generated, squared_radii(reference, k), centre, around_points=True)


def _centre(generated: Tensor, reference: Tensor, metric: str, k: int) -> Tensor:
    """The mean [D] of the reference rows; UserError where the two sets cannot be compared by k neighbours."""
    for features, name in ((generated, "generated"), (reference, "reference")):
        check_features(features, k + 1, metric, name)
    if generated.shape[1] != reference.shape[1]:
        widths = f"{generated.shape[1]} and {reference.shape[1]} numbers"
        raise UserError(f"features of different widths cannot be compared: {widths}")
    return sum(rows.double().sum(0) for rows in reference.split(BLOCK)) / len(reference)


def squared_radii(features: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Squared distance of each row to its k-th nearest other row, float64 [N]."""
    centre = sum(rows.double().sum(0) for rows in features.split(BLOCK)) / len(features)
    radii = []
    for start in range(0, len(features), BLOCK):
        rows = features[start : start + BLOCK]
        nearest = torch.full((len(rows), k), torch.inf, dtype=torch.float64, device=centre.device)
        who = torch.zeros(len(rows), k, dtype=torch.int64, device=centre.device)
        for other in range(0, len(features), BLOCK):
            tile, _ = _tile(rows, features[other : other + BLOCK], centre)
            if start == other:
                tile.fill_diagonal_(torch.inf)
            columns = torch.arange(other, other + tile.shape[1], device=tile.device).expand(tile.shape)
            nearest, chosen = torch.cat([nearest, tile], 1).topk(k, largest=False)
            who = torch.cat([who, columns], 1).gather(1, chosen)
        exact = [_by_differences(rows, features[who[:, rank]]) for rank in range(k)]
        radii.append(torch.stack(exact).amax(0))
    return torch.cat(radii)


def _covered(points: Tensor, centres: Tensor, radii: Tensor, origin: Tensor, around_points: bool = False) -> Tensor:
    """Whether each point [P, D] lies within the squared radius [C] of some centre [C, D], or, `around_points`, within
    its own [P]: bool [P]."""
    parts = []
    for start in range(0, len(points), BLOCK):
        rows = points[start : start + BLOCK]
        inside = torch.zeros(len(rows), dtype=torch.bool, device=radii.device)
        for other in range(0, len(centres), BLOCK):
            near = centres[other : other + BLOCK]
            own = radii[start : start + BLOCK, None] if around_points else radii[other : other + BLOCK]
            tile, doubt = _tile(rows, near, origin)
            reach = own.expand_as(tile)
            tile -= reach
            inside |= (tile < -doubt).any(1)
            open_pairs = ((tile.abs() <= doubt) & ~inside[:, None]).nonzero()
            for i, j in (pairs.unbind(1) for pairs in open_pairs.split(BLOCK)):
                # The sum of the same D squares, perhaps in another order.
                bound = reach[i, j] * (1 + rows.shape[1] * EPSILON)
                inside[i[_by_differences(rows[i], near[j]) <= bound]] = True
        parts.append(inside)
    return torch.cat(parts)


def _tile(a: Tensor, b: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances float64 [A, B] by a matrix product, and a bound on their rounding errors."""
    a, b = a.double() - origin, b.double() - origin  # smaller numbers, smaller errors
    lengths = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(lengths, a, b.T, alpha=-2), lengths * (2 * a.shape[1] * EPSILON)


def _by_differences(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances of rows of [N, D] to their partners, float64 [N]; zero for equal rows."""
    return (a.double() - b.double()).square().sum(1)


def check_features(features: Tensor, least: int, metric: str, name: str, first: int = 0) -> None:
    """UserError unless features [N, D] are finite and of at least `least` rows.

    Args:
        name, first: for the message: what set they are of, and the number of the first row in it.
    """
    if len(features) < least:
        have = f"there {'is' if len(features) == 1 else 'are'} {len(features)}"
        raise UserError(f"{metric} needs at least {least} {name} image{'s' if least > 1 else ''}; {have}")
    bad = torch.cat([~rows.isfinite().all(1) for rows in features.split(BLOCK)]).nonzero()
    if len(bad):
        raise UserError(f"the features of {name} image {first + bad[0].item()} (counted from 0) are not finite")


def save_statistics(path: str | Path, pool: Gaussian, spatial: Gaussian) -> None:
    """Write reference statistics as ADM's files have them, atomically."""
    arrays = (pool.mean, pool.covariance, spatial.mean, spatial.covariance)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **{key: array.numpy() for key, array in zip(STATISTICS, arrays, strict=True)})


def load_statistics(path: Path) -> tuple[Gaussian, Gaussian] | None:
    """Reference statistics of the pool and the spatial features in an .npz; None where it has images without any.

    Raises:
        UserError: the file cannot be read, or has neither, or statistics that do not fit together or are not finite.
    """
    file = Npz(path)
    if not set(STATISTICS) <= set(file.keys):
        if ARRAY in file.keys:
            return None
        expected = f"expected {ARRAY} (images), or {', '.join(STATISTICS)}, or both"
        raise UserError(f"{path} holds {file.content}; {expected}")
    mu, sigma, mu_s, sigma_s = (torch.from_numpy(one) for one in file.numbers(STATISTICS, WIDEST))
    for name, mean, covariance in (("mu, sigma", mu, sigma), ("mu_s, sigma_s", mu_s, sigma_s)):
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            shapes = f"{list(mean.shape)}, {list(covariance.shape)}"
            raise UserError(f"{path}: {name} have the shapes {shapes}; expected [D], [D, D]")
        if not (mean.float().isfinite().all() and covariance.isfinite().all()):
            raise UserError(f"{path}: {name} are not finite")
    return Gaussian(mu.float(), sigma.double()), Gaussian(mu_s.float(), sigma_s.double())
