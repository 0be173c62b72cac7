"""Tables on a terminal of any width, and in a pipe: every figure stands whole."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from argrpo_cli.cli.options import present
from argrpo_cli.evals.tables import markdown, table
from argrpo_cli.shapes import Column, Result, Value

COLUMNS = {
    "match": Column("rendering match given class and size", "dB", "higher"),
    "recognised": Column("recognised", "", "higher", 1, percent=True),
    "fid": Column("FID", "", "lower"),
}
ROWS = {
    name: {"match": Value(match, 0.789, 48), "recognised": Value(0.521, 0.073, 48), "fid": Value(16.888, 0.076, 48)}
    for name, match in (("runs/a-policy-of-a-rather-long-name", 123.456), ("nano-c2i", -123.456))
}
RESULT = Result("nano", COLUMNS, ROWS, difference=ROWS["nano-c2i"], paper={"AR-GRPO": {"fid": 3.21}})
FIGURES = ("123.456", "-123.456", "± 0.789", "52.1 %", "± 7.3 %", "16.888", "± 0.076", "3.210")


def shown(width: int) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=width).print(table(RESULT, width))
    return text.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_figure_is_cut_and_no_line_is_longer_than_the_terminal(width: int) -> None:
    lines = shown(width)
    assert max(map(len, lines)) <= width
    for figure in FIGURES:
        whole = figure if width < 80 else figure.removesuffix(" %")  # beside its error a share has the unit once
        assert any(re.search(rf"(?<![\d.]){re.escape(whole)}(?!\d)", line) for line in lines), figure


def test_where_nothing_fits_lines_are_longer_rather_than_figures_in_pieces(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    present(RESULT.plain, lambda width: table(RESULT, width))
    text = capsys.readouterr().out
    assert all(figure in text for figure in FIGURES) and max(map(len, text.splitlines())) > 30


def test_the_same_as_a_part_of_a_page_in_markdown() -> None:
    text = markdown({"summary.json": RESULT})
    assert text.startswith("### ") and "\n## " not in text and "| 16.888 ± 0.076 |" in text
