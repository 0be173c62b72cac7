"""GenEval's detector: Mask2Former with a Swin-S backbone, trained on COCO's instances.

The benchmark runs mmdet 2.x (`mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco`). This is its test pipeline and its
post-processing around transformers' Mask2Former. With the benchmark's own file (`load_mask2former(weights="....pth")`)
it is the benchmark's detector; the weights that are fetched are those of the same architecture and recipe by
Mask2Former's authors. Trained apart, the two do not find quite the same, so results should name the detector.

- The image is resized as OpenCV does it, to fit into 1333 x 800, padded with grey at the right and below to multiples
  of 32, and normalised with ImageNet's mean and deviation.
- Mask logits are enlarged to the padded input, cut to its image, and resized to the original size.
- Of all pairs (query, class) the MAX_PER_IMAGE likeliest are reported, so one query may give several classes. Score =
  class probability x mean mask probability where the mask's logit is positive; the box bounds those pixels. No NMS.

Which of them count, `rules.Thresholds` says.

mmdet and transformers compute the same from the same numbers under other names (`NAMES`), but for three things:

- query, key and value of an attention are one matrix in mmdet, in this order; transformers has three, except in the
  decoder's attention across to the pixels;
- where Swin merges four pixels into one, mmdet's columns run over channels and within each over the pixels (0, 0),
  (0, 1), (1, 0), (1, 1) as (row, column); transformers' over the pixels (0, 0), (1, 0), (0, 1), (1, 1) and within each
  over the channels;
- Swin's indices of relative positions are stored by mmdet and computed by transformers.

Feature levels run from coarse to fine in both; classes are COCO's 80 in its order, "no object" last, in both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argrpo_cli.geneval.prompts import OBJECT_NAMES
from argrpo_cli.geneval.rules import Detection
from argrpo_cli.networks.weights import fit_state, load_pretrained, read_state
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import fetch

REPO, FILES = "facebook/mask2former-swin-small-coco-instance", ("config.json", "model.safetensors")
MMDET_FILES = (".pth", ".pt")
MMDET_SOURCE = "evaluation/download_models.sh of https://github.com/djghosh13/geneval"
LONG_EDGE, SHORT_EDGE, DIVISOR = 1333, 800, 32
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, in 0..255
PADDING = 128  # before normalisation
MAX_PER_IMAGE = 100
MASK_PIXELS = 2**26  # enlarged mask logits at a time: 256 MB of float32
# Swin's last norm is not on the way to the detector, and its tables of indices are computed: files differ in both.
NOT_NEEDED = (".swin.layernorm.weight", ".swin.layernorm.bias", ".relative_position_index")


@dataclass(frozen=True)
class Objects:
    """What was found in one image: the detections of each class, and at `masks[name][detection.index]` their masks.

    Masks are bool [H, W] and lie on the detector's device; several may be one tensor.
    """

    detections: dict[str, list[Detection]] = field(default_factory=dict)
    masks: dict[str, list[Tensor]] = field(default_factory=dict)


class Mask2Former:
    """A network with the classes of OBJECT_NAMES as a detector of uint8 images.

    Args:
        network: transformers' Mask2FormerForUniversalSegmentation, or what gives its `class_queries_logits`
            [B, Q, 81] and `masks_queries_logits` [B, Q, h, w] for pixels [B, 3, H, W].
        batch_size: images in the network at a time, and images whose masks are in memory at a time.
    """

    def __init__(self, network: nn.Module, device: str = "cpu", batch_size: int = 8):
        self.network = network.to(device).eval().requires_grad_(False)
        self.device, self.batch_size = device, batch_size

    @torch.inference_mode()
    def detect(self, images: Tensor) -> Iterator[Objects]:
        """uint8 [B, 3, H, W] to what is found in each; lazily, so that only one batch's masks are in memory."""
        height, width = images.shape[-2:]
        for chunk in images.split(self.batch_size):
            pixels = preprocess(chunk.to(self.device))
            output = self.network(pixel_values=pixels)
            yield from postprocess(
                output.class_queries_logits.float(),
                output.masks_queries_logits.float(),
                padded=tuple(pixels.shape[-2:]),
                scaled=scaled_size(height, width),
                size=(height, width),
            )


def scaled_size(height: int, width: int) -> tuple[int, int]:
    """The size of an image as the network sees it: the largest of its proportions within 1333 x 800."""
    scale = min(LONG_EDGE / max(height, width), SHORT_EDGE / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def preprocess(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to the network's float32 [B, 3, H', W'], H' and W' multiples of 32."""
    height, width = scaled_size(images.shape[-2], images.shape[-1])
    pixels = resize_bytes(images, height, width).float()
    pixels = F.pad(pixels, (0, -width % DIVISOR, 0, -height % DIVISOR), value=PADDING)
    mean, deviation = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (pixels - mean) / deviation


def resize_bytes(images: Tensor, height: int, width: int) -> Tensor:
    """uint8 [..., H, W] to uint8 [..., height, width] as OpenCV's INTER_LINEAR does, to the bit.

    Bilinear without antialiasing, in whole numbers: shares are multiples of 2^-11, and digits are cut off on the way.
    """
    columns, x_shares = _neighbours(images.shape[-1], width, images.device)
    rows, y_shares = _neighbours(images.shape[-2], height, images.device)
    wide = sum(images[..., at].to(torch.int32) * share for at, share in zip(columns, x_shares, strict=True)) >> 4
    high = sum((wide[..., at, :] * share[:, None]) >> 16 for at, share in zip(rows, y_shares, strict=True))
    return ((high + 2) >> 2).to(torch.uint8)


def _neighbours(length: int, size: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """For each of `size` places along an axis of `length` its two neighbours, and their shares in 2048."""
    at = ((torch.arange(size, dtype=torch.float64) + 0.5) * (1 / (size / length)) - 0.5).float()
    low = at.floor()
    share = at - low
    places = [(low.long() + step).clamp(0, length - 1).to(device) for step in (0, 1)]
    shares = [(part * 2048).round().to(device, torch.int32) for part in (1 - share, share)]
    return (places[0], places[1]), (shares[0], shares[1])


def postprocess(
    class_logits: Tensor, mask_logits: Tensor, padded: tuple[int, int], scaled: tuple[int, int], size: tuple[int, int]
) -> list[Objects]:
    """The objects of images of one `size` (height, width) that the network saw `scaled` and then `padded`.

    Args:
        class_logits: float [B, Q, 81], the last one of no object.
        mask_logits: float [B, Q, h, w].
    """
    masks, certainty, boxes = measure_masks(mask_logits.flatten(0, 1), padded, scaled, size)
    shape = mask_logits.shape[:2]
    probability = class_logits.softmax(-1)[..., :-1]
    classes = probability.shape[-1]
    value, place = probability.flatten(1).topk(min(MAX_PER_IMAGE, shape[1] * classes))
    query, label = place // classes, place % classes
    score = value * certainty.view(shape).gather(1, query)
    box = boxes.view(*shape, 4).gather(1, query[..., None].expand(-1, -1, 4))
    columns = (box.tolist(), score.tolist(), label.tolist(), query.tolist())
    images = []
    for own, *rows in zip(masks.unflatten(0, shape), *columns, strict=True):
        objects = Objects()
        for corners, certain, index, number in zip(*rows, strict=True):
            same = objects.detections.setdefault(OBJECT_NAMES[index], [])
            same.append(Detection(tuple(corners), certain, len(same)))
            objects.masks.setdefault(OBJECT_NAMES[index], []).append(own[number])
        images.append(objects)
    return images


def measure_masks(
    mask_logits: Tensor, padded: tuple[int, int], scaled: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks at the size of the image, and their certainty and boxes; MASK_PIXELS bounds the memory for it.

    Args:
        mask_logits: float [N, h, w].

    Returns:
        bool [N, H, W], the mean probability inside each mask [N], and boxes (x0, y0, x1, y1) [N, 4], whose right and
        lower sides are those of the last pixel. Both are 0 for an empty mask.
    """
    masks, certainty, boxes = [], [], []
    for rows in mask_logits.split(max(1, MASK_PIXELS // (padded[0] * padded[1]))):
        logits = F.interpolate(rows[None], padded, mode="bilinear", align_corners=False)
        logits = F.interpolate(logits[..., : scaled[0], : scaled[1]], size, mode="bilinear", align_corners=False)[0]
        mask = logits > 0
        masks.append(mask)
        certainty.append((logits.sigmoid() * mask).sum((1, 2)) / (mask.sum((1, 2)) + 1e-6))
        boxes.append(_bounds(mask))
    return torch.cat(masks), torch.cat(certainty), torch.cat(boxes)


def _bounds(masks: Tensor) -> Tensor:
    """The boxes [N, 4] of masks bool [N, H, W]; zeros where one is empty."""
    sides = []
    for along in (masks.any(1), masks.any(2)):  # columns, then rows that are not empty
        first, last = along.int().argmax(1), along.shape[1] - along.flip(1).int().argmax(1)
        sides.append(torch.stack([first, last], 1) * along.any(1, keepdim=True))
    return torch.cat(sides, 1)[:, [0, 2, 1, 3]].float()


def build_mask2former() -> nn.Module:
    """The published architecture with random weights: Swin-S, 6 and 9 layers, 100 queries, 80 classes."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = [f"stage{number}" for number in range(1, 5)]
    swin = SwinConfig(
        image_size=224, embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7, out_features=stages
    )
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, num_labels=len(OBJECT_NAMES)))


def load_mask2former(device: str = "cpu", weights: str | Path | None = None, batch_size: int = 8) -> Mask2Former:
    """The published detector, fetched once, or a local one.

    Args:
        weights: the benchmark's own file (.pth), or a folder with config.json and model.safetensors.

    Raises:
        UserError: the files are missing, damaged or of another network, or cannot be fetched.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    if weights is not None and Path(weights).suffix in MMDET_FILES:
        return Mask2Former(load_mmdet(weights), device, batch_size)
    if weights is None:
        weights = [fetch(REPO, file) for file in FILES][-1].parent
    folder = Path(weights)
    for file in FILES:
        if not (folder / file).is_file():
            mend = f"give a folder with {' and '.join(FILES)} of {REPO}, or the benchmark's own .pth file"
            raise UserError(f"weights not found: {folder / file}; {mend}")
    network = load_pretrained(Mask2FormerForUniversalSegmentation, folder, torch.float32, NOT_NEEDED)
    if network.config.num_labels != len(OBJECT_NAMES):
        raise UserError(f"{folder} tells {network.config.num_labels} classes apart, expected COCO's 80; use {REPO}")
    return Mask2Former(network, device, batch_size)


# the benchmark's own file

MERGED_PIXELS = (0, 2, 1, 3)  # transformers' order of the four pixels, in mmdet's numbers
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
FUSED = re.compile(r"(.*)\.(?:qkv\.|in_proj_)(weight|bias)")
KEPT_FUSED = ".cross_attn"
COMPUTED = ".relative_position_index"

_SWIN = "model.pixel_level_module.encoder"
_BLOCK, _OWN_BLOCK = "backbone.stages.#.blocks.#", f"{_SWIN}.swin.encoder.layers.#.blocks.#"
_PIXEL, _OWN_PIXEL = "panoptic_head.pixel_decoder", "model.pixel_level_module.decoder"
_ENCODER, _OWN_ENCODER = f"{_PIXEL}.encoder.layers.#", f"{_OWN_PIXEL}.encoder.layers.#"
_QUERIES = "model.transformer_module"
_DECODER, _OWN_DECODER = "panoptic_head.transformer_decoder.layers.#", f"{_QUERIES}.decoder.layers.#"

# The beginnings of mmdet's keys and transformers' in their place; # is a number, the same in both.
NAMES = {
    "backbone.patch_embed.projection": f"{_SWIN}.swin.embeddings.patch_embeddings.projection",
    "backbone.patch_embed.norm": f"{_SWIN}.swin.embeddings.norm",
    f"{_BLOCK}.norm1": f"{_OWN_BLOCK}.layernorm_before",
    f"{_BLOCK}.norm2": f"{_OWN_BLOCK}.layernorm_after",
    f"{_BLOCK}.attn.w_msa.qkv": f"{_OWN_BLOCK}.attention.qkv",
    f"{_BLOCK}.attn.w_msa.proj": f"{_OWN_BLOCK}.attention.o_proj",
    f"{_BLOCK}.attn.w_msa": f"{_OWN_BLOCK}.attention.relative_position_bias",
    f"{_BLOCK}.ffn.layers.0.0": f"{_OWN_BLOCK}.mlp.fc1",
    f"{_BLOCK}.ffn.layers.1": f"{_OWN_BLOCK}.mlp.fc2",
    "backbone.stages.#.downsample": f"{_SWIN}.swin.encoder.layers.#.downsample",
    **{f"backbone.norm{stage}": f"{_SWIN}.hidden_states_norms.stage{stage + 1}" for stage in range(4)},
    f"{_PIXEL}.input_convs.#.conv": f"{_OWN_PIXEL}.input_projections.#.0",
    f"{_PIXEL}.input_convs.#.gn": f"{_OWN_PIXEL}.input_projections.#.1",
    f"{_PIXEL}.level_encoding.weight": f"{_OWN_PIXEL}.level_embed",
    f"{_PIXEL}.lateral_convs.0.conv": f"{_OWN_PIXEL}.adapter_1.0",
    f"{_PIXEL}.lateral_convs.0.gn": f"{_OWN_PIXEL}.adapter_1.1",
    f"{_PIXEL}.output_convs.0.conv": f"{_OWN_PIXEL}.layer_1.0",
    f"{_PIXEL}.output_convs.0.gn": f"{_OWN_PIXEL}.layer_1.1",
    f"{_PIXEL}.mask_feature": f"{_OWN_PIXEL}.mask_projection",
    f"{_ENCODER}.attentions.0": f"{_OWN_ENCODER}.self_attn",
    f"{_ENCODER}.norms.0": f"{_OWN_ENCODER}.self_attn_layer_norm",
    f"{_ENCODER}.norms.1": f"{_OWN_ENCODER}.final_layer_norm",
    f"{_ENCODER}.ffns.0.layers.0.0": f"{_OWN_ENCODER}.fc1",
    f"{_ENCODER}.ffns.0.layers.1": f"{_OWN_ENCODER}.fc2",
    f"{_DECODER}.attentions.0.attn": f"{_OWN_DECODER}.cross_attn",  # comes first in a layer
    f"{_DECODER}.attentions.1.attn": f"{_OWN_DECODER}.self_attn",
    f"{_DECODER}.norms.0": f"{_OWN_DECODER}.cross_attn_layer_norm",
    f"{_DECODER}.norms.1": f"{_OWN_DECODER}.self_attn_layer_norm",
    f"{_DECODER}.norms.2": f"{_OWN_DECODER}.final_layer_norm",
    f"{_DECODER}.ffns.0.layers.0.0": f"{_OWN_DECODER}.fc1",
    f"{_DECODER}.ffns.0.layers.1": f"{_OWN_DECODER}.fc2",
    "panoptic_head.transformer_decoder.post_norm": f"{_QUERIES}.decoder.layernorm",
    "panoptic_head.query_embed": f"{_QUERIES}.queries_embedder",
    "panoptic_head.query_feat": f"{_QUERIES}.queries_features",
    "panoptic_head.level_embed": f"{_QUERIES}.level_embed",
    "panoptic_head.cls_embed": "class_predictor",
    **{
        f"panoptic_head.mask_embed.{2 * layer}": f"{_QUERIES}.decoder.mask_predictor.mask_embedder.{layer}.0"
        for layer in range(3)
    },
}


def load_mmdet(path: str | Path) -> nn.Module:
    """The detector of a file of mmdet 2.x, float32, in transformers' network; no pickled code is run.

    Raises:
        UserError: the file is absent, damaged, or of another network; what is missing, left over or of another shape.
    """
    state = read_state(path, ("state_dict",))
    if not any(key.startswith("panoptic_head.") for key in state):
        raise UserError(f"{path} is no Mask2Former of mmdet 2.x; give the benchmark's own file, see {MMDET_SOURCE}")
    network = build_mask2former()
    own = network.state_dict().items()  # Swin's last norm and the loss have no part in a prediction
    rest = {key: value for key, value in own if key.endswith(NOT_NEEDED) or key.startswith("criterion.")}
    fit_state(network, from_mmdet(state) | rest, path)
    return network


def from_mmdet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmdet's state dict in transformers' names and layout; a key that has no place there stays as it is."""
    mapped: dict[str, Tensor] = {}
    for key, value in state.items():
        name = renamed(key)
        fused = FUSED.fullmatch(name)
        if key.endswith(COMPUTED):
            continue
        if ".downsample." in name:
            mapped[name] = merged_pixels(value)
        elif fused and not fused[1].endswith(KEPT_FUSED):
            parts = zip(PROJECTIONS, value.chunk(3), strict=True)
            mapped.update({f"{fused[1]}.{part}.{fused[2]}": rows.contiguous() for part, rows in parts})
        else:
            mapped[name] = value
    return mapped


def renamed(key: str) -> str:
    """transformers' name of a key of mmdet, attentions still in one; the key itself where there is none."""
    for theirs, own in NAMES.items():
        found = re.match(re.escape(theirs).replace(r"\#", r"(\d+)") + r"(?=\.|$)", key)
        if found:
            for number in found.groups():
                own = own.replace("#", number, 1)
            return own + key[found.end() :]
    return key


def merged_pixels(value: Tensor) -> Tensor:
    """[..., 4 C]: mmdet's columns (channel, pixel) as transformers' (pixel, channel)."""
    by_pixel = value.unflatten(-1, (-1, 4)).transpose(-1, -2)
    return by_pixel[..., MERGED_PIXELS, :].flatten(-2).contiguous()
