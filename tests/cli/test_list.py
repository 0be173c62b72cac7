"""`argrpo list`: all that there is, for people and for programs; --json and --quiet of the other commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from argrpo_cli.captions import CAPTION_SETS
from argrpo_cli.cli.app import run
from argrpo_cli.cli.evals import BENCHMARKS
from argrpo_cli.policy.folder import BUNDLED_POLICIES
from argrpo_cli.policy.published import POLICIES
from argrpo_cli.recipe import list_recipes
from argrpo_cli.rewards import REWARDS
from argrpo_cli.shapes import Result

NAMES = {
    "policies": [*BUNDLED_POLICIES, *POLICIES],
    "recipes": list_recipes(),
    "rewards": list(REWARDS),
    "prompts": list(CAPTION_SETS),
    "benchmarks": [name for name in BENCHMARKS if name != "report"],
}


def test_everything_is_listed_as_json_with_a_line_on_what_it_is(capsys) -> None:
    assert run(["list", "--json"]) == 0
    lists = json.loads(capsys.readouterr().out)
    assert {kind: [row["name"] for row in rows] for kind, rows in lists.items()} == NAMES
    assert all(row["about"] and "\n" not in row["about"] for rows in lists.values() for row in rows)
    rows = {row["name"]: row for rows in lists.values() for row in rows}
    assert rows["nano-t2i"]["reads"] == "captions" and rows["nano-t2i"]["image_size"] == 64
    bundled = [rows[name]["family"] for name in BUNDLED_POLICIES]
    assert bundled == ["llamagen", "llamagen", "janus", "var"]
    assert rows["var-d16"]["family"] == "var" and rows["var-d16"]["sampling"]["top_k"] == 900
    assert rows["maniqa"]["family"] == "quality" and not rows["maniqa"]["reads_prompt"]


def test_a_pipe_gets_a_line_for_each_and_one_kind_is_enough(capsys, fails) -> None:
    assert run(["list", "rewards"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES["rewards"]
    assert "no list of 'recipies'; did you mean 'recipes'?" in fails("list", "recipies")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for index in range(3):
        Image.fromarray(np.full((64, 64, 3), 80 * index, np.uint8)).save(tmp_path / f"dog-{index}.png")
    return tmp_path


def test_json_is_all_there_is_on_standard_output(pictures: Path, capsys) -> None:
    scored = ["score", str(pictures), "--rewards", "nano-quality"]
    (pictures / "bad.png").write_bytes(b"no picture")
    assert run([*scored, "--json"]) == 2
    told = capsys.readouterr()
    assert json.loads(told.out) == json.loads((pictures / "summary.json").read_text())
    assert Result.load(pictures / "summary.json").plain() == json.loads(told.out)
    assert "WARNING: 1 images cannot be read" in told.err and "scores" in told.err
    (pictures / "bad.png").unlink()
    assert run([*scored, "--quiet", "--json"]) == 0
    told = capsys.readouterr()
    assert told.err == "" and json.loads(told.out)["protocol"]["images"] == 3
    assert run([*scored, "--quiet"]) == 0
    told = capsys.readouterr()
    assert told.err == "" and "nano-quality" in told.out and "scores in" not in told.out
    assert run(scored) == 0
    assert f"scores in {pictures}, best" in capsys.readouterr().out, "it is as before"


def test_drawing_tells_where_the_images_are(tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "out")
    assert run(["sample", "--class", "dog", "--n", "1", "--device", "cpu", "--out", out, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert run(["sample", "--class", "dog", "--n", "1", "--device", "cpu", "--out", out, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["images"], told["drawn_before"], told["policy"]) == (1, 1, "nano-c2i")
    assert Path(told["grid"]).is_file() and Path(told["metadata"]).is_file()
