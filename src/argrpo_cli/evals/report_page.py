"""The page of `argrpo eval report`: results grouped into tables, as Markdown or as one self-contained HTML file."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argrpo_cli import __version__
from argrpo_cli.evals.report import Result, Row, Value
from argrpo_cli.evals.tables import markdown_table
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import write_text

CONFLICT = "not measured alike"
MEASURED, DIFFERENCE, PAPER = "measured", "difference", "paper"
HASH = re.compile(r"[0-9a-f]{64}")
HEADING = "Measured beside the AR-GRPO paper"
ABOUT = f"Made by argrpo {__version__}. ± standard errors, where there are any. A dash: not measured."
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #ccc; --dim: #666; --warn: #a33; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --paper: #16181c; --line: #3a3d44; --dim: #9a9fa8; --warn: #ff8f80; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
div.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.4rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; min-width: 9rem; }
tr.difference td { font-weight: 600; }
tr.paper td, .protocol { color: var(--dim); }
tr.paper td { font-style: italic; }
.protocol { font-size: 0.85rem; }
ul.notes li { color: var(--warn); }
@media print { div.table { overflow: visible; } }
"""


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


def write_report(results: Sequence[Result], out: Path) -> list[Section]:
    """Write the page to `out`, as its suffix says (.md or .html); the tables that are on it.

    Raises:
        UserError: another suffix, or a file that cannot be written.
    """
    writers = {".md": markdown, ".html": html_page, ".htm": html_page}
    if out.suffix.lower() not in writers:
        raise UserError(f"--out {out}: give the page a name that ends in .md or .html")
    titles = dict.fromkeys(result.title for result in results)
    sections = [section([result for result in results if result.title == title]) for title in titles]
    write_text(out, writers[out.suffix.lower()](sections))
    return sections


def section(results: Sequence[Result]) -> Section:
    """One table of the results of one benchmark."""
    labels = {key: label for result in results for key, label in result.labels.items()}
    rows = _distinct([row for result in results for row in result.rows])
    differences = _distinct([row for result in results for row in result.differences])
    paper = _merged([row for result in results for row in result.paper])
    lines = [(row.name, [_cell(row.cells.get(key)) for key in labels], MEASURED) for row in rows]
    lines += [(row.name, [_cell(row.cells.get(key), "+") for key in labels], DIFFERENCE) for row in differences]
    lines += [
        (f"{row.name} (paper)", [_cell(row.cells[key]) if key in row.cells else "" for key in labels],
         PAPER)
        for row in paper
    ]  # fmt: skip
    protocol, conflicts = _protocols(rows)
    warnings = [*conflicts, *dict.fromkeys(text for result in results for text in result.warnings)]
    return Section(results[0].title, list(labels.values()), lines, protocol, warnings)


def markdown(sections: Sequence[Section]) -> str:
    """The page in Markdown."""
    parts = [f"# {HEADING}", ABOUT]
    for one in sections:
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


def html_page(sections: Sequence[Section]) -> str:
    """The page as HTML that needs no other file, light or dark as the reader's system is."""
    escape = html.escape
    body = [f"<h1>{escape(HEADING)}</h1>", f"<p>{escape(ABOUT)}</p>"]
    for one in sections:
        head = "".join(f"<th>{escape(label)}</th>" for label in ["", *one.columns])
        rows = [
            f'<tr class="{kind}">' + "".join(f"<td>{_cell_html(text)}</td>" for text in [name, *cells]) + "</tr>"
            for name, cells, kind in one.lines
        ]
        body += [f"<h2>{escape(one.title)}</h2>", '<div class="table"><table>', f"<thead><tr>{head}</tr></thead>"]
        body += ["<tbody>", *rows, "</tbody></table></div>"]
        if one.warnings:
            body += ['<ul class="notes">', *(f"<li>{escape(text)}</li>" for text in one.warnings), "</ul>"]
        if one.protocol:
            lines = "".join(f"<li>{escape(text)}</li>" for text in one.protocol)
            body.append(f'<details class="protocol"><summary>Protocol</summary><ul>{lines}</ul></details>')
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">'
    text = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n<title>{escape(HEADING)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{text}\n</body>\n</html>\n"
    )


def _cell_html(text: str) -> str:
    """A narrow page breaks a cell before its error, and nowhere else."""
    return html.escape(text).replace("± ", "±&nbsp;")


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """Rows in order, one that several files have alike once; others of the same name say which file they are of."""
    kept: list[Row] = []
    for row in rows:
        if not any((row.name, row.cells, row.protocol) == (one.name, one.cells, one.protocol) for one in kept):
            kept.append(row)
    names = [row.name for row in kept]
    return [
        Row(f"{row.name} ({row.source})", row.cells, row.protocol, row.source)
        if names.count(row.name) > 1 and row.source
        else row
        for row in kept
    ]


def _merged(rows: Sequence[Row]) -> list[Row]:
    """A row of each name, with the cells of all: files tell what the paper reports of the columns they have."""
    merged: dict[str, Row] = {}
    for row in rows:
        merged.setdefault(row.name, Row(row.name, {})).cells.update(row.cells)
    return list(merged.values())


def _protocols(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """What the measured rows share, or some of them alone tell, and a line for each setting in which they differ."""
    measured = [row for row in rows if row.protocol]
    shared: dict[tuple[str, ...], list[str]] = {tuple(row.name for row in measured): []}
    conflicts = []
    for key in dict.fromkeys(key for row in measured for key in row.protocol):
        names: dict[str, list[str]] = {}
        for row in measured:
            if key in row.protocol:
                names.setdefault(_said(row.protocol[key]), []).append(row.name)
        if len(names) == 1:
            value, having = next(iter(names.items()))
            shared.setdefault(tuple(having), []).append(f"{key}: {value}")
        else:
            told = "; ".join(f"{value} for {', '.join(own)}" for value, own in names.items())
            conflicts.append(f"{CONFLICT}: {key} is {told}")
    (_, of_all), *others = shared.items()
    return [*of_all, *(f"of {', '.join(names)} alone: {text}" for names, texts in others for text in texts)], conflicts


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and HASH.fullmatch(value):
        return value[:16]
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cell(value: Value | None, sign: str = "") -> str:
    if value is None or value[0] is None:
        return "–"
    mean, error = value
    digits = 2 if abs(mean) >= 100 else 3
    return f"{mean:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _plain(text: str) -> str:
    """A text that Markdown takes for nothing but words, within a table too."""
    for sign, stand_in in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("\n", " ")):
        text = text.replace(sign, stand_in)
    return text
