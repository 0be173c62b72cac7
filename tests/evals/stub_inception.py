"""A network in Inception's place that takes no time."""

from __future__ import annotations

import torch
from torch import Tensor

from argrpo_cli.evals import imagenet, imagenet_reference
from argrpo_cli.networks.inception import Features

POOL_WIDTH, SPATIAL_WIDTH, CLASSES = 64, 48, 20


class StubInception:
    """Fixed random projections of the pixels, which depend on the batch by rounding as a real network's do."""

    device, fingerprint, package = "cpu", "stubstubstubstub", "stub 1"

    def __init__(self) -> None:
        self.batches: list[int] = []  # how many images each had

    def features(self, images: Tensor) -> Features:
        self.batches.append(len(images))
        pixels = images.flatten(1).float() / 255
        widths = (POOL_WIDTH, SPATIAL_WIDTH, CLASSES)
        outputs = []
        for seed, width in enumerate(widths):
            generator = torch.Generator().manual_seed(seed)
            outputs.append(pixels @ torch.randn(pixels.shape[1], width, generator=generator))
        return Features(outputs[0], outputs[1], outputs[2].softmax(1))


def install(network: StubInception, replace=setattr) -> None:
    """Let the evaluation use the network instead of Inception; `replace` sets an attribute of a module."""
    replace(imagenet, "load_inception", lambda weights, device: network)
    replace(imagenet_reference, "POOL_WIDTH", POOL_WIDTH)
    replace(imagenet_reference, "SPATIAL_WIDTH", SPATIAL_WIDTH)
