"""The judge's own classifier: which object does a picture show, and features to compare sets of pictures by.

No reward uses it. It is built unlike the reward networks (dense blocks with batch normalisation, raw renderings beside
reconstructions in its training), so that it does not share their blind spots more than it must.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argrpo_cli.policy.vq import from_uint8


class DenseLayer(nn.Module):
    """Adds `growth` channels computed from all the channels before (Huang et al. 2017)."""

    def __init__(self, width: int, growth: int):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], dim=1)


class RecognitionNet(nn.Module):
    """64x64 pixels to class logits by way of features [B, 128]."""

    def __init__(self, classes: int = 24, growth: int = 20, layers: Sequence[int] = (2, 3, 3), features: int = 128):
        super().__init__()
        width = 32
        body: list[nn.Module] = [nn.Conv2d(3, width, 5, stride=2, padding=2, bias=False)]
        for count in layers:
            for _ in range(count):
                body.append(DenseLayer(width, growth))
                width += growth
            half = width // 2
            body += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, half, 1, bias=False), nn.AvgPool2d(2)]
            width = half
        self.body = nn.Sequential(*body, nn.BatchNorm2d(width), nn.ReLU())
        self.project = nn.Linear(width * 16, features)  # 4x4 cells: parts keep their places
        self.classify = nn.Linear(features, classes)

    def features(self, x: Tensor) -> Tensor:
        """x [B, 3, 64, 64] in [-1, 1] to [B, 128]."""
        return self.project(self.body(x).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(F.relu(self.features(x)))


class Recogniser:
    """A trained RecognitionNet for uint8 images."""

    def __init__(self, network: RecognitionNet):
        self.network = network.eval().requires_grad_(False)

    @torch.inference_mode()
    def features(self, images: Tensor, batch_size: int = 100) -> Tensor:
        """uint8 [B, 3, 64, 64] to float32 [B, 128]."""
        return torch.cat([self.network.features(from_uint8(chunk)) for chunk in images.split(batch_size)])

    @torch.inference_mode()
    def classes(self, features: Tensor) -> Tensor:
        """Features to the most likely class id, int64 [B]."""
        return self.network.classify(F.relu(features)).argmax(-1)


def load_recogniser(folder: str | Path) -> Recogniser:
    """The bundled classifier from the judge's folder."""
    from argrpo_cli.rewards.weights import load_weights, read_config

    return Recogniser(load_weights(RecognitionNet(**read_config(folder)["recogniser"]), folder))


def nearest_distances(features: Tensor, k: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row, [N]."""
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").square()
    return distances.kthvalue(k + 1, dim=1).values  # the nearest of all is the row itself


def precision_recall(generated: Tensor, reference: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) as ADM computes them, row by row.

    Features [G, D] and [R, D] to bool [G]: within the k-th neighbour distance of some reference row (the mean is
    precision); and bool [R]: within that of some generated row (recall). Squared distances, the bound included.
    """
    distances = torch.cdist(generated, reference, compute_mode="donot_use_mm_for_euclid_dist").square()
    precision = (distances <= nearest_distances(reference, k)[None]).any(1)
    recall = (distances <= nearest_distances(generated, k)[:, None]).any(0)
    return precision, recall


def diversity(features: Tensor, class_ids: Tensor) -> Tensor:
    """Mean distance between the features of two pictures of one class, one value for each class in ascending order."""
    return torch.stack([F.pdist(features[class_ids == one]).mean() for one in class_ids.unique()])
