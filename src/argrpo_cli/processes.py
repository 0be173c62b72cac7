"""Several processes, on one machine or many, that share one job: who this one is, and doing things in step.

Started by `accelerate launch` or `torchrun`, which say in the environment how many there are; alone otherwise.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from argrpo_cli.devices import resolve_device
from argrpo_cli.errors import UserError

Result = TypeVar("Result")

LONGEST_JOB = timedelta(days=30)  # the first to finish waits for the last


@dataclass(frozen=True)
class Team:
    """This process among its kind.

    Attributes:
        index: 0 for the one that reports and writes what there is one of.
        count: how many processes there are.
        device: what this one computes on.
    """

    index: int
    count: int
    device: str

    def lead(self, action: Callable[[], None]) -> None:
        """Let the first process act while the others wait.

        Raises:
            UserError: what `action` raised, in the first process; the others exit with code 2 without a word.
        """
        self.together(action if self.index == 0 else lambda: None)

    def together(self, action: Callable[[], Result]) -> Result:
        """Let every process act, wait for the slowest, and return what `action` returned here.

        Raises:
            UserError: in the first process, what `action` raised in the first of them that failed; the others exit
                with code 2 without a word.
        """
        if self.count == 1:
            return action()
        import torch.distributed as dist

        result: Any = None
        fault: str | None = None
        try:
            result = action()
        except UserError as error:
            fault = str(error)
        faults: list[str | None] = [None] * self.count
        dist.all_gather_object(faults, fault)
        first = next((one for one in faults if one is not None), None)
        if first is None:
            return result
        if self.index == 0:
            raise UserError(first)
        raise SystemExit(2)


def join_team(device: str = "auto") -> Team:
    """The team of this process; a device without a number becomes this process's own.

    Raises:
        UserError: no such device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Team(0, 1, resolve_device(device))
    from accelerate import PartialState

    state = PartialState(cpu=resolve_device(device) == "cpu", timeout=LONGEST_JOB)
    atexit.register(_leave)
    own = str(state.device) if device in ("auto", "cpu", state.device.type) else resolve_device(device)
    return Team(state.process_index, state.num_processes, own)


def _leave() -> None:
    """End the connection before the interpreter does: its threads, still running then, can abort a finished process."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
