"""A judge's questions as the paper prints them, with captions that stay captions; and from a reply's text to a score,
or to no score; never to a wrong one."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from argrpo_cli.rewards.judge.questions import (
    FAKE,
    FORCED_PREFIX,
    LIMIT,
    QUALITY,
    WEIRD,
    Question,
    UnusableReply,
    read_final_score,
    read_score,
    unified_question,
)

CASES = Path(__file__).parents[2] / "data" / "judge" / "replies.jsonl"
QUESTIONS = {"quality": QUALITY, "fake": FAKE, "weird": WEIRD}


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


def score(reply: str, question=QUALITY) -> float | None:
    try:
        return read_score(reply, question)
    except UnusableReply:
        return None


def cases() -> list[dict]:
    return [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case['question']}-{case['kind']}")
def test_golden_replies(case):
    expected = None if case["expected"] == "unparseable" else case["expected"]
    assert score(case["reply"], QUESTIONS[case["question"]]) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"score": 3 // good\n}', 3),
        ('{{"score": 3}}', 3),
        ('{"score": 3, ...}', 3),
        ("{'score': 3, 'explanation': 'it's fine, 'really', and 'so on'.'}", 3),
        ('{"score": 4\n', 4),  # only the brace is missing
        ('Result [1]: {"score": 2}', 2),
        ('{"score": "4 out of 5"}', 4),
        ('{"score":3}{"note":"x"}', 3),
        ('{"score": -0.0}', 0),
        ('{"score": 5}\x00', 5),
    ],
)
def test_forgiven(reply, expected):
    assert score(reply) == expected


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("", "is empty"),
        ('{"score": 3', "ends within its score"),  # of 3.5, perhaps
        ('{"score": "3', "ends within its score"),
        ('{"score": 3.5} Now mine: {"description": "The im', "ends before its score"),  # not the example's 3.5
        ('{"a": {"score": 1}, "b": {"score": 0}}', "has 2 scores"),
        ('{"score": 3,5}', "not a number"),
        ('{"score": "__import__(\'os\').getpid()"}', "not a number"),
        ('{"score": 0x3}', "not a number"),
        ('{"score": "7/10"}', "out of 10"),
        ('{"score": 1e999}', "inf is outside 0 to 5"),
        ('{"score": 5.0001}', "outside 0 to 5"),
        ('{"score": 3}' + " " * LIMIT, "longer than"),
    ],
)
def test_not_guessed(reply, why):
    with pytest.raises(UnusableReply, match=why):
        read_score(reply, QUALITY)


def test_valid_json_is_read_as_json_reads_it():
    rng = random.Random(0)
    pieces = ['"', "\\", "{", "}", "[", "]", ":", ",", "\n", "'", "“", "```", "//", "score", '"score": 9', " ", "a"]

    def text() -> str:
        return "".join(rng.choice(pieces) for _ in range(rng.randrange(12)))

    def value(depth: int):
        kind = rng.randrange(6 if depth < 3 else 4)
        if kind < 4:
            return [text(), rng.uniform(-9, 9), True, None][kind]
        if kind == 4:
            return [value(depth + 1) for _ in range(rng.randrange(3))]
        return {f"{rng.choice('abc')} {rng.choice(pieces)}": value(depth + 1) for _ in range(rng.randrange(3))}

    for _ in range(500):
        rows = [(f"k{index}", value(0)) for index in range(4)] + [("score", round(rng.uniform(0, 5), 2))]
        rng.shuffle(rows)
        reply = json.dumps(dict(rows), indent=rng.choice([None, 2]), ensure_ascii=rng.random() < 0.5)
        assert score(reply) == dict(rows)["score"], reply


def test_garbage_takes_no_time_and_raises_nothing_else():
    rng = random.Random(1)
    units = ['{"', "{", "[", '"', '{"a":', '" "', '"//', '", ', "\\", "`", "'", "“", "final score ", "9", " ", '"a":']
    texts = [unit * (LIMIT // len(unit)) for unit in units] + ['{"a": "' + unit * 8000 for unit in units]
    texts += ['{"a": "' + ('"' + " " * 199 + ", " + " " * 198 + "x") * 160]
    texts += ["".join(rng.choice([*units, "score", ":", "}", "]", "\n"]) for _ in range(2000)) for _ in range(20)]
    for text in texts:
        start = time.process_time()
        score(text[:LIMIT])
        with pytest.raises(UnusableReply):
            read_final_score(text[:LIMIT])
        assert time.process_time() - start < 1.0, text[:20]


FINAL = {
    "4": 4,
    "4.": 4,
    " 4.5\n": 4.5,
    "4/5": 4,
    "4 / 5.": 4,
    "4 out of 5": 4,
    "4 points": 4,
    "**2**.": 2,
    "**2.**": 2,
    "`3`": 3,
    '"3"': 3,
    "\n\n**4**\r\nIt fits.": 4,
    "4\nBecause of 2 cats.": 4,
    "1e0": 1,
    "+4": 4,
}
NO_FINAL = [
    *("0", "6", "nan", "inf", "-4", "four", "1e-1", "3 or 4", "3 to 4", "3-4", "3–4", "3, 4", "3 4", "3,5", "3/4"),
    *("4½", "4 1/2", "1 000", "1\u00a0000", "1,000", "80%", "4 %", "4+", "~4", ">3", "4...", "4?", "3.5.1", "0x3"),
    *("", "\n", "[1 to 5]", "4 or so", "4 and a half", "4 (or 5)", "½", "²", "four 4", "4th", "4 of 5 cats", "5 4/5"),
    *("8/10", "4 out of ten"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), FINAL.items())
def test_final_score(text, expected):
    assert read_final_score(f"The 3 cats are there.\nFinal Score: {text}") == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("**Final Score:** 3", 3),
        ("**Final Score**: 3", 3),
        ("FINAL SCORE：**2**.", 2),
        ("Final Score: 3. No. Final Score: 4", 4),
    ],
)
def test_final_score_in_other_dress(reply, expected):
    assert read_final_score(reply) == expected


@pytest.mark.parametrize("text", NO_FINAL)
def test_no_final_score(text):
    with pytest.raises(UnusableReply):
        read_final_score(f"Final Score: {text}")


@pytest.mark.parametrize("reply", ["", "4", "Score: 4", "Final Score 4", "Final Score: 4. Final Score: none"])
def test_no_final_score_where_none_is_said(reply):
    with pytest.raises(UnusableReply):
        read_final_score(reply)


@pytest.mark.parametrize("text", [*FINAL, *NO_FINAL])
def test_both_readers_refuse_the_same(text):
    """What no JSON reply may have under "score" is no final score either, bold type and ends of lines apart."""
    if "\n" in text or set(text) & set('*`"[]'):
        return
    inside = score(f'{{"score": "{text}"}}', Question("", "", low=1.0, high=5.0))
    assert inside == FINAL.get(text) or text.endswith("."), text
