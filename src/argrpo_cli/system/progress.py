"""Progress of a long job: a bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argrpo_cli.system.processes import Team

LINE_EVERY_SECONDS = 10.0


def notice(text: str) -> None:
    """A line on the terminal, from the first of several processes: what takes a while is under way."""
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """Show the progress of a job of `total` units on standard error; yields `advance(count)`."""
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
