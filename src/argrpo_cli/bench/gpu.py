"""What only a GPU can tell, within minutes: `python -m argrpo_cli.bench gpu --minutes 8 --out DIR`.

Random weights of the published shapes, nothing is fetched. Each part runs in a process of its own with a time limit,
the most important ones first (`PARTS`; what they do is in `gpu_sampling.py` and `gpu_training.py`); what no longer fits
is left out and a line says so. Every figure goes into DIR/results.jsonl as it comes, so that a run that is cut off
loses nothing; the same command goes on where it stopped. At the end there is a table, DIR/table.txt; `--table DIR`
prints it again.

`--toy` runs the same parts on a CPU at sizes that mean nothing, to see that they run. The parts need torch,
transformers, torchvision and annotated-types; where PEFT or pyiqa is missing, what needs it is left out and says so.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from argrpo_cli.bench import Bench
from argrpo_cli.system.errors import UserError, did_you_mean
from argrpo_cli.system.files import make_dir, read_text, writable, write_text
from argrpo_cli.system.plain import parse_json, to_json

RESULTS, TABLE = "results.jsonl", "table.txt"
PATIENCE = 10  # with a toy run, which is no measurement and may run on a busy machine
LONGEST_START = 120  # seconds
FAILED = 3  # exit code of a part that has recorded its error


class Part(NamedTuple):
    """The file of the function that measures it; seconds after which it is ended, and with fewer than which it is not
    begun, the start of its process included."""

    file: str
    most: float
    least: float


PARTS = {
    "card": Part("gpu_sampling", 40, 10),
    "sampler": Part("gpu_sampling", 90, 20),
    "step": Part("gpu_training", 120, 30),
    "ratio": Part("gpu_training", 45, 15),
    "sizes": Part("gpu_sampling", 100, 15),
    "rewards": Part("gpu_training", 60, 15),
    "float32": Part("gpu_sampling", 60, 20),
    "attention": Part("gpu_sampling", 30, 10),
    "ddp": Part("gpu_training", 40, 15),
    "inception": Part("gpu_training", 30, 12),
    "compiled": Part("gpu_sampling", 120, 40),
}


def main(arguments: list[str] | None = None) -> None:
    """Run the parts that have not been run into this folder yet, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m argrpo_cli.bench gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together  [default: 8]")
    parser.add_argument("--out", type=Path, help="the folder of the results")
    parser.add_argument("--toy", action="store_true", help="on a CPU, at toy sizes")
    parser.add_argument("--parts", help=f"only these, with commas between them: {', '.join(PARTS)}")
    parser.add_argument("--table", type=Path, metavar="DIR", help="print the table of a folder, and measure nothing")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the parts in this very process
    options = parser.parse_args(arguments)
    if options.table is not None:
        print(table(rows_of(options.table / RESULTS)))
        return
    names = options.parts.split(",") if options.parts else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        hint = did_you_mean(unknown[0], PARTS)
        raise UserError(f"--parts {unknown[0]}: no such part; there are {', '.join(PARTS)}{hint}")
    if options.out is None or options.minutes <= 0:
        raise UserError(f"--out {options.out}, --minutes {options.minutes:g}: give a folder, and a time above 0")
    results = make_dir(options.out) / RESULTS
    if options.here:
        for name in names:
            run_part(name, results, options.toy)
        return
    run(names, results, options.minutes, options.toy)
    write_text(options.out / TABLE, table(rows_of(results)) + "\n")
    print(read_text(options.out / TABLE))


def run(names: list[str], results: Path, minutes: float, toy: bool) -> None:
    """Each part in a process, until the time is over; UserError without a GPU."""
    end = time.monotonic() + 60 * minutes - age()
    # A child of a process that has asked CUDA anything cannot use it; through NVML it may be asked.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    for part in PARTS.values():  # before the forks, which then need no time for it
        import_module(f"argrpo_cli.bench.{part.file}")

    if not toy and not torch.cuda.is_available():
        raise UserError("there is no GPU that torch can use here; --toy runs the same parts on a CPU")
    done = {row["part"] for row in rows_of(results) if "seconds" in row}
    for name in names:
        left = max(end - time.monotonic(), 0)
        if name in done:
            print(f"{name}: in {results} already", flush=True)
        elif left < PARTS[name].least:
            record(results, name, skipped=f"{left:.0f} s were left, and it needs {PARTS[name].least}")
        else:
            process = multiprocessing.get_context("fork").Process(target=run_part, args=(name, results, toy))
            process.start()
            wait(process, name, results, min(PARTS[name].most * (PATIENCE if toy else 1), left))


def age() -> float:
    """Seconds since this process began: loading torch took some of them. 0 where Linux does not say."""
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
    return seconds if 0 <= seconds < LONGEST_START else 0.0  # another clock, or a process that has done other things


def wait(process: BaseProcess, name: str, results: Path, limit: float) -> None:
    """Let a part run until its limit; what ended it other than itself is recorded."""
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join(10)
        record(results, name, stopped=f"after {limit:.0f} s; the rows above are whole")
    elif process.exitcode not in (0, FAILED):  # a signal, or the end of CUDA's patience
        record(results, name, failed=f"its process ended with {process.exitcode}")


def run_part(name: str, results: Path, toy: bool) -> None:
    """Run a part here; SystemExit once an error in it is recorded."""
    import torch

    if not toy and torch.cuda._is_in_bad_fork():  # CUDA was asked before the fork after all: begin again, afresh
        command = ["-m", "argrpo_cli.bench", "gpu", "--here", "--parts", name, "--out", str(results.parent)]  # CUDA
        os.execv(sys.executable, [sys.executable, *command])  # CUDA
    start = time.monotonic()
    record(results, name, started=time.strftime("%Y-%m-%d %H:%M:%S"))
    figures = {row["row"]: row for row in rows_of(results) if row["part"] == "card" and "row" in row}
    bench = Bench("cpu" if toy else "cuda", toy, figures, lambda row, **more: record(results, name, row=row, **more))
    try:
        getattr(import_module(f"argrpo_cli.bench.{PARTS[name].file}"), name)(bench)
    except Exception as error:
        traceback.print_exc()
        at = traceback.extract_tb(error.__traceback__)[-1]
        record(results, name, failed=f"{type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})"[:500])
        sys.exit(FAILED)
    record(results, name, seconds=round(time.monotonic() - start, 1))


def record(results: Path, part: str, **values: Any) -> None:
    """Add a line to the results, and print it."""
    line = to_json({"part": part, **values})
    with writable(results), results.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def rows_of(results: Path) -> list[dict[str, Any]]:
    """The lines of a file of results, none where there is no file; a last one that was cut off is left out, and so is
    what an earlier attempt at a part has left."""
    rows: list[dict[str, Any]] = []
    for line in read_text(results).splitlines() if results.exists() else []:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if "started" in row or "skipped" in row:
            rows = [other for other in rows if other["part"] != row["part"]]
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The figures part by part, as text."""
    lines = []
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        cells = [{key: _cell(value) for key, value in row.items() if key != "part"} for row in own if "row" in row]
        columns = list(dict.fromkeys(key for row in cells for key in row))
        widths = {key: max(len(key), *(len(row.get(key, "")) for row in cells)) for key in columns}
        lines += ["", part]
        for row in [dict.fromkeys(columns, "") | {key: key for key in columns if key != "row"}, *cells] * bool(cells):
            first, *others = (row.get(key, "") for key in columns)
            texts = [f"{text:>{widths[key]}}" for key, text in zip(columns[1:], others, strict=True)]
            lines.append("  ".join([f"  {first:<{widths['row']}}", *texts]).rstrip())
        for key in ("skipped", "stopped", "failed", "seconds"):
            lines += [f"  {key}: {row[key]}" for row in own if key in row]
    return "\n".join(lines).strip("\n")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
