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

from argrpo_cli.policy.llamagen.vq import from_uint8

SPATIAL_CHANNELS = 7


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
        self.middle = 0
        for index, count in enumerate(layers):
            for _ in range(count):
                body.append(DenseLayer(width, growth))
                width += growth
            half = width // 2
            body += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, half, 1, bias=False), nn.AvgPool2d(2)]
            width = half
            if index == 1:
                self.middle = len(body)  # behind the second transition
        self.body = nn.Sequential(*body, nn.BatchNorm2d(width), nn.ReLU())
        self.project = nn.Linear(width * 16, features)  # 4x4 cells: parts keep their places
        self.classify = nn.Linear(features, classes)

    def features(self, x: Tensor) -> Tensor:
        """x [B, 3, 64, 64] in [-1, 1] to [B, 128]."""
        return self.project(self.body(x).flatten(1))

    def spatial(self, x: Tensor) -> Tensor:
        """x [B, 3, 64, 64] in [-1, 1] to [B, 112]: where things are, halfway through the network, for sFID.

        As ADM takes the first 7 channels of a map in the middle of Inception, these are the first 7 behind the second
        transition (8x8 cells, no class decided yet), averaged to 4x4 cells: 112 numbers, few enough for the covariance
        of about a thousand images.
        """
        return F.avg_pool2d(self.body[: self.middle](x)[:, :SPATIAL_CHANNELS], 2).flatten(1)

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

    @torch.inference_mode()
    def probabilities(self, features: Tensor) -> Tensor:
        """Features to the probability of each class, float32 [B, classes]."""
        return self.network.classify(F.relu(features)).softmax(-1)

    @torch.inference_mode()
    def spatial_features(self, images: Tensor, batch_size: int = 100) -> Tensor:
        """uint8 [B, 3, 64, 64] to float32 [B, 112]."""
        return torch.cat([self.network.spatial(from_uint8(chunk)) for chunk in images.split(batch_size)])


def load_recogniser(folder: str | Path) -> Recogniser:
    """The bundled classifier from the judge's folder."""
    from argrpo_cli.networks.weights import load_weights, read_config

    return Recogniser(load_weights(RecognitionNet(**read_config(folder)["recogniser"]), folder))


def diversity(features: Tensor, class_ids: Tensor) -> Tensor:
    """Mean distance between the features of two pictures of one class, one value for each class in ascending order."""
    return torch.stack([F.pdist(features[class_ids == one]).mean() for one in class_ids.unique()])
