"""`argrpo eval report`: results on one page, in the shape of the paper's tables, as Markdown or self-contained HTML.

Results of one benchmark share a table, a baseline above what was compared with it; rows that were not measured alike
are flagged, setting by setting.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from argrpo_cli import __version__
from argrpo_cli.evals.tables import ARROWS, TITLES, cell, markdown_table
from argrpo_cli.shapes import Column, Result, Value
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import write_text

EXPECTED = "what `argrpo eval`, `score` or `entropy` wrote: summary.json, or the file of `eval nano --out`"
CONFLICT = "not measured alike"
MEASURED, DIFFERENCE, PAPER = "measured", "difference", "paper"
OWN = {"path", "weights", "base", "step", "sha256", "images_sha256", "files", "count"}  # tells a row from others
DETAILS = {"n", "batch_size", "keep_images"}
HASH = re.compile(r"[0-9a-f]{64}")
HEADING = "Measured beside the AR-GRPO paper"
ABOUT = f"Made by argrpo {__version__}. ± standard errors, where there are any. A dash: not measured."
TEMPLATE = Path(__file__).with_name("page.html.j2")


@dataclass(frozen=True)
class Row:
    """A line of a table: measures, and how they were measured, as flat keys (`sampling.seed`) to values."""

    name: str
    cells: Mapping[str, Value]
    protocol: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Section:
    """A table ready to be written.

    Attributes:
        lines: name of a row, the texts of its cells, and MEASURED, DIFFERENCE or PAPER.
        protocol: what all its measured rows share, and what some alone tell, a line each.
        warnings: what to know before rows are compared.
    """

    title: str
    columns: list[str]
    lines: list[tuple[str, list[str], str]]
    protocol: list[str]
    warnings: list[str]


def read_results(sources: Sequence[Path]) -> dict[str, Result]:
    """Path to result, of files, and of folders with what lies below them (where other files are passed over).

    Raises:
        UserError: a file that is no result, or a folder without any.
    """
    results = {}
    for source in sources:
        paths = [path for path in sorted(source.rglob("*.json")) if _is_result(path)] if source.is_dir() else [source]
        if not paths:
            raise UserError(f"no results in {source}; expected {EXPECTED}")
        results |= {str(path): Result.load(path) for path in paths}
    return results


def _is_result(path: Path) -> bool:
    try:
        value = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError):
        return False
    return not path.name.startswith(".") and isinstance(value, dict) and {"format", "benchmark"} <= value.keys()


def write_report(results: Mapping[str, Result], out: Path) -> list[Section]:
    """Write the page to `out`, as its suffix says (.md or .html); the tables that are on it.

    Raises:
        UserError: another suffix, or a file that cannot be written.
    """
    writers = {".md": markdown, ".html": html_page, ".htm": html_page}
    if out.suffix.lower() not in writers:
        raise UserError(f"--out {out}: give the page a name that ends in .md or .html")
    tables = sections(results)
    write_text(out, writers[out.suffix.lower()](tables))
    return tables


def sections(results: Mapping[str, Result]) -> list[Section]:
    """A table for each benchmark, or for each of its groups of columns."""
    kinds = [(one.benchmark, column.group) for one in results.values() for column in one.columns.values()]
    return [_section(results, *kind) for kind in dict.fromkeys(kinds)]


def _section(results: Mapping[str, Result], benchmark: str, group: str) -> Section:
    columns: dict[str, Column] = {}
    rows, differences, paper, notes = [], [], {}, []
    for source, result in results.items():
        own = {key: one for key, one in result.columns.items() if one.group == group}
        if result.benchmark != benchmark or not own:
            continue
        columns |= own
        names = list(result.rows)
        if result.difference:  # the baseline first
            differences.append(Row(f"{names[0]} − {names[1]}", _cells(result.difference, own), {}, source))
            names[:2] = names[1::-1]
        rows += [Row(name, _cells(result.rows[name], own), _protocol(result, name), source) for name in names]
        for name, numbers in result.paper.items():
            paper.setdefault(name, {}).update({key: Value(numbers[key]) for key in own if key in numbers})
        notes += [*result.warnings, *(f"not as in the paper: {text}" for text in result.departures)]
    rows = _distinct(rows)
    lines = [(row.name, _texts(row.cells, columns, "–"), MEASURED) for row in rows]
    lines += [(row.name, _texts(row.cells, columns, "–", "+"), DIFFERENCE) for row in _distinct(differences)]
    lines += [(f"{name} (paper)", _texts(cells, columns, ""), PAPER) for name, cells in paper.items() if cells]
    protocol, conflicts = _protocols(rows)
    labels = [f"{one.label}{ARROWS.get(one.better, '')}" for one in columns.values()]
    title = TITLES.get(benchmark, benchmark) + (f", {group}" if group else "")
    return Section(title, labels, lines, protocol, list(dict.fromkeys([*conflicts, *notes])))


def _cells(values: Mapping[str, Value], columns: Collection[str]) -> dict[str, Value]:
    return {key: value for key, value in values.items() if key in columns}


def _texts(cells: Mapping[str, Value], columns: Mapping[str, Column], absent: str, sign: str = "") -> list[str]:
    return [cell(cells[key], column, sign) if key in cells else absent for key, column in columns.items()]


def _protocol(result: Result, row: str) -> dict[str, Any]:
    """How a row was measured; nothing of one that is no policy and no set of pictures."""
    measured = result.protocol.get("measured", {})
    if row not in measured:
        return {}
    shared = {key: part for key, part in result.protocol.items() if key != "measured"}
    counts = [value.count for value in result.rows[row].values() if value.count]
    images = {"images": max(counts)} if counts else {}
    return _flat(shared, skip=DETAILS) | images | _flat(measured[row], skip=OWN | DETAILS)


def _flat(part: Mapping[str, Any], skip: Collection[str] = ()) -> dict[str, Any]:
    """Nested settings as one level of keys with dots; what has a name in `skip` is left out, however deep."""
    flat: dict[str, Any] = {}
    for key, value in part.items():
        if key in skip or value in (None, [], ""):
            continue
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": one for inner, one in _flat(value, skip).items()}
        else:
            flat[key] = value
    return flat


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """Rows in order, one that several files have alike once; others of the same name say which file they are of."""
    kept: list[Row] = []
    for row in rows:
        if not any((row.name, row.cells, row.protocol) == (one.name, one.cells, one.protocol) for one in kept):
            kept.append(row)
    names = [row.name for row in kept]
    return [
        Row(f"{row.name} ({row.source})", row.cells, row.protocol, row.source) if names.count(row.name) > 1 else row
        for row in kept
    ]


def _protocols(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """What the measured rows share, or some of them alone tell, and a line for each setting in which they differ."""
    measured = [row for row in rows if row.protocol]
    shared: dict[tuple[str, ...], list[str]] = {tuple(row.name for row in measured): []}
    conflicts = []
    for key in dict.fromkeys(key for row in measured for key in row.protocol):
        names: dict[str, list[str]] = {}
        for row in measured:
            if key in row.protocol:
                names.setdefault(_text(row.protocol[key]), []).append(row.name)
        if len(names) == 1:
            value, having = next(iter(names.items()))
            shared.setdefault(tuple(having), []).append(f"{key}: {value}")
        else:
            parts = "; ".join(f"{value} for {', '.join(own)}" for value, own in names.items())
            conflicts.append(f"{CONFLICT}: {key} is {parts}")
    (_, of_all), *others = shared.items()
    return [*of_all, *(f"of {', '.join(names)} alone: {text}" for names, texts in others for text in texts)], conflicts


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and HASH.fullmatch(value):
        return value[:16]
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def markdown(tables: Sequence[Section]) -> str:
    """The page as Markdown."""
    parts = [f"# {HEADING}", ABOUT]
    for one in tables:
        rows = []
        for name, cells, kind in one.lines:
            mark = "*" if kind == PAPER else "**" if kind == DIFFERENCE else ""
            rows.append((f"{mark}{_plain(name)}{mark}", cells))
        parts += [f"## {_plain(one.title)}", markdown_table([_plain(label) for label in one.columns], rows)]
        parts += ["\n".join(f"- **Note:** {_plain(text)}" for text in one.warnings)] if one.warnings else []
        if one.protocol:
            lines = [f"- {_plain(text)}" for text in one.protocol]
            parts.append("\n".join(["<details><summary>Protocol</summary>", "", *lines, "", "</details>"]))
    return "\n\n".join(parts) + "\n"


def html_page(tables: Sequence[Section]) -> str:
    """The page as HTML that needs no other file, light or dark as the reader's system is."""
    from jinja2 import Environment

    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text("utf-8"))
    return page.render(heading=HEADING, about=ABOUT, sections=tables) + "\n"


def _plain(text: str) -> str:
    """A text that Markdown takes for nothing but words, within a table too."""
    for sign, stand_in in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("\n", " ")):
        text = text.replace(sign, stand_in)
    return text
