"""`argrpo eval report`: reading the result files of the benchmarks, whatever their shape, for one page of tables.

Every file becomes one or more `Result`s: rows of measures with standard errors, differences, the paper's rows, and the
protocol of each row. `report_page.py` groups them into tables and writes these.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from argrpo_cli.paper import numbers as paper_numbers
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_json, read_jsonl

Value = tuple[float | None, float | None]  # and its standard error; None where there is none

EXPECTED = (
    "the file of `argrpo eval nano --out`, the summary.json of eval imagenet, geneval or drawbench, or entropy.jsonl"
)
FIDELITY = {
    "inception_score": "IS ↑",
    "fid": "FID ↓",
    "sfid": "sFID ↓",
    "precision": "precision ↑",
    "recall": "recall ↑",
}
TITLES = {
    "imagenet": "ImageNet (table 2)",
    "drawbench": "DrawBench (table 4)",
    "nano": "Nano world, single objects",
}
OFFICIAL_SETS = ("geneval", "official")
OF_A_POLICY = ("policies", "measured")  # parts of a protocol that have an entry for each policy
IDENTITY = {"policy", "weights", "images_sha256", "base", "step", "path", "fingerprint", "sha256", "files"}  # its own
DETAILS = {"n", "batch_size", "keep_images"}  # of sampling; how many images there are is told as `images`


@dataclass(frozen=True)
class Row:
    """A line of a table: measures, and how they were measured, as flat keys (`sampling.seed`) to values."""

    name: str
    cells: dict[str, Value]
    protocol: dict[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Result:
    """What one file says of one table.

    Attributes:
        title: of the table; results with the same title share one.
        labels: measure to its heading, in the order of the columns.
        rows: policies, a baseline first.
        differences: rows of paired differences.
        paper: rows that the paper reports.
    """

    title: str
    labels: dict[str, str]
    rows: list[Row]
    differences: list[Row] = field(default_factory=list)
    paper: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_results(sources: Sequence[Path]) -> list[Result]:
    """The results in files, and in folders with what lies below them (where other files are passed over).

    Raises:
        UserError: a file that is no result, or a folder without any.
    """
    results = []
    for source in sources:
        if source.is_dir():
            found = [result for path in _files(source) for result in _read(path) or []]
            if not found:
                raise UserError(f"no results in {source}; expected {EXPECTED}")
        else:
            told = _read(source)
            if told is None:
                raise UserError(f"{source} is not a result that the report knows; expected {EXPECTED}")
            found = told
        results += found
    return results


def _files(folder: Path) -> list[Path]:
    """The files below a folder that may be results: JSON objects, and entropy.jsonl."""
    paths = sorted(path for path in folder.rglob("*") if path.name == "entropy.jsonl" or path.suffix == ".json")
    return [path for path in paths if not path.name.startswith(".") and _is_object(path)]


def _is_object(path: Path) -> bool:
    if path.suffix == ".jsonl":
        return True
    try:
        return isinstance(json.loads(path.read_text("utf-8-sig")), dict)
    except (OSError, ValueError):
        return False


def _read(path: Path) -> list[Result] | None:
    """The results of a file, None when it holds something else."""
    if path.suffix == ".jsonl":
        rows = read_jsonl(path)
        known = rows and all({"policy", "mode", "mean", "standard_error"} <= row.keys() for row in rows)
        return [_entropy(rows, str(path))] if known else None
    value = read_json(path)
    try:
        if isinstance(value.get("benchmark"), str) and isinstance(value.get("policies"), dict):
            return [_benchmark(value, str(path))]
        if {"scores", "totals", "settings"} <= value.keys():
            return _geneval(value, str(path))
        if {"real", "reward_weights", "settings"} <= value.keys():
            return [_nano(value, str(path))]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} looks like a result, but a part of it is missing or of another shape") from error
    return None


def _benchmark(value: Mapping[str, Any], source: str) -> Result:
    """The shape of imagenet and drawbench: `policies` {name: {measure: {value, error}}}, the baseline last."""
    protocol = value.get("protocol", {})
    # Of images drawn here "settings", of those that `argrpo sample` drew "sampling": one thing in the tables.
    renamed = {"settings": "sampling"}
    shared = {renamed.get(key, key): part for key, part in protocol.items() if key not in OF_A_POLICY}
    headings = {key: one["label"] for key, one in value.get("columns", {}).items()}
    rows = []
    for name, own in reversed(value["policies"].items()):
        about = [protocol[key][name] for key in OF_A_POLICY if name in protocol.get(key, {})]
        rows.append(
            Row(name, _cells(own), _flat(shared, skip=DETAILS) | _flat(*about, skip=IDENTITY | DETAILS), source)
        )
    measures = dict.fromkeys(key for row in rows for key in row.cells)
    reported = value.get("paper", {})
    model = f"{reported['policy']}, " if "policy" in reported else ""
    paper = [
        Row(model + name, {key: (float(number), None) for key, number in numbers.items()})
        for name, numbers in reported.items()
        if isinstance(numbers, dict) and numbers
    ]
    return Result(
        TITLES.get(value["benchmark"], value["benchmark"]),
        {key: headings.get(key, FIDELITY.get(key, key)) for key in measures},
        rows,
        _difference(rows, value.get("difference"), source),
        paper,
        [str(text) for text in value.get("warnings", [])],
    )


def _geneval(value: Mapping[str, Any], source: str) -> list[Result]:
    """A table for each set of prompts, in the paper's order of the categories."""
    settings = {key: part for key, part in value["settings"].items() if key != "policies"}
    protocol = _flat(settings, {"versions": value.get("versions", {})}, skip={"files"})
    departures = [f"not as in the paper: {text}" for text in value.get("differs_from_paper", [])]
    results = []
    for part in next(iter(value["scores"].values())):
        rows = [Row(name, _cells(own[part]), protocol, source) for name, own in reversed(value["scores"].items())]
        known = [tag for tag in paper_numbers.TABLE_3_COLUMNS if tag in rows[0].cells]
        labels = {tag: tag.replace("_", " ") for tag in [*known, *(tag for tag in rows[0].cells if tag not in known)]}
        paper = [
            Row(name, {tag: (number, None) for tag, number in zip(paper_numbers.TABLE_3_COLUMNS, numbers, strict=True)})
            for name, numbers in paper_numbers.TABLE_3.items()
        ]
        warnings = list(departures)
        if absent := value.get("prompts_absent"):
            warnings.append(f"{absent} of the 553 official prompts have no image: `overall` is not the paper's")
        if part not in OFFICIAL_SETS:
            warnings.append(f"the paper's rows are of the 553 official prompts, those above of the set {part}")
        difference = _difference(rows, value.get("difference", {}).get(part), source)
        results.append(Result(f"GenEval (table 3), {part}", labels, rows, difference, paper, warnings))
    return results


def _nano(value: Mapping[str, Any], source: str) -> Result:
    from argrpo_cli.evals.nano_table import LABELS

    measured = value["policies"] if "policies" in value else value["images"]
    protocol = _flat(
        value["settings"], {"reward_weights": value["reward_weights"], "versions": value.get("versions", {})}
    )
    rows = [Row(name, _cells(own), protocol, source) for name, own in reversed(measured.items())]
    keys = dict.fromkeys(key for row in rows for key in row.cells)
    ordered = [key for key in [*LABELS, *value["reward_weights"]] if key in keys]  # as the command prints them
    real = Row("real scenes", _cells(value["real"]))
    labels = {key: LABELS.get(key, key) for key in ordered}
    return Result(TITLES["nano"], labels, [*rows, real], _difference(rows, value.get("difference"), source))


def _entropy(table: Sequence[Mapping[str, Any]], source: str) -> Result:
    """Conditional and guided entropy: a row per policy or checkpoint, and the change from the first."""
    rows: dict[str, Row] = {}
    changes: dict[str, Row] = {}
    for line in table:
        name, mode = str(line["policy"]), str(line["mode"])
        known = ("split", "asked", "data", "labels", "preprocessing", "cfg_scale", "temperature", "images", "seed")
        protocol = _flat({key: line[key] for key in known if line.get(key) is not None})
        row = rows.setdefault(name, Row(name, {}, protocol, source))
        row.cells[mode] = (line["mean"], line["standard_error"])
        if "change" in line:
            change = changes.setdefault(
                name, Row(f"{name}, change from {line.get('against', table[0]['policy'])}", {}, {}, source)
            )
            change.cells[mode] = (line["change"], line["change_error"])
    modes = dict.fromkeys(mode for row in rows.values() for mode in row.cells)
    return Result(
        "Policy entropy, nats per token (figures 3 and 4)",
        {mode: mode for mode in modes},
        list(rows.values()),
        list(changes.values()),
    )


def _difference(rows: Sequence[Row], difference: Mapping[str, Any] | None, source: str) -> list[Row]:
    if not difference:
        return []
    return [Row(f"{rows[-1].name} − {rows[0].name}", _cells(difference), {}, source)]


def _cells(measures: Mapping[str, Any]) -> dict[str, Value]:
    """Measure to (value, error), under either of the names that results give them; NaN is none."""
    cells = {}
    for key, one in measures.items():
        pair = (one["value"] if "value" in one else one["mean"], one.get("error"))
        value, error = (None if number is None or number != number else float(number) for number in pair)
        cells[key] = (value, error)
    return cells


def _flat(*parts: Mapping[str, Any], skip: Collection[str] = ()) -> dict[str, Any]:
    """Nested settings as one level of keys with dots; what has a name in `skip` is left out, however deep."""
    flat: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if key in skip or value in (None, [], ""):
                continue
            if isinstance(value, Mapping):
                flat |= {f"{key}.{inner}": one for inner, one in _flat(value, skip=skip).items()}
            else:
                flat[key] = value
    return flat
