"""What looks at GenEval's pictures: a detector and a judge of colours, with the thresholds for their answers.

    observer = load_observer("mask2former", "cuda")             # or "nano", see `nano_detector.py`
    for prompt, (detections, classify_color) in zip(prompts, observer.observe(images, prompts)):
        judge_image(prompt, detections, classify_color, observer.thresholds)

For the benchmark's colours OpenAI's CLIP ViT-L/14 looks at the crop of an object. The class feature of a colour is the
normalised mean of the normalised features of its three texts (`color_texts`), as in clip_benchmark's zero-shot
classifier; the answer is the colour of the largest cosine. Computed in float32, where the benchmark has half precision.
Weights: open_clip's `ViT-L-14-quickgelu`, `openai` (under the name `ViT-L-14` open_clip 3 builds another activation for
them).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from argrpo_cli.geneval import DETECTORS, MASK2FORMER, NANO
from argrpo_cli.geneval.detector import REPO, Mask2Former, load_mask2former
from argrpo_cli.geneval.nano_detector import NANO_THRESHOLDS, Detector, load_detector, observation
from argrpo_cli.geneval.prompts import COLORS, Prompt
from argrpo_cli.geneval.rules import OFFICIAL, ClassifyColor, Detections, Thresholds, colored_objects
from argrpo_cli.networks.weights import fingerprint
from argrpo_cli.system.errors import UserError, did_you_mean
from argrpo_cli.system.files import WEIGHTS

if TYPE_CHECKING:
    from argrpo_cli.networks.clip import ClipModel

BENCHMARKS_OWN = "743b7d99"  # how the SHA-256 of the benchmark's file begins, as its name says
MODEL, PRETRAINED = "ViT-L-14-quickgelu", "openai"
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = (0x99, 0x99, 0x99)  # what CLIP sees where the object is not


def color_texts(name: str) -> list[list[str]]:
    """The three texts of each of the ten colours for a class; the article is always "a"."""
    return [[template.format(color=color, name=name) for template in TEMPLATES] for color in COLORS]


def pick_colors(logits: np.ndarray) -> list[str]:
    """The colour of the largest logit in each row; the first one of equals."""
    return [COLORS[column] for column in np.asarray(logits).reshape(-1, len(COLORS)).argmax(1)]


def crop_for_color(
    image: np.ndarray,
    mask: np.ndarray | None,
    box: Sequence[float] | None,
    background: tuple[int, int, int] | None = GREY,
) -> np.ndarray:
    """The picture of one object: `image` (uint8 [H, W, 3]), with `background` outside `mask`, cut to `box`.

    The corners of the box are rounded to whole pixels, halves to even ones; what lies outside the image is black.
    Without a mask or a background the image's own background stays, without a box the image is not cut.
    """
    if mask is not None and background is not None:
        image = np.where(np.asarray(mask, bool)[:, :, None], image, np.array(background, np.uint8))
    if box is None:
        return image
    x0, y0, x1, y1 = (int(corner) for corner in np.rint(np.asarray(box[:4], np.float32)))
    crop = np.zeros((y1 - y0, x1 - x0, 3), np.uint8)
    height, width = image.shape[:2]
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if left < right and top < bottom:
        crop[top - y0 : bottom - y0, left - x0 : right - x0] = image[top:bottom, left:right]
    return crop


class ClipColors:
    """Which of GenEval's ten colours have these objects? Their crops may be of any sizes.

    Args:
        batch_size: crops in the network at a time.
    """

    def __init__(self, clip: ClipModel, batch_size: int = 64):
        import open_clip

        self.clip, self.batch_size = clip, batch_size
        pixels = clip.prepare
        self.transform = open_clip.image_transform(
            pixels.size, is_train=False, mean=tuple(pixels.mean), std=tuple(pixels.std), resize_mode=pixels.resize_mode
        )
        self._classes: dict[str, Tensor] = {}

    def classify(self, names: Sequence[str], crops: Sequence[np.ndarray]) -> list[str]:
        """The colours of objects of classes `names` on their `crops`, uint8 [H, W, 3] as `crop_for_color` cuts them."""
        return pick_colors(self.logits(names, crops).cpu().numpy())

    @torch.inference_mode()
    def logits(self, names: Sequence[str], crops: Sequence[np.ndarray]) -> Tensor:
        """float32 [crops, 10], on the device of the network: 100 times the cosines, in the order of COLORS."""
        rows = [torch.zeros(0, len(COLORS), device=self.clip.device)]
        for start in range(0, len(crops), self.batch_size):
            part = slice(start, start + self.batch_size)
            pixels = torch.stack([self.transform(Image.fromarray(crop)) for crop in crops[part]])
            pixels = pixels.to(self.clip.device, self.clip.dtype)
            images = F.normalize(self.clip.network.encode_image(pixels).float(), dim=-1)
            classes = torch.stack([self._class_features(name) for name in names[part]])
            rows.append(100 * torch.einsum("bd,bcd->bc", images, classes))
        return torch.cat(rows)

    def _class_features(self, name: str) -> Tensor:
        """float32 [10, D], a unit vector for each colour of a class."""
        if name not in self._classes:
            texts = color_texts(name)
            features = self.clip.text_features([text for row in texts for text in row])
            self._classes[name] = F.normalize(features.unflatten(0, (len(texts), -1)).mean(1), dim=-1)
        return self._classes[name]


class Observer:
    """What `load_observer` gives.

    Attributes:
        thresholds: for its scores.
        label: name, source and hash of the weights, of the network for colours too; identifies the figures.
        packages: that it computes with, beside torch.
        least_score: objects of a lower score need not be listed; they cannot have counted.
        names_every_color: colours are known of all objects, not only of those that a prompt asks them of.
    """

    thresholds: Thresholds = OFFICIAL
    label: Mapping[str, Any]
    packages: Sequence[str] = ()
    least_score = 0.0
    names_every_color = False

    def observe(self, images: Tensor, prompts: Sequence[Prompt]) -> list[tuple[Detections, ClassifyColor]]:
        """uint8 [B, 3, H, W] and B prompts to what `judge_image` and `reward_score` take."""
        raise NotImplementedError


class NanoObserver(Observer):
    """The detector of the nano world, which names colours itself."""

    thresholds, names_every_color = NANO_THRESHOLDS, True

    def __init__(self, detector: Detector):
        self.detector = detector

    @cached_property
    def label(self) -> dict[str, Any]:
        return {"name": "nano-detector", "weights": fingerprint([self.detector.network])}

    def observe(self, images: Tensor, prompts: Sequence[Prompt]) -> list[tuple[Detections, ClassifyColor]]:
        """uint8 [B, 3, H, W], seen at 64x64, and B prompts."""
        if len(prompts) != len(images):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        return [observation(objects) for objects in self.detector.detect(images)]


class OfficialObserver(Observer):
    """Mask2Former, and CLIP for the colours: the crops of all images go through it together.

    Args:
        weights, clip_weights: the local files that they are of. Whether they are the benchmark's own, the hash says.
    """

    packages, least_score = ("transformers", "open_clip_torch"), 0.1

    def __init__(
        self,
        detector: Mask2Former,
        colors: ClipColors,
        weights: str | Path | None = None,
        clip_weights: str | Path | None = None,
    ):
        self.detector, self.colors, self.weights, self.clip_weights = detector, colors, weights, clip_weights

    @cached_property
    def label(self) -> dict[str, Any]:
        path = None if self.weights is None else Path(self.weights)
        source: dict[str, Any] = {"source": REPO if path is None else path.name, "benchmarks_own": False}
        if path is not None and not path.is_dir():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            source |= {"sha256": digest, "benchmarks_own": digest.startswith(BENCHMARKS_OWN)}
        return {
            "name": "Mask2Former Swin-S",
            **source,
            "weights": fingerprint([self.detector.network]),
            "colors": {
                "name": f"CLIP {MODEL}, {PRETRAINED if self.clip_weights is None else Path(self.clip_weights).name}",
                "weights": fingerprint([self.colors.clip.network]),
            },
        }

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
            return lambda name, detections: [answers[place, name, detection.index] for detection in detections]

        return [(detections, classifier(place)) for place, detections in enumerate(by_image)]


def load_observer(
    detector: str,
    device: str = "cpu",
    weights: str | Path | None = None,
    clip_weights: str | Path | None = None,
    batch_size: int = 8,
) -> Observer:
    """What looks at the images, by the detector's name.

    Args:
        weights: a local folder of the detector in the place of the published or bundled one, or the benchmark's own
            .pth file.
        clip_weights: a local file of OpenAI's ViT-L/14 in open_clip's layout in the place of the published one.
        batch_size: images in Mask2Former at a time.

    Raises:
        UserError: an unknown detector, weights that are missing, damaged or of another network.
    """
    if detector == NANO:
        if clip_weights is not None:
            raise UserError(f"geneval: clip_weights = {clip_weights}: the detector nano has no CLIP; leave it out")
        return NanoObserver(load_detector(WEIGHTS / "nano-detector" if weights is None else weights, device))
    if detector != MASK2FORMER:
        hint = did_you_mean(detector, DETECTORS)
        raise UserError(f"geneval: detector {detector!r} is unknown; there are {', '.join(DETECTORS)}{hint}")
    from argrpo_cli.networks.clip import load_open_clip

    mask2former = load_mask2former(device, weights, batch_size)
    colors = ClipColors(load_open_clip(MODEL, PRETRAINED, clip_weights, device))
    return OfficialObserver(mask2former, colors, weights, clip_weights)
