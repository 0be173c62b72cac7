"""From images to what GenEval's rules ask about: objects, and the colours of those whose colour a prompt names.

observer = OfficialObserver(load_mask2former("cuda"), ClipColors(load_color_clip("cuda")))
for prompt, (detections, classify_color) in zip(prompts, observer.observe(images, prompts)):
    judge_image(prompt, detections, classify_color, observer.thresholds)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from argrpo_cli.geneval.colors import crop_for_color
from argrpo_cli.geneval.grammar import Prompt
from argrpo_cli.geneval.rules import OFFICIAL, ClassifyColor, Detection, Detections, Thresholds, colored_objects

if TYPE_CHECKING:
    from argrpo_cli.geneval.clip_colors import ClipColors
    from argrpo_cli.geneval.mask2former import Mask2Former


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
        found: list[Detections] = []
        asked: list[tuple[int, str, int]] = []  # image, class, index of the detection
        crops: list[np.ndarray] = []
        for place, (prompt, objects) in enumerate(zip(prompts, self.detector.detect(images), strict=True)):
            found.append(objects.detections)
            for name, detection in colored_objects(prompt, objects.detections, self.thresholds):
                mask = objects.masks[name][detection.index].cpu().numpy()
                asked.append((place, name, detection.index))
                crops.append(crop_for_color(pictures[place], mask, detection.box))
        answers = dict(zip(asked, self.colors.classify([name for _, name, _ in asked], crops), strict=True))

        def classifier(place: int) -> ClassifyColor:
            def classify(name: str, detections: Sequence[Detection]) -> list[str]:
                return [answers[place, name, detection.index] for detection in detections]

            return classify

        return [(detections, classifier(place)) for place, detections in enumerate(found)]
