"""`argrpo eval report`: results of the benchmarks on one page, in the shape of the paper's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS...",
            help="What eval nano --out wrote, summary.json of eval imagenet, geneval and drawbench, entropy.jsonl, or "
            "folders of such files.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The page: a name that ends in .md or .html.")] = Path("report.md"),
) -> None:
    """Result files as one page: base, trained, difference, and the paper's numbers below."""
    from argrpo_cli.evals.report import read_results
    from argrpo_cli.evals.report_page import CONFLICT, write_report

    sections = write_report(read_results(results), out)
    notes = 0
    for section in sections:
        notes += len(section.warnings)
        for warning in section.warnings:
            if warning.startswith(CONFLICT):
                print(f"{section.title}: {warning}")
    told = f", with {notes} {'note' if notes == 1 else 'notes'}" if notes else ""
    print(f"{len(sections)} {'table' if len(sections) == 1 else 'tables'} in {out}{told}")
