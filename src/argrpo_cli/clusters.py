"""Means whose values come in clusters: the images of one prompt succeed or fail together."""

from __future__ import annotations

import math
from collections.abc import Sequence


def clustered_mean(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean over the values of all groups, and its standard error; values of one group are not independent.

    N values of G groups with mean m have, with e_g the sum of (value - m) over group g,

        error^2 = G / (G - 1) * sum_g e_g^2 / N^2

    which is the standard error of the mean of the groups' means when all have as many values. The error is NaN of a
    single group; at least one value is needed, and no empty group.
    """
    count = sum(map(len, groups))
    mean = math.fsum(value for group in groups for value in group) / count
    if len(groups) < 2:
        return mean, math.nan
    squares = math.fsum(math.fsum(value - mean for value in group) ** 2 for group in groups)
    return mean, math.sqrt(len(groups) / (len(groups) - 1) * squares) / count
