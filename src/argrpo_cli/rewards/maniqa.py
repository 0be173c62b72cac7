"""MANIQA (Yang et al., CVPR workshops 2022, arXiv 2204.08958): image quality without a reference.

The network is pyiqa's, equal to the authors' (github.com/IIGROUP/MANIQA) to 1e-7, with their KonIQ-10k weights. Crops
and pooling are ours, because pyiqa pools the patches of all crops together and the authors average over crops:

    score of a crop = sum(s w) / sum(w) over its 28x28 patches;    score of an image = mean over its crops.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal
from unittest import mock

import numpy as np
from annotated_types import Interval

from argrpo_cli.rewards.base import Count, File, Reward
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import HubFile

if TYPE_CHECKING:
    from torch import Tensor, nn

PARAMETERS = 135_747_530  # of pyiqa's network
SCALE = 0.8  # of the KonIQ-10k weights; the class's own default is PIPAL's
CROP = 224
CROPS = 20
PATCHES = 28  # a side: the ViT's patches are 8 pixels
BLOCKS_READ = [6, 7, 8, 9]  # of the ViT's twelve

Corner = tuple[int, int]


def build_network() -> nn.Module:
    """pyiqa's MANIQA at the size of its KonIQ-10k weights, at random, nothing fetched; UserError without pyiqa."""
    try:
        from pyiqa.archs import maniqa_arch
    except ImportError as error:
        raise UserError(f"maniqa needs pyiqa, which cannot be imported ({error}); run: pip install pyiqa") from error
    create_model = maniqa_arch.timm.create_model

    def untrained(name: str, pretrained: bool) -> nn.Module:
        return create_model(name, pretrained=False)

    # It asks timm for ImageNet weights whatever it is told; MANIQA's own file replaces every one of them.
    with mock.patch.object(maniqa_arch, "timm", SimpleNamespace(create_model=untrained)):
        network = maniqa_arch.MANIQA(pretrained=False, scale=SCALE)
    return network.eval().requires_grad_(False)


def patch_maps(network: nn.Module, crops: Tensor) -> tuple[Tensor, Tensor]:
    """Quality and weight of every patch: crops [N, 3, 224, 224] in [0, 1] to two float32 [N, 784].

    The network's own `forward` would resample crops of this very size to 225 pixels, and run all of the ViT.
    """
    import torch

    tokens = network.vit.forward_intermediates(
        crops * 2 - 1, indices=BLOCKS_READ, output_fmt="NLC", intermediates_only=True, stop_early=True
    )
    network.save_output.outputs.clear()  # filled by its hooks, for its own forward
    x = torch.cat(tokens, -1).transpose(1, 2)
    for attention, conv, swin in (
        (network.tablock1, network.conv1, network.swintransformer1),
        (network.tablock2, network.conv2, network.swintransformer2),
    ):
        for block in attention:
            x = block(x)
        x = swin(conv(x.unflatten(-1, (PATCHES, PATCHES)))).flatten(2)
    x = x.transpose(1, 2)
    return network.fc_score(x)[..., 0].float(), network.fc_weight(x)[..., 0].float()


def pooled(score: Tensor, weight: Tensor) -> Tensor:
    """Mean of the patches' quality by their weights (the paper's patch-weighted prediction): two [N, P] to [N]."""
    return (score * weight).sum(-1) / weight.sum(-1)


def grid_corners(height: int, width: int) -> list[Corner]:
    """Upper left corners (top, left) of the fixed crops: pyiqa's grid, four rows of five.

    The step is a quarter of the room, (side - 224) // 4, on either axis: at 256 pixels the rows start at 0, 8, 16 and
    24, the columns at 0, 8, 16, 24 and 32. pyiqa takes the first 20 of 5x5 crops, so the last row is not looked at.
    Crops that coincide, where a side leaves less than 4 pixels of room, are taken once; the mean stays the same.
    """
    down, right = (height - CROP) // 4, (width - CROP) // 4
    return list(dict.fromkeys((row * down, column * right) for row in range(4) for column in range(5)))


def random_corners(generator: np.random.RandomState, height: int, width: int) -> list[Corner]:
    """The 20 corners that the published code draws for one image: top before left, crop by crop.

    Its range is [0, side - 224), so the last row and column of pixels are never seen; a side of 224, where the
    published code fails, needs no draw. Where both are 224 there is one crop.
    """

    def draw(side: int) -> int:
        return int(generator.randint(0, side - CROP)) if side > CROP else 0

    return [(draw(height), draw(width)) for _ in range(CROPS if max(height, width) > CROP else 1)]


def enlarged(images: Tensor) -> Tensor:
    """Images in [0, 1], [B, 3, H, W], with a short side of at least 224: smaller ones are enlarged, bicubic."""
    import torch.nn.functional as F

    height, width = images.shape[-2:]
    if min(height, width) >= CROP:
        return images
    size = [max(CROP, round(side * CROP / min(height, width))) for side in (height, width)]
    return F.interpolate(images, size, mode="bicubic", align_corners=False).clamp(0, 1)


class Maniqa(Reward):
    """Quality as people rated it in KonIQ-10k, about 0 to 1, larger is better; never negative.

    Args:
        weights: a local ckpt_koniq10k.pt; otherwise it is fetched.
        crops: "grid" looks at the same crops of every image (`grid_corners`). "random" looks at 20 random ones of each,
            as published, but by a generator for each: the same seed and the same pixels give the same score, whatever
            was scored before (the published code draws from numpy's global generator, unseeded).
        seed: of the random crops; the checksum (crc32) of the image's bytes is added to it.
        dtype: "float32" or "bfloat16" of the network; the pooling is in float32. (The token attention multiplies before
            it scales, which float16 need not hold.)
        crop_batch: how many crops go through the network at once; each takes some 0.2 GB in float32.

    An image with a side below 224 is enlarged until its short side is 224 (the published code fails there).
    """

    name, family, reads_prompt = "maniqa", "quality", False
    low, factor = 0.0, 2.0  # its last layer is a ReLU
    files: ClassVar = {"weights": HubFile("chaofengc/IQA-PyTorch-Weights", "ckpt_koniq10k.pt", 4 * PARAMETERS)}
    packages: ClassVar = {"pyiqa": "pyiqa"}
    parameters, network_name = PARAMETERS, "MANIQA of pyiqa"
    working = 4 * 10**9  # 20 crops of 0.2 GB

    def __init__(
        self,
        device: str = "cpu",
        *,
        weights: File = None,
        crops: Literal["grid", "random"] = "grid",
        seed: Annotated[int, Interval(ge=0, lt=2**32)] = 0,
        dtype: Literal["float32", "bfloat16"] = "float32",
        crop_batch: Count = 20,
    ):
        import torch

        from argrpo_cli.networks.weights import fit_state, read_state

        network, path = build_network(), self.path("weights", weights)
        fit_state(network, read_state(path, wrappers=("params",)), path)
        self.network = network.to(device, getattr(torch, dtype))
        self.device, self.dtype, self.crop_batch = device, getattr(torch, dtype), crop_batch
        self.seed = seed if crops == "random" else None

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, H, W] to float32 [B]; the conditions are not looked at."""
        unit = enlarged(images.to(self.device).float().div_(255))
        height, width = unit.shape[-2:]
        if self.seed is None:
            return self.crop_scores(unit, [grid_corners(height, width)] * len(unit)).mean(-1)
        seeds = [(self.seed + zlib.crc32(image.contiguous().numpy())) % 2**32 for image in images.cpu()]
        corners = [random_corners(np.random.RandomState(seed), height, width) for seed in seeds]
        return self.crop_scores(unit, corners).mean(-1)

    def crop_scores(self, images: Tensor, corners: Sequence[Sequence[Corner]]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] and K corners for each to the score of every crop, float32 [B, K]."""
        import torch

        places = [(image, top, left) for image, row in enumerate(corners) for top, left in row]
        parts, start = [], 0
        while start < len(places):
            part = places[start : start + self.crop_batch]
            crops = torch.stack([images[i, :, top : top + CROP, left : left + CROP] for i, top, left in part])
            try:
                parts.append(pooled(*patch_maps(self.network, crops.to(self.dtype))))
            except torch.OutOfMemoryError:  # fewer images at a time would not help: their crops are what is large
                if len(part) == 1:
                    raise
                self.crop_batch = len(part) // 2
                continue
            start += len(part)
        return torch.cat(parts).view(len(images), -1) if parts else images.new_zeros(0, 1)
