"""`argrpo list`: what there is to choose from."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from argrpo_cli.cli.options import OUTPUT, command, present
from argrpo_cli.system.errors import UserError, offer, printable

BENCHMARKS, REPORT = "benchmarks", "report"  # the latter measures nothing


def list_command(benchmarks: Mapping[str, Callable[..., None]]) -> Callable[..., None]:
    """The command, which knows these benchmarks."""

    @command(tells=("json",))
    def list_(kind: str | None = None) -> None:
        """List policies, recipes, rewards, benchmarks and prompt sets by name, each with a line on what it is.

        Options:
            [KIND]: policies, recipes, rewards, benchmarks or prompts.  [default: all]
        """
        from argrpo_cli.catalogue import KINDS

        kinds = {
            **KINDS,
            BENCHMARKS: lambda: [_benchmark(name, one) for name, one in benchmarks.items() if name != REPORT],
        }
        if kind is not None and kind not in kinds:
            raise UserError(f"no list of {kind!r}{offer(kind, kinds)}")
        lists = {name: rows() for name, rows in kinds.items() if kind in (None, name)}
        present(lambda: lists)
        if not OUTPUT.get().json:
            _show(lists)

    return list_


def _benchmark(name: str, function: Callable[..., None]) -> dict[str, Any]:
    return {"name": name, "about": (function.__doc__ or "").partition("\n")[0], "command": f"argrpo eval {name}"}


def _show(lists: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A line for each, in pipes too; on a terminal it is wrapped beside the names."""
    width = max(len(row["name"]) for rows in lists.values() for row in rows) + 2
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for place, (kind, rows) in enumerate(lists.items()):
        if len(lists) > 1:
            print(f"{chr(10) * (place > 0)}{kind}")
        for row in rows:
            line = printable(f"{row['name']:<{width}}{row['about']}")
            indent = " " * min(width, columns // 2)
            print(textwrap.fill(line, columns, subsequent_indent=indent, break_long_words=False) if columns else line)
