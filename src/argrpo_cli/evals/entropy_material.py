"""What the entropy of a policy is measured along: real pictures, held-out scenes of the nano world, or its own samples.

All three come in chunks, each with a key that says what decides its tokens, so that a chunk that was measured before is
known before its tokens are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from argrpo_cli.captions import read_captions
from argrpo_cli.evals.image_codes import CHUNK, PREPROCESSING, CodedImages, default_cache, tokenise
from argrpo_cli.evals.imagenet_folder import LabelledImages, conditions_of, open_labelled
from argrpo_cli.networks.weights import fingerprint
from argrpo_cli.policy import Policy
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.processes import Team

FIRST_SEED, SEED_STRIDE, MOST_SEEDS = 200_000_000, 10_000, 10_000  # of samples of prompts; `eval` draws others


@dataclass(frozen=True)
class Question:
    """What the entropy is measured on.

    Attributes:
        split: "val" for held-out images, teacher-forced; None for samples.
        prompts: a bundled set or a file of captions to sample; only where split is None.
        limit: at most so many scenes or prompts; so many of the pictures of `data`, every class equally often.
        seed: of the samples.
        data: folder of real pictures for the split; None for the nano world's scenes.
    """

    split: str | None = "val"
    prompts: str | None = None
    limit: int | None = None
    seed: int = 0
    data: str | None = None


@dataclass(frozen=True)
class Manner:
    """How a policy is asked: guidance scale of the guided mode, temperature, images at a time."""

    cfg_scale: float = 2.0
    temperature: float = 1.0
    batch_size: int = 64


@dataclass(frozen=True)
class Chunk:
    """Some images: what decides their tokens, what they show, and how to get the tokens, int64 [B, T]."""

    key: Any
    conditions: list[Condition]
    tokens: Callable[[], Tensor]


@dataclass(frozen=True)
class Material:
    """All images of a question for one policy.

    Attributes:
        chunks: the images.
        shown: what they show, equal for two policies that are measured on the same images.
        about: where the images are from, for the results.
    """

    chunks: list[Chunk]
    shown: Sequence[Any]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(len(chunk.conditions) for chunk in self.chunks)


def open_pictures(question: Question) -> LabelledImages | None:
    """The pictures of a question that asks for some, in the order they are measured in.

    Raises:
        UserError: no such folder, no labels, or a limit that is no number of images.
    """
    if question.limit is not None and question.limit < 2:
        raise UserError(f"--n {question.limit}: an interval needs 2 images or more")
    if question.split not in (None, "val"):
        raise UserError(f"no split {question.split!r}; there is val")
    if question.data is None:
        return None
    if question.split is None:
        raise UserError("--data are pictures to walk along, and --prompts asks for samples; give one of them")
    pictures = open_labelled(question.data).first(question.limit)
    if len(pictures.files) < 2:
        raise UserError(f"{question.data} holds one picture, and an interval needs 2 or more")
    return pictures


def gather(
    policy: Policy,
    name: str,
    question: Question,
    pictures: LabelledImages | None,
    manner: Manner,
    cache: Path | None,
    team: Team,
) -> Material:
    """The images for a policy called `name`; pictures are tokenised here, samples drawn when their tokens are wanted.

    Raises:
        UserError: the policy does not fit the question, or a picture cannot be read.
    """
    if pictures is not None:
        return _pictures(policy, pictures, cache, team)
    if question.split is not None:
        return team.together(lambda: _scenes(policy, name, question))
    return team.together(lambda: _samples(policy, name, question, manner))


def _pictures(policy: Policy, pictures: LabelledImages, cache: Path | None, team: Team) -> Material:
    conditions = team.together(lambda: conditions_of(pictures, policy))
    images = CodedImages(
        folder=pictures.folder,
        files=pictures.files,
        size=policy.image_size,
        tokenizer=fingerprint([policy.tokenizer]),
        tokens=policy.model.config.block_size,
        cache=cache or default_cache(),
    )
    tokenise(images, policy.tokenizer, team)

    def codes(chunk: int) -> Tensor:
        kept = images.load(chunk)
        if kept is None:
            raise UserError(f"{pictures.folder}, or the codes of it in {images.cache}, changed meanwhile; start again")
        return kept

    chunks = [
        Chunk(
            key=["pictures", images.key(chunk)],
            conditions=conditions[images.place(chunk)],
            tokens=partial(codes, chunk),
        )
        for chunk in images.chunks
    ]
    about = {"labels": pictures.source, "preprocessing": PREPROCESSING, "tokenizer": images.tokenizer}
    return Material(chunks, pictures.files, about)


def _scenes(policy: Policy, name: str, question: Question) -> Material:
    if policy.tokenizer_name != "nano-vq":
        raise UserError(f"--split val of {name} needs --data: a folder of ImageNet's validation pictures")
    from argrpo_cli.nano.tokens import load_held_out

    task = "classes" if policy.text_encoder is None else "captions"
    tokens, conditions = (part[: question.limit] for part in load_held_out(task))
    chunks = [
        Chunk(["scenes", task, place.start], conditions[place], lambda place=place: tokens[place])
        for place in _places(len(conditions), CHUNK)
    ]
    return Material(chunks, conditions)


def _samples(policy: Policy, name: str, question: Question, manner: Manner) -> Material:
    if policy.text_encoder is None:
        raise UserError(f"{name} draws classes and reads no prompts; measure it with --split val")
    prompts = _readable(policy, question.prompts)
    conditions = policy.conditions(read_captions(prompts))[: question.limit]
    if len(conditions) < 2:
        raise UserError(f"--prompts {question.prompts} holds one caption, and an interval needs 2 or more")
    if not 0 <= question.seed < MOST_SEEDS:
        raise UserError(f"--seed {question.seed}: give 0 to {MOST_SEEDS - 1}")
    seeds = [FIRST_SEED + question.seed * SEED_STRIDE + index for index in range(len(conditions))]

    def draw(place: slice) -> Tensor:
        return policy.sample(
            conditions[place],
            cfg_scale=manner.cfg_scale,
            temperature=manner.temperature,
            seeds=seeds[place],
            batch_size=manner.batch_size,
        )

    chunks = [
        Chunk(["samples", *seeds[place]], conditions[place], partial(draw, place))
        for place in _places(len(conditions), manner.batch_size)
    ]
    return Material(chunks, conditions, {"prompts": prompts, "seed": question.seed})


def _places(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _readable(policy: Policy, prompts: str) -> str:
    """The set itself; for the official GenEval list, the part of it that a policy of few words can read."""
    few_words = policy.text_encoder is not None and policy.text_encoder.words is not None
    return "geneval-nano" if prompts == "geneval" and few_words else prompts


def chunk_identity(chunk: Chunk) -> list[Any]:
    """What decides the tokens and conditions of a chunk, ready for JSON."""
    return [chunk.key, [list(asdict(one).values()) for one in chunk.conditions]]
