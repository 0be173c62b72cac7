"""Random weights of Inception in a file as torch-fidelity reads them, such that features keep their spread."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


def empty_inception() -> nn.Module:
    """torch-fidelity's network before any file of weights is read; it has no other way in."""

    class Unfilled(FeatureExtractorInceptionV3):
        def load_state_dict(self, *given, **named):
            return None

    import torch_fidelity.feature_extractor_inceptionv3 as port

    fetch, port.load_state_dict_from_url = port.load_state_dict_from_url, lambda *given, **named: {}
    try:
        return Unfilled("inception-v3-compat", ["2048", "logits_unbiased"])
    finally:
        port.load_state_dict_from_url = fetch


def save_random_inception(path: Path, seed: int = 0) -> Path:
    """A file of random weights; He's scale, and normalisations that shift and stretch."""
    torch.manual_seed(seed)
    network = empty_inception()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.8, 1.2)
            module.bias.data.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    network.fc.weight.data.normal_(0, 0.05)
    network.fc.bias.data.normal_(0, 1)
    torch.save(network.state_dict(), path)
    return path
