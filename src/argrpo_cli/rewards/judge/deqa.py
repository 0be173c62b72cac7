"""DeQA-Score (You et al., CVPR 2025, arXiv 2501.11561): image quality, 1 to 5, from the next word of a model that sees.

The model begins its answer with "The quality of the image is"; the score is the expectation of 5, 4, 3, 2, 1 under the
softmax of the next token's logits over excellent, good, fair, poor, bad (github.com/zhiyuanyou/DeQA-Score). The model,
`zhiyuanyou/DeQA-Score-Mix3`, is a 7B mPLUG-Owl2 that exists as remote code only, which is not executed here: it is
asked through an OpenAI-compatible server that returns the `top_logprobs` of the next token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from argrpo_cli.rewards.judge.questions import UnusableReply
from argrpo_cli.rewards.judge.server import ServerReward, data_url
from argrpo_cli.shapes import Condition

if TYPE_CHECKING:
    from PIL.Image import Image

QUESTION = "How would you rate the quality of this image?"
ANSWER = "The quality of the image is"
LEVELS = {"excellent": 5.0, "good": 4.0, "fair": 3.0, "poor": 2.0, "bad": 1.0}
TOP_LOGPROBS = 20  # the most that the protocol allows
UNCERTAINTY = 0.05  # of the score, through levels that are not among the likeliest tokens
BACKGROUND = (122, 116, 104)  # 255 x CLIP's mean, truncated: what published preprocessing makes images square with


def build_request(image_url: str) -> dict[str, Any]:
    """The body, without the model, of a chat completion that asks for the word after `ANSWER`.

    `continue_final_message` is an extension of the protocol that vLLM and SGLang have.
    """
    content = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": image_url}}]
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": ANSWER}],
        "continue_final_message": True,
        "add_generation_prompt": False,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": TOP_LOGPROBS,
    }


def next_tokens(reply: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The likeliest first tokens of a server's reply and their log-probabilities; a mark of a word is a space.

    Raises:
        UnusableReply: the reply has another shape, or numbers that are no log-probabilities.
    """
    try:
        listed = [
            (re.sub("[▁Ġ]", " ", one["token"]), float(one["logprob"]))
            for one in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        ]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UnusableReply("the reply has no top_logprobs; the server must return them for the next token") from error
    if not all(value < 1e-3 for _, value in listed):  # room for rounding; a NaN is not below it either
        raise UnusableReply("the reply has numbers that are no log-probabilities")
    return listed


def expected_level(logprobs: Mapping[str, float]) -> float:
    """The score, in [1, 5], of log-probabilities (or logits) of levels; a level that is not given has probability 0.

    Raises:
        UnusableReply: there is none of the levels, or none is finite.
    """
    known = {level: value for level, value in logprobs.items() if level in LEVELS and value > -math.inf}
    if not known or not all(math.isfinite(value) for value in known.values()):
        raise UnusableReply("no log-probability of excellent, good, fair, poor or bad")
    largest = max(known.values())
    mass = {level: math.exp(value - largest) for level, value in known.items()}
    return sum(LEVELS[level] * share for level, share in mass.items()) / sum(mass.values())


def score_of(reply: Mapping[str, Any]) -> float:
    """The score, in [1, 5], in a server's reply to `build_request`.

    A level that is not listed is at most as likely as the least likely token that is. Where that could move the score
    by more than `UNCERTAINTY`, there is no score.

    Raises:
        UnusableReply: the reply has another shape, or says too little of the levels.
    """
    listed = [(token.strip(), value) for token, value in next_tokens(reply)]
    logprobs: dict[str, float] = {}
    for token, value in listed:
        if token in LEVELS:
            logprobs[token] = max(value, logprobs.get(token, -math.inf))
    score = expected_level(logprobs)
    largest, least = max(logprobs.values()), min(value for _, value in listed)
    known = sum(math.exp(value - largest) for value in logprobs.values())
    unlisted = (len(LEVELS) - len(logprobs)) * math.exp(least - largest)
    if 4 * unlisted / (known + unlisted) > UNCERTAINTY:  # the levels span 4
        raise UnusableReply(f"only {', '.join(logprobs)} among the {len(listed)} likeliest tokens, which is too little")
    return score


def squared(image: Image) -> Image:
    """The image made square around its centre, as published preprocessing does."""
    from PIL import Image

    side = max(image.size)
    square = Image.new("RGB", (side, side), BACKGROUND)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class Deqa(ServerReward):
    """Quality from 1 (bad) to 5 (excellent), by a model behind a server; options as those of `ServerReward`.

    The conditions are not looked at.
    """

    name, family, reads_prompt = "deqa", "quality", False
    low, high = 1.0, 5.0
    label, unit, divisor = "DeQA", "score / 5", 5.0
    published, resample = "zhiyuanyou/DeQA-Score-Mix3", False

    def request(self, image: Image, condition: Condition) -> dict[str, Any]:
        return build_request(data_url(squared(image), self.image_format))

    def read(self, response: Any, condition: Condition) -> float:
        return score_of(response)
