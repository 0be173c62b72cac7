"""Speed on this machine, as ratios against a named baseline: `python -m argrpo_cli.bench NAME`."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch


def machine(device: str) -> str:
    """What a table of speeds was measured on, in a line."""
    what = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {device}, {what}, torch {torch.__version__}"


def measure(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each job; they take turns, so that a slow moment of the machine hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            wait_for_device()
            start = time.perf_counter()
            job()
            wait_for_device()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def wait_for_device() -> None:
    """Kernels run behind Python's back on a GPU; time is taken when they are done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
