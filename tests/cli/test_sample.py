"""`argrpo sample` with a policy too small to draw anything, through the real code paths."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
from PIL import Image

from argrpo_cli.cli.app import run
from argrpo_cli.system.files import read_jsonl
from tests.training.tiny import CLASSES, IMAGE_SIZE, save_tiny_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy") / "tiny")


@pytest.fixture
def sample(policy):
    def sample(out, *arguments):
        assert run(["sample", "--policy", str(policy), "--out", str(out), *map(str, arguments)]) == 0
        return {path.name: path.read_bytes() for path in out.glob("*-*.png")}

    return sample


def test_the_folder_holds_images_a_grid_and_metadata(sample, policy, tmp_path, capsys):
    out = tmp_path / "new" / "images"
    images = sample(out, "--class", "dog", "--class", "1", "--n", 3, "--seed", 7)
    assert sorted(images) == [f"{name}-0000{seed}.png" for name in ("001-bee", "003-dog") for seed in (7, 8, 9)]
    assert sorted(path.name for path in out.iterdir() if path.name not in images) == [
        "grid.png", "metadata.jsonl", "settings.json",
    ]  # fmt: skip
    rows = read_jsonl(out / "metadata.jsonl")
    assert [row["file"] for row in rows[:3]] == ["003-dog-00007.png", "003-dog-00008.png", "003-dog-00009.png"]
    assert rows[3] == {
        "file": "001-bee-00007.png",
        "prompt": "a photo of a bee",
        "class_id": 1,
        "class_name": "bee",
        "seed": 7,
        "policy": str(policy),
        "cfg_scale": 2.0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "cfg_interval": -1,
        "dtype": "float32",
    }
    with Image.open(out / "003-dog-00007.png") as image:
        assert (image.mode, image.size) == ("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    assert "6 images" in capsys.readouterr().out


def test_an_image_depends_on_class_and_seed_alone(sample, tmp_path):
    one = sample(tmp_path / "a", "--n", 4, "--batch-size", 5)
    assert len(one) == 4 * CLASSES
    other = sample(tmp_path / "b", "--class", "dog", "--class", "ant", "--n", 2, "--seed", 2, "--batch-size", 64)
    assert other == {name: one[name] for name in other}
    assert len(set(one.values())) > CLASSES  # they are not all the same picture


def test_a_class_named_twice_is_drawn_once(sample, tmp_path):
    assert len(sample(tmp_path / "a", "--class", "dog", "--class", "3", "--n", 2)) == 2


def test_npz_holds_the_images_shuffled_with_their_place_in_the_metadata(sample, tmp_path):
    out = tmp_path / "a"
    sample(out, "--n", 2, "--npz")
    with np.load(out / "samples.npz") as archive:
        array, index = archive["arr_0"], archive["index"]
    assert array.shape == (2 * CLASSES, IMAGE_SIZE, IMAGE_SIZE, 3) and array.dtype == np.uint8
    assert sorted(index) == list(range(2 * CLASSES)) and sorted(index) != list(index)
    rows = read_jsonl(out / "metadata.jsonl")
    for place, pixels in zip(index, array, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(out / rows[place]["file"])), pixels)


def test_an_interrupted_folder_is_completed_and_what_is_there_kept(sample, tmp_path, capsys):
    out = tmp_path / "a"
    whole = sample(out, "--n", 3)
    (out / "metadata.jsonl").unlink()
    (out / "003-dog-00001.png").unlink()
    kept = (out / "003-dog-00000.png").stat().st_mtime_ns
    capsys.readouterr()
    assert sample(out, "--n", 3, "--batch-size", 2) == whole
    assert (out / "003-dog-00000.png").stat().st_mtime_ns == kept
    assert (out / "metadata.jsonl").exists()
    assert "12 images (11 were there already)" in capsys.readouterr().out


def test_samples_of_other_settings_are_not_mixed_or_lost(sample, fails, policy, tmp_path):
    out = tmp_path / "a"
    first = sample(out, "--n", 2)
    line = fails("sample", "--policy", policy, "--out", out, "--n", 2, "--cfg-scale", 3)
    assert "holds samples of other settings (" in line and "--overwrite" in line
    assert {path.name: path.read_bytes() for path in out.glob("*-*.png")} == first


def test_samples_of_an_earlier_version_are_told_and_can_be_replaced(sample, fails, policy, tmp_path):
    out = tmp_path / "a"
    sample(out, "--n", 2)
    (out / "settings.json").rename(out / "sampling.json")
    assert "holds samples of an earlier version" in fails("sample", "--policy", policy, "--out", out, "--n", 2)
    assert len(sample(out, "--n", 1, "--overwrite")) == CLASSES
    assert (out / "settings.json").exists() and not (out / "sampling.json").exists()


def test_overwrite_leaves_an_evaluation_alone(fails, policy, tmp_path):
    (tmp_path / "settings.json").write_text('{"prompts": "x", "batch_size": 4}')
    (tmp_path / "summary.json").write_text("{}")
    line = fails("sample", "--policy", policy, "--out", tmp_path, "--class", "dog", "--overwrite")
    assert "holds samples of other settings (command, " in line
    assert sorted(os.listdir(tmp_path)) == ["settings.json", "summary.json"]


def test_overwrite_replaces_the_samples_and_nothing_else(sample, tmp_path):
    out = tmp_path / "a"
    sample(out, "--n", 2, "--npz")
    (out / "notes.txt").write_text("mine")
    (out / "mine.png").write_bytes(b"x")
    assert sorted(sample(out, "--n", 1, "--class", "dog", "--overwrite")) == ["003-dog-00000.png"]
    assert (out / "notes.txt").read_text() == "mine" and (out / "mine.png").exists()
    assert not (out / "samples.npz").exists()


def test_a_folder_with_other_things_is_left_alone(fails, policy, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    assert "is not empty; choose another --out" in fails("sample", "--policy", policy, "--out", tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "dgo"], "no class 'dgo'"),
        (["--class", "4"], "no class 4"),
        (["--class", "-1"], "no class"),
        (["--device", "toaster"], "device 'toaster' is not available; this machine has cpu"),
    ],
)
def test_what_does_not_exist_is_named_and_nothing_is_written(fails, policy, tmp_path, arguments, message):
    assert message in fails("sample", "--policy", policy, "--out", tmp_path / "out", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_policy_is_named(fails, tmp_path):
    assert "no policy 'nano-c3i'" in fails("sample", "--policy", "nano-c3i", "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_output_below_a_file_cannot_be_written(fails, policy, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in fails("sample", "--policy", policy, "--out", tmp_path / "file")
    assert "cannot create the folder" in fails("sample", "--policy", policy, "--out", tmp_path / "file" / "below")


def test_a_full_disk_is_one_line_and_the_rest_can_be_drawn_later(sample, fails, policy, tmp_path, monkeypatch):
    out, replace = tmp_path / "a", os.replace
    left = 5

    def filling(source, target):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", filling)
        line = fails("sample", "--policy", policy, "--out", out, "--n", 3)
    assert "cannot write" in line and "no space left on device" in line
    assert not (out / "metadata.jsonl").exists()
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    for path in out.glob("*.png"):
        Image.open(path).load()  # what is there is whole
    assert sample(out, "--n", 3) == sample(tmp_path / "b", "--n", 3)


def test_settings_are_written_before_and_metadata_after_the_images(sample, tmp_path):
    out = tmp_path / "a"
    sample(out, "--n", 1)
    settings = json.loads((out / "settings.json").read_text())
    assert settings["n"] == 1 and settings["classes"] == [] and len(settings["weights"]) == 16
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert min(times, key=times.get) == "settings.json" and max(times, key=times.get) == "metadata.jsonl"
