"""The three questions of the paper's figure 13 and UnifiedReward's, with captions in them that stay captions.

The wording of the three, with its slips, is the figure's. Two things differ on purpose: the example replies stand in
the ``` fences that the figure prints as ''', and they are strict JSON on unbroken lines (in the published code the
examples of the 0/1 questions end in a comma, `{"score": 0,}`, which is not JSON, and judges copy it).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question about one image: the text before the image, the text after it, and what scores answer it.

    `before` may hold one `{prompt}`, where the caption goes.
    """

    name: str
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
    name="quality",
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


def _yes_no(name: str, question: str) -> Question:
    return Question(name, whole=True, before="", after=_YES_NO.replace("{question}", question))


FAKE = _yes_no("fake", "Is the image an AI-generated image?")
WEIRD = _yes_no("weird", "Is there any strange feature in the image?")

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
