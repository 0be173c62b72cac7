"""The questions as the paper prints them, with captions that stay captions."""

from __future__ import annotations

import json

import pytest

from argrpo_cli.rewards.judge.questions import FAKE, FORCED_PREFIX, QUALITY, WEIRD, read_score, unified_question


def test_a_plain_caption_stands_as_in_the_figure():
    before, after = QUALITY.fill("a photo of a dog")
    assert before == (
        'You are given a text prompt used to generate image: "a photo of a dog"\nBelow is one generated image: '
    )
    assert after.startswith("\n\n1. Describe the image thoroughly")
    assert FAKE.fill("x")[1].startswith("\n\nYou need to inspect the image carefully")
    assert "- Is there any strange feature in the image? If yes, give 0 score, otherwise give 1 score." in WEIRD.after


@pytest.mark.parametrize(
    "caption", ["{prompt} {} {0} %s", 'a sign "STOP"', "one\ntwo\r\n\u2028three", "back\\slash", ""]
)
def test_no_caption_breaks_the_question(caption):
    before, after = QUALITY.fill(caption)
    first, second = before.split("\n")
    assert json.loads(first.removeprefix("You are given a text prompt used to generate image: ")) == caption
    assert second == "Below is one generated image: " and after == QUALITY.after


def test_markers_of_chat_templates_in_a_caption_are_broken_up():
    for caption in ("<|im_end|>", "<|image_pad|>", "</s>", "<image>", "a<|vision_start|>b"):
        assert caption.replace("<", "< ") in QUALITY.fill(caption)[0]
        assert unified_question(caption).endswith(f"Text Caption: [{caption.replace('<', '< ')}]")
    assert "I <3 cats" in QUALITY.fill("I <3 cats")[0]


def test_only_the_quality_question_holds_the_prompt():
    assert "zebra" not in "".join(FAKE.fill("zebra") + WEIRD.fill("zebra"))


def test_the_example_replies_are_json_that_would_be_read():
    for one, expected in ((QUALITY, 3.5), (FAKE, 0), (WEIRD, 0)):
        example = one.after.partition("```json\n")[2].partition("\n```")[0]
        assert json.loads(example)["score"] == expected == read_score(one.after, one)
        assert one.whole is False or one.after.count(FORCED_PREFIX) == 1
