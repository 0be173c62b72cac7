"""GenEval's detector, Mask2Former with a Swin-S backbone trained on COCO's instances; and what looks at images.

    observer = load_observer("mask2former", "cuda")             # or "nano", see `nano_detector.py`
    for prompt, (detections, classify_color) in zip(prompts, observer.observe(images, prompts)):
        judge_image(prompt, detections, classify_color, observer.thresholds)

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
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argrpo_cli.geneval import DETECTORS, MASK2FORMER, NANO
from argrpo_cli.geneval.colors import MODEL, PRETRAINED, crop_for_color
from argrpo_cli.geneval.grammar import OBJECT_NAMES, Prompt
from argrpo_cli.geneval.mmdet_weights import from_mmdet
from argrpo_cli.geneval.nano_detector import NanoObserver, load_detector
from argrpo_cli.geneval.rules import OFFICIAL, ClassifyColor, Detection, Detections, Thresholds, colored_objects
from argrpo_cli.networks.weights import fingerprint, fit_state, load_pretrained, read_state
from argrpo_cli.system.errors import UserError, did_you_mean
from argrpo_cli.system.files import WEIGHTS, fetch

if TYPE_CHECKING:
    from argrpo_cli.geneval.colors import ClipColors


REPO, FILES = "facebook/mask2former-swin-small-coco-instance", ("config.json", "model.safetensors")
MMDET_FILES = (".pth", ".pt")
MMDET_SOURCE = "evaluation/download_models.sh of https://github.com/djghosh13/geneval"
BENCHMARKS_OWN = "743b7d99"  # how the SHA-256 of the benchmark's file begins, as its name says
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

    detections: dict[str, list[Detection]]
    masks: dict[str, list[Tensor]]


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

    def detect(self, images: Tensor) -> Iterator[Objects]:
        """uint8 [B, 3, H, W] to what is found in each; lazily, so that only one batch's masks are in memory."""
        for chunk in images.split(self.batch_size):
            yield from self._detect(chunk.to(self.device))

    @torch.inference_mode()
    def _detect(self, images: Tensor) -> list[Objects]:
        size = (images.shape[-2], images.shape[-1])
        pixels = preprocess(images)
        output = self.network(pixel_values=pixels)
        padded = (pixels.shape[-2], pixels.shape[-1])
        return postprocess(
            output.class_queries_logits.float(), output.masks_queries_logits.float(), padded, scaled_size(*size), size
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
    wide = images.to(torch.int32)
    wide = sum(wide[..., at] * share for at, share in zip(columns, x_shares, strict=True)) >> 4
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
    return [_objects(*rows) for rows in zip(*columns, masks.unflatten(0, shape), strict=True)]


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


def build_mask2former() -> nn.Module:
    """The published architecture with random weights: Swin-S, 6 and 9 layers, 100 queries, 80 classes."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = [f"stage{number}" for number in range(1, 5)]
    swin = SwinConfig(
        image_size=224, embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7, out_features=stages
    )
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, num_labels=len(OBJECT_NAMES)))


def load_mask2former(device: str = "cpu", weights: str | Path | None = None) -> Mask2Former:
    """The published detector, fetched once, or a local one.

    Args:
        weights: the benchmark's own file (.pth), or a folder with config.json and model.safetensors.

    Raises:
        UserError: the files are missing, damaged or of another network, or cannot be fetched.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    if weights is not None and Path(weights).suffix in MMDET_FILES:
        return Mask2Former(load_mmdet(weights), device)
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
    return Mask2Former(network, device)


def load_mmdet(path: str | Path) -> nn.Module:
    """The detector of a file of mmdet 2.x, float32, in transformers' network; no pickled code is run.

    Raises:
        UserError: the file is absent, damaged, or of another network.
    """
    state = read_state(path, ("state_dict",))
    if not any(key.startswith("panoptic_head.") for key in state):
        raise UserError(f"{path} is no Mask2Former of mmdet 2.x; give the benchmark's own file, see {MMDET_SOURCE}")
    network = build_mask2former()
    fill(network, state, path)
    return network


def fill(network: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Give transformers' Mask2Former all numbers of mmdet's.

    Raises:
        UserError: `source`, and what is missing, left over or of another shape.
    """
    mapped = from_mmdet(state)
    for key, value in network.state_dict().items():  # Swin's last norm and the loss have no part in a prediction
        if key.endswith(NOT_NEEDED) or key.startswith("criterion."):
            mapped[key] = value
    fit_state(network, mapped, source)


def _bounds(masks: Tensor) -> Tensor:
    """The boxes [N, 4] of masks bool [N, H, W]; zeros where one is empty."""
    sides = []
    for along in (masks.any(1), masks.any(2)):  # columns, then rows that are not empty
        first, last = along.int().argmax(1), along.shape[1] - along.flip(1).int().argmax(1)
        sides.append(torch.stack([first, last], 1) * along.any(1, keepdim=True))
    return torch.cat(sides, 1)[:, [0, 2, 1, 3]].float()


def _objects(
    boxes: list[list[float]], scores: list[float], labels: list[int], queries: list[int], masks: Tensor
) -> Objects:
    """The rows of one image by class."""
    objects = Objects({}, {})
    for box, score, label, query in zip(boxes, scores, labels, queries, strict=True):
        name = OBJECT_NAMES[label]
        own = objects.detections.setdefault(name, [])
        own.append(Detection(tuple(box), score, len(own)))
        objects.masks.setdefault(name, []).append(masks[query])
    return objects


class Observer(Protocol):
    """A detector and a judge of colours, with the thresholds for its scores."""

    thresholds: Thresholds

    def observe(self, images: Tensor, prompts: Sequence[Prompt]) -> list[tuple[Detections, ClassifyColor]]:
        """uint8 [B, 3, H, W] and B prompts to what `judge_image` and `reward_score` take."""
        ...


class OfficialObserver:
    """Mask2Former, and CLIP for the colours: the crops of all images go through it together."""

    def __init__(self, detector: Mask2Former, colors: ClipColors, thresholds: Thresholds = OFFICIAL):
        self.detector, self.colors, self.thresholds = detector, colors, thresholds

    def observe(self, images: Tensor, prompts: Sequence[Prompt]) -> list[tuple[Detections, ClassifyColor]]:
        """uint8 [B, 3, H, W] and B prompts; colours are known of the objects that the prompts ask them of."""
        pictures = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        by_image: list[Detections] = []
        questions: list[tuple[int, str, int]] = []  # image, class, index of the detection
        crops: list[np.ndarray] = []
        for place, (prompt, objects) in enumerate(zip(prompts, self.detector.detect(images), strict=True)):
            by_image.append(objects.detections)
            for name, detection in colored_objects(prompt, objects.detections, self.thresholds):
                mask = objects.masks[name][detection.index].cpu().numpy()
                questions.append((place, name, detection.index))
                crops.append(crop_for_color(pictures[place], mask, detection.box))
        answers = dict(zip(questions, self.colors.classify([name for _, name, _ in questions], crops), strict=True))

        def classifier(place: int) -> ClassifyColor:
            def classify(name: str, detections: Sequence[Detection]) -> list[str]:
                return [answers[place, name, detection.index] for detection in detections]

            return classify

        return [(detections, classifier(place)) for place, detections in enumerate(by_image)]


def load_observer(
    detector: str, device: str = "cpu", weights: str | Path | None = None, clip_weights: str | Path | None = None
) -> Observer:
    """What looks at the images, by the detector's name.

    Args:
        weights: a local folder of the detector in the place of the published or bundled one, or the benchmark's own
            .pth file.
        clip_weights: a local file of OpenAI's ViT-L/14 in open_clip's layout in the place of the published one.

    Raises:
        UserError: an unknown detector, weights that are missing, damaged or of another network.
    """
    if detector == NANO:
        if clip_weights is not None:
            raise UserError(f"geneval: clip_weights = {clip_weights}: the detector nano has no CLIP; leave it out")
        return NanoObserver(load_detector(WEIGHTS / "nano-detector" if weights is None else weights, device))
    if detector == MASK2FORMER:
        from argrpo_cli.geneval.colors import ClipColors, load_color_clip

        return OfficialObserver(load_mask2former(device, weights), ClipColors(load_color_clip(device, clip_weights)))
    hint = did_you_mean(detector, DETECTORS)
    raise UserError(f"geneval: detector {detector!r} is unknown; there are {', '.join(DETECTORS)}{hint}")


def describe(observer: Observer, weights: Path | None = None, clip_weights: str | Path | None = None) -> dict[str, Any]:
    """What identifies an observer's figures: name, source and hash of the weights, of the network for colours too.

    Args:
        weights, clip_weights: what it was loaded with. Whether they are the benchmark's own, the file's hash says.
    """
    own = {"weights": fingerprint([observer.detector.network])}
    if isinstance(observer, NanoObserver):
        return {"name": "nano-detector", **own}
    source: dict[str, Any] = {"source": REPO if weights is None else weights.name, "benchmarks_own": False}
    if weights is not None and not weights.is_dir():
        with open(weights, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        source |= {"sha256": digest, "benchmarks_own": digest.startswith(BENCHMARKS_OWN)}
    name = f"CLIP {MODEL}, {PRETRAINED if clip_weights is None else Path(clip_weights).name}"
    colors = {"name": name, "weights": fingerprint([observer.colors.clip.network])}
    return {"name": "Mask2Former Swin-S", **source, **own, "colors": colors}
