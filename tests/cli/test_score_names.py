"""`argrpo score` on files of any name: each is read, named, written so that it comes back, and harmless in a table."""

from __future__ import annotations

import csv
import os
import sys
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from argrpo_cli.captions import file_rows
from argrpo_cli.cli.app import run
from argrpo_cli.image_prompts import prompt_from_file_name
from argrpo_cli.rewards.custom import find_function
from argrpo_cli.shapes import Result
from argrpo_cli.system.files import read_jsonl, write_jsonl
from argrpo_cli.system.processes import LOCK

NAMES = [b"caf\xe9.png", b"a dog.png", b"=1+1.png", b"\x1b[31mred.png", b"a\nb.png", "@x\x9b.png".encode()]


@pytest.fixture
def brightness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A reward of one's own, which needs no network."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "brightness.py").write_text(
        "def reward(images, conditions):\n    return images.float().mean((1, 2, 3))\n"
    )
    monkeypatch.chdir(tmp_path / "code")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "brightness:reward"
    sys.modules.pop("brightness", None)
    find_function.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / os.fsdecode(b"pictures\xff")
    folder.mkdir()
    for value, name in enumerate(NAMES):
        Image.new("RGB", (4, 4), (value,) * 3).save(folder / os.fsdecode(name), format="PNG")
    return folder


def test_files_of_any_name_are_scored_and_named(folder: Path, brightness: str, capsys) -> None:
    for _ in range(2):
        assert run(["score", str(folder), "--rewards", brightness, "--class", "dog"]) == 0
        assert not set("".join(capsys.readouterr())) & {"\x1b", "\x9b", "\udcff"}
    rows = read_jsonl(folder / "scores.jsonl")
    scores = {os.fsencode(row["file"]): row["scores"][brightness] for row in rows}
    assert scores == {name: value for value, name in enumerate(NAMES)}
    assert next(iter(Result.load(folder / "summary.json").rows)).endswith("pictures\\udcff")
    with open(folder / "scores.csv", encoding="utf-8", newline="") as file:
        cells = [row["file"] for row in csv.DictReader(file)]
    assert (
        "'=1+1.png" in cells and "caf\\udce9.png" in cells and "\\x1b[31mred.png" in cells and "'@x\\x9b.png" in cells
    )


def test_metadata_may_name_them(folder: Path, brightness: str) -> None:
    write_jsonl(folder / "metadata.jsonl", [{"file": os.fsdecode(NAMES[0]), "prompt": "a\u2028b"}])
    assert run(["score", str(folder), "--rewards", brightness]) == 0
    (row,) = read_jsonl(folder / "scores.jsonl")
    assert (os.fsencode(row["file"]), row["prompt"]) == (NAMES[0], "a\u2028b")


def test_a_torn_file_is_named_without_what_a_terminal_obeys(folder: Path, brightness: str, capsys) -> None:
    for name in NAMES:
        (folder / os.fsdecode(name)).write_bytes(b"torn")
    assert run(["score", str(folder), "--rewards", brightness, "--class", "dog"]) == 2
    seen = "".join(capsys.readouterr())
    assert "argrpo: error: " in seen and not set(seen) & {"\x1b", "\x9b", "\udcff"}


def test_prompts_that_look_like_formulas_come_back_from_the_table(folder: Path, brightness: str, tmp_path) -> None:
    prompts = ["=SUM(1)", "'=x", "-a dog", "@home", "a 'cat'", "+1"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    assert run(["score", str(folder), "--rewards", brightness, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    cells = [line.split(",")[1] for line in (folder / "scores.csv").read_text().split("\n")[1:] if line.count(",") == 3]
    assert cells and not any(cell.lstrip("'")[:1] in "=+-@" and cell[0] != "'" for cell in cells)
    assert [row["prompt"] for row in file_rows(folder / "scores.csv")] == prompts


@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9"), "\x1b[31mred dog", "\udcff"])
def test_an_unprintable_name_is_no_prompt(name: str) -> None:
    assert prompt_from_file_name(name) is None


def test_a_prompt_of_odd_bytes_is_refused_before_anything_is_loaded(folder: Path, fails, monkeypatch) -> None:
    odd = os.fsdecode(b"a \xff")
    monkeypatch.setattr("argrpo_cli.rewards.load_rewards", lambda *args: pytest.fail("loaded"))
    assert "the prompt 'a \\udcff' is not text" in fails("score", folder, "--rewards", "nano-clip", "--prompt", odd)
    monkeypatch.setattr("argrpo_cli.policy.load_policy", lambda *args: pytest.fail("loaded"))
    assert "the prompt 'a \\udcff' is not text" in fails("sample", "--prompt", odd, "--out", folder / "new")
    assert not (folder / "new").exists()


def test_no_lock_is_left_anywhere(folder: Path, brightness: str, tmp_path: Path, monkeypatch, fails) -> None:
    (tmp_path / "shared").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "shared"))
    seen = []
    (tmp_path / "code" / "brightness.py").write_text(
        "def reward(images, conditions):\n    watch()\n    return images.float().mean((1, 2, 3))\n"
    )
    find_function(brightness).__globals__["watch"] = lambda: seen.append((tmp_path / "out" / LOCK).is_file())
    arguments = ("score", folder, "--rewards", brightness, "--class", "dog", "--out", tmp_path / "out")
    assert run([str(one) for one in arguments]) == 0
    assert seen == [True] and not (tmp_path / "out" / LOCK).exists() and not any((tmp_path / "shared").iterdir())
