"""DINOv2 (Oquab et al. 2023) in transformers' layout: how images look, whatever they are called.

from argrpo_cli.networks.dinov2 import load_dinov2
load_dinov2("facebook/dinov2-large").features(images)                    # float32 [B, 1024]
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from argrpo_cli.networks.pixels import Preprocess
from argrpo_cli.networks.weights import load_pretrained
from argrpo_cli.system.files import fetch_folder

FILES = ("config.json", "model.safetensors")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
SIZE = 224  # pixels; the network's table of positions, made for 518, is interpolated


class DinoV2:
    """The network on a device, in float32."""

    def __init__(self, network: nn.Module, device: str = "cpu"):
        self.network = network.to(device).eval().requires_grad_(False)
        self.device = device
        self.prepare = Preprocess(SIZE, MEAN, STD, resize_mode="squash")

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W], whole and scaled to 224 x 224, to the class token after the last norm, float32 [B, D]."""
        return self.network(self.prepare(images.to(self.device))).pooler_output


def load_dinov2(model: str, device: str = "cpu") -> DinoV2:
    """A DINOv2 of the hub, fetched once, or of a local folder.

    Raises:
        UserError: no such model, another kind of model, weights that are missing, damaged or of another network.
    """
    from transformers import Dinov2Model

    folder = Path(model) if Path(model).is_dir() else fetch_folder(model, FILES)
    return DinoV2(load_pretrained(Dinov2Model, folder, torch.float32), device)
