"""Speed on this machine, as ratios against a named baseline: `python -m argrpo_cli.bench NAME`."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from argrpo_cli.system.processes import peak_memory, resolve_device


def parse(
    name: str,
    about: str | None,
    arguments: list[str] | None,
    more: Sequence[tuple[str, dict[str, Any]]] = (),
    **defaults: Any,
) -> argparse.Namespace:
    """The options of a benchmark; `device` among them is one that is there, and a line says what it is.

    Args:
        more: flags with what `add_argument` takes, for those that are more than a value with a default.
    """
    parser = argparse.ArgumentParser(prog=f"python -m argrpo_cli.bench {name}", description=about)
    for flag, words in more:
        parser.add_argument(flag, **words)
    for key, default in {**defaults, "device": "auto"}.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args(arguments)
    options.device = resolve_device(options.device)
    print(machine(options.device), flush=True)
    return options


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


@dataclass(frozen=True)
class Bench:
    """What a part of `bench gpu` is given.

    Attributes:
        device: "cuda", or "cpu" with toy sizes.
        toy: whether sizes are to mean nothing and take no time.
        card: rows of the part "card" by their names, empty where it has not been run.
        row: records a row: its name and its figures.
    """

    device: str
    toy: bool
    card: dict[str, dict[str, Any]]
    row: Callable[..., None]

    def seconds(self, job: Callable[[], object], repeats: int = 1) -> float:
        """Median of a job's repeats."""
        return measure({"": job}, repeats)[""]

    def free(self) -> None:
        """Give memory that nothing holds back to the device, and begin to look for the peak again."""
        if self.device == "cuda":
            torch.cuda.empty_cache()  # CUDA
            torch.cuda.reset_peak_memory_stats()  # CUDA

    def memory(self) -> float:
        """GiB at most since `free`, on a GPU."""
        return round(peak_memory(self.device) / 2**30, 2)


def wait_for_device() -> None:
    """Kernels run behind Python's back on a GPU; time is taken when they are done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
