"""Several processes that share one job, on one machine or many: which this is, what it computes on, its progress.

Started by `accelerate launch` or `torchrun`, which say in the environment how many there are; alone otherwise.
"""

from __future__ import annotations

import atexit
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from argrpo_cli.system.errors import UserError, first_line, printable
from argrpo_cli.system.files import make_dir, reason

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")

WARNING = "WARNING: "  # begins a line that is told however quiet it is to be
_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)
LOCK = ".lock"  # in a folder that one process holds
LINE_EVERY_SECONDS = 10.0  # of progress, where there is no terminal
LONGEST_JOB = timedelta(days=30)  # the first to finish waits for the last
# Launchers end all processes once one has failed; the first must have had the time to say why.
LAST_WORDS = 2.0  # seconds
# What gloo and NCCL say in a process that waits for another which has ended.
LEFT_ALONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


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

    @property
    def first(self) -> bool:
        """Whether this is the process that reports and writes."""
        return self.index == 0

    def lead(self, action: Callable[[], Result]) -> Result | None:
        """Let the first process act while the others wait; what `action` returned, None in the others.

        Raises:
            UserError: what `action` raised, in the first process; the others exit with code 2 without a word.
        """
        return self.together(action if self.first else lambda: None)

    def from_lead(self, action: Callable[[], Result]) -> Result:
        """As `lead`; what `action` returned, which must be plain data, is known to all afterwards."""
        result = self.lead(action)
        if self.count == 1:
            return result
        import torch.distributed as dist

        box = [result]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def together(self, action: Callable[[], Result]) -> Result:
        """Let every process act, wait for the slowest, and return what `action` returned here.

        Raises:
            UserError: in the first process, what `action` raised in the first of them that failed; the others exit
                with code 2 without a word.
        """
        if self.count == 1:
            return action()
        result: Any = None
        fault: str | None = None
        try:
            result = action()
        except UserError as error:
            fault = str(error)
        except OSError as error:  # or the others would wait for a process that has ended
            fault = first_line(error)
        first = next((one for one in self.exchange(fault) if one is not None), None)
        if first is None:
            return result
        self.fail(first)

    def fail(self, message: str) -> NoReturn:
        """End the job for a reason that all processes have found at the same point.

        Raises:
            UserError: `message`, in the first process; the others exit with code 2 without a word.
        """
        if not self.first:
            time.sleep(LAST_WORDS)
            raise SystemExit(2)
        raise UserError(message)

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Within this context a process that is left by another exits with code 1 without a word, or it would bury
        what the other one has said under a traceback of its own."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not any(words in str(error) for words in LEFT_ALONE):
                raise
            time.sleep(LAST_WORDS)
            raise SystemExit(1) from error

    def exchange(self, value: Result) -> list[Result]:
        """What each process gave, in their order; plain data. All must call it."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes below each other, on the CPU; as many [N, ...] from each. All must call it."""
        if self.count == 1:
            return rows.cpu()
        import torch
        import torch.distributed as dist

        own = rows.to(self.device).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(parts, own)
        return torch.cat(parts).cpu()


ALONE = Team(0, 1, "cpu")  # what a part that can be used by itself has when nobody gives it a team


def resolve_device(name: str) -> str:
    """`auto` as the best device of this machine, anything else checked to exist here.

    Raises:
        UserError: the name is no torch device, or this machine has none of that kind.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type == "meta":
            raise RuntimeError("a device without numbers")
        torch.empty(0, device=torch.device(name))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        have = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            have.append("mps")
        raise UserError(f"device {name!r} is not available; this machine has {', '.join(have)}") from error
    return name


def peak_memory(device: str) -> int:
    """Bytes at the worst moment: on a GPU since its counter was reset, on a CPU of this process so far."""
    import resource

    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def quick_in_bfloat16(device: str) -> bool:
    """Whether bfloat16 takes less time than float32 there; False where torch does not say (before 2.11).

    Without AMX a CPU takes 1.3 times as long in bfloat16 as in float32 although it has AVX-512 instructions for it, and
    three times without those (nano-c2i, oneDNN held to these instructions).
    """
    import torch

    if device.startswith("cuda"):
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and _capabilities().get("amx_bf16", False)


def _capabilities() -> dict[str, Any]:
    import torch

    return getattr(torch.cpu, "get_capabilities", dict)()


@cache
def tell_slow(dtype: str, device: str) -> None:
    """Say once where a processor is asked for bfloat16 and is known to be slow at it."""
    if dtype == "bfloat16" and device == "cpu" and _capabilities() and not quick_in_bfloat16(device):
        say("bfloat16 takes longer than float32 on this processor, which has no matrix instructions for it (AMX)")


def is_device(name: str) -> bool:
    """Whether a machine may have such a device, this one or another."""
    import torch

    try:
        return torch.device(name).type != "meta"
    except RuntimeError:
        return False


def join_team(device: str = "auto", patience: timedelta = LONGEST_JOB) -> Team:
    """The team of this process; a device without a number becomes this process's own.

    Args:
        patience: how long a process waits for the others before it takes them to be lost.

    Raises:
        UserError: no such device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Team(0, 1, resolve_device(device))
    from accelerate import PartialState

    state = PartialState(cpu=resolve_device(device) == "cpu", timeout=patience)
    atexit.register(_leave)
    own = str(state.device) if device in ("auto", "cpu", state.device.type) else resolve_device(device)
    return Team(state.process_index, state.num_processes, own)


def _leave() -> None:
    """End the connection before the interpreter does: its threads, still running then, can abort a finished process."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def alone_in(folder: str | os.PathLike[str], busy: str) -> Iterator[None]:
    """Hold a folder, which is made if need be, against other processes of any machine; it is left as it was found.

    Args:
        busy: what to say where another process holds it.

    Raises:
        UserError: another one does, or the file system has no locks.
    """
    from filelock import FileLock, Timeout

    new = [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
    file = make_dir(folder) / LOCK
    lock = FileLock(file)  # released by the system when the process dies, however it dies
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(busy) from error
    except (OSError, NotImplementedError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise UserError(f"cannot lock {file}: {why}; choose a folder on another file system with --out") from error
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()  # while it is held: whoever has opened it meanwhile finds that it has no name, and gives up
        lock.release()
        with suppress(OSError):
            for path in new:
                path.rmdir()  # where nothing came of it


def program() -> str:
    """The command as a shell in this folder finds it: `argrpo` where that is the one that runs, else by its path."""
    this = Path(sys.argv[0])
    if this.parts[-2:] == ("argrpo_cli", "__main__.py"):
        this = Path(sys.executable)
    elif this.stem != "argrpo":
        return "argrpo"  # a program of someone else's, whose user knows where ours is
    there = shutil.which(this.name)
    if there is not None and os.path.samefile(there, this):
        name = this.name.removesuffix(".exe")
    else:
        inside = this.absolute().is_relative_to(Path.cwd())
        name = shlex.quote(str(this.absolute().relative_to(Path.cwd()) if inside else this))
    return name if this.stem == "argrpo" else f"{name} -m argrpo_cli"


def again(*arguments: str | os.PathLike[str]) -> str:
    """A command of this program, to be typed as it is."""
    return f"{program()} {shlex.join(map(os.fspath, arguments))}"


@contextmanager
def quietly(on: bool = True) -> Iterator[None]:
    """Within this context, if `on`, there is no progress, and of remarks the warnings alone."""
    before = _QUIET.set(on or _QUIET.get())
    try:
        yield
    finally:
        _QUIET.reset(before)


def notice(text: str) -> None:
    """A line on the terminal, from the first of several processes: what takes a while is under way."""
    if sys.stderr.isatty():
        say(text)


def say(text: str) -> None:
    """A line on standard error, from the first of several processes."""
    if os.environ.get("RANK", "0") == "0" and (text.startswith(WARNING) or not _QUIET.get()):
        print(printable(text), file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """Show the progress of a job of `total` units on standard error; yields `advance(count)`."""
    if _QUIET.get():
        yield lambda count: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda count: bar.advance(task, count)
        return

    start = shown = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        now = time.monotonic()
        if done >= total or now - shown >= LINE_EVERY_SECONDS:
            shown = now
            rate = done / max(now - start, 1e-9)
            print(f"{label}: {done}/{total} {unit}, {rate:.1f}/s", file=sys.stderr, flush=True)

    yield advance


@contextmanager
def shared_progress(team: Team, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """As `progress`, of the first process's share of a team's job; nothing in the others, or of a share of nothing."""
    if not (team.first and total):
        yield lambda count: None
        return
    with progress(label if team.count == 1 else f"{label}, one of {team.count} processes", total) as advance:
        yield advance
