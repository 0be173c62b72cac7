"""judge-quality, judge-fake and judge-weird: the paper's VLM-as-a-judge (figure 13), Qwen2.5-VL-3B-Instruct by default.
And unified-reward, another model that is asked so.

The questions and the reading of replies are in `questions.py`; the model runs in this process (`local.py`)
or behind a server (`server.py`). An image that the judge gives no score to is NaN, never 0 (the published code gives
0); `failures` counts them and `last_error` says why the last one has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Interval

from argrpo_cli.rewards.base import Count, Needs
from argrpo_cli.rewards.judge.questions import (
    FAKE,
    QUALITY,
    WEIRD,
    Question,
    read_final_score,
    read_score,
    unified_question,
)
from argrpo_cli.rewards.judge.server import ServerReward
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import HubFile, to_pil

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
PARAMETERS = 3_754_622_976  # by its model card's index
FILES = (
    HubFile(MODEL, "config.json"),
    HubFile(MODEL, "model-00001-of-00002.safetensors", 3_980_000_000),
    HubFile(MODEL, "model-00002-of-00002.safetensors", 3_530_000_000),
)
WORKING = 2 * 10**9  # keys and values of 64 chats: 36 layers x 512 numbers x 2 bytes for each of some 700 tokens


class VisionModel(ServerReward):
    """A vision-language model that is asked about images, in this process or behind a server.

    Args:
        backend: "local" is the model in this process, by transformers; "server" any OpenAI-compatible server.
        model: hub name or folder; for a server, the name that it lists. The published one by default.
        url: of the server, such as http://localhost:8000/v1. Its key, where it wants one, is read from the
            environment: ARGRPO_JUDGE_API_KEY, else OPENAI_API_KEY.
        server: further options of the server backend, see `ServerReward`.

    Raises:
        UserError: options that contradict each other, a model that cannot be loaded, a server that is not there.
    """

    published_needs: ClassVar[Needs | None] = None  # of the published model here, with float32 weights

    def __init__(
        self,
        device: str = "cpu",
        *,
        backend: Literal["local", "server"] = "local",
        model: str | None = None,
        url: str | None = None,
        **server: Any,
    ):
        self.check_together({"backend": backend, "url": url})
        if backend == "server" and url is None:
            mend = "give its url, such as http://localhost:8000/v1"
            raise UserError(f"{self.name}: backend is 'server' and url missing; {mend}")
        self.device = device
        self.remote = backend == "server"  # a scheduler may ask it while the device is at other work
        if self.remote:
            super().__init__(device, url=url, model=model, **server)
        else:
            from argrpo_cli.rewards.judge.local import load_local

            self.local = load_local(model or self.published, device)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """As others, and UserError for options that contradict each other."""
        super().check_options(options)
        cls.check_together(options)

    @classmethod
    def check_together(cls, options: Mapping[str, Any]) -> None:
        """UserError for options that contradict each other; a url that is missing may come."""
        backend = options.get("backend", "local")
        if options.get("url") is not None and backend != "server":
            raise UserError(f"{cls.name}: backend is {backend!r} and url given; use backend 'server' with a url")

    @classmethod
    def needs(cls, options: Mapping[str, Any], device: str = "cpu") -> Needs:
        """A server, or the model here, which is known in full where it is the judge's of the paper."""
        model = options.get("model") or cls.published
        if options.get("backend", "local") == "server":
            return super().needs(options, device)
        if model == cls.published and cls.published_needs is not None:
            whole = cls.published_needs
            return whole if device == "cpu" else whole._replace(weights=whole.weights // 2)
        files = (HubFile(model, "config.json"),) if "/" in model else ()
        return Needs(files, weights=None, working=WORKING, network=model)


class Judge(VisionModel):
    """One question put to a vision-language model about every image; see `VisionModel` for the model.

    Args:
        reading: "generate" reads the score from the reply's JSON, as the paper. "logit", for the 0/1 questions and
            the local backend, is P("1") against P("0") where the reply has its digit: one forward pass.
        attempts: replies asked for one image at most.
        temperature: of a server's first attempt. 0 gives the same score again. Where a reply has no score, asking again
            at 0 would give the same reply, so that further attempts take the settings of the published server path.
    """

    family, factor, reads_prompt = "realism", 0.25, False
    low, high = 0.0, 1.0
    published = MODEL
    published_needs = Needs(FILES, {}, 4 * PARAMETERS, WORKING, MODEL)
    question: ClassVar[Question]

    def __init__(
        self,
        device: str = "cpu",
        *,
        reading: Literal["generate", "logit"] = "generate",
        attempts: Count = 3,
        temperature: Annotated[float, Interval(ge=0, lt=math.inf)] = 0.0,
        **model: Any,
    ):
        self.check_together({**model, "reading": reading})
        self.reading, self.attempts, self.temperature = reading, attempts, temperature
        super().__init__(device, attempts=attempts, **model)

    @classmethod
    def check_together(cls, options: Mapping[str, Any]) -> None:
        if options.get("reading") == "logit" and not cls.question.whole:
            raise UserError(f"{cls.name}: reading 'logit' is for the 0/1 questions; use 'generate'")
        if options.get("reading") == "logit" and options.get("backend") == "server":
            raise UserError(f"{cls.name}: reading 'logit' needs the model in this process; use backend 'local'")
        super().check_together(options)

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, H, W] and B conditions to float32 [B] in the judge's own unit; NaN where it gave no score.

        0 to 5 for the quality; 0 or 1 (between them with reading "logit") for the others, 1 being good. Only the
        quality question has the prompt in it.
        """
        if self.remote:
            return super().score(images, conditions)
        pictures, texts = to_pil(images), [self.texts(one) for one in conditions]
        if self.reading == "logit" and pictures:
            return self.local.probability_of_one(pictures, texts)
        return self.scores_of(self.local.ask(pictures, texts, self.read_reply, self.attempts))

    def texts(self, condition: Condition) -> tuple[str, str]:
        return self.question.fill(condition.prompt)

    def read_reply(self, reply: str) -> float:
        return read_score(reply, self.question)


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


class UnifiedReward(ServerReward):
    """UnifiedReward-7b-v1.5 behind a server: 1 to 5 for how well an image fits its caption and how good it looks.

    The question is the pointwise one for generated images of the model's card as far as it is known here; it has not
    been run against the real model. As the published evaluation: 512 x 512 pixels, temperature 0, the number after
    "Final Score:". The published code divides it by 5; here it is raw. Options are those of `ServerReward`.
    """

    name, low, high, factor = "unified-reward", 1.0, 5.0, 1 / 5
    label, unit, divisor = "UnifiedReward", "score / 5, images at 512 pixels", 5.0
    published = "CodeGoat24/UnifiedReward-7b-v1.5"

    def check(self, conditions: Sequence[Condition]) -> None:
        """UserError where a prompt is empty, since there is nothing to hold the image against."""
        if any(not condition.prompt.strip() for condition in conditions):
            raise UserError("unified-reward: a prompt is empty; give every image a caption")

    def request(self, image: Image, condition: Condition) -> dict[str, Any]:
        from PIL.Image import Resampling

        return super().request(image.resize((512, 512), Resampling.BICUBIC), condition)

    def texts(self, condition: Condition) -> tuple[str, str]:
        return "", unified_question(condition.prompt)

    def read_reply(self, reply: str) -> float:
        return read_final_score(reply)
