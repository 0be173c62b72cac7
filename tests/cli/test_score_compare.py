"""`argrpo score` with rewards that compare images: they see the whole folder."""

from __future__ import annotations

import sys

import pytest
from PIL import Image

from argrpo_cli.cli.app import run
from argrpo_cli.rewards.custom import find_function
from argrpo_cli.system.files import read_jsonl


def _save(path, value, size=4):
    Image.new("RGB", (size, size), (value,) * 3).save(path)


@pytest.fixture
def folder(tmp_path):
    for index, value in enumerate((10, 20, 60)):
        _save(tmp_path / f"dog-{index}.png", value)
    return tmp_path


@pytest.fixture
def unlike(tmp_path_factory, monkeypatch):
    """A module of rewards of one's own: how far an image is from the mean of its group, and of all."""
    place = tmp_path_factory.mktemp("own")
    (place / "unlike.py").write_text(
        "def group(images, conditions):\n"
        "    level = images.float().mean((1, 2, 3))\n"
        "    return (level - level.mean()).abs()\n"
        "def batch(images, conditions):\n"
        "    return group(images, conditions)\n"
        "group.scope, batch.scope = 'group', 'batch'\n"
    )
    monkeypatch.syspath_prepend(place)
    yield
    sys.modules.pop("unlike", None)
    find_function.cache_clear()


def test_rewards_that_compare_images_see_the_whole_folder(folder, unlike, capsys):
    _save(folder / "cat-0.png", 110)
    (folder / "cat-1.png").write_bytes(b"no picture")
    names = "unlike:group,unlike:batch"
    assert run(["score", str(folder), "--rewards", names, "--batch-size", "2"]) == 2
    assert "1 of 5 images could not be read" in capsys.readouterr().err
    rows = {row["file"]: row["scores"] for row in read_jsonl(folder / "scores.jsonl")}
    assert [rows[f"dog-{index}.png"]["unlike:group"] for index in range(3)] == [20, 10, 30]
    assert rows["cat-0.png"] == {"unlike:group": 0, "unlike:batch": 60}
    assert rows["cat-1.png"] == {"unlike:group": None, "unlike:batch": None}
    assert rows["dog-0.png"]["unlike:batch"] == 40
    _save(folder / "cat-1.png", 110, size=8)
    assert run(["score", str(folder), "--rewards", names]) == 2
    assert "compares images of one size, and " in capsys.readouterr().err


def test_a_benchmark_of_single_images_refuses_a_reward_that_compares_them(folder, unlike, capsys):
    assert run(["eval", "drawbench", "--out", str(folder / "new"), "--columns", "unlike:batch"]) == 2
    assert "unlike:batch compares the images of a batch with each other" in capsys.readouterr().err
