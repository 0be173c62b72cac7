"""The processes of a run: what each draws of an update, and how `argrpo train --processes N` starts them.

That is accelerate's launcher, started from here, on the same command without that option.

The launcher starts N processes of this command and tells them in the environment of each other. It takes signals for
them; once one has failed, it ends the others. What went wrong is said by the process where it did.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from argrpo_cli.system.errors import UserError, did_you_mean
from argrpo_cli.system.processes import quick_in_bfloat16

if TYPE_CHECKING:
    from argrpo_cli.recipe import Recipe

CONFIGS = ("ddp", "fsdp2", "zero2", "zero3")  # accelerate/*.yaml
# Seconds that processes get to finish their step and save when a signal comes, before the launcher kills them.
TIME_TO_SAVE = 600
CHUNK, CHUNK_TOKENS = 64, 2**14  # images that a process draws at a time, or as many as have so many tokens


def images_per_process(recipe: Recipe, processes: int) -> tuple[int, int]:
    """How many images of an update each process draws, and how many of them pass through the model at a time.

    `batch_size` counts the images of all processes, so a recipe means the same update on any number of them.
    Process i draws images i n to (i + 1) n - 1. A group may lie on several processes: rewards are gathered before
    groups are compared. `micro_batch_size` is per process, and all of its images where it has fewer.

    Raises:
        UserError: the numbers do not divide.
    """
    optim = recipe.optim
    if optim.batch_size % processes:
        lower = optim.batch_size - optim.batch_size % processes
        fitting = next((size for size in range(lower, 0, -processes) if size % optim.group_size == 0), None)
        higher = next(
            size
            for size in range(lower + processes, lower + processes * (optim.group_size + 1), processes)
            if size % optim.group_size == 0
        )
        sizes = f"{fitting} or {higher}" if fitting else f"{higher}"
        raise UserError(
            f"{recipe.method}.batch_size: {optim.batch_size} images cannot be shared by {processes} processes; "
            f"use for instance {sizes}, or another number of processes"
        )
    share = optim.batch_size // processes
    micro = min(optim.micro_batch_size or share, share)
    if share % micro:
        raise UserError(
            f"{recipe.method}.micro_batch_size: {micro} does not divide the {share} images that each of "
            f"{processes} processes draws ({optim.batch_size} / {processes}); use one that does, or null for "
            f"all {share} at once"
        )
    return share, micro


def settle_dtype(recipe: Recipe, device: str) -> Recipe:
    """The recipe with `policy.dtype: auto` settled for a device."""
    if recipe.start is not None:
        recipe = recipe.model_copy(update={"start": settle_dtype(recipe.start, device)})
    if recipe.policy.dtype != "auto":
        return recipe
    fast = quick_in_bfloat16(device)
    policy = recipe.policy.model_copy(update={"dtype": "bfloat16" if fast else "float32"})
    return recipe.model_copy(update={"policy": policy})


def drawn_at_once(tokens: int) -> int:
    """How many images of so many tokens a process draws at a time: 256 of 64, and 64 of 256 or more."""
    return max(CHUNK, CHUNK_TOKENS // tokens)


def config_file(name: str) -> Path:
    """The accelerate configuration of that name, one of `CONFIGS`, or the file of the user's own.

    Raises:
        UserError: neither.
    """
    if name in CONFIGS:
        return Path(__file__).parent / "accelerate" / f"{name}.yaml"
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"--accelerate-config {name}: neither a file nor one of {', '.join(CONFIGS)}{did_you_mean(name, CONFIGS)}"
        )
    return path


def check_launch(processes: int | None, device: str, config: str | None) -> None:
    """Whether a machine could run so many processes on the recipe's device, by such a configuration.

    Raises:
        UserError: none could.
    """
    if config is not None and processes in (None, 1):
        raise UserError(f"--accelerate-config {config}: for several processes; say how many with --processes")
    if processes in (None, 1):
        return
    config_file(config or "ddp")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--processes {processes}: a launcher has started this process already; leave the option out")
    if ":" in device:
        raise UserError(f"policy.device {device}: one GPU, and --processes {processes} takes one each; use auto")


def check_alone(processes: int, device: str) -> None:
    """UserError when transformers would share out the model of a single process over several GPUs."""
    import torch

    if processes == 1 and device.startswith("cuda") and torch.cuda.device_count() > 1:
        raise UserError(
            f"{torch.cuda.device_count()} GPUs are visible and one process takes one; train on all of them with "
            f"--processes {torch.cuda.device_count()}, or choose one with CUDA_VISIBLE_DEVICES=0"
        )


def check_processes(processes: int, device: str, config: str) -> bool:
    """Whether this machine can run so many processes on the recipe's device; True for the CPU.

    Raises:
        UserError: it cannot.
    """
    import torch

    from argrpo_cli.system.processes import resolve_device

    if config.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"--accelerate-config {config} needs DeepSpeed: pip install deepspeed")
    if resolve_device(device) == "cpu":
        if config in CONFIGS and config != "ddp":
            raise UserError(f"--accelerate-config {config}: for GPUs, and this run is on the CPU; use ddp")
        return True
    if processes > torch.cuda.device_count():
        raise UserError(f"--processes {processes}: one GPU each, and this machine has {torch.cuda.device_count()}")
    return False


def launch(arguments: Sequence[str], processes: int, config: str, cpu: bool) -> int:
    """Run `argrpo ARGUMENTS` as several processes and wait for them.

    Args:
        arguments: of the command that each of them runs.
        config: see `config_file`.
        cpu: compute on the CPU.

    Returns:
        The exit code: 0, that of the process that failed first, or 128 and the signal that ended them.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    own = ["--config_file", str(config_file(config)), "--num_processes", str(processes), "--main_process_port", "0"]
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": TIME_TO_SAVE} | ({"ACCELERATE_USE_CPU": "true"} if cpu else {})
    for name in environment.keys() & os.environ.keys():
        del environment[name]  # what the user has set stays
    with patch_environment(**environment), _silent():
        try:
            launch_command(launch_command_parser().parse_args([*own, "-m", "argrpo_cli", *arguments]))
        except SignalException as stop:
            return 128 + int(stop.sigval)
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            if failure.exitcode > 0:
                return failure.exitcode
            number = -failure.exitcode  # of a signal, and a process that it ended could not say so
            why = "; it may have run out of memory" if number == signal.SIGKILL else ""
            print(f"argrpo: error: process {rank} was ended by {signal.Signals(number).name}{why}", file=sys.stderr)
            return 128 + number
    return 0


@contextmanager
def _silent() -> Iterator[None]:
    """The launcher reports every end of a process as a failure of its own, after the process has said it better."""
    before = logging.root.manager.disable
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
        for number, handler in handlers.items():  # the launcher takes them and does not give them back
            signal.signal(number, handler)
        sys.stdout.flush()
