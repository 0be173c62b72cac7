"""A process that reads hostile input, case after case: a hang, a crash or a huge allocation ends it and not the tests.

python -m tests.fuzz.worker pictures 7 1234         one case again, in this process, with its traceback
python -m tests.fuzz.worker pictures 7 0 5000       so many cases, under watch
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from argrpo_cli.system.errors import UserError, one_line
from tests.fuzz.mutate import Damage

PATIENCE = 20.0  # seconds of computing, or of not computing, that a case may take; a busy machine has no part in that
PREPARATION = 600.0  # seconds for imports and for what is damaged later
MOST_MEMORY = 3 * 2**30
LONGEST_LINE = 2000  # characters of a message
READ, REFUSED, FAILED = "read", "refused", "failed"


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        verdict: READ, REFUSED (by a UserError of one line) or FAILED.
        words: what was said or went wrong; of a failure also where, in its last lines.
        kind: of a failure, in a few words: such as the type of an exception and the line that raised it.
        peak: most bytes in memory while it ran.
    """

    verdict: str
    words: str = ""
    kind: str = ""
    peak: int = 0


@dataclass
class Summary:
    """Of many cases."""

    name: str
    cases: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    failures: dict[str, list[tuple[str, Outcome]]] = field(default_factory=dict)  # by kind
    peak: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        counts = ", ".join(f"{self.verdicts[verdict]} {verdict}" for verdict in (READ, REFUSED, FAILED))
        head = f"{self.name}: {self.cases} cases, {counts}; peak {self.peak / 2**20:.0f} MiB; {self.seconds:.1f} s"
        parts = [head]
        for kind, cases in sorted(self.failures.items(), key=lambda one: -len(one[1])):
            again, first = cases[0]
            parts.append(f"--- {len(cases)} x {kind}; {again}\n{first.words}")
        return "\n".join(parts)


def run_case(home: Path, name: str, seed: int, index: int) -> Outcome:
    """Make the input of a case and read it in this process."""
    folder = home / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _forget_peak()
    damage = Damage(name, seed, index)
    try:
        outcome = Outcome(READ, module_of(name).case(seeds_of(home, name), damage, folder))
    except UserError as error:
        outcome = _of_refusal(str(error), whole=damage.none)
    except BaseException as error:  # a panic of a library in Rust, too
        outcome = Outcome(FAILED, "".join(traceback.format_exception(error)[-14:]), _kind_of(error))
    peak = _peak()
    if peak > MOST_MEMORY and outcome.verdict != FAILED:
        outcome = Outcome(FAILED, f"{peak / 2**30:.1f} GiB; {outcome.words}", "memory")
    return Outcome(outcome.verdict, outcome.words, outcome.kind, peak)


def module_of(name: str) -> Any:
    """What makes the cases of a name: `seeds(folder)` once, and `case(seeds, rng, folder)`."""
    return importlib.import_module(f"tests.fuzz.{name}")


_SEEDS: dict[str, Any] = {}


def seeds_of(home: Path, name: str) -> Any:
    """What is damaged in the cases of a name, made once."""
    if name not in _SEEDS:
        folder = home / "seeds" / name
        folder.mkdir(parents=True, exist_ok=True)
        _SEEDS[name] = module_of(name).seeds(folder)
    return _SEEDS[name]


def _of_refusal(line: str, whole: bool) -> Outcome:
    """A refusal must be one line that a terminal can show, and nothing that is `whole` may be refused."""
    if whole:
        return Outcome(FAILED, line, "what is whole is refused")
    line = one_line(line)
    if not line.strip() or len(line) > LONGEST_LINE:
        return Outcome(FAILED, line[:600], f"a message of {len(line)} characters")
    return Outcome(REFUSED, line)


def _kind_of(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = next((one for one in reversed(frames) if "argrpo_cli" in one.filename), frames[-1])
    what = f": {error}" if isinstance(error, AssertionError) else ""
    return f"{type(error).__name__}{what[:80]} in {Path(own.filename).name}, line {own.lineno}, {own.name}"


def _status(key: str) -> int:
    """Bytes of a row such as VmHWM in the system's account of this process; 0 where there is none."""
    try:
        rows = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(row.split()[1]) * 1024 for row in rows if row.startswith(f"{key}:")), 0)


def _forget_peak() -> None:
    with suppress(OSError):  # else the peak is that of all cases
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _limit_memory() -> None:
    """An allocation above the limit fails in this process, and the machine has no trouble by it."""
    if size := _status("VmSize"):
        resource.setrlimit(resource.RLIMIT_AS, (size + MOST_MEMORY, resource.RLIM_INFINITY))


def _serve(connection: Connection, home: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.stdin.close()
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 0)
    while True:
        name, seed, index = connection.recv()
        if index is None:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            seeds_of(home, name)
            _limit_memory()
            connection.send(None)
        else:
            connection.send(run_case(home, name, seed, index))


class Worker:
    """The process and its watch. Inputs of cases that failed are kept in `home`/failed."""

    def __init__(self, home: Path, tell: Callable[[str], None] = lambda line: None) -> None:
        self.home, self.tell = home, tell
        self._process: Any = None
        self._ready: set[str] = set()

    def cases(self, name: str, seed: int, indices: Iterable[int]) -> Summary:
        """Run cases one after another."""
        summary, start = Summary(name), time.monotonic()
        for index in indices:
            outcome = self.case(name, seed, index)
            summary.cases += 1
            summary.verdicts[outcome.verdict] += 1
            summary.peak = max(summary.peak, outcome.peak)
            if outcome.verdict == FAILED:
                again = f"again: python -m tests.fuzz.worker {name} {seed} {index}"
                if outcome.kind not in summary.failures:
                    self.tell(f"{outcome.kind}; {again}")
                summary.failures.setdefault(outcome.kind, []).append((again, outcome))
        summary.seconds = time.monotonic() - start
        return summary

    def case(self, name: str, seed: int, index: int) -> Outcome:
        """Run a case; a process that hangs or dies over it is a failure, too, and another takes its place."""
        outcome = self._ask(name, seed, index)
        if outcome.verdict == FAILED:
            kept = self.home / "failed" / f"{name}-{seed}-{index}"
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(exist_ok=True)
            (self.home / "case").rename(kept)
        return outcome

    def _ask(self, name: str, seed: int, index: int) -> Outcome:
        if self._process is None:
            self._start()
        if name not in self._ready:
            self._connection.send((name, seed, None))
            if not self._connection.poll(PREPARATION):
                raise RuntimeError(f"the seeds of {name} were not ready within {PREPARATION:.0f} s")
            self._connection.recv()
            self._ready.add(name)
        try:
            self._connection.send((name, seed, index))
            return self._connection.recv() if self._answers() else self._ended("hang", f"nothing in {PATIENCE:.0f} s")
        except (EOFError, ConnectionError):
            self._process.join()
            return self._ended("crash", f"the process ended with {self._process.exitcode}")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.home), daemon=True)
        self._process.start()
        theirs.close()
        self._ready.clear()

    def _answers(self) -> bool:
        """Whether an answer comes before the process has computed, or has stood still, for as long as it may."""
        account = psutil.Process(self._process.pid).cpu_times
        first = last = sum(account()[:2])
        while not self._connection.poll(PATIENCE):
            last, before = sum(account()[:2]), last
            if last - first > PATIENCE or last == before:
                return False
        return True

    def _ended(self, kind: str, words: str) -> Outcome:
        self.close()
        return Outcome(FAILED, words, kind)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def main(name: str, seed: str, first: str, last: str | None = None) -> None:
    """See the head of this file."""
    home = Path(os.environ.get("FUZZ_HOME") or tempfile.mkdtemp(prefix="fuzz-"))
    if last is None:
        seeds_of(home, name)
        _limit_memory()
        outcome = run_case(home, name, int(seed), int(first))
        print(f"{outcome.verdict}, {outcome.peak / 2**20:.0f} MiB: {outcome.words}\nthe input: {home / 'case'}")
        return
    worker = Worker(home, print)
    print(worker.cases(name, int(seed), range(int(first), int(last))))
    worker.close()
    print(f"failures are in {home / 'failed'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
