"""DeQA-Score (You et al., CVPR 2025, arXiv 2501.11561): image quality, 1 to 5, from the next word of a model that sees.

The model begins its answer with "The quality of the image is"; the score is the expectation of 5, 4, 3, 2, 1 under the
softmax of the next token's logits over excellent, good, fair, poor, bad (github.com/zhiyuanyou/DeQA-Score). The model,
`zhiyuanyou/DeQA-Score-Mix3`, is a 7B mPLUG-Owl2 that exists as remote code only, which is not executed here: it is
asked through an OpenAI-compatible server that returns the `top_logprobs` of the next token.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from argrpo_cli.rewards.judge.replies import UnusableReply
from argrpo_cli.rewards.judge.server import JudgeServer, ServerReward
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError

MODEL = "zhiyuanyou/DeQA-Score-Mix3"
QUESTION = "How would you rate the quality of this image?"
ANSWER = "The quality of the image is"
LEVELS = {"excellent": 5.0, "good": 4.0, "fair": 3.0, "poor": 2.0, "bad": 1.0}
TOP_LOGPROBS = 20  # the most that the protocol allows
UNCERTAINTY = 0.05  # of the score, through levels that are not among the likeliest tokens
BACKGROUND = (122, 116, 104)  # 255 x CLIP's mean, truncated: what published preprocessing makes images square with


def build_request(image_url: str, model: str = MODEL) -> dict[str, Any]:
    """The body of a chat completion that asks for the word after `ANSWER`; `image_url` may be a data URL.

    `continue_final_message` is an extension of the protocol that vLLM and SGLang have.
    """
    content = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": image_url}}]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": ANSWER}],
        "continue_final_message": True,
        "add_generation_prompt": False,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": TOP_LOGPROBS,
    }


def expected_level(logprobs: Mapping[str, float]) -> float:
    """The score, in [1, 5], of log-probabilities (or logits) of levels; a level that is not given has probability 0.

    Raises:
        ValueError: there is none of the levels, or none is finite.
    """
    given = {level: logprobs[level] for level in LEVELS if level in logprobs and logprobs[level] > -math.inf}
    if not given or not all(math.isfinite(value) for value in given.values()):
        raise ValueError("no log-probability of excellent, good, fair, poor or bad")
    largest = max(given.values())
    mass = {level: math.exp(value - largest) for level, value in given.items()}
    return sum(LEVELS[level] * share for level, share in mass.items()) / sum(mass.values())


def score_of(reply: Mapping[str, Any]) -> float:
    """The score, in [1, 5], in a server's reply to `build_request`.

    A level that is not listed is at most as likely as the least likely token that is. Where that could move the score
    by more than `UNCERTAINTY`, there is no score.

    Raises:
        ValueError: the reply has another shape, or says too little of the levels.
    """
    try:
        listed = [
            (one["token"].strip(" ▁Ġ\n"), float(one["logprob"]))
            for one in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        ]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError("the reply has no top_logprobs; the server must return them for the next token") from error
    if not all(value < 1e-3 for _, value in listed):  # room for rounding; a NaN is not below it either
        raise ValueError("the reply has numbers that are no log-probabilities")
    logprobs: dict[str, float] = {}
    for token, value in listed:
        if token in LEVELS:
            logprobs[token] = max(value, logprobs.get(token, -math.inf))
    score = expected_level(logprobs)
    largest, least = max(logprobs.values()), min(value for _, value in listed)
    known = sum(math.exp(value - largest) for value in logprobs.values())
    unlisted = (len(LEVELS) - len(logprobs)) * math.exp(least - largest)
    if 4 * unlisted / (known + unlisted) > UNCERTAINTY:  # the levels span 4
        raise ValueError(f"only {', '.join(logprobs)} among the {len(listed)} likeliest tokens, which is too little")
    return score


def data_url(image: Tensor) -> str:
    """uint8 [3, H, W] as a PNG in a data URL, made square around its centre as published preprocessing does."""
    from PIL import Image

    height, width = image.shape[-2:]
    side = max(height, width)
    square = torch.tensor(BACKGROUND, dtype=torch.uint8)[:, None, None].repeat(1, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = image.cpu()
    buffer = io.BytesIO()
    Image.fromarray(square.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class Deqa(ServerReward):
    """Quality from 1 (bad) to 5 (excellent), by a model behind a server.

    Args:
        url: of the OpenAI-compatible server; `model` is its name there. The others are JudgeServer's.

    Raises:
        UserError: no url, an option out of range, a server that is not there or does not have the model.
    """

    def __init__(
        self,
        device: str = "cpu",
        *,
        url: str | None = None,
        model: str = MODEL,
        attempts: int = 3,
        concurrency: int = 16,
        timeout: float = 60.0,
        backoff: float = 1.0,
    ):
        if url is None:
            raise UserError(
                f"deqa: url is missing; serve {MODEL} with an OpenAI-compatible server and give its url, such as "
                "http://localhost:8000/v1"
            )
        self.device = device
        self.server = JudgeServer(
            url, model, attempts=attempts, concurrency=concurrency, timeout=timeout, backoff=backoff
        )

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, H, W] to float32 [B], NaN where the server gave no score; the conditions are not looked at."""
        if not len(images):
            return torch.zeros(0, device=self.device)
        requests = [partial(_request, image, self.server.model) for image in images.cpu()]
        answers = self.server.complete(requests, _read, resample=False)
        return self.scores_of(answers)


def _request(image: Tensor, model: str) -> dict[str, Any]:
    return build_request(data_url(image), model)


def _read(response: Any) -> float:
    try:
        return score_of(response)
    except ValueError as error:
        raise UnusableReply(str(error)) from error
