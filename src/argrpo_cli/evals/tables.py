"""Results as tables: for the terminal, and all on one page in the shape of the paper's, as Markdown or HTML."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from argrpo_cli import __version__
from argrpo_cli.shapes import Column, Result, Value
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import fill_template, read_json, write_text

if TYPE_CHECKING:
    from rich.table import Table

TITLES = {
    "imagenet": "ImageNet (table 2)",
    "geneval": "GenEval (table 3)",
    "geneval2": "GenEval 2",
    "drawbench": "DrawBench (table 4)",
    "unigenbench": "UniGenBench++",
    "wise": "WISE-Verified",
    "nano": "Nano world, single objects",
    "entropy": "Policy entropy, nats per token (figures 3 and 4)",
    "score": "Reward scores",
}
IMAGES = Column("").counted
ARROWS = {"higher": " ↑", "lower": " ↓"}
TITLE_WIDTH = 70  # characters that a title and a caption have at least, where the terminal does
LABEL_WIDTH = 12  # characters of the first column that must fit beside the figures
FRAME = 3  # characters between two columns
# Of the page.
EXPECTED = "what `argrpo eval`, `score` or `entropy` wrote: summary.json, or the file of `eval nano --out`"
CONFLICT = "not measured alike"
MEASURED, DIFFERENCE, PAPER = "measured", "difference", "paper"
# What tells a row from others.
OWN = {"path", "weights", "base", "step", "unfinished", "sha256", "images_sha256", "files", "count"}
DETAILS = {"n", "batch_size", "keep_images"}
HASH = re.compile(r"[0-9a-f]{64}")
HEADING = "Measured beside the AR-GRPO paper"
ABOUT = f"Made by argrpo {__version__}. ± standard errors, where there are any. A dash: not measured."


def table(result: Result, width: int = 80) -> Table:
    """A line for each column of the result: baseline, policy, difference, and the paper's numbers in grey.

    Figures are never cut: where the lines do not fit `width`, errors stand below their numbers.
    """
    from rich.table import Table

    names = _order(result)
    counts = {key: next((row[key].count for row in result.rows.values() if key in row), None) for key in result.columns}
    cells = {key: _cells(result, names, key, column) for key, column in result.columns.items()}
    heads = [
        *(_head(result, name, "\n") for name in names),
        *(["difference"] if result.difference else []),
        *(f"paper: {row}" for row in result.paper),
    ]
    if len(set(counts.values())) > 1:
        alike = all(column.counted == IMAGES for column in result.columns.values())
        heads.insert(0, IMAGES if alike else "count")
        cells = {key: ["" if counts[key] is None else str(counts[key]), *own] for key, own in cells.items()}
    if sum(_widths(cells.values())) + FRAME * (len(heads) + 1) + 1 + LABEL_WIDTH > width:
        cells = {key: [_stacked(text) for text in own] for key, own in cells.items()}
    about = [result.protocol[key] for key in ("about", "errors") if key in result.protocol]
    about += [f"not as in the paper: {', '.join(result.departures)}"] if result.departures else []
    images = {key: count for key, count in counts.items() if result.columns[key].counted == IMAGES}
    labels = {key: _label(column) for key, column in result.columns.items()}
    first, *widths = _fitted(list(labels.values()), heads, _widths(cells.values()), width)
    out = Table(title=title(result, images), caption="\n".join(about), caption_justify="left")
    out.min_width = min(width, TITLE_WIDTH)
    out.add_column("", width=first)
    for head, own in zip(heads, widths, strict=True):
        style = "dim" if head.startswith("paper: ") else None
        out.add_column(head, justify="right", width=own, style=style, overflow="fold")
    group = ""
    for key, column in result.columns.items():
        if column.group != group:
            out.add_section()
            out.add_row(f"[bold]{column.group}[/bold]")
            group = column.group
        out.add_row(labels[key], *cells[key])
    return out


def _stacked(text: str) -> str:
    """A figure with its error below it, each with the unit."""
    number, sign, error = text.partition(" ± ")
    return f"{number}{' %' if text.endswith(' %') else ''}\n± {error}" if sign else text


def _label(column: Column) -> str:
    unit = f", {column.unit}" if column.unit else ""
    return f"{'  ' if column.group else ''}{column.label}{ARROWS.get(column.better, '')}{unit}"


def _fitted(labels: Sequence[str], heads: Sequence[str], figures: Sequence[int], width: int) -> list[int]:
    """Widths of the columns, labels first: figures stand whole, though the table be wider than `width`; what room there
    is goes to whole words of the heads, then to the labels, then to whole heads."""
    widths = [LABEL_WIDTH, *figures]
    words = [max((len(word) for word in head.split()), default=0) for head in heads]
    lines = [max(map(len, head.split("\n"))) for head in heads]
    for goals in ([0, *words], [max(map(len, labels), default=0), *words], [0, *lines]):
        for place in sorted(range(len(widths)), key=lambda place: goals[place] - widths[place]):  # small wants first
            spare = width - sum(widths) - FRAME * len(widths) - 1
            widths[place] += max(0, min(spare, goals[place] - widths[place]))
    return widths


def _widths(rows: Iterable[Sequence[str]]) -> list[int]:
    """The longest line in each column."""
    return [max(len(line) for text in column for line in text.split("\n")) for column in zip(*rows, strict=True)]


def _order(result: Result) -> list[str]:
    """Rows as people compare them: the baseline before the policy."""
    names = list(result.rows)
    return [*names[1::-1], *names[2:]] if result.difference else names


def _head(result: Result, name: str, gap: str = " ") -> str:
    """The name of a row, and how its policy was sampled where that is not as the others."""
    where = result.protocol.get("measured", {}).get(name, {}).get("unfinished")
    words = ([f"unfinished, {where}"] if where else []) + _drawn(_own_sampling(result, name))
    return f"{name}{gap}({', '.join(words)})" if words else name


def _own_sampling(result: Result, name: str) -> Mapping[str, Any]:
    """How a policy was sampled, where the policies of a result are not sampled alike; nothing of finished pictures."""
    measured = result.protocol.get("measured", {})
    return measured.get(name, {}).get("sampling", {}) if "sampling" in result.protocol else {}


def _drawn(sampling: Mapping[str, Any]) -> list[str]:
    """Guidance, and what of the other settings is not as usual."""
    usual = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "cfg_interval": -1}
    words = [f"cfg {sampling['cfg_scale']:g}"] if "cfg_scale" in sampling else []
    return words + [f"{k.replace('_', '-')} {sampling[k]:g}" for k, off in usual.items() if sampling.get(k, off) != off]


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
    parts += _drawn(sampling)
    parts += [f"seed {sampling['seed']}"] if "seed" in sampling else []
    return f"{TITLES.get(result.benchmark, result.benchmark)}: {', '.join(parts)}; ± standard error"


# the page of `argrpo eval report`


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
        value = read_json(path)
    except UserError:
        return False
    if path.name.startswith("."):
        return False
    return {
        "format",
        "benchmark",
    } <= value.keys() or path.name == "summary.json"  # an earlier version's is told as such


def write_report(results: Mapping[str, Result], out: Path) -> list[Section]:
    """Write the page to `out`, as its suffix says (.md or .html); the tables that are on it.

    Results of one benchmark share a table, a baseline above what was compared with it; rows that were not measured
    alike are flagged, setting by setting. The HTML needs no other file, and is light or dark as the reader's system is.

    Raises:
        UserError: another suffix, or a file that cannot be written.
    """
    kind = {".md": "md", ".html": "html", ".htm": "html"}.get(out.suffix.lower())
    if kind is None:
        raise UserError(f"--out {out}: give the page a name that ends in .md or .html")
    tables = sections(results)
    template = Path(__file__).with_name(f"page.{kind}.j2")
    write_text(out, fill_template(template, heading=HEADING, about=ABOUT, sections=tables, plain=_plain))
    return tables


def markdown(results: Mapping[str, Result]) -> str:
    """The same tables as a part of another page in Markdown."""
    template = Path(__file__).with_name("page.md.j2")
    page = fill_template(template, heading="", about="", sections=sections(results), plain=_plain)
    return page[page.index("## ") :].replace("\n## ", "\n### ").replace("## ", "### ", 1).strip()


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
        if result.difference:
            cells = {key: result.difference[key] for key in own if key in result.difference}
            heads = [_head(result, name) for name in list(result.rows)[:2]]
            differences.append(Row(" − ".join(heads), cells, source=source))
        for name in _order(result):
            cells = {key: result.rows[name][key] for key in own if key in result.rows[name]}
            rows.append(Row(_head(result, name), cells, _protocol(result, name), source))
        for name, numbers in result.paper.items():
            paper.setdefault(name, {}).update({key: Value(numbers[key]) for key in own if key in numbers})
        notes += [*result.warnings, *(f"not as in the paper: {text}" for text in result.departures)]

    def texts(cells: Mapping[str, Value], absent: Value | None, sign: str = "") -> list[str]:
        return [cell(cells.get(key, absent), column, sign) for key, column in columns.items()]

    rows, dash = _distinct(rows), Value(None)
    lines = [(row.name, texts(row.cells, dash), MEASURED) for row in rows]
    lines += [(row.name, texts(row.cells, dash, "+"), DIFFERENCE) for row in _distinct(differences)]
    lines += [(f"{name} (paper)", texts(cells, None), PAPER) for name, cells in paper.items() if cells]
    protocol, conflicts = _protocols(rows)
    labels = [f"{one.label}{ARROWS.get(one.better, '')}" for one in columns.values()]
    title = TITLES.get(benchmark, benchmark) + (f", {group}" if group else "")
    return Section(title, labels, lines, protocol, list(dict.fromkeys([*conflicts, *notes])))


def _protocol(result: Result, row: str) -> dict[str, Any]:
    """How a row was measured; nothing of one that is no policy and no set of pictures.

    Where policies that were compared are sampled each in its own way, that stands in their names and is no conflict.
    """
    measured = result.protocol.get("measured", {})
    if row not in measured:
        return {}
    shared = {key: part for key, part in result.protocol.items() if key != "measured"}
    values = result.rows[row].items()
    counts = [one.count for key, one in values if one.count and result.columns[key].counted == IMAGES]
    images = {"images": max(counts)} if counts else {}
    own = {key: part for key, part in measured[row].items() if part != _own_sampling(result, row)}
    return _flat(shared, skip=DETAILS) | images | _flat(own, skip=OWN | DETAILS)


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
    several: list[Row] = []
    for row in rows:
        if not any(replace(row, source=one.source) == one for one in several):
            several.append(row)
    count = Counter(row.name for row in several)
    return [replace(row, name=f"{row.name} ({row.source})") if count[row.name] > 1 else row for row in several]


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


def _plain(text: str) -> str:
    """A text that Markdown takes for nothing but words, within a table too."""
    for sign, stand_in in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("\n", " ")):
        text = text.replace(sign, stand_in)
    return text
