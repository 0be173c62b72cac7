"""How the images of an update are shared out over the processes of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from argrpo_cli.system.errors import UserError

if TYPE_CHECKING:
    from argrpo_cli.recipe.schema import GrpoSection

CHUNK = 64  # images that a process draws and decodes at a time


def images_per_process(grpo: GrpoSection, processes: int) -> tuple[int, int]:
    """How many images of an update each process draws, and how many of them pass through the model at a time.

    `grpo.batch_size` counts the images of all processes, so a recipe means the same update on any number of them.
    Process i draws images i n to (i + 1) n - 1. A group may lie on several processes: rewards are gathered before
    groups are compared. `grpo.micro_batch_size` is per process, and all of its images where it has fewer.

    Raises:
        UserError: the numbers do not divide.
    """
    if grpo.batch_size % processes:
        lower = grpo.batch_size - grpo.batch_size % processes
        fitting = next((size for size in range(lower, 0, -processes) if size % grpo.group_size == 0), None)
        higher = next(
            size
            for size in range(lower + processes, lower + processes * (grpo.group_size + 1), processes)
            if size % grpo.group_size == 0
        )
        sizes = f"{fitting} or {higher}" if fitting else f"{higher}"
        raise UserError(
            f"grpo.batch_size: {grpo.batch_size} images cannot be shared by {processes} processes; "
            f"use for instance {sizes}, or another number of processes"
        )
    share = grpo.batch_size // processes
    micro = min(grpo.micro_batch_size or share, share)
    if share % micro:
        raise UserError(
            f"grpo.micro_batch_size: {micro} does not divide the {share} images that each of {processes} processes "
            f"draws ({grpo.batch_size} / {processes}); use one that does, or null for all {share} at once"
        )
    return share, micro
