"""The question about colour: crops, texts and the choice among ten words."""

from __future__ import annotations

import numpy as np
import pytest

from argrpo_cli.geneval.observers import GREY, color_texts, crop_for_color, pick_colors
from argrpo_cli.geneval.prompts import COLORS
from tests.geneval import goldens

BACKGROUNDS = {"original": None, "#fff": (255, 255, 255)}
IMAGE = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)


@pytest.mark.parametrize("case", goldens.crops(), ids=lambda case: str(case["options"]))
def test_official_crops(case):
    background = BACKGROUNDS.get(case["options"].get("bgcolor"), GREY)
    box = None if case["options"].get("crop") == "0" else case["box"]
    crop = crop_for_color(case["image"], case["mask"], box, background)
    assert crop.dtype == np.uint8
    np.testing.assert_array_equal(crop, case["crop"])


@pytest.mark.parametrize(
    ("box", "columns", "rows"),
    [
        ((1.4, 2.6, 3.6, 5.4), (1, 4), (3, 5)),
        ((0.5, 1.5, 2.5, 3.5), (0, 2), (2, 4)),  # halves go to the even pixel
        ((1.0, 1.0, 2.0, 2.0, 0.9), (1, 2), (1, 2)),  # a score behind the box is not looked at
    ],
)
def test_corners_are_rounded_halves_to_even(box, columns, rows):
    np.testing.assert_array_equal(crop_for_color(IMAGE, None, box), IMAGE[slice(*rows), slice(*columns)])


def test_what_lies_outside_the_image_is_black():
    crop = crop_for_color(IMAGE, None, (-2, -1, 8, 10))
    assert crop.shape == (11, 10, 3)
    np.testing.assert_array_equal(crop[1:9, 2:8], IMAGE)
    assert crop.sum() == IMAGE.sum()
    assert not crop_for_color(IMAGE, None, (20, 20, 24, 23)).any()


def test_what_lies_outside_the_mask_is_grey_and_the_image_stays_as_it_was():
    before, mask = IMAGE.copy(), np.zeros((8, 6), bool)
    mask[2, 3] = True
    crop = crop_for_color(IMAGE, mask, (2, 1, 5, 4))
    np.testing.assert_array_equal(crop[1, 1], IMAGE[2, 3])
    crop[1, 1] = GREY
    assert (crop == 0x99).all()
    np.testing.assert_array_equal(IMAGE, before)


def test_the_texts_of_a_class_say_a_whatever_the_colour():
    texts = color_texts("fire hydrant")
    assert len(texts) == 10 and all(len(row) == 3 for row in texts)
    assert texts[COLORS.index("orange")] == [
        "a photo of a orange fire hydrant",
        "a photo of a orange-colored fire hydrant",
        "a photo of a orange object",
    ]


def test_the_largest_logit_is_the_colour_and_the_first_of_equals():
    logits = np.zeros((3, 10))
    logits[1, 9], logits[2, 4], logits[2, 6] = 1, 2, 2
    assert pick_colors(logits) == ["red", "white", "blue"]
