"""The nano detector: maps and boxes, what it is trained towards, and how well the bundled one knows real scenes."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from argrpo_cli.geneval.nano_detector import NANO_THRESHOLDS, Found, decode_maps, load_detector, observation
from argrpo_cli.geneval.prompts import TAGS, parse_prompt
from argrpo_cli.geneval.rules import judge_image
from argrpo_cli.nano import scenes
from argrpo_cli.nano.judge import load_judge
from argrpo_cli.nano.make import judges as t
from argrpo_cli.nano.tokens import decode, load_held_out
from argrpo_cli.rewards import load_rewards
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from tests.emoji import no_font  # noqa: F401

DOG = Found("dog", (4.0, 8.0, 40.0, 36.0), 1.0, "red")
TWO_CATS = [Found("cat", (2.0, 2.0, 30.0, 30.0), 1.0, None), Found("cat", (34.0, 32.0, 62.0, 62.0), 1.0, None)]


def perfect_maps(made):
    """Maps that say exactly what the targets ask for."""
    bells, places, sides, colors = t.targets(made)
    centres = torch.where(bells == 1, 8.0, -8.0)
    side_map = torch.zeros(len(made), 4, 16, 16)
    color_map = torch.zeros(len(made), len(scenes.COLORS), 16, 16)
    for (image, row, column), distances, color in zip(places.tolist(), sides, colors.tolist(), strict=True):
        side_map[image, :, row, column] = distances
        color_map[image, max(color, 0), row, column] = 9.0
    return centres, side_map, color_map


def test_targets_and_decoding_are_inverse():
    first, second = decode_maps(*perfect_maps([[DOG], TWO_CATS]))
    assert [(one.name, one.color) for one in first] == [("dog", "red")]
    assert first[0].box == pytest.approx(DOG.box)
    assert first[0].score == pytest.approx(torch.tensor(8.0).sigmoid().item())
    assert sorted(one.box for one in second) == [pytest.approx(one.box) for one in TWO_CATS]


def test_only_peaks_are_objects_and_boxes_stay_inside():
    centres, sides, colors = (
        torch.full((1, 24, 16, 16), -9.0),
        torch.full((1, 4, 16, 16), 50.0),
        torch.zeros(1, 8, 16, 16),
    )
    centres[0, 3, 5, 5], centres[0, 3, 5, 6], centres[0, 7, 5, 6] = 2.0, 1.0, 0.5
    (found,) = decode_maps(centres, sides, colors)
    assert [one.name for one in found] == [
        scenes.CLASS_NAMES[3],
        scenes.CLASS_NAMES[7],
    ]  # one cell may hold two classes
    assert found[0].box == (0.0, 0.0, 64.0, 64.0)


def test_the_centre_loss_is_the_focal_loss_by_hand():
    logits, bells = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[1.0, 0.4, 0.0]])
    p = logits.sigmoid()[0]
    by_hand = -((1 - p[0]) ** 2 * p[0].log() + 0.6**4 * p[1] ** 2 * (1 - p[1]).log() + p[2] ** 2 * (1 - p[2]).log())
    assert t.centre_loss(logits, bells).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_overlap_and_average_precision_by_hand():
    assert t.overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert t.overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    # Hits at ranks 1 and 3 of two that are there: precision 1 up to recall 1/2, 2/3 up to 1.
    assert t.average_precision([(0.9, True), (0.2, True), (0.5, False)], 2) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert t.average_precision([], 2) == 0
    assert t.average_precision([(0.9, True)], 2) == 0.5


@pytest.fixture(scope="module")
def held_out():
    """Reconstructed scenes of the text task that no training saw, their captions, and what the detector finds."""
    tokens, conditions = load_held_out("captions")
    images = decode(load_judge().tokenizer, tokens[:360])
    return images, conditions[:360], load_detector().detect(images)


def test_the_bundled_detector_finds_in_real_scenes_what_their_captions_say(held_out):
    _, conditions, found = held_out
    right = defaultdict(list)
    for one, objects in zip(conditions, found, strict=True):
        prompt = parse_prompt(one.prompt)
        verdict = judge_image(prompt, *observation(objects), NANO_THRESHOLDS)
        right[prompt.tag].append(verdict.correct)
    shares = {tag: sum(values) / len(values) for tag, values in right.items()}
    assert set(shares) == set(TAGS)
    assert min(shares.values()) >= 0.95, shares


def test_the_reward_is_full_for_the_own_caption_and_lower_for_another(held_out):
    images, conditions, _ = held_out
    rewards = load_rewards(["nano-geneval"])
    rewards.check(conditions)
    own = rewards.score(images[:120], conditions[:120])["nano-geneval"]
    other = rewards.score(images[:120], conditions[1:120] + conditions[:1])["nano-geneval"]
    assert own.dtype == torch.float32 and own.max() <= 1
    assert own.mean() > 0.95
    assert other.mean() < 0.4


def test_pictures_of_other_sizes_are_resized(held_out):
    images, conditions, _ = held_out
    rewards = load_rewards(["nano-geneval"])
    large = images[:24].repeat_interleave(2, 2).repeat_interleave(2, 3)
    own, again = (rewards.score(one, conditions[:24])["nano-geneval"] for one in (images[:24], large))
    torch.testing.assert_close(again, own, rtol=1e-4, atol=1e-4)


def test_the_reward_refuses_what_genevals_templates_do_not_make():
    with pytest.raises(UserError, match="GenEval has no such prompt: 'a painting of a dog'"):
        load_rewards(["nano-geneval"]).check([Condition("a photo of a dog"), Condition("a painting of a dog")])


def test_the_facts_of_a_detector_that_sees_the_truth_are_full(no_font):  # noqa: F811
    _, made = t.make_scenes(np.random.default_rng(3), count=24)

    class Sees:
        def detect(self, images):
            return [t.truth(scene) for scene in made]

    facts = t.detector_facts(Sees(), None, made)
    assert facts.startswith(
        "AP50 100.0%, counted right 100.0%, colours right 100.0%, captions right: single_object 100.0%"
    )
    assert facts.count("100.0%") >= 3 + 4 and facts.count("%") == facts.count("100.0%"), facts

    class Blind:
        def detect(self, images):
            return [[] for _ in made]

    assert t.detector_facts(Blind(), None, made).startswith("AP50 0.0%, counted right 0.0%, colours right nan%")
