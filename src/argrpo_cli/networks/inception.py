"""Inception's features of images as ADM's evaluator takes them, by torch-fidelity's port of the 2015 network.

    inception = load_inception(device="cuda")
    pool, spatial, probabilities = inception.features(images)      # uint8 [B, 3, H, W], 0..255

FID, precision and recall look at the pool features, IS at the probabilities, sFID at the spatial ones, which
torch-fidelity does not offer: the first 7 channels of the convolution that TensorFlow's graph calls `mixed_6/conv`,
after its ReLU, 17 x 17 places. The network resizes by itself (TensorFlow 1's bilinear, not antialiased, to 299).

The numbers are torch-fidelity's up to rounding (1e-6), and come sooner: batch normalisation is folded into the
convolutions, and on a CPU channels lie innermost and the ReLU is part of oneDNN's convolution. torch's compiler uses
that operator and torch documents it nowhere else; a version without it takes two steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from argrpo_cli.networks.weights import fingerprint, read_state
from argrpo_cli.system.errors import UserError, first_line, out_of_memory

if TYPE_CHECKING:
    from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d

POOL_WIDTH, SPATIAL_WIDTH, CLASSES = 2048, 2023, 1008
SPATIAL_CHANNELS = 7
OUTPUTS = ["2048", "logits_unbiased"]  # by torch-fidelity's names


class Features(NamedTuple):
    """Of a batch: pool float32 [B, 2048], spatial float32 [B, 2023] (row, column, channel), probabilities [B, 1008]."""

    pool: Tensor
    spatial: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class Inception:
    """The network on a device; `fingerprint` tells its weights from others, `package` is what it comes from."""

    network: nn.Module
    device: str
    fingerprint: str
    package: str

    @torch.inference_mode()
    def features(self, images: Tensor) -> Features:
        """uint8 [B, 3, H, W] of any size to features on its device, in IEEE float32; UserError where memory ends."""
        caught: list[Tensor] = []
        hook = self.network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: caught.append(call[2]))
        try:
            # cuDNN otherwise rounds what it multiplies to TF32's ten bits.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                pool, logits = self.network(images.to(self.device))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            why = f"Inception runs out of memory with {len(images)} images; give a smaller --batch-size"
            raise UserError(why) from error
        finally:
            hook.remove()
        spatial = caught[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pool, spatial.contiguous(), logits.softmax(1))


def load_inception(weights: str | Path | None = None, device: str = "cpu") -> Inception:
    """The network with torch-fidelity's published weights, fetched once into torch's cache, or a file of them.

    Raises:
        UserError: torch-fidelity is not installed; the file is absent, damaged or of another network; no connection.
    """
    try:
        import torch_fidelity
        from torch_fidelity import feature_extractor_inceptionv3 as port
    except ImportError as error:
        raise UserError("Inception needs torch-fidelity; install it: pip install 'argrpo-cli[eval]'") from error
    if weights is not None:
        read_state(weights)  # torch-fidelity would run pickled code; what passes here has none
    try:
        network = port.FeatureExtractorInceptionV3(
            "inception-v3-compat", OUTPUTS, feature_extractor_weights_path=None if weights is None else str(weights)
        )
    except (URLError, OSError) as error:
        mend = f"download {port.URL_INCEPTION_V3} and give the file with --inception"
        raise UserError(f"cannot fetch Inception's weights: {first_line(error)}; {mend}") from error
    except RuntimeError as error:
        source = weights if weights is not None else f"the cached file of {port.URL_INCEPTION_V3}"
        raise UserError(f"weights do not fit Inception: {source} ({first_line(error)})") from error
    held = fingerprint([network])
    for name, block in list(network.named_modules()):
        if isinstance(block, port.BasicConv2d):
            network.set_submodule(name, ConvReLU(block))
    return Inception(network.to(device), device, held, f"torch-fidelity {torch_fidelity.__version__}")


class ConvReLU(nn.Module):
    """A convolution with the normalisation folded in, and its ReLU."""

    def __init__(self, block: BasicConv2d) -> None:
        super().__init__()
        self.conv = fuse_conv_bn_eval(block.conv, block.bn)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        if x.device.type != "cpu" or not _one_step():
            return F.relu(conv(x), inplace=True)
        geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        weight = conv.weight.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(x, weight, conv.bias, *geometry, "relu", [], "")


def _one_step() -> bool:
    """Whether this torch has oneDNN's convolution with a ReLU."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
