"""The independent judge of the nano world, used for evaluation only: no reward looks at what it looks at.

First a question of truth: how well does a sample match a rendering of its class (`matching.py`)? Beside it recognition
by a classifier of its own (`recognition.py`), whose features also serve to compare whole sets of pictures.

The tokenizer blurs small objects more than large ones, so clean scenes match the better the larger they are. A policy
that merely draws larger would gain; `expected_db` says what real scenes of a class and size reach, to be subtracted.

The judge needs no font. It keeps tokens of canonical scenes (each object at its largest size, shifted against the
tokenizer's grid, on different backgrounds), decodes them with nano-vq, and solves for colour and alpha: on background
B_s a pixel is I_s = p + (1 - a) B_s, hence I_s - B_s = p - a B_s, a least-squares line through all the scenes.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from argrpo_cli.nano import WEIGHTS, scenes
from argrpo_cli.nano.make.corrupt import decode
from argrpo_cli.nano.make.study import load_tokenizer
from argrpo_cli.nano.matching import Match, Matcher, Template, match_classes
from argrpo_cli.nano.recognition import Recogniser, load_recogniser
from argrpo_cli.policy.llamagen.vq import VQModel
from argrpo_cli.system.errors import UserError

TOKENS_FILE = "tokens.safetensors"
LARGEST = scenes.SINGLE_SIZES[1]
CENTRE = sum(scenes.SINGLE_SIZES) / 2
FITTED = 480  # reference scenes behind `expected_db`: 20 of each class for a fit of one number a class and two more


def canonical_layout() -> list[tuple[int, int, tuple[float, float, float]]]:
    """Corner (x, y) and background of the canonical scenes of every class: six shifts, six hues, all pairs."""
    shifts = [(0, 0), (1, 3), (2, 2), (3, 4), (4, 1), (0, 4)]
    pastels = [colorsys.hsv_to_rgb(step / 6, 0.35, 0.88 if step % 2 else 1.0) for step in range(6)]
    return [(x, y, pastel) for x, y in shifts for pastel in pastels]


def canonical_scene(class_id: int, x: int, y: int, background: tuple[float, float, float]) -> scenes.Scene:
    """One object at its largest size."""
    placed = scenes.Placed(class_id, LARGEST, x, y)
    return scenes.Scene((placed,), background, class_id=class_id)


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


@dataclass
class Judge:
    """What the judge knows: a template per class, its classifier, tokens and classes of reference scenes."""

    templates: list[Template]
    recogniser: Recogniser
    tokenizer: VQModel
    reference_tokens: Tensor
    reference_classes: Tensor

    def match(self, images: Tensor, class_ids: Tensor) -> Match:
        """Rendering match of uint8 [B, 3, 64, 64] against their own classes, int64 [B]."""
        return match_classes(self.matchers, images.cpu(), class_ids.cpu())

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
        return self.recogniser.features(self.reference_images)

    @cached_property
    def reference_spatial(self) -> Tensor:
        return self.recogniser.spatial_features(self.reference_images)


@lru_cache(maxsize=1)
def load_judge(folder: str | Path = WEIGHTS / "nano-judge", tokenizer: str | Path = WEIGHTS / "nano-vq") -> Judge:
    """The bundled judge, on the CPU, kept in memory; UserError when its files are missing."""
    path = Path(folder) / TOKENS_FILE
    if not path.is_file():
        raise UserError(f"tokens of the judge not found: {path}; install the package again or run `make nano`")
    kept = load_file(path)
    vq = load_tokenizer(tokenizer)
    canonical = kept["canonical"].long()  # [classes, S, T]
    images = decode(vq, canonical.flatten(0, 1)).unflatten(0, canonical.shape[:2])
    return Judge(
        templates=[solve_template(one) for one in images],
        recogniser=load_recogniser(folder),
        tokenizer=vq,
        reference_tokens=kept["reference"].long(),
        reference_classes=kept["reference_classes"].long(),
    )
