"""What a judge is asked, and its replies: from a text to a score, or to the reason why there is none.

The questions are the three of the paper's figure 13 and UnifiedReward's, with captions in them that stay captions. The
wording of the three, with its slips, is the figure's. Two things differ on purpose: the example replies stand in the
``` fences that the figure prints as ''', and they are strict JSON on unbroken lines (in the published code the examples
of the 0/1 questions end in a comma, `{"score": 0,}`, which is not JSON, and judges copy it).

Replies are data from outside. They are read by one pass of a small reader for JSON and what language models write in
its place: no evaluation, a bounded length and depth, and regular expressions that cannot run away. It forgives
fences, prose around the object, trailing and missing commas, single, typographic and missing quotes, quotes inside
strings, comments and an end cut off after the score. What it does not do is guess: a score that is cut itself, a sum,
a range, a word, NaN, or a number outside the question's range is no score, and never 0.

Of several objects the last with a score counts, since the first may be the question's own example or be corrected
by what follows; the published code takes the first block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argrpo_cli.system.errors import UserError


@dataclass(frozen=True)
class Question:
    """A question about one image: the text before the image, the text after it, and what scores answer it.

    `before` may hold one `{prompt}`, where the caption goes.
    """

    before: str
    after: str
    low: float = 0.0
    high: float = 1.0
    whole: bool = False  # only `low` and `high` themselves answer it

    def fill(self, caption: str) -> tuple[str, str]:
        """The texts before and after the image, for an image of this caption."""
        head, slot, tail = self.before.partition("{prompt}")
        return (head + quoted(caption) + tail if slot else self.before), self.after


def plain(caption: str) -> str:
    """A caption in which nothing reads as a marker of a chat template, such as <|im_end|>, </s> or <image>."""
    return re.sub(r"<(?=[|/_A-Za-z])", "< ", caption)


def quoted(caption: str) -> str:
    """A caption between double quotes, as JSON writes it: one line, its own quotes escaped; plain words unchanged."""
    return json.dumps(plain(caption), ensure_ascii=False)


_EXAMPLE = json.dumps(
    {
        "description": "The image shows a brown dog with one eye and two ears. its mouth is open and the its tongue is "
        "sticking out.",
        "score": 3.5,
        "explanation": "The image shows a brown dog matches the prompt 'a photo of a dog' (1 score). The image is "
        "complete and all part can be seen (1 score). The dog in the photo looks unreal because it has only one eye "
        "and the eye position is not reasonable (0 score). The dog's face is clear but its body and background is "
        "blurred (0.5 score). The image do not have any noises, defects and artifacts (1 score). So the total score of "
        "this image is 1+1+0+0.5+1=3.5 .",
    },
    indent=2,
)

_YES_NO = """

You need to inspect the image carefully and give a score according to the question below:

- {question} If yes, give 0 score, otherwise give 1 score.

The answer should be in a JSON format as follows:

```json
{"score": 0}
```"""

QUALITY = Question(
    high=5.0,
    before="You are given a text prompt used to generate image: {prompt}\nBelow is one generated image: ",
    after="""

1. Describe the image thoroughly (objects, colors, layout, etc.), do not be affected by the prompt.
2. Score the generation quality from following aspects:
 - Is the object in the generated image satisfying the category according to the prompt? (0-1 score)
 - Is the generated image completed without missing parts? (0-1 score)
 - Does the content of generated image look real and reasonable? (0-1 score)
 - Is the generated image clear, bright and in high quality? (0-1 score)
 - Is the generated image free of any noises, defects and artifacts? (0-1 score)

Your response should in a ****JSON**** format following rules below:

1. The final response should have three keys: "description", "score", "explanation".
2. The total score of the image should be store in "score" key, you may use float numbers for the scores. The value of \
total score should be between 0 and 5.
3. The reasoning and scoring process could be write in "explanation" for you to explain your score. Following is a \
exmaple of response:

```json
"""
    + _EXAMPLE
    + "\n```",
)


FAKE = Question("", _YES_NO.replace("{question}", "Is the image an AI-generated image?"), whole=True)
WEIRD = Question("", _YES_NO.replace("{question}", "Is there any strange feature in the image?"), whole=True)

FORCED_PREFIX = '```json\n{"score": '  # what the reply to a 0/1 question begins with, up to the digit

_UNIFIED = """\
You are given a text caption and a generated image based on that caption. \
Your task is to evaluate this image based on two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. \
Consider the accuracy of depicted objects, their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, \
color accuracy, and overall aesthetic appeal.
Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: """


def unified_question(caption: str) -> str:
    """UnifiedReward's about an image of this caption: on one line, in square brackets as the model was trained."""
    return f"{_UNIFIED}[{' '.join(plain(caption).split())}]"


LIMIT = 65_536  # characters of a reply
DEPTH = 16  # of nested objects and arrays

_NUMBER = r"[+-]?(?:\d{1,12}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][+-]?\d{1,3})?"
_SCORE = re.compile(rf"({_NUMBER})(?:\s{{0,9}}+(?:/|out of)\s{{0,9}}+(\d{{1,6}})|\s{{0,9}}+points?)?")
# The rest of the line, or the next one: all of it must be the score.
_FINAL_SCORE = re.compile(r"final score[\s*_]{0,9}+[:：]\s{0,9}+([^\n]{0,60}+)(?:\n|\Z)", re.IGNORECASE)
_MARKS = " \t\r*_`\"'“”"  # around a score in bold or in quotes

_SPACE = re.compile(r"(?:\s++|//[^\n]*+)*+")
_QUOTED_KEY = r'(?:"(?:[^"\\\n]|\\.){1,100}+"|“[^”\n]{1,100}+”|\'[^\'\n]{1,100}+\')\s{0,50}+[:：]'
_KEY = re.compile(rf"{_QUOTED_KEY}|[^\W\d]\w{{0,100}}+\s{{0,50}}+[:：]")
_WORD = re.compile(r"\w++|.", re.DOTALL)
_TOKEN = re.compile(r"(?:[^,，}\]\[{\n`\"“']|,(?=\d))*+")  # a comma before a digit may be a decimal one: 3,5
_ITEM = re.compile(r"[^,，}\]\[{\n`\"“']*+")
_OPENING = re.compile(r"[{\[]")
_CLOSING_QUOTES = {'"': '"', "'": "'", "“": "”"}
_STRING_PARTS = {end: re.compile(rf"[\\{end}]") for end in _CLOSING_QUOTES.values()}
# A quote ends a string only where the text after it goes on as JSON; others are quotes inside the string.
_AFTER_STRING = re.compile(rf"\s{{0,200}}+(?:\Z|}}|```|//|[,，]\s{{0,200}}+(?:\Z|}}|//|{_KEY.pattern})|{_QUOTED_KEY})")
_AFTER_ITEM = re.compile(r"\s{0,200}+(?:\Z|[\],，]|```|//)")
_LITERALS: dict[str, bool | None] = {"true": True, "false": False, "null": None, "none": None}


def check_model(name: str) -> None:
    """UserError for what is neither a folder nor like the hub's name of a model; the hub is not asked."""
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith(("/", ".", "~"))):
        raise UserError(
            f"judge: there is no model folder {name!r}, and a hub name looks like Qwen/Qwen2.5-VL-3B-Instruct"
        )


class UnusableReply(ValueError):
    """There is no score in a reply; the message says why and quotes none of its text."""


def read_score(reply: str, question: Question) -> float:
    """The score that a reply gives to a question of the judge.

    Raises:
        UnusableReply: there is none, it is cut off, ambiguous, no number, or none that answers the question.
    """
    _check_length(reply)
    scores = _last_scores(reply)
    if len(scores) > 1:
        raise UnusableReply(f"the reply has {len(scores)} scores, and which one counts is not clear")
    value = scores[0]
    if isinstance(value, bool) and question.whole:
        return float(value)
    if not isinstance(value, str):
        raise UnusableReply("the score in the reply is not a number")
    return _number(value, question.low, question.high, question.whole)


def read_final_score(reply: str) -> float:
    """The number, 1 to 5, after the last "Final Score:" of a reply: what `read_score` takes, also in bold, and with a
    full stop. UnusableReply where there is none."""
    _check_length(reply)
    *_, place = [None, *re.finditer("final score", reply, re.IGNORECASE)]
    match = _FINAL_SCORE.match(reply, place.start()) if place else None
    if match is None:
        raise UnusableReply("the reply has no number after 'Final Score:'")
    return _number(match[1].strip(_MARKS).removesuffix(".").rstrip(_MARKS), 1.0, 5.0)


def _check_length(reply: str) -> None:
    if len(reply) > LIMIT:
        raise UnusableReply(f"the reply is longer than {LIMIT} characters")
    if not reply.strip():
        raise UnusableReply("the reply is empty")


def _number(text: str, low: float, high: float, whole: bool = False) -> float:
    """The number that a text is, where it answers the question; UnusableReply otherwise."""
    match = _SCORE.fullmatch(text.strip())
    if match is None:
        raise UnusableReply("the score in the reply is not a number")
    score, out_of = float(match[1]), match[2]
    if out_of is not None and float(out_of) != high:
        raise UnusableReply(f"the score is given out of {out_of}, not out of {high:g}")
    if not low <= score <= high:
        raise UnusableReply(f"the score {score:g} is outside {low:g} to {high:g}")
    if whole and score not in (low, high):
        raise UnusableReply(f"the score {score:g} is neither {low:g} nor {high:g}")
    return score + 0.0  # no negative zero


def _last_scores(reply: str) -> list[Any]:
    """The values under "score" of the last object that has any; UnusableReply when there is none."""
    reader, last = _Reader(reply), []
    while (opening := _OPENING.search(reply, reader.position)) is not None:
        reader.position = opening.start()
        value = reader.value()
        scores = _scores(value)
        if reader.cut and not scores and _keys(value):
            raise UnusableReply("the reply ends before its score")
        last = scores or last
    if not last:
        raise UnusableReply("the reply has no JSON object with a score")
    if last == [_Reader.CUT]:
        raise UnusableReply("the reply ends within its score")
    return last


def _scores(value: Any) -> list[Any]:
    """The value under "score" of an object itself, else those of everything inside it."""
    if isinstance(value, dict):
        if "score" in value:
            return [value["score"]]
        value = list(value.values())
    return [score for child in value for score in _scores(child)] if isinstance(value, list) else []


def _keys(value: Any) -> bool:
    """Whether there is an object with a key somewhere, so that it is more than a bracket in prose."""
    return any(map(_keys, value)) if isinstance(value, list) else isinstance(value, dict) and bool(value)


class _Reader:
    """One pass over a text that should be JSON. It never fails: what it cannot read it skips.

    Objects become dicts with keys in lower case (a repeated key's last value wins), arrays lists, `true`, `false` and
    `null` their Python values, and all else a str, quoted or not. `cut` tells that the text ended before the value.
    """

    CUT = object()  # a value that the text's end cut off

    def __init__(self, text: str):
        self.text, self.position, self.cut = text, 0, False

    def value(self, depth: int = 0, in_object: bool = False) -> Any:
        """The value at the current position."""
        first = self._peek()
        if first == "{" and depth < DEPTH:
            return self._object(depth)
        if first == "[" and depth < DEPTH:
            return self._array(depth)
        if first in _CLOSING_QUOTES:
            return self._string(_CLOSING_QUOTES[first], _AFTER_STRING if in_object else _AFTER_ITEM)
        token = (_TOKEN if in_object else _ITEM).match(self.text, self.position)[0]
        self.position += len(token)
        if self.position == len(self.text) and token == token.rstrip():  # more digits may have followed
            self.cut = True
            return self.CUT
        token = token.partition("//")[0].strip()
        return _LITERALS.get(token.lower(), token)

    def _peek(self) -> str:
        """The next character that is neither space nor comment; "" at the end of the text."""
        self.position = _SPACE.match(self.text, self.position).end()
        return self.text[self.position : self.position + 1]

    def _parts(self, end: str) -> Iterator[str]:
        """Where each part of an object or array begins, its first character, until it ends or the text does."""
        self.position += 1
        while not self.cut:
            first = self._peek()
            if not first:
                self.cut = True
            elif first == end:
                self.position += 1
                return
            elif self.text.startswith("```", self.position):
                return
            else:
                yield first

    def _object(self, depth: int) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        for first in self._parts("}"):
            if first == "{" and depth + 1 < DEPTH:
                pairs[f"{{{len(pairs)}"] = self.value(depth + 1)  # an object where a key should be
            elif (key := _KEY.match(self.text, self.position)) is not None:
                self.position = key.end()
                pairs[key[0][:-1].strip().strip("\"'“”").strip().lower()] = self.value(depth + 1, in_object=True)
            else:
                self.position = _WORD.match(self.text, self.position).end()
        return pairs

    def _array(self, depth: int) -> list[Any]:
        items: list[Any] = []
        for first in self._parts("]"):
            if first in "},，`" or (first in "{[" and depth + 1 >= DEPTH):
                self.position += 1
            else:
                items.append(self.value(depth + 1))
        return items

    def _string(self, end: str, after: re.Pattern[str]) -> Any:
        start = self.position + 1
        position = start
        while (part := _STRING_PARTS[end].search(self.text, position)) is not None:
            if part[0] == "\\":
                position = part.end() + 1
            elif after.match(self.text, part.end()):
                self.position = part.end()
                return self.text[start : part.start()]
            else:
                position = part.end()
        self.position, self.cut = len(self.text), True
        return self.CUT
