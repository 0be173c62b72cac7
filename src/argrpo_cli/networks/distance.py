"""How different two pictures look: distances of network features, as LPIPS (Zhang et al. 2018, arXiv:1801.03924).

Of the maps [B, C, h, w] of some layers of a network, every place scaled to unit length:

    d(x, y) = sum over layers of the mean over places of sum over channels of w_c (x_c - y_c)^2

LPIPS takes the five last layers before VGG16 halves its maps, with weights w_c fitted to what people say. The nano
world has no such weights: there w is 1, and the network is that of a reward, and not of its judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from argrpo_cli.networks.nano import QualityNet
from argrpo_cli.networks.weights import fit_state, load_network, published_file, read_state
from argrpo_cli.system.files import WEIGHTS, HubFile, expanded

if TYPE_CHECKING:
    from collections.abc import Iterator

# The weights of torchvision, with its names, and LPIPS's of version 0.1, `lin0.model.1.weight` and so on.
VGG16 = HubFile("timm/vgg16.tv_in1k", "model.safetensors", 553_430_176)
LINEAR = HubFile("chaofengc/IQA-PyTorch-Weights", "LPIPS_v0.1_vgg-a78928a0.pth", 7_000)
VGG16_PARAMETERS = 14_714_688  # of its convolutions
WIDTHS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions between two halvings
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1], LPIPS's own
FOLDER = "pixel.perceptual_folder"  # of a recipe
AT_ONCE = 2**22  # pixels that go through a network at a time, of both sides together

Distance = Callable[[Tensor, Tensor], Tensor]


class Vgg16(nn.Module):
    """The convolutions of VGG16, numbered as published."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width, count in WIDTHS:
            for _ in range(count):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1]: the maps of five depths."""
        for constant, operation in ((MEAN, torch.sub), (DEVIATION, torch.div)):
            x = operation(x, torch.tensor(constant, dtype=x.dtype, device=x.device)[:, None, None])
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                yield x
            x = layer(x)


def maps_of_body(network: QualityNet, x: Tensor) -> Iterator[Tensor]:
    """Pixels [B, 3, 64, 64] in [-1, 1]: the maps before each halving of a nano network's body, and the last."""
    for layer in network.body:
        if isinstance(layer, nn.Conv2d) and layer.stride != (1, 1):
            yield x
        x = layer(x)
    yield x


@torch.inference_mode()
def feature_distance(
    maps: Callable[[Tensor], Iterator[Tensor]], weights: Sequence[Tensor] | None, images: Tensor, others: Tensor
) -> Tensor:
    """d of images and others, both uint8 [B, 3, H, W]: float32 [B], 0 for the same.

    Args:
        maps: gives [B, C, h, w] of some depths of pixels in [-1, 1].
        weights: w of each depth, [C]; None is 1.
    """
    at_once = max(1, AT_ONCE // (2 * images.shape[-1] * images.shape[-2]))
    parts = []
    for pair in zip(images.split(at_once), others.split(at_once), strict=True):
        unit = torch.cat(pair).float().div(127.5).sub(1)
        total: Tensor | float = 0.0
        for depth, one in enumerate(maps(unit)):
            left, right = F.normalize(one.float(), dim=1, eps=1e-10).chunk(2)
            squares = (left - right).square()
            if weights is not None:
                squares = squares * weights[depth][:, None, None]
            total = total + squares.sum(1).mean((1, 2))
        parts.append(total)
    return torch.cat(parts)


def load_distance(name: str, device: str, captions: bool = False, folder: str | None = None) -> Distance:
    """A distance by the name that a recipe has for it, "lpips" or "nano".

    Args:
        captions: of the nano world, whether scenes of several objects are compared.
        folder: of the files of `VGG16` and `LINEAR`; by default the hub's.

    Raises:
        UserError: weights that cannot be fetched, or are others.
    """
    if name == "nano":
        network = load_network(QualityNet, WEIGHTS / ("nano-quality-t2i" if captions else "nano-quality"), device)
        return partial(feature_distance, partial(maps_of_body, network), None)
    vgg, linear = (
        published_file(one.repo, one.file, None if folder is None else expanded(folder) / one.file, FOLDER)
        for one in (VGG16, LINEAR)
    )
    state = {key: value for key, value in read_state(vgg).items() if key.startswith("features.")}
    return lpips(state, str(vgg), read_state(linear, ("params",)), device)


def lpips(state: dict[str, Tensor], source: str, linear: dict[str, Tensor], device: str) -> Distance:
    """LPIPS from the weights of VGG16's convolutions and those of its linear layers."""
    network = Vgg16()
    fit_state(network, state, source)
    fitted = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width, _ in WIDTHS)
    names = {f"lin{depth}.model.1.weight": f"{depth}.weight" for depth in range(len(WIDTHS))}
    fit_state(fitted, linear, LINEAR.file, names=names)
    weights = [one.weight.detach().flatten().to(device) for one in fitted]
    return partial(feature_distance, network.to(device).eval().requires_grad_(False), weights)
