"""GenEval's verdicts: the official answers, and what each rule means."""

from __future__ import annotations

import numpy as np
import pytest

from argrpo_cli.geneval.prompts import Prompt, Requirement, compose
from argrpo_cli.geneval.rules import (
    Detection,
    Thresholds,
    iou,
    judge_image,
    relative_position,
    reward_score,
    select,
)
from tests.geneval import goldens

BOX = (10.0, 10.0, 30.0, 30.0)


def found(*scores: float, box=BOX) -> list[Detection]:
    return [Detection(box, score, index) for index, score in enumerate(scores)]


def no_color(name, detections):
    raise AssertionError("no colour was asked for")


def colors(*words: str):
    """A classifier that knows the colour of each detection by its index."""
    return lambda name, detections: [words[detection.index] for detection in detections]


def up(value: float) -> float:
    """The next float32 above the float32 nearest to a value."""
    return float(np.nextafter(np.float32(value), np.float32(1)))


def reward_and_verdict(prompt, detections, classify):
    """Score, GenEval's verdict and that with exact counts, as the reward server answers."""
    score, strict = reward_score(prompt, detections, classify)
    return score, judge_image(prompt, detections, classify).correct, strict


DOG = compose("single_object", (Requirement("dog"),))
TWO_DOGS = compose("counting", (Requirement("dog", 2),))
RED_DOG = compose("colors", (Requirement("dog", color="red"),))
DOG_LEFT_OF_CAT = compose("position", (Requirement("cat"), Requirement("dog", position=("left of", 0))))
LEFT, MIDDLE, RIGHT = (0.0, 0.0, 20.0, 20.0), (40.0, 0.0, 60.0, 20.0), (80.0, 0.0, 100.0, 20.0)


@pytest.mark.parametrize("case", goldens.decisions(), ids=lambda case: case["id"])
def test_official_decisions(case):
    prompt, classify = goldens.prompt_of(case), goldens.classifier_of(case)
    detections, thresholds = goldens.detections_of(case), Thresholds(**case["thresholds"])
    expected = case["expected"]
    verdict = judge_image(prompt, detections, classify, thresholds)
    assert verdict.correct is expected["correct"]
    assert verdict.reason == expected["reason"]
    assert verdict.kept.keys() == expected["kept"].keys()
    for name, rows in expected["kept"].items():
        kept = [[*detection.box, detection.score] for detection in verdict.kept[name]]
        np.testing.assert_allclose(kept, rows, rtol=0, atol=1e-5)
    if "reward" in expected:
        score, strict = reward_score(prompt, detections, classify, thresholds)
        assert score == pytest.approx(expected["reward"]["score"], abs=1e-6)
        assert verdict.correct == expected["reward"]["correct"]
        assert strict == expected["reward"]["strict_correct"]


def test_official_positions_and_overlaps():
    cases = goldens.positions()
    assert len(cases) == 230
    for case in cases:
        assert list(relative_position(case["a"], case["b"])) == case["relations"], case
        assert iou(case["a"], case["b"]) == pytest.approx(case["iou"], abs=1e-6)


@pytest.mark.parametrize(("tag", "threshold"), [("single_object", 0.3), ("color_attr", 0.3), ("counting", 0.9)])
def test_a_score_must_exceed_its_threshold_in_float32(tag, threshold):
    # 0.3 in float32 is a little more than 0.3 in float64, and 0.9 a little less: neither counts.
    at = float(np.float32(threshold))
    assert select({"dog": found(at)}, tag) == {}
    assert select({"dog": found(threshold)}, tag) == {}
    assert len(select({"dog": found(up(threshold))}, tag)["dog"]) == 1


def test_only_counting_asks_for_high_scores():
    assert judge_image(DOG, {"dog": found(0.5)}, no_color).correct
    assert judge_image(TWO_DOGS, {"dog": found(0.95, 0.5)}, no_color).reason == "expected dog>=2, found 1"


def test_objects_are_ranked_by_score_and_classes_without_any_are_left_out():
    kept = select({"dog": found(0.4, 0.9, 0.6), "cat": found(0.1), "cow": []}, "two_object")
    assert {name: [detection.index for detection in group] for name, group in kept.items()} == {"dog": [1, 2, 0]}


def test_of_equal_scores_the_later_detection_comes_first():
    kept = select({"dog": found(0.5, 0.9, 0.5, 0.5)}, "single_object")
    assert [detection.index for detection in kept["dog"]] == [1, 3, 2, 0]


def test_at_most_sixteen_objects_of_a_class_count():
    scores = np.linspace(0.31, 0.99, 20)
    kept = select({"dog": found(*scores), "cat": found(0.5)}, "single_object")
    assert [detection.index for detection in kept["dog"]] == list(range(19, 3, -1))
    assert len(kept["cat"]) == 1
    seventeen = Prompt(0, "counting", "", (Requirement("dog", 17),))
    assert judge_image(seventeen, {"dog": found(*[0.95] * 18)}, no_color).reason == "expected dog>=17, found 16"


def test_the_cap_comes_before_non_maximum_suppression():
    detections = {"dog": [*found(0.9, 0.8), Detection(RIGHT, 0.7)]}
    kept = select(detections, "single_object", Thresholds(max_objects=2, nms_threshold=0.5))
    assert [detection.score for detection in kept["dog"]] == [0.9]


def test_the_official_settings_keep_even_identical_boxes():
    assert len(select({"dog": found(0.9, 0.8)}, "single_object")["dog"]) == 2
    assert len(select({"dog": found(0.9, 0.8)}, "single_object", Thresholds(nms_threshold=0.99))["dog"]) == 1


def test_a_suppressed_box_suppresses_no_other():
    near, far = (0.0, 0.0, 9.0, 9.0), (6.0, 0.0, 15.0, 9.0)
    middle = (3.0, 0.0, 12.0, 9.0)  # overlaps both by 70 of 130 pixels; they overlap by 40 of 160
    detections = {"dog": [Detection(near, 0.9), Detection(middle, 0.8), Detection(far, 0.7)]}
    kept = select(detections, "single_object", Thresholds(nms_threshold=0.5))
    assert [detection.score for detection in kept["dog"]] == [0.9, 0.7]
    # An overlap of exactly the threshold suppresses: 40 / 160.
    kept = select({"dog": [detections["dog"][0], detections["dog"][2]]}, "", Thresholds(nms_threshold=0.25))
    assert len(kept["dog"]) == 1


def test_the_last_pixel_of_a_box_belongs_to_it():
    assert iou((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert iou((0, 0, 9, 9), (9, 9, 18, 18)) == pytest.approx(1 / 199)
    assert iou((0, 0, 9, 9), (10, 0, 19, 9)) == 0
    assert iou((0, 0, -1, -1), (0, 0, -1, -1)) == 0  # nothing over nothing


@pytest.mark.parametrize(
    ("box", "relations"),
    [
        ((-100, 0, -80, 20), ("left of",)),
        ((100, 0, 120, 20), ("right of",)),
        ((0, -100, 20, -80), ("above",)),
        ((0, 100, 20, 120), ("below",)),
        ((100, 100, 120, 120), ("below", "right of")),
        ((-100, -100, -80, -80), ("above", "left of")),
        ((100, 30, 120, 50), ("right of",)),
        ((0, 0, 20, 20), ()),
        ((4, 0, 24, 20), ()),  # 4 pixels: the dead zone is 0.1 * (20 + 20)
        ((9, 0, 29, 20), ("right of",)),  # (9 - 4) / 9 > 1/2
        ((8, 0, 28, 20), ()),  # (8 - 4) / 8 = 1/2 is not more than half
        ((-8, 0, 12, 20), ()),
        ((0, 8, 20, 28), ()),
        ((0, -8, 20, 12), ()),
    ],
)
def test_relations_to_the_box_0_0_20_20(box, relations):
    assert relative_position(box, (0, 0, 20, 20)) == relations


def test_the_dead_zone_grows_with_both_boxes_and_its_threshold():
    small, large = (9, 0, 29, 20), (-30, 0, 50, 20)
    assert relative_position(small, (0, 0, 20, 20), 0.1) == ("right of",)
    assert relative_position(small, (0, 0, 20, 20), 0.2) == ()
    assert relative_position(small, large, 0.1) == ()
    assert relative_position((1, 0, 21, 20), (0, 0, 20, 20), 0.0) == ("right of",)
    detections = {"dog": found(0.9, box=(0, 0, 20, 20)), "cat": found(0.9, box=small)}
    assert judge_image(DOG_LEFT_OF_CAT, detections, no_color).correct
    verdict = judge_image(DOG_LEFT_OF_CAT, detections, no_color, Thresholds(position_threshold=0.2))
    assert verdict.reason == "expected dog left of target, found  target"  # two blanks, as the official script prints


def test_more_objects_than_asked_for_are_a_fault_in_counting_only():
    assert judge_image(DOG, {"dog": found(0.9, 0.8, 0.7), "cat": found(0.9)}, no_color).correct
    assert judge_image(TWO_DOGS, {"dog": found(0.99, 0.98), "cat": found(0.99)}, no_color).correct
    verdict = judge_image(TWO_DOGS, {"dog": found(0.99, 0.98, 0.97)}, no_color)
    assert not verdict.correct and verdict.reason == "expected dog<3, found 3"


def test_exclude_alone_decides_where_nothing_is_included():
    prompt = Prompt(0, "single_object", "", (), (Requirement("cat", 1),))
    assert judge_image(prompt, {}, no_color).correct
    assert judge_image(prompt, {"cat": found(0.4)}, no_color).reason == "expected cat<1, found 1"


@pytest.mark.parametrize(("words", "correct"), [(("red", "blue"), True), (("blue", "red"), False)])
def test_the_best_object_alone_must_have_the_colour(words, correct):
    seen = []

    def classify(name, detections):
        seen.append((name, [detection.index for detection in detections]))
        return colors(*words)(name, detections)

    verdict = judge_image(RED_DOG, {"dog": found(0.9, 0.8)}, classify)
    assert verdict.correct is correct
    assert seen == [("dog", [0])]
    assert verdict.reason == ("" if correct else "expected red dog>=1, found 0 red; and 1 blue")


def test_colours_in_a_reason_come_in_the_official_order():
    prompt = Prompt(0, "colors", "", (Requirement("dog", 4, "red"),))
    verdict = judge_image(prompt, {"dog": found(0.9, 0.8, 0.7, 0.6)}, colors("white", "red", "blue", "white"))
    assert verdict.reason == "expected red dog>=4, found 1 red; and 1 red, 1 blue, 2 white"


def test_colour_is_not_asked_for_where_objects_are_missing():
    assert judge_image(RED_DOG, {}, no_color).reason == "expected dog>=1, found 0"


@pytest.mark.parametrize(("boxes", "correct"), [((LEFT, RIGHT), True), ((RIGHT, LEFT), False)])
def test_the_best_object_alone_must_stand_in_the_right_place(boxes, correct):
    dogs = [Detection(boxes[0], 0.9), Detection(boxes[1], 0.8)]
    verdict = judge_image(DOG_LEFT_OF_CAT, {"dog": dogs, "cat": found(0.5, box=MIDDLE)}, no_color)
    assert verdict.correct is correct
    assert verdict.reason == ("" if correct else "expected dog left of target, found right of target")


@pytest.mark.parametrize(("boxes", "correct"), [((RIGHT, LEFT), True), ((LEFT, RIGHT), False)])
def test_the_best_target_alone_is_the_target(boxes, correct):
    cats = [Detection(boxes[0], 0.9), Detection(boxes[1], 0.8)]
    verdict = judge_image(DOG_LEFT_OF_CAT, {"cat": cats, "dog": found(0.5, box=MIDDLE)}, no_color)
    assert verdict.correct is correct


def test_all_of_several_objects_must_stand_so_to_all_targets():
    prompt = Prompt(0, "position", "", (Requirement("cat", 2), Requirement("dog", 2, position=("left of", 0))))
    left = [Detection(LEFT, 0.9), Detection((22.0, 0.0, 30.0, 20.0), 0.8)]
    right = [Detection(MIDDLE, 0.9), Detection(RIGHT, 0.8)]
    assert judge_image(prompt, {"dog": left, "cat": right}, no_color).correct
    assert not judge_image(prompt, {"dog": [left[0], Detection(RIGHT, 0.8)], "cat": right}, no_color).correct
    assert not judge_image(prompt, {"dog": left, "cat": [right[0], Detection(LEFT, 0.8)]}, no_color).correct


def test_a_missing_target_is_a_second_fault():
    verdict = judge_image(DOG_LEFT_OF_CAT, {"dog": found(0.9)}, no_color)
    assert verdict.reason == "expected cat>=1, found 0\nno target for dog to be left of"


def test_a_target_of_the_wrong_colour_is_no_target():
    prompt = Prompt(0, "position", "", (Requirement("cat", color="red"), Requirement("dog", position=("left of", 0))))
    detections = {"dog": found(0.9, box=LEFT), "cat": found(0.9, box=RIGHT)}
    assert judge_image(prompt, detections, colors("red")).correct
    assert judge_image(prompt, detections, colors("pink")).reason.endswith("no target for dog to be left of")


def test_an_object_of_the_wrong_colour_is_not_looked_at_for_its_place():
    prompt = Prompt(0, "position", "", (Requirement("cat"), Requirement("dog", 1, "red", ("left of", 0))))
    verdict = judge_image(prompt, {"dog": found(0.9, box=RIGHT), "cat": found(0.9, box=LEFT)}, colors("blue"))
    assert verdict.reason == "expected red dog>=1, found 0 red; and 1 blue"


def test_nothing_is_asked_nothing_is_wrong():
    assert judge_image(Prompt(0, "single_object", "", ()), {"dog": found(0.9)}, no_color).correct


@pytest.mark.parametrize(
    ("scores", "score", "correct", "strict"),
    [((0.99, 0.98), 1.0, 1.0, 1.0), ((0.99,), 0.5, 0.0, 0.0), ((0.99,) * 3, 0.5, 0.0, 0.0), ((0.99,) * 6, -1.0, 0, 0)],
)
def test_the_reward_of_a_count_falls_with_its_distance_below_zero_too(scores, score, correct, strict):
    assert reward_and_verdict(TWO_DOGS, {"dog": found(*scores)}, no_color) == (score, correct, strict)


def test_extra_objects_cost_strict_correctness_and_reward_but_not_correctness():
    assert reward_and_verdict(RED_DOG, {"dog": found(0.9, 0.8)}, colors("red", "red")) == (0.0, 1.0, 0.0)


def test_missing_objects_fail_their_colour_too_and_one_failure_fails_the_strict_verdict():
    prompt = compose("color_attr", (Requirement("dog", color="red"), Requirement("cat", color="blue")))
    assert reward_and_verdict(prompt, {"cat": found(0.9)}, colors("blue")) == ((0 + 0 + 1 + 1) / 4, 0.0, 0.0)


def test_a_wrong_place_adds_both_terms_and_a_missing_target_one():
    cat = found(0.9, box=MIDDLE)
    rewards = [
        reward_score(DOG_LEFT_OF_CAT, {"dog": found(0.9, box=box), "cat": cats}, no_color)[0]
        for box, cats in [(LEFT, cat), (RIGHT, cat), (LEFT, [])]
    ]
    assert rewards == [1.0, (1 + 1 + 0 + 1) / 4, pytest.approx((0 + 1 + 0) / 3)]


def test_the_reward_asks_for_each_colour_once():
    asked = []

    def classify(name, detections):
        asked.append(name)
        return ["red"] * len(detections)

    prompt = compose("color_attr", (Requirement("dog", color="red"), Requirement("cat", color="blue")))
    assert reward_score(prompt, {"dog": found(0.9), "cat": found(0.8)}, classify) == (0.75, 0.0)
    assert asked == ["dog", "cat"]
