"""geneval2, a task reward without a detector: a vision-language model answers questions about what the prompt asks for.

Of each atom of a prompt (an object, its number, a colour, a relation) a question is asked as GenEval 2 does; the reward
is the mean of the probabilities of the expected answers (Soft-TIFA of Kamath et al. 2025). The questions are those of a
file in the benchmark's format, or follow from a prompt of GenEval's own grammar. `evals/geneval2.py` asks this judge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal

from argrpo_cli.geneval.questions import (
    Item,
    Likelihood,
    Question,
    arithmetic_mean,
    find_item,
    geometric_mean,
    read_items,
    variants,
    wording,
)
from argrpo_cli.rewards.base import File, Needs
from argrpo_cli.rewards.judge import VisionModel
from argrpo_cli.rewards.judge.deqa import TOP_LOGPROBS, next_tokens
from argrpo_cli.rewards.judge.server import Answer
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import to_pil

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

NANO = "nano"
UNCERTAINTY = 0.05  # of a probability, through words that are not among the likeliest tokens that a server lists
MISSING = (math.nan, math.nan, False)


class GenEval2(VisionModel):
    """The mean probability, 0 to 1, of the expected answers to a prompt's questions; see `VisionModel` for the model.

    Args:
        backend: "nano" is the bundled detector of the nano world, which can be asked about its objects alone.
        mean: over the questions of a prompt; "geometric" is the headline of the benchmark, and 0 where one answer is.
        questions: a file in GenEval 2's format. Without it, and for prompts that are not in it, prompts are those that
            GenEval's templates make.

    Probabilities are `Likelihood.exact`: the reward pays for no token but the answer.
    """

    name = "geneval2"
    low, high = 0.0, 1.0
    published = "Qwen/Qwen3-VL-8B-Instruct"
    resample = False

    def __init__(
        self,
        device: str = "cpu",
        *,
        backend: Literal["local", "server", "nano"] = "local",
        mean: Literal["geometric", "arithmetic"] = "geometric",
        questions: File = None,
        **model: Any,
    ):
        self.backend, self.mean = backend, geometric_mean if mean == "geometric" else arithmetic_mean
        items = {item.prompt: item for item in read_items(questions)} if questions is not None else {}
        self.find = cache(lambda prompt: items.get(prompt.strip()) or find_item(prompt))
        self.first_tokens = cache(self._first_tokens)
        if backend == NANO:
            from argrpo_cli.geneval.nano_detector import load_detector

            self.check_together({"backend": backend, **model})
            self.device, self.remote, self.detector = device, False, load_detector(device=device)
        else:
            super().__init__(device, backend=backend, **model)

    @classmethod
    def check_together(cls, options: Mapping[str, Any]) -> None:
        if options.get("backend") == NANO and options.get("model") is not None:
            raise UserError(f"{cls.name}: backend is 'nano' and model given; leave one of them out")
        super().check_together(options)

    @classmethod
    def needs(cls, options: Mapping[str, Any], device: str = "cpu") -> Needs:
        """As others; the nano detector is bundled."""
        return Needs() if options.get("backend") == NANO else super().needs(options, device)

    def check(self, conditions: Sequence[Condition]) -> None:
        """UserError for a prompt without questions, or with one that this judge cannot be asked."""
        for condition in conditions:
            self.check_item(self.find(condition.prompt))

    def check_item(self, item: Item) -> None:
        """UserError for a question that this judge cannot be asked."""
        if self.backend == NANO:
            from argrpo_cli.geneval.nano_answers import check_question

            for question in item.questions:
                check_question(question)

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, H, W] and B conditions to float32 [B]; NaN where one of a prompt's answers is missing."""
        answers = self.ask(images, [self.find(condition.prompt).questions for condition in conditions])
        missing = [next((one.reason for one in own if one.reason), "") for own in answers]
        means = [self.mean([one.exact for one in own]) for own in answers]
        return self.scores_of([Answer(*pair) for pair in zip(means, missing, strict=True)])

    def ask(self, images: Tensor, questions: Sequence[Sequence[Question]]) -> list[list[Likelihood]]:
        """uint8 [B, 3, H, W] and questions about each to what the judge thinks of their answers, in their order."""
        if self.backend == NANO:
            from argrpo_cli.geneval.nano_answers import answer

            pairs = zip(self.detector.detect(images), questions, strict=True)
            return [[answer(objects, question) for question in own] for objects, own in pairs]
        if self.remote:
            return self._ask_server(to_pil(images), questions)
        pictures, answers = to_pil(images), [[] for _ in questions]
        for several in zip_longest(*questions):  # the first question of every image, then the second: batches of B
            places = [place for place, question in enumerate(several) if question is not None]
            texts = [("", wording(several[place])) for place in places]
            rows = self.local.next_token([pictures[place] for place in places], texts)
            for place, row in zip(places, rows, strict=True):
                answers[place].append(self._local_likelihood(row, several[place].answer))
        return answers

    # --- the model in this process

    def _local_likelihood(self, row: Tensor, answer: str) -> Likelihood:
        """From the probabilities of all tokens, float32 [V]."""
        first, whole = self.first_tokens(answer)
        likeliest = self.local.processor.tokenizer.decode([int(row.argmax())]).lower() in variants(answer)
        return Likelihood(row[first].sum().item(), min(row[whole].sum().item(), 1.0), likeliest)

    def _first_tokens(self, answer: str) -> tuple[list[int], list[int]]:
        """Of the variants of an answer the first token of each, repeated as they come, and those that are one token.

        Raises:
            UserError: none is one token, so that the first token of a reply says nothing.
        """
        tokenizer = self.local.processor.tokenizer
        first = [tokenizer.encode(text)[0] for text in variants(answer)]  # one that a tokenizer puts first, included
        alone = [tokenizer.encode(text, add_special_tokens=False) for text in variants(answer)]
        whole = sorted({ids[0] for ids in alone if len(ids) == 1})
        if not whole:
            raise UserError(f"{self.name}: in this model's tokenizer {answer!r} is not one token; give another model")
        return first, whole

    # --- a server

    def _ask_server(self, pictures: Sequence[Image], questions: Sequence[Sequence[Question]]) -> list[list[Likelihood]]:
        flat = [(picture, one) for picture, own in zip(pictures, questions, strict=True) for one in own]
        replies = iter(self._run(self._ask_all, [one for one, _ in flat], [one for _, one in flat]))
        return [[_listed_likelihood(next(replies), one.answer) for one in own] for own in questions]

    def texts(self, condition: Question) -> tuple[str, str]:
        return "", wording(condition)

    def request(self, image: Image, condition: Question) -> dict[str, Any]:
        settings = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return super().request(image, condition) | settings

    def read(self, response: Any, condition: Question) -> list[tuple[str, float]]:
        return next_tokens(response)


def _listed_likelihood(reply: Answer, answer: str) -> Likelihood:
    """From the likeliest tokens that a server lists: those that are variants, each once.

    Variants that are not listed have probability 0; each has at most that of the least likely token that is. Where
    that could add more than `UNCERTAINTY`, there is no answer. Which token a variant begins with the server does not
    say, so that `published` is `exact`.
    """
    if reply.reason:
        return Likelihood(*MISSING, reply.reason)
    texts, listed = set(variants(answer)), dict(reply.score)
    share = math.fsum(math.exp(value) for token, value in listed.items() if token in texts)
    rest = max(0.0, 1 - math.fsum(map(math.exp, listed.values())))
    unlisted = len(texts - listed.keys()) * math.exp(min(listed.values(), default=0.0))
    if (doubt := min(unlisted, rest)) > UNCERTAINTY:
        return Likelihood(*MISSING, f"the {len(listed)} likeliest tokens leave {doubt:.2f} for {answer!r} unlisted")
    share = min(share, 1.0)
    return Likelihood(share, share, max(listed, key=listed.get).lower() in texts)
