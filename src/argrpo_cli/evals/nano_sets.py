"""Measures of a whole set of nano pictures on the judge's features: IS, FID, sFID, precision and recall.

The classifier's features [N, 128] stand for Inception's pool, its class probabilities for Inception's, and a map of its
middle layer [N, 112] for ADM's spatial features; the judge's reference scenes are the real images.

IS, FID, sFID and recall are one number for a set. Their errors are those of a jackknife over twenty groups of samples,
each with all classes in their shares; two policies with paired seeds have the same groups, so the error of their
difference is paired. It is the error of drawing the samples: the reference scenes, the judge and the training run are
given. With few images it errs on the safe side: against the spread of fresh samples that of FID and sFID was near twice
too large at 192 images, a fifth at 480 and at 2,016.

FID and sFID are biased upwards, the more the fewer the images, because a covariance of few rows is not the true one.
The errors leave it out: compare equal numbers of images only. Even then it is larger for a policy of more variety, so
both go along without the jackknife's estimate of it, as `fid_corrected` and `sfid_corrected`. IS is taken over all
samples as one split.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from argrpo_cli.evals.fidelity import Gaussian, frechet_distance, inception_score, precision_recall
from argrpo_cli.nano.judge import Judge

INCEPTION_SCORE, FID, SFID, PRECISION, RECALL = "inception_score", "fid", "sfid", "precision", "recall"
CORRECTED = "_corrected"
GROUPS = 20

Values = dict[str, Tensor]  # measure to its values over units


def set_values(
    images: Tensor, features: Tensor, judge: Judge, groups: Tensor, reference: Tensor | slice = slice(None)
) -> Values:
    """IS, FID and sFID of uint8 images [N, 3, 64, 64] with the judge's features of them, as jackknife values, and the
    last two without their bias.

    `groups` int64 [N] from `class_groups`; `reference` picks the reference scenes to compare with.
    """
    spatial = judge.recogniser.spatial_features(images.cpu())
    probabilities = judge.recogniser.probabilities(features)
    real = Gaussian.of(judge.reference_features[reference], "reference")
    real_spatial = Gaussian.of(judge.reference_spatial[reference], "reference")
    measures: dict[str, Callable[[Tensor], float]] = {
        INCEPTION_SCORE: lambda rows: inception_score(probabilities[rows], split_size=len(probabilities)),
        FID: lambda rows: frechet_distance(Gaussian.of(features[rows]), real),
        SFID: lambda rows: frechet_distance(Gaussian.of(spatial[rows]), real_spatial),
    }
    values = {}
    for key, measure in measures.items():
        values[key], bias = jackknife(measure, groups)
        if key in (FID, SFID):
            values[f"{key}{CORRECTED}"] = values[key] - bias
    return values


def manifold_values(features: Tensor, judge: Judge, groups: Tensor) -> Values:
    """Precision of each sample, 0 or 1, and recall as jackknife values: the samples make up its manifold."""
    precision, _ = precision_recall(features, judge.reference_features)

    def recall(rows: Tensor) -> float:
        return precision_recall(features[rows], judge.reference_features)[1].float().mean().item()

    return {PRECISION: precision.float(), RECALL: jackknife(recall, groups)[0]}


def real_set_values(judge: Judge, held_out: slice) -> Values:
    """What real scenes reach: the reference scenes `held_out` as the set, the others as its reference."""
    mask = torch.ones(len(judge.reference_classes), dtype=torch.bool)
    mask[held_out] = False
    ids = judge.reference_classes[held_out]
    features = judge.reference_features[held_out]
    return set_values(judge.reference_images[held_out], features, judge, class_groups(len(ids), ids), mask)


def class_groups(n: int, class_ids: Tensor | None = None, seed: int = 0) -> Tensor:
    """A group for each of n samples, int64 [n]: twenty (or n) of equal size to one, classes dealt out evenly."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    if class_ids is not None:
        order = order[torch.argsort(class_ids[order], stable=True)]
    groups = torch.empty(n, dtype=torch.int64)
    groups[order] = torch.arange(n) % min(GROUPS, n)
    return groups


def jackknife(measure: Callable[[Tensor], float], groups: Tensor) -> tuple[Tensor, float]:
    """Values of the groups, and the bias of the measure.

    The values v_g, float64 [G], have the measure of all rows, m, as their mean, and std / sqrt(G) is the jackknife
    error: v_g = m + (G - 1) (mean over h of m_-h - m_-g), m_-g being the measure without group g. The bias is the
    jackknife's, too, (G - 1) (mean over h of m_-h - m): what falls as 1 / N (Quenouille 1956).

    `measure` takes a mask of the rows to use, bool [N].
    """
    count = len(groups.unique())
    whole = measure(torch.ones_like(groups, dtype=torch.bool))
    without = torch.tensor([measure(groups != group) for group in range(count)], dtype=torch.float64)
    values = whole + (count - 1) * (without.mean() - without)
    return values, (count - 1) * (without.mean().item() - whole)
