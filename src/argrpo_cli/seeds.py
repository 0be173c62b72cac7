"""Which noise belongs to whom: the one table of seeds, so that no two commands draw the same images by accident.

Every image has a seed of its own below 2^32 (torch's CPU generator looks at no more bits). A user's `--seed s` chooses
a block of a command's own space; within it images are numbered. Training is apart: its seeds are hashes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from argrpo_cli.system.errors import UserError


@dataclass(frozen=True)
class Space:
    """Seeds first, first + 1, ...: blocks of `stride` images, `most` of them; `least` images must be drawn of one."""

    first: int
    stride: int
    most: int
    least: int = 1


SPACES = {
    # `argrpo sample` takes the user's own numbers, from 0.
    "nano": Space(1_000_000, 100_000, 490, least=48),  # two of each class, which are compared
    "critic": Space(50_000_000, 10_000_000, 2),  # what nano-critic learnt from, and what it was measured on
    "entropy": Space(200_000_000, 10_000, 10_000),
    "geneval": Space(400_000_000, 100_000, 10_000),
    "drawbench": Space(1_500_000_000, 100_000, 5_000),
    "imagenet": Space(2_000_000_000, 100_000, 10_000, least=5),  # for three neighbours without one of the images
    "geneval2": Space(3_100_000_000, 100_000, 2_000),
    "unigenbench": Space(3_300_000_000, 100_000, 2_000),
    "wise": Space(3_500_000_000, 100_000, 2_000),
}


def check(space: str, seed: int, n: int, option: str = "--n", prompts: int | None = None) -> None:
    """Whether n images, or n of each of some prompts, fit the block `seed` of a space.

    Raises:
        UserError: there is no such block, or the images are too few or too many for it.
    """
    one = SPACES[space]
    if not 0 <= seed < one.most:
        raise UserError(f"--seed {seed}: give 0 to {one.most - 1}")
    most = one.stride // (prompts or 1)
    if not one.least <= n <= most:
        each = f" of each of {prompts} prompts" if prompts else ""
        raise UserError(f"{option} {n}: give {one.least} to {most} images{each}")


def of(space: str, seed: int, index: int) -> int:
    """The seed of image `index` of the block that a user's `seed` chooses."""
    one = SPACES[space]
    return one.first + seed * one.stride + index


def of_training(seed: int, step: int, index: int) -> int:
    """The seed of image `index` of the batch drawn after `step` updates: the same whenever and wherever it is drawn."""
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits; a CPU generator uses the low 32


def happens(what: str, seed: int, probability: float) -> bool:
    """Whether what happens by chance happens to the image, or the batch, with this seed: "drop", its condition is
    dropped in training; "student", the student draws the batch in distillation."""
    digest = hashlib.blake2b(f"{what}/{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < probability
