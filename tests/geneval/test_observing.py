"""From images to what the rules ask about: the colours of many images in one batch are those of each by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from argrpo_cli.geneval.detector import Objects
from argrpo_cli.geneval.observers import OfficialObserver
from argrpo_cli.geneval.prompts import COLORS, Requirement, compose, parse_prompt
from argrpo_cli.geneval.rules import Detection, Thresholds, colored_objects, judge_image, reward_score
from tests.geneval import goldens

PROMPTS = [
    parse_prompt(text)
    for text in (
        "a photo of a red car",
        "a photo of three dogs",
        "a photo of a blue dog and a green car",
        "a photo of a car",
        "a photo of a white dog",
    )
]
SCORES = {"dog": (0.2, 0.95, 0.6), "car": (0.31, 0.3, 0.8)}


class CropColors:
    """Answers by the content of a crop alone, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def classify(self, names, crops):
        self.asked.append(list(names))
        return [self.color(name, crop) for name, crop in zip(names, crops, strict=True)]

    def color(self, name, crop):
        return COLORS[(int(crop.sum()) + len(name) + crop.shape[0]) % len(COLORS)]

    def color_logits(self, name, crops):
        return np.eye(len(COLORS))[[COLORS.index(self.color(name, crop)) for crop in crops]]


class Detector:
    """Finds what it is given."""

    def __init__(self, objects):
        self.objects = objects

    def detect(self, images):
        assert len(images) == len(self.objects)
        yield from self.objects


def scene(seed):
    """Three dogs and three cars with random boxes and masks in an image of 24x32."""
    rng = np.random.default_rng(seed)
    detections, masks = {}, {}
    for name, scores in SCORES.items():
        corners = [sorted(rng.uniform(0, 24, 2)) + sorted(rng.uniform(0, 24, 2)) for _ in scores]
        detections[name] = [
            Detection((x0, y0, x1 + 4, y1), score, index)
            for index, ((x0, x1, y0, y1), score) in enumerate(zip(corners, scores, strict=True))
        ]
        masks[name] = [torch.from_numpy(rng.random((24, 32)) < 0.7) for _ in scores]
    return Objects(detections, masks)


@pytest.fixture
def images():
    return torch.from_numpy(np.random.default_rng(9).integers(0, 256, (len(PROMPTS), 3, 24, 32), np.uint8))


def test_verdicts_are_those_of_every_image_by_itself_from_one_batch_of_crops(images):
    scenes, colors = [scene(seed) for seed in range(len(PROMPTS))], CropColors()
    seen = OfficialObserver(Detector(scenes), colors).observe(images, PROMPTS)
    assert colors.asked == [["car", "dog", "car", "dog"]]
    answers = []
    for prompt, image, own, (detections, classify) in zip(PROMPTS, images, scenes, seen, strict=True):
        assert detections == own.detections
        masks = {name: [mask.numpy() for mask in rows] for name, rows in own.masks.items()}
        alone = goldens.color_classifier(image.permute(1, 2, 0).numpy(), masks, colors.color_logits)
        assert judge_image(prompt, detections, classify) == judge_image(prompt, detections, alone)
        assert reward_score(prompt, detections, classify) == reward_score(prompt, detections, alone)
        answers += [classify(name, [one]) for name, one in colored_objects(prompt, detections)]
    assert len({answer[0] for answer in answers}) > 1


def test_only_the_objects_that_count_are_asked_about():
    detections = scene(0).detections
    named = [[(name, one.index) for name, one in colored_objects(prompt, detections)] for prompt in PROMPTS]
    assert named == [[("car", 2)], [], [("dog", 1), ("car", 2)], [], [("dog", 1)]]
    assert colored_objects(PROMPTS[0], detections, Thresholds(threshold=0.8)) == []  # too few are left
    two = compose("colors", (Requirement("dog", 2, "red"),))
    assert [(name, one.index) for name, one in colored_objects(two, detections)] == [("dog", 1), ("dog", 2)]


@pytest.mark.parametrize("case", goldens.decisions(), ids=range(len(goldens.decisions())))
def test_the_rules_ask_for_no_colour_beyond_those(case):
    prompt, detections, classify = goldens.prompt_of(case), goldens.detections_of(case), goldens.classifier_of(case)
    known = {(name, one.index) for name, one in colored_objects(prompt, detections)}

    def guarded(name, found):
        assert {(name, one.index) for one in found} <= known
        return classify(name, found)

    judge_image(prompt, detections, guarded)
    reward_score(prompt, detections, guarded)
