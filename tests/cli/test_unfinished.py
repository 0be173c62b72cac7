"""A run that is not at its end stands for its newest checkpoint, and says so wherever its policy is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from argrpo_cli.cli.app import run
from argrpo_cli.cli.entropy import _title
from argrpo_cli.evals.tables import sections, table
from argrpo_cli.policy.folder import unfinished
from argrpo_cli.shapes import Column, Result, Value
from argrpo_cli.system.files import WEIGHTS, make_dir, read_json, read_jsonl, write_json


@pytest.fixture
def running(tmp_path: Path) -> Path:
    """A run of nano-c2i after 60 of 130 updates."""
    folder = tmp_path / "run"
    (make_dir(folder / "checkpoints") / "step_000060").symlink_to(WEIGHTS / "nano-c2i")
    write_json(folder / "run.json", {"recipe": {"method": "grpo", "grpo": {"steps": 130}}, "finished": None})
    return folder


def test_drawing_says_it_on_the_terminal_and_beside_the_pictures(running: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    asked = ["--policy", str(running), "--class", "dog", "--n", "1", "--device", "cpu", "--out", str(out)]
    assert run(["sample", *asked, "--quiet"]) == 0
    line = f"WARNING: {running} is a run that is not finished: this is its policy at step 60 of 130\n"
    assert capsys.readouterr().err == line, "however quiet it is to be"
    assert [row["unfinished"] for row in read_jsonl(out / "metadata.jsonl")] == ["step 60 of 130"]


def test_a_finished_run_and_what_is_no_run_are_not(running: Path) -> None:
    assert unfinished(running) == "step 60 of 130" and _title(str(running)) == f"{running} (step 60 of 130)"
    for other in ("nano-c2i", running / "checkpoints" / "step_000060"):
        assert unfinished(other) == "" and _title(str(other)) == str(other)
    write_json(running / "run.json", read_json(running / "run.json") | {"finished": {"step": 60}})
    assert unfinished(running) == ""


def test_tables_and_the_page_name_the_step() -> None:
    rows = {"run": {"fid": Value(3.0, 0.1, 48)}}
    measured = {"run": {"path": "run", "unfinished": "step 60 of 130"}}
    result = Result("nano", {"fid": Column("FID")}, rows, protocol={"measured": measured})
    assert [column.header for column in table(result).columns] == ["", "run\n(unfinished, step 60 of 130)"]
    (section,) = sections({"summary.json": result})
    assert section.lines[0][0] == "run (unfinished, step 60 of 130)" and section.warnings == []
