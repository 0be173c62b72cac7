"""judge-quality, judge-fake and judge-weird: the paper's VLM-as-a-judge (figure 13), Qwen2.5-VL-3B-Instruct by default.

The questions are in `prompts.py`, the reading of replies in `replies.py`; the model runs in this process (`local.py`)
or behind a server (`server.py`). An image that the judge gives no score to is NaN, never 0 (the published code gives
0); `failures` counts them and `last_error` says why the last one has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from argrpo_cli.rewards.base import Needs, choose
from argrpo_cli.rewards.judge.prompts import FAKE, QUALITY, WEIRD, Question
from argrpo_cli.rewards.judge.replies import read_score
from argrpo_cli.rewards.judge.server import ServerReward, server_needs, to_pil
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import HubFile

if TYPE_CHECKING:
    from torch import Tensor

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
PARAMETERS = 3_754_622_976  # by its model card's index
FILES = (
    HubFile(MODEL, "config.json"),
    HubFile(MODEL, "model-00001-of-00002.safetensors", 3_980_000_000),
    HubFile(MODEL, "model-00002-of-00002.safetensors", 3_530_000_000),
)
WORKING = 2 * 10**9  # keys and values of 64 chats: 36 layers x 512 numbers x 2 bytes for each of some 700 tokens
BACKENDS = ("local", "server")
READINGS = ("generate", "logit")


class Judge(ServerReward):
    """One question put to a vision-language model about every image.

    Args:
        backend: "local" is the model in this process, by transformers; "server" any OpenAI-compatible server.
        model: hub name or folder; for a server, the name that it lists.
        url: of the server, such as http://localhost:8000/v1. Its key, where it wants one, is read from the
            environment: ARGRPO_JUDGE_API_KEY, else OPENAI_API_KEY.
        reading: "generate" reads the score from the reply's JSON, as the paper. "logit", for the 0/1 questions and
            the local backend, is P("1") against P("0") where the reply has its digit: one forward pass.
        attempts: replies asked for one image at most.
        temperature: of a server's first attempt. 0 gives the same score again. Where a reply has no score, asking again
            at 0 would give the same reply, so that further attempts take the settings of the published server path.
        server: further options of the server backend, see `ServerReward`.

    Raises:
        UserError: an option that is not one, a model that cannot be loaded, a server that is not there.
    """

    family, factor, reads_prompt = "realism", 0.25, False
    low, high = 0.0, 1.0
    published = MODEL
    question: ClassVar[Question]

    def __init__(
        self,
        device: str = "cpu",
        *,
        backend: str = "local",
        model: str = MODEL,
        url: str | None = None,
        reading: str = "generate",
        attempts: int = 3,
        temperature: float = 0.0,
        **server: Any,
    ):
        name = self.name
        choose(name, "backend", backend, BACKENDS)
        choose(name, "reading", reading, READINGS)
        if reading == "logit" and not self.question.whole:
            raise UserError(f"{name}: reading 'logit' is for the 0/1 questions; use 'generate'")
        if reading == "logit" and backend == "server":
            raise UserError(f"{name}: reading 'logit' needs the model in this process; use backend 'local'")
        if (url is not None) != (backend == "server"):
            mend = (
                "give its url, such as http://localhost:8000/v1" if url is None else "use backend 'server' with a url"
            )
            raise UserError(f"{name}: backend is {backend!r} and url {'missing' if url is None else 'given'}; {mend}")
        if attempts < 1:
            raise UserError(f"{name}: attempts is {attempts}; it must be at least 1")
        if not 0 <= temperature < math.inf:
            raise UserError(f"judge: temperature is {temperature!r}; it must be 0 or more")
        self.device, self.reading, self.attempts, self.temperature = device, reading, attempts, temperature
        self.remote = backend == "server"  # a scheduler may ask it while the device is at other work
        if self.remote:
            super().__init__(device, url=url, model=model, attempts=attempts, **server)
        else:
            from argrpo_cli.rewards.judge.local import load_local

            self.local = load_local(model, device)

    @classmethod
    def needs(cls, options: Mapping[str, Any], device: str = "cpu") -> Needs:
        """A server, or the model here, which is known in full where it is the paper's."""
        model, backend = options.get("model", MODEL), options.get("backend", "local")
        choose("judge", "backend", backend, BACKENDS)
        if backend == "server":
            return server_needs(f"{model} at {options.get('url', '?')}", options)
        if model == MODEL:
            return Needs(FILES, {}, (4 if device == "cpu" else 2) * PARAMETERS, WORKING, model)
        files = (HubFile(model, "config.json"),) if "/" in model else ()
        return Needs(files, weights=None, working=WORKING, network=model)

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, H, W] and B conditions to float32 [B] in the judge's own unit; NaN where it gave no score.

        0 to 5 for the quality; 0 or 1 (between them with reading "logit") for the others, 1 being good. Only the
        quality question has the prompt in it.
        """
        pictures, prompts = to_pil(images), [self.question.fill(one.prompt) for one in conditions]
        if not pictures:
            return self.scores_of([])
        if self.reading == "logit":
            return self.local.probability_of_one(pictures, prompts)
        read = partial(read_score, question=self.question)
        if self.remote:
            answers = self.ask_server(pictures, prompts, read)
        else:
            answers = self.local.ask(pictures, prompts, read, self.attempts)
        return self.scores_of(answers)


class JudgeQuality(Judge):
    """How well the image shows its prompt, whole, real, clear and clean: 0 to 5."""

    name, high, reads_prompt = "judge-quality", 5.0, True
    question = QUALITY


class JudgeFake(Judge):
    """0 where the image looks generated by an AI, 1 where it does not."""

    name, question = "judge-fake", FAKE


class JudgeWeird(Judge):
    """0 where the image has a strange feature, 1 where it has none."""

    name, question = "judge-weird", WEIRD
