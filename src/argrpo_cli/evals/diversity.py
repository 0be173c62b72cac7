"""How much the images of a policy differ, and how much of its base's variety is left: features [N, D] of any network.

A collapse of the policy shows here and in no reward: pictures of one prompt become alike, and parts of what the base
draws are drawn no more. Everything takes features and the group of each row (its prompt, or its class), and gives a
`Measure`: `summary()` is the `Value` with its standard error, `minus` the paired difference to a policy that drew the
same prompts with the same seeds. The arithmetic is in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from argrpo_cli.evals.fidelity import NEIGHBOURS, check_features, covered, recalled
from argrpo_cli.evals.statistics import Measure, class_groups, jackknife, mean_of

COVERING = 5  # neighbours, Naeem et al.'s k


def distance_within(features: Tensor, groups: Tensor) -> Measure:
    """Mean of 1 - cosine over the pairs of images of one group, in [0, 2].

    It is taken as the mean over the images of each one's mean distance to the others of its group, so that groups of n
    images weigh n. An image alone in its group has no value.

    Args:
        features: [N, D], of any length; zero rows have a cosine of 0 with all.
        groups: int64 [N], such as the number of each image's prompt; the error is clustered by them.

    Raises:
        UserError: features that are not finite.
    """
    values = torch.full((len(features),), torch.nan, dtype=torch.float64)
    for rows, unit in _groups_of(features, groups):
        apart = 1 - unit @ unit.T
        values[rows] = (apart.sum(1) - apart.diagonal()) / (len(rows) - 1)
    return mean_of(values, groups)


def vendi_within(features: Tensor, groups: Tensor) -> Measure:
    """`vendi_score` of the images of one group, averaged over groups as in `distance_within`: from 1, all alike, to
    the number of images."""
    values = torch.full((len(features),), torch.nan, dtype=torch.float64)
    for rows, unit in _groups_of(features, groups):
        values[rows] = vendi_score(unit)
    return mean_of(values, groups)


def vendi_of_all(features: Tensor, groups: Tensor) -> Measure:
    """`vendi_score` of all images together, with a jackknife's error that leaves out whole groups of images.

    It cannot be larger than N or D, and grows with N: compare equal numbers of images.
    """
    unit = _unit(features)
    places = groups.unique(return_inverse=True)[1]
    count = int(places.max()) + 1
    blocks = class_groups(count)[places] if count > 1 else class_groups(len(unit))
    left = [vendi_score(unit[blocks != block]) for block in range(int(blocks.max()) + 1) if len(unit) > 1]
    return jackknife(vendi_score(unit), left, len(unit))[0]


def vendi_score(unit: Tensor) -> float:
    """exp(-sum_i l_i log l_i), l_i the eigenvalues of K / n, K_ij the cosine of images i and j: how many different
    images there are, effectively (Friedman and Dieng 2023, definition 3.1). Rows of length 1, [N, D]."""
    gram = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit  # the same eigenvalues but for zeros
    shares = (torch.linalg.eigvalsh(gram) / len(unit)).clamp(min=0)
    return torch.special.entr(shares).sum().exp().item()


def recall(features: Tensor, base: Tensor, groups: Tensor, k: int = NEIGHBOURS) -> Measure:
    """Share of the base's images within the manifold of the policy's (Kynkäänniemi et al. 2019): nearer to one of the
    policy's images, [N, D], than that one's k-th neighbour among them.

    Features are compared as they are, by Euclidean distance. With the base's own seeds it is 1 for an unchanged policy.

    Args:
        base: [R, D], of the base.
        groups: int64 [R], of the base's images; the error is theirs, given the policy's images.

    Raises:
        UserError: k images or fewer in one of them, features of different widths or not finite.
    """
    return mean_of(recalled(features, base, k).cpu().double(), groups)


def coverage(features: Tensor, base: Tensor, groups: Tensor, k: int = COVERING) -> Measure:
    """Share of the base's images with an image of the policy nearer than their k-th neighbour among the base's own
    (Naeem et al. 2020, equation 9). An outlier of the policy cannot raise it, as it can recall. Arguments and errors of
    `recall`."""
    return mean_of(covered(features, base, k).cpu().double(), groups)


def _unit(features: Tensor) -> Tensor:
    """Rows of length 1, float64 on the CPU."""
    check_features(features, 1, "diversity", "generated")
    return F.normalize(features.cpu().double(), dim=1)


def _groups_of(features: Tensor, groups: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each group of two images or more their rows, int64 [n], and unit features [n, D]."""
    unit, order = _unit(features), groups.argsort(stable=True)
    sizes = groups.unique(return_counts=True)[1].tolist()
    return [(rows, unit[rows]) for rows in order.split(sizes) if len(rows) > 1]
