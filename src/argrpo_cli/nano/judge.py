"""The independent judge of the nano world, for evaluation. No reward looks at what it looks at, but `loo-fid` and
`clusters` with `features: nano`: then its classifier's numbers are what was trained, and its rendering match is not.

First a question of truth: how well does a sample match a rendering of its class (`matching.py`)? Beside it recognition
by a classifier of its own, whose features also serve to compare whole sets of pictures; it is built unlike the reward
networks (dense blocks with batch normalisation, raw renderings beside reconstructions in its training), so that it does
not share their blind spots more than it must.

The tokenizer blurs small objects more than large ones, so clean scenes match the better the larger they are. A policy
that merely draws larger would gain; `expected_db` says what real scenes of a class and size reach, to be subtracted.

The judge needs no font. It keeps tokens of canonical scenes (each object at its largest size, shifted against the
tokenizer's grid, on different backgrounds), decodes them with nano-vq, and solves for colour and alpha: on background
B_s a pixel is I_s = p + (1 - a) B_s, hence I_s - B_s = p - a B_s, a least-squares line through all the scenes.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from argrpo_cli.nano import scenes
from argrpo_cli.nano.matching import Match, Matcher, Template, match_classes
from argrpo_cli.nano.tokens import TOKENS_FILE, decode, load_tokenizer
from argrpo_cli.networks.weights import load_weights
from argrpo_cli.policy.llamagen.pretrained import VQModel
from argrpo_cli.policy.llamagen.vq import from_uint8
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import WEIGHTS, load_tensors, read_json, save_tensors

MOMENTS_FILE = "moments.safetensors"
LARGEST = scenes.SINGLE_SIZES[1]
CENTRE = sum(scenes.SINGLE_SIZES) / 2
SPATIAL_CHANNELS = 7
AT_ONCE = 100  # pictures
FITTED = 480  # reference scenes behind `expected_db`: 20 of each class for a fit of one number a class and two more


def canonical_layout() -> list[tuple[int, int, tuple[float, float, float]]]:
    """Corner (x, y) and background of the canonical scenes of every class: six shifts, six hues, all pairs."""
    shifts = [(0, 0), (1, 3), (2, 2), (3, 4), (4, 1), (0, 4)]
    pastels = [colorsys.hsv_to_rgb(step / 6, 0.35, 0.88 if step % 2 else 1.0) for step in range(6)]
    return [(x, y, pastel) for x, y in shifts for pastel in pastels]


def solve_template(images: Tensor) -> Template:
    """Colour and alpha from the canonical scenes of one class, uint8 [S, 3, 64, 64] in the order of the layout."""
    layout = canonical_layout()
    windows = torch.stack(
        [image[:, y : y + LARGEST, x : x + LARGEST] for image, (x, y, _) in zip(images, layout, strict=True)]
    )
    background = torch.tensor([b for _, _, b in layout])[:, :, None, None]  # [S, 3, 1, 1]
    rise = windows.float() / 255 - background
    rise_mean, background_mean = rise.mean(0), background.mean(0)
    spread = background - background_mean
    alpha = -((rise - rise_mean) * spread).sum((0, 1)) / spread.square().sum()
    # Reconstructions blur: what is nearly clear or nearly solid was so.
    alpha = ((alpha - 0.06) / 0.88).clamp(0, 1)[None]
    colour = rise_mean + alpha * background_mean
    return Template(colour.clamp(min=0).minimum(alpha), alpha)


class DenseLayer(nn.Module):
    """Adds `growth` channels computed from all the channels before (Huang et al. 2017)."""

    def __init__(self, width: int, growth: int):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], dim=1)


class RecognitionNet(nn.Module):
    """64x64 pixels to class logits by way of features [B, 128]."""

    def __init__(self, classes: int = 24, growth: int = 20, layers: Sequence[int] = (2, 3, 3), features: int = 128):
        super().__init__()
        width = 32
        body: list[nn.Module] = [nn.Conv2d(3, width, 5, stride=2, padding=2, bias=False)]
        self.middle = 0
        for index, count in enumerate(layers):
            for _ in range(count):
                body.append(DenseLayer(width, growth))
                width += growth
            half = width // 2
            body += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, half, 1, bias=False), nn.AvgPool2d(2)]
            width = half
            if index == 1:
                self.middle = len(body)  # behind the second transition
        self.body = nn.Sequential(*body, nn.BatchNorm2d(width), nn.ReLU())
        self.project = nn.Linear(width * 16, features)  # 4x4 cells: parts keep their places
        self.classify = nn.Linear(features, classes)

    def features(self, x: Tensor) -> Tensor:
        """x [B, 3, 64, 64] in [-1, 1] to [B, 128]."""
        return self.project(self.body(x).flatten(1))

    def spatial(self, x: Tensor) -> Tensor:
        """x [B, 3, 64, 64] in [-1, 1] to [B, 112]: where things are, halfway through the network, for sFID.

        As ADM takes the first 7 channels of a map in the middle of Inception, these are the first 7 behind the second
        transition (8x8 cells, no class decided yet), averaged to 4x4 cells: 112 numbers, few enough for the covariance
        of about a thousand images.
        """
        return F.avg_pool2d(self.body[: self.middle](x)[:, :SPATIAL_CHANNELS], 2).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(F.relu(self.features(x)))


def diversity(features: Tensor, class_ids: Tensor) -> Tensor:
    """Mean distance between the features of two pictures of one class, one value for each class in ascending order."""
    return torch.stack([F.pdist(features[class_ids == one]).mean() for one in class_ids.unique()])


@dataclass
class Judge:
    """What the judge knows: a template per class, its classifier, tokens and classes of reference scenes."""

    templates: list[Template]
    recogniser: RecognitionNet
    tokenizer: VQModel
    reference_tokens: Tensor
    reference_classes: Tensor

    def match(self, images: Tensor, class_ids: Tensor) -> Match:
        """Rendering match of uint8 [B, 3, 64, 64] against their own classes, int64 [B]."""
        return match_classes(self.matchers, images.cpu(), class_ids.cpu())

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """What the classifier sees in uint8 [B, 3, 64, 64]: float32 [B, 128]."""
        return torch.cat([self.recogniser.features(from_uint8(chunk)) for chunk in images.split(AT_ONCE)])

    @torch.inference_mode()
    def spatial_features(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, 64, 64] to float32 [B, 112]."""
        return torch.cat([self.recogniser.spatial(from_uint8(chunk)) for chunk in images.split(AT_ONCE)])

    @torch.inference_mode()
    def probabilities(self, features: Tensor) -> Tensor:
        """Features to the probability of each class, float32 [B, classes]."""
        return self.recogniser.classify(F.relu(features)).softmax(-1)

    def expected_db(self, class_ids: Tensor, size: Tensor) -> Tensor:
        """The match in dB that real scenes of these classes (int64 [B]) and sizes (pixels, [B]) reach, float32 [B]."""
        return (self._factors(class_ids, size) @ self.size_coefficients).float()

    @cached_property
    def size_coefficients(self) -> Tensor:
        """Of db ~ class + size + size^2 on the reference scenes, by least squares: float64 [classes + 2]."""
        match = self.reference_match
        factors = self._factors(self.reference_classes[:FITTED], match.size)
        return torch.linalg.lstsq(factors, match.db.double()[:, None], driver="gelsd").solution[:, 0]

    def _factors(self, class_ids: Tensor, size: Tensor) -> Tensor:
        """Class as one-hot, size and its square, float64 [B, classes + 2]."""
        centred = (size.double()[:, None] - CENTRE) / 10  # near 1, for a well-conditioned fit
        return torch.cat([F.one_hot(class_ids, len(self.templates)).double(), centred, centred.square()], dim=1)

    @cached_property
    def reference_match(self) -> Match:
        """Matches of the first reference scenes, those that `expected_db` is fitted to."""
        return self.match(self.reference_images[:FITTED], self.reference_classes[:FITTED])

    @cached_property
    def matchers(self) -> dict[int, Matcher]:
        return {class_id: Matcher(template) for class_id, template in enumerate(self.templates)}

    @cached_property
    def reference_images(self) -> Tensor:
        """Reconstructions of the reference scenes, uint8 [R, 3, 64, 64]."""
        return decode(self.tokenizer, self.reference_tokens)

    @cached_property
    def reference_features(self) -> Tensor:
        return self.features(self.reference_images)

    @cached_property
    def reference_spatial(self) -> Tensor:
        return self.spatial_features(self.reference_images)


def load_recogniser(folder: str | Path = WEIGHTS / "nano-judge") -> RecognitionNet:
    """The judge's classifier alone, on the CPU."""
    return load_weights(RecognitionNet(**read_json(Path(folder) / "config.json")["recogniser"]), folder)


def save_moments(folder: Path, recogniser: RecognitionNet, images: Tensor) -> None:
    """Write mean and standard deviation of the features of the reference images, uint8 [R, 3, 64, 64]: decoding them
    takes ten seconds, and a reward needs no more of them."""
    with torch.inference_mode():
        features = torch.cat([recogniser.features(from_uint8(chunk)) for chunk in images.split(AT_ONCE)]).double()
    save_tensors(folder / MOMENTS_FILE, {"mean": features.mean(0), "deviation": features.std(0, correction=0)})


def reference_moments(folder: str | Path = WEIGHTS / "nano-judge") -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the reference's features, float64 [128]; UserError where they are missing."""
    moments = load_tensors(Path(folder) / MOMENTS_FILE)
    if moments is None:
        raise UserError(f"{Path(folder) / MOMENTS_FILE} is missing; install the package again or run `make nano`")
    return moments["mean"], moments["deviation"]


@lru_cache(maxsize=1)
def load_judge(folder: str | Path = WEIGHTS / "nano-judge") -> Judge:
    """The bundled judge, on the CPU, kept in memory; UserError when its files are missing."""
    path = Path(folder) / TOKENS_FILE
    if not path.is_file():
        raise UserError(f"tokens of the judge not found: {path}; install the package again or run `make nano`")
    tokens = load_file(path)
    vq = load_tokenizer()
    canonical = tokens["canonical"].long()  # [classes, S, T]
    images = decode(vq, canonical.flatten(0, 1)).unflatten(0, canonical.shape[:2])
    return Judge(
        templates=[solve_template(one) for one in images],
        recogniser=load_recogniser(folder),
        tokenizer=vq,
        reference_tokens=tokens["reference"].long(),
        reference_classes=tokens["reference_classes"].long(),
    )
