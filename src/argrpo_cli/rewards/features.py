"""What rewards compare images by: the features of a network that reads no prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from argrpo_cli.rewards.base import File, Needs
from argrpo_cli.rewards.clip import Clip

if TYPE_CHECKING:
    from torch import Tensor

INCEPTION = 23_850_960  # parameters
ADM_NAME = "adm-256"  # ADM's reference batch of ImageNet at 256 pixels, with statistics of Inception's features
ADM_URL = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)


class Features:
    """uint8 [B, 3, H, W] to float32 [B, D], on the device of the network.

    Args:
        kind: `inception`, the pool features that FID is made of (D = 2048); `clip`, unit features of OpenAI's ViT-B/32
            (D = 512); `nano`, those of the nano judge's classifier (D = 128).
        weights: a local file in the place of the published one.

    Attributes:
        module: the network, by whose weights its features are told from others.

    Raises:
        UserError: the network's package or weights are missing.
    """

    def __init__(self, kind: str, device: str, weights: File = None) -> None:
        self.kind = kind
        if kind == "nano":
            from argrpo_cli.nano.judge import load_recogniser
            from argrpo_cli.networks.pixels import to_unit

            recogniser = load_recogniser().to(device)
            self.module, self._look = recogniser, lambda images: recogniser.features(to_unit(images.to(device)))
        elif kind == "clip":
            clip = Clip(device, weights=weights).clip
            self.module, self._look = clip.network, clip.image_features
        else:
            from argrpo_cli.networks.inception import load_inception

            inception = load_inception(weights, device)
            self.module, self._look = inception.network, lambda images: inception.features(images).pool

    def __call__(self, images: Tensor) -> Tensor:
        return self._look(images)

    @staticmethod
    def needs(kind: str, options: Mapping[str, Any]) -> Needs:
        """What such features need, given a reward's options; Inception's weights are torch-fidelity's to fetch."""
        if kind == "clip":
            return Clip.needs({"weights": options.get("weights")})
        if kind == "nano":
            return Needs()
        packages = {"torch_fidelity": "'argrpo-cli[eval]'"}
        return Needs((), packages, weights=4 * INCEPTION, network="Inception of torch-fidelity")
