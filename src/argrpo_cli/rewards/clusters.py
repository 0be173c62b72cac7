"""clusters: a bonus for images that look like few others of their prompt (DiverseGRPO, arXiv 2512.21514).

The N images of a group are clustered by spectral clustering of their distances d, and image i of a cluster of n_k has

    E_i = sqrt(N / n_k),    added as R + beta E with beta the term's weight.

Affinities are A_ij = exp(-d_ij^2 / 2 sigma^2). The rows of the first k eigenvectors of D^-1/2 A D^-1/2, D = diag(A 1),
scaled to unit length, are clustered by k-means (Ng, Jordan and Weiss 2001). A group is small, so this is done here and
exactly: k-means starts at every image in turn, and the best end is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt

from argrpo_cli.rewards.base import Count, File, Needs, Reward
from argrpo_cli.rewards.features import Features
from argrpo_cli.shapes import Condition

if TYPE_CHECKING:
    from torch import Tensor

    from argrpo_cli.recipe import Recipe

CLUSTERS = 4
ROUNDS = 100  # of k-means at most


class Clusters(Reward):
    """sqrt(N / n_k), from 1 (all alike) to sqrt(N) (one that is like no other).

    Args:
        features: of which d_ij = 1 - cos(f_i, f_j): `clip` (ViT-B/32), `inception`, or `nano`, the nano judge's. The
            paper's DreamSim is a distance of the same form on networks tuned for it.
        clusters: k, into which each group falls. The paper tunes it and gives no rule.
        sigma: width of the affinity; null is the mean distance of the group.
        weights: a local file of the network's weights in the place of the published one.
    """

    name, family, scope, reads_prompt, low = "clusters", "quality", "group", False, 1.0

    def __init__(
        self,
        device: str = "cpu",
        *,
        features: Literal["clip", "inception", "nano"] = "clip",
        clusters: Count = CLUSTERS,
        sigma: Annotated[float, Gt(0)] | None = None,
        weights: File = None,
    ):
        self.features, self.clusters, self.sigma = Features(features, device, weights), clusters, sigma

    @classmethod
    def needs(cls, options: Mapping[str, Any], device: str = "cpu") -> Needs:
        """The network of the features."""
        return Features.needs(options.get("features", "clip"), options)

    @classmethod
    def unfit(cls, options: Mapping[str, Any], recipe: Recipe) -> str:
        """Each image in a cluster of its own has the same bonus."""
        count, size = options.get("clusters", CLUSTERS), recipe.grpo.group_size
        return (
            f"clusters {count} leaves groups of {size} images nothing to tell apart; set less" if count >= size else ""
        )

    def look(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """Unit features float32 [B, D]."""
        from torch.nn.functional import normalize

        return normalize(self.features(images), dim=-1)

    def compare(self, seen: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """Float32 [N]."""
        unit = seen.double()
        labels = spectral_clusters((1 - unit @ unit.T).clamp(min=0), self.clusters, self.sigma)
        return (len(labels) / labels.bincount()[labels]).sqrt().float()


def spectral_clusters(distances: Tensor, count: int, sigma: float | None = None) -> Tensor:
    """Labels int64 [N] of at most `count` clusters, of distances float64 [N, N].

    Args:
        sigma: as in `Clusters`.
    """
    import torch

    n = len(distances)
    apart = distances.sum() - distances.trace()  # of an image to itself there is nothing but rounding
    if n == 1 or apart <= 1e-6 * n * (n - 1):
        return torch.zeros(n, dtype=torch.int64)
    sigma = apart / (n * (n - 1)) if sigma is None else sigma
    affinity = (-distances.square() / (2 * sigma**2)).exp()
    degree = affinity.sum(1).rsqrt()
    values, vectors = torch.linalg.eigh(degree[:, None] * affinity * degree)  # ascending
    count = min(count, int((values > 1e-9).sum()))  # images that are the same make others, which say nothing
    return k_means(torch.nn.functional.normalize(vectors[:, -count:], dim=1), count)


def k_means(points: Tensor, count: int) -> Tensor:
    """Labels int64 [N] of points float64 [N, D]: the least sum of squares that Lloyd's rule reaches from N starts, each
    a point and, one after the other, those farthest from all chosen before."""
    import torch

    n, apart = len(points), torch.cdist(points, points)
    chosen = torch.arange(n)[:, None]  # [starts, centres]
    while chosen.shape[1] < count:
        chosen = torch.cat([chosen, apart[chosen].amin(1).argmax(1, keepdim=True)], dim=1)
    centres, labels = points[chosen], torch.full((n, n), -1)
    for _ in range(ROUNDS):
        before, labels = labels, torch.cdist(points.expand(n, -1, -1), centres).argmin(-1)  # [starts, N]
        if torch.equal(labels, before):
            break
        members = torch.nn.functional.one_hot(labels, count).double()
        sizes = members.sum(1)[..., None]
        means = members.transpose(1, 2) @ points / sizes.clamp(min=1)
        centres = torch.where(sizes > 0, means, centres)
    nearest = torch.cdist(points.expand(n, -1, -1), centres).amin(-1)
    return labels[nearest.square().sum(-1).argmin()]
