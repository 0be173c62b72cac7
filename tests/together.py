"""Several processes of the command line, as `torchrun` starts them.

They are forked from this one: the libraries are loaded, and what a test has replaced is replaced in them, too.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.state import AcceleratorState, GradientState

import argrpo_cli.policy.llamagen.policy  # noqa: F401 (before the forks, with the libraries it needs)
from argrpo_cli.cli.app import run


class Ended(NamedTuple):
    """Exit codes, and what all have printed."""

    codes: list[int | None]
    out: str
    err: str


def together(arguments: Sequence[str], folder: Path) -> Ended:
    """Run `argrpo ARGUMENTS` by two processes; see `forked`."""
    return forked(partial(run, arguments), folder)


def forked(action: Callable[[], int], folder: Path, processes: int = 2, timeout: float = 1800) -> Ended:
    """As `start`, and wait for their end."""
    jobs = start(action, folder, processes)
    for job in jobs:
        job.join(timeout)
        job.kill()  # does nothing to one that has ended
    printed = ["".join(path.read_text() for path in sorted(folder.glob(f"{name}-*"))) for name in ("out", "err")]
    return Ended([job.exitcode for job in jobs], *printed)


def start(action: Callable[[], int], folder: Path, processes: int) -> list[BaseProcess]:
    """Let several processes act, each to an exit code; what they print goes into `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    variables = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    fork = multiprocessing.get_context("fork")
    jobs = [fork.Process(target=_work, args=(action, rank, variables, folder)) for rank in range(processes)]
    for job in jobs:
        job.start()
    return jobs


def _work(action: Callable[[], int], rank: int, variables: dict[str, object], folder: Path) -> None:
    os.environ |= {key: str(value) for key, value in {**variables, "RANK": rank, "LOCAL_RANK": rank}.items()}
    sys.stdout, sys.stderr = (open(folder / f"{name}-{rank}", "w") for name in ("out", "err"))  # noqa: SIM115
    AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier test
    GradientState._reset_state()
    torch.set_num_threads(1)  # a fork has the calling thread only
    sys.exit(action())
