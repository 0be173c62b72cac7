"""The nano world's scenes: what they promise the policy, the rewards and the judge."""

from __future__ import annotations

import numpy as np
import pytest

from argrpo_cli.geneval.prompts import TAGS
from argrpo_cli.nano import scenes
from argrpo_cli.shapes import class_prompt
from argrpo_cli.system.errors import UserError
from tests.emoji import needs_font


def test_there_are_at_least_24_classes_with_distinct_names():
    assert len(scenes.CLASS_NAMES) >= 24
    assert len(set(scenes.CLASS_NAMES)) == len(set(scenes.EMOJI)) == len(scenes.CLASS_NAMES)


def test_a_class_scene_has_one_object_of_the_class_inside_the_picture():
    rng = np.random.default_rng(0)
    for index in range(300):
        scene = scenes.class_scene(rng, index % len(scenes.CLASS_NAMES))
        (placed,) = scene.objects
        assert placed.class_id == scene.class_id == index % len(scenes.CLASS_NAMES)
        assert scenes.SINGLE_SIZES[0] <= placed.size <= scenes.SINGLE_SIZES[1]
        assert 0 <= placed.x <= scenes.IMAGE_SIZE - placed.size
        assert 0 <= placed.y <= scenes.IMAGE_SIZE - placed.size
        assert abs(placed.hue) <= 18
        assert scene.prompt.text == class_prompt(scenes.CLASS_NAMES[placed.class_id])


@pytest.mark.parametrize("tag", TAGS)
def test_caption_scenes_stay_inside_the_picture_and_state_their_facts(tag):
    rng = np.random.default_rng(1)
    for _ in range(50):
        scene = scenes.caption_scene(rng, tag)
        assert scene.prompt.tag == tag or (tag == "counting" and len(scene.objects) == 1)
        assert scene.prompt.text.startswith("a photo of ")
        for placed in scene.objects:
            assert placed.x >= 0 and placed.x + placed.size <= scenes.IMAGE_SIZE
            assert placed.y >= 0 and placed.y + placed.size <= scenes.IMAGE_SIZE
        if tag == "counting":
            assert len(scene.objects) == scene.prompt.include[0].count
        if tag in ("two_object", "position", "color_attr"):
            assert len({placed.class_id for placed in scene.objects}) == 2


def test_the_position_named_in_the_caption_is_the_position_of_the_objects():
    rng = np.random.default_rng(2)
    for _ in range(100):
        scene = scenes.caption_scene(rng, "position")
        first, second = scene.objects
        shown = {
            "left of": first.x + first.size <= second.x,
            "right of": second.x + second.size <= first.x,
            "above": first.y + first.size <= second.y,
            "below": second.y + second.size <= first.y,
        }
        assert shown[scene.prompt.include[1].position[0]], scene.prompt.text


def test_an_unknown_category_is_named_in_the_error():
    with pytest.raises(UserError, match="'sculpture'"):
        scenes.caption_scene(np.random.default_rng(0), "sculpture")


@pytest.mark.parametrize("degrees", [-18.0, 0.0, 5.0, 120.0])
def test_a_hue_turn_is_a_rotation_that_keeps_greys(degrees):
    turn = scenes.hue_matrix(degrees)
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(turn @ np.full(3, 0.4), np.full(3, 0.4), atol=1e-6)
    if degrees == 120.0:
        np.testing.assert_allclose(turn @ np.array([1.0, 0, 0]), [0, 1, 0], atol=1e-6)


def test_backgrounds_are_pale():
    rng = np.random.default_rng(3)
    colours = np.array([scenes.random_background(rng) for _ in range(200)])
    assert colours.min() > 0.5 and colours.max(1).min() > 0.85


@needs_font
def test_the_same_seed_renders_the_same_pictures():
    first, ids = scenes.class_batch(np.random.default_rng(4), 48, balanced=True)
    again, _ = scenes.class_batch(np.random.default_rng(4), 48, balanced=True)
    assert first.shape == (48, 3, 64, 64) and first.dtype == np.uint8
    assert sorted(ids.tolist()) == sorted([*range(24)] * 2)
    np.testing.assert_array_equal(first, again)


@needs_font
def test_every_class_shows_an_object_that_fills_its_box():
    for class_id, name in enumerate(scenes.CLASS_NAMES):
        placed = scenes.Placed(class_id, 48, 8, 8)
        _, alpha = scenes.object_pixels(placed)
        rows, columns = np.where(alpha[..., 0] > 0.5)
        assert max(np.ptp(rows), np.ptp(columns)) >= 44, name
        assert alpha.mean() > 0.1, name


@needs_font
def test_a_mirrored_scene_is_the_mirror_image():
    plain = scenes.Scene((scenes.Placed(9, 40, 10, 12),), (0.9, 0.8, 0.9))
    mirrored = scenes.Scene((scenes.Placed(9, 40, 64 - 40 - 10, 12, mirror=True),), (0.9, 0.8, 0.9))
    np.testing.assert_array_equal(scenes.render(plain)[:, ::-1], scenes.render(mirrored))


@needs_font
@pytest.mark.parametrize("color", list(scenes.COLORS))
def test_a_painted_object_takes_the_colour_of_its_word(color):
    pixels, alpha = scenes.object_pixels(scenes.Placed(1, 48, 0, 0, color=color))
    mean = (pixels * alpha).sum((0, 1)) / alpha.sum()
    paint = np.array(scenes.COLORS[color])
    distances = {name: np.linalg.norm(mean / mean.sum() - np.array(c) / sum(c)) for name, c in scenes.COLORS.items()}
    assert distances[color] < 0.25, (mean, paint)


def test_captions_use_only_words_that_nano_clip_knows():
    from argrpo_cli.nano.make.rewards import CLIP
    from argrpo_cli.networks.nano import WordTokenizer

    known, rng = set(CLIP["words"]), np.random.default_rng(5)
    for _ in range(200):
        assert set(WordTokenizer.split(scenes.caption_scene(rng).prompt.text)) <= known


def test_categories_of_scenes_come_in_the_shares_asked_for():
    shares = {"position": 0.75, "color_attr": 0.25}
    _, made = scenes.caption_batch(np.random.default_rng(0), 200, shares)
    counts = {tag: sum(one.prompt.tag == tag for one in made) / 200 for tag in shares}
    assert counts == pytest.approx(shares, abs=0.12)  # four standard deviations
    assert sum(counts.values()) == 1
