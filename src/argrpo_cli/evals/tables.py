"""Results as tables: for the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from argrpo_cli.shapes import Column, Result, Value

if TYPE_CHECKING:
    from rich.table import Table

TITLES = {
    "imagenet": "ImageNet (table 2)",
    "geneval": "GenEval (table 3)",
    "drawbench": "DrawBench (table 4)",
    "nano": "Nano world, single objects",
    "entropy": "Policy entropy, nats per token (figures 3 and 4)",
    "score": "Reward scores",
}
ARROWS = {"higher": " ↑", "lower": " ↓"}
TITLE_WIDTH = 70  # characters that a title and a caption have at least, where the terminal does
LABEL_WIDTH = 12  # characters of the first column that must fit beside the figures
FRAME = 3  # characters between two columns


def table(result: Result, width: int = 80) -> Table:
    """A line for each column of the result: baseline, policy, difference, and the paper's numbers in grey.

    Figures are never cut: where the lines do not fit `width`, errors stand below their numbers.
    """
    from rich.table import Table

    names = _order(result)
    counts = {key: next((row[key].count for row in result.rows.values() if key in row), None) for key in result.columns}
    cells = {key: _cells(result, names, key, column) for key, column in result.columns.items()}
    heads = [*names, *(["difference"] if result.difference else []), *(f"paper: {row}" for row in result.paper)]
    if len(set(counts.values())) > 1:
        heads.insert(0, "images")
        cells = {key: ["" if counts[key] is None else str(counts[key]), *own] for key, own in cells.items()}
    if sum(_widths(cells.values())) + FRAME * (len(heads) + 1) + LABEL_WIDTH > width:
        cells = {key: [text.replace(" ± ", "\n± ") for text in own] for key, own in cells.items()}
    least = min(width, TITLE_WIDTH)
    out = Table(title=title(result, counts), caption=caption(result), min_width=least, caption_justify="left")
    out.add_column("", min_width=LABEL_WIDTH)
    for head, least in zip(heads, _widths(cells.values()), strict=True):
        style = "dim" if head.startswith("paper: ") else None
        out.add_column(head, justify="right", min_width=least, style=style, overflow="fold")
    group = ""
    for key, column in result.columns.items():
        if column.group != group:
            out.add_section()
            out.add_row(f"[bold]{column.group}[/bold]")
            group = column.group
        unit = f", {column.unit}" if column.unit else ""
        out.add_row(f"{'  ' if group else ''}{column.label}{ARROWS.get(column.better, '')}{unit}", *cells[key])
    return out


def show(result: Result) -> None:
    """Print the table and the warnings."""
    from rich.console import Console

    console = Console()
    console.print(table(result, console.width))
    for warning in result.warnings:
        print(f"WARNING: {warning}")


def _widths(rows: Iterable[Sequence[str]]) -> list[int]:
    """The longest line in each column."""
    return [max(len(line) for text in column for line in text.split("\n")) for column in zip(*rows, strict=True)]


def _order(result: Result) -> list[str]:
    """Rows as people compare them: the baseline before the policy."""
    names = list(result.rows)
    return [*names[1::-1], *names[2:]] if result.difference else names


def _cells(result: Result, names: Sequence[str], key: str, column: Column) -> list[str]:
    values = [cell(result.rows[name].get(key), column) for name in names]
    if result.difference:
        values.append(cell(result.difference.get(key), column, "+"))
    return values + [cell(Value(row[key]) if key in row else None, column) for row in result.paper.values()]


def cell(value: Value | None, column: Column, sign: str = "") -> str:
    """`0.123 ± 0.004`; nothing where nothing was asked."""
    if value is None:
        return ""
    if column.percent and not value.error:  # all alike: an error of zero would claim too much
        value = Value(value.value)
    return value.text(column.digits, column.percent, sign)


def title(result: Result, counts: Mapping[str, Any]) -> str:
    """The benchmark, and how much of what was drawn how."""
    protocol = result.protocol
    sampling = protocol.get("sampling", {})
    several = sorted({count for count in counts.values() if count is not None})
    parts = [f"{several[-1]:,} images"] if several else []
    parts += [f"{protocol[key]} {key}" for key in protocol if key.startswith("images per")]
    usual = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "cfg_interval": -1}
    parts += [f"cfg {sampling['cfg_scale']:g}"] if "cfg_scale" in sampling else []
    parts += [f"{k.replace('_', '-')} {sampling[k]:g}" for k, off in usual.items() if sampling.get(k, off) != off]
    parts += [f"seed {sampling['seed']}"] if "seed" in sampling else []
    return f"{TITLES.get(result.benchmark, result.benchmark)}: {', '.join(parts)}; ± standard error"


def caption(result: Result) -> str:
    """What the errors are of, and where the protocol is not the paper's."""
    lines = [result.protocol[key] for key in ("about", "errors") if key in result.protocol]
    if result.departures:
        lines.append(f"not as in the paper: {', '.join(result.departures)}")
    return "\n".join(lines)


def markdown_table(columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table of numbers: names on the left without a heading, cells flush right; the texts are taken as they are."""
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]
    return "\n".join(lines)
