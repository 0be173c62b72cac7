"""`argrpo score` with rewards that need no network; the real ones have their own tests."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from argrpo_cli.cli.app import run
from argrpo_cli.image_prompts import prompt_from_file_name
from argrpo_cli.rewards import REWARDS, check_reward, load_rewards
from argrpo_cli.rewards.custom import find_function
from argrpo_cli.shapes import Result, Value
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import make_dir, read_jsonl, write_jsonl


class Rewards:
    """Brightness as a quality reward, and the length of the prompt as a conditional one."""

    family = {"bright": "quality", "words": "conditional"}  # noqa: RUF012
    entries = {"bright": check_reward("aesthetic"), "words": check_reward("clip")}  # noqa: RUF012

    def __init__(self, names, device):
        self.names, self.batches, self.last_error = names, [], {}

    def check(self, conditions):
        """They judge any condition."""

    def identity(self, options=None):
        return {name: dict((options or {}).get(name, {})) for name in self.names}

    def score(self, images, conditions, batch_size=64):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        self.batches.append(tuple(images.shape))
        scores = {
            "bright": images.float().mean(dim=(1, 2, 3)),
            "words": torch.tensor([float(len(one.prompt.split())) for one in conditions]),
        }
        return {name: scores[name] for name in self.names}


@pytest.fixture(autouse=True)
def rewards(monkeypatch):
    made = []

    def load(names, device="cpu", options=None):
        made.append(Rewards(names, device))
        return made[-1]

    monkeypatch.setattr("argrpo_cli.rewards.load_rewards", load)
    monkeypatch.setattr("argrpo_cli.cli.options.check_rewards", lambda names, options: None)
    return made


def _save(path, value, size=4, mode="RGB"):
    colour = {"RGB": (value,) * 3, "L": value, "RGBA": (value, value, value, 0)}[mode]
    Image.new(mode, (size, size), colour).save(path)


@pytest.fixture
def folder(tmp_path):
    for index, value in enumerate((10, 20, 60)):
        _save(tmp_path / f"dog-{index}.png", value)
    return tmp_path


def test_scores_and_their_statistics(folder, capsys):
    assert run(["score", str(folder), "--rewards", "bright"]) == 0
    rows = read_jsonl(folder / "scores.jsonl")
    assert [row["file"] for row in rows] == ["dog-0.png", "dog-1.png", "dog-2.png"]
    assert [row["scores"]["bright"] for row in rows] == [10, 20, 60]
    result = Result.load(folder / "summary.json")
    error = math.sqrt((400 + 100 + 900) / 2 / 3)
    value = result.rows[str(folder)]["bright"]
    assert (value.value, value.error, value.count) == (30, pytest.approx(error), 3)
    assert (result.benchmark, result.columns["bright"].group) == ("score", "quality")
    assert result.protocol == {"images": 3, "rewards": {"bright": {"family": "quality", "min": 10, "max": 60}}}
    out = capsys.readouterr().out
    for text in ("bright", "30.0000", f"{error:.4f}", "10.0000", "60.0000", str(folder / "scores.jsonl")[:20]):
        assert text in out


def test_one_image_has_no_standard_error(tmp_path, capsys):
    _save(tmp_path / "a.png", 5)
    assert run(["score", str(tmp_path), "--rewards", "bright"]) == 0
    assert Result.load(tmp_path / "summary.json").rows[str(tmp_path)]["bright"] == Value(5, None, 1)


def test_metadata_says_what_is_scored_and_what_it_shows(folder):
    rows = [
        {"file": "dog-2.png", "prompt": "one two three", "class_id": 7, "seed": 3},
        {"file": "dog-0.png", "prompt": "x"},
    ]
    write_jsonl(folder / "metadata.jsonl", rows)
    assert run(["score", str(folder), "--rewards", "words,bright"]) == 0
    assert read_jsonl(folder / "scores.jsonl") == [
        {
            "file": "dog-2.png",
            "prompt": "one two three",
            "class_id": 7,
            "seed": 3,
            "scores": {"words": 3, "bright": 60},
        },
        {"file": "dog-0.png", "prompt": "x", "class_id": None, "scores": {"words": 1, "bright": 10}},
    ]


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        (["--prompt", "hello there"], "hello there"),
        (["--class", "orange"], "a photo of an orange"),
        ([], "a photo of a dog"),
    ],
)
def test_without_metadata_the_prompt_is_given_or_read_from_the_file_name(folder, arguments, prompt, capsys):
    assert run(["score", str(folder), "--rewards", "words", *arguments]) == 0
    assert {row["prompt"] for row in read_jsonl(folder / "scores.jsonl")} == {prompt}
    assert ("read from the file names" in " ".join(capsys.readouterr().out.split())) == (not arguments)


@pytest.mark.parametrize(
    ("stem", "prompt"),
    [
        ("003-dog-00012", "a photo of a dog"),
        ("golden_retriever", "a photo of a golden retriever"),
        ("a_photo_of_two_cats_007", "a photo of two cats"),
        ("umbrella (2)", "a photo of an umbrella"),
        ("IMG_0012", None),
        ("000123", None),
        ("image-1", None),
    ],
)
def test_file_names_that_are_words_are_prompts(stem, prompt):
    assert prompt_from_file_name(stem) == prompt


def test_images_of_any_kind_and_size_are_scored_as_rgb_in_batches(tmp_path, rewards):
    _save(tmp_path / "a.png", 10)
    _save(tmp_path / "b.jpg", 20)
    _save(tmp_path / "c.png", 30, size=6, mode="L")
    _save(tmp_path / "d.png", 40, size=6, mode="RGBA")  # fully transparent: white
    _save(tmp_path / "grid.png", 99)
    assert run(["score", str(tmp_path), "--rewards", "bright", "--batch-size", "3"]) == 0
    assert [row["scores"]["bright"] for row in read_jsonl(tmp_path / "scores.jsonl")] == [10, 20, 30, 255]
    assert rewards[0].batches == [(2, 3, 4, 4), (1, 3, 6, 6), (1, 3, 6, 6)]


def test_the_scores_can_go_elsewhere(folder, tmp_path):
    before = sorted(os.listdir(folder))
    assert run(["score", str(folder), "--rewards", "bright", "--out", str(tmp_path / "new" / "out")]) == 0
    assert sorted(os.listdir(tmp_path / "new" / "out")) == [
        "best_worst.png",
        "scores.csv",
        "scores.jsonl",
        "summary.json",
    ]
    assert sorted(os.listdir(folder)) == sorted([*before, "new"])


def _no_scores(folder):
    return not (folder / "scores.jsonl").exists() and not (folder / "summary.json").exists()


def test_an_empty_folder_and_a_file_are_named(tmp_path, fails):
    assert f"no images in {tmp_path}" in fails("score", tmp_path, "--rewards", "bright")
    (tmp_path / "file").write_text("")
    assert "file: it is not an image" in fails("score", tmp_path / "file", "--rewards", "bright")
    assert f"no folder {tmp_path / 'gone'}" in fails("score", tmp_path / "gone", "--rewards", "bright")
    assert "there is no image" in fails("score", tmp_path / "gone.png", "--rewards", "bright")


def test_a_conditional_reward_needs_to_know_what_the_image_should_show(tmp_path, fails):
    _save(tmp_path / "000123.png", 1)
    assert run(["score", str(tmp_path), "--rewards", "bright", "--out", str(tmp_path / "o")]) == 0
    line = fails("score", tmp_path, "--rewards", "bright,words")
    assert "words needs to know what" in line and "000123.png" in line and "--prompt, --class or --prompts" in line


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ('{"file": "gone.png", "prompt": "x"}\n', "lists gone.png, which is not there"),
        ('{"file": "%s", "prompt": "x"}\n' % ("x" * 300), "which is not there"),
        ('{"prompt": "x"}\n', "image 1: 'file' is missing"),
        ('{"file": "dog-0.png", "prompt": 3}\n', "dog-0.png: prompt = 3: must be text"),
        ('{"file": "dog-0.png", "class_id": "3"}\n', "class_id = '3': must be a whole number"),
        ('{"file": \n', "line 1: not JSON"),
        ("", "lists no images"),
    ],
)
def test_malformed_metadata_is_told(folder, fails, metadata, message):
    (folder / "metadata.jsonl").write_text(metadata)
    assert message in fails("score", folder, "--rewards", "bright")
    assert _no_scores(folder)


def test_a_class_that_the_nano_world_lacks_is_told_before_anything_is_scored(folder, fails, monkeypatch):
    monkeypatch.setattr("argrpo_cli.rewards.load_rewards", load_rewards)
    line = fails("score", folder, "--rewards", "nano-clip", "--class", "dgo")
    assert "'dgo'" in line and "did you mean 'dog'" in line
    assert _no_scores(folder)


def test_two_sources_of_prompts_are_one_too_many(folder, fails):
    assert "not both" in fails("score", folder, "--rewards", "words", "--prompt", "x", "--class", "y")
    write_jsonl(folder / "metadata.jsonl", [{"file": "dog-0.png", "prompt": "x"}])
    assert "leave out --prompt, --class and --prompts" in fails("score", folder, "--rewards", "words", "--class", "y")


def test_an_unwritable_output_is_told(folder, fails):
    (folder / "file").write_text("")
    assert "it is a file, not a folder" in fails("score", folder, "--rewards", "bright", "--out", folder / "file")


def test_an_empty_prompt_and_an_unfinished_folder_are_refused(folder, fails, tmp_path):
    assert "--prompt is empty; say what the images should show" in fails(
        "score", folder, "--rewards", "bright", "--prompt", " "
    )
    (folder / "settings.json").write_text('{"command": "sample"}')
    (folder / "metadata.jsonl").unlink(missing_ok=True)
    assert "is unfinished; give the same `argrpo sample` command again" in fails("score", folder, "--rewards", "bright")


def test_a_refused_folder_leaves_no_other_behind(folder, fails, tmp_path):
    (folder / "text.png").write_text("not a picture")
    (folder / "metadata.jsonl").unlink(missing_ok=True)
    arguments = ("--rewards", "bright", "--class", "dog", "--out", tmp_path / "out", "--strict")
    assert "cannot read the image" in fails("score", folder, *arguments)
    assert not (tmp_path / "out").exists()


# --- sources ---


def test_image_files_and_an_npz_are_scored_like_a_folder(folder, fails):
    files = [str(folder / f"dog-{index}.png") for index in (2, 0)]
    assert run(["score", *files, "--rewards", "bright", "--out", str(folder / "a")]) == 0
    assert [row["scores"]["bright"] for row in read_jsonl(folder / "a" / "scores.jsonl")] == [60, 10]

    pixels = np.stack([np.full((4, 6, 3), value, np.uint8) for value in (7, 9, 8)])
    np.savez_compressed(folder / "set.npz", pixels)
    arguments = ["--rewards", "bright,words", "--prompt", "a b", "--batch-size", "2"]
    assert run(["score", str(folder / "set.npz"), *arguments]) == 0
    rows = read_jsonl(folder / "set-scores" / "scores.jsonl")
    assert [(row["file"], row["scores"]) for row in rows] == [
        (f"0000{index}", {"bright": value, "words": 2}) for index, value in enumerate((7, 9, 8))
    ]
    np.savez(folder / "wrong.npz", pixels.astype(np.float32))
    assert "arr_0 is float32 [3, 4, 6, 3]; expected arr_0, uint8 images" in fails("score", folder / "wrong.npz")
    (folder / "cut.npz").write_bytes((folder / "set.npz").read_bytes()[:200])
    assert "cut.npz: it is neither a folder nor an .npz file, or a damaged one" in fails("score", folder / "cut.npz")
    assert "give one folder, one .npz, or image files" in fails("score", folder, folder / "set.npz")


def test_captions_come_in_order_or_by_name(folder, fails):
    (folder / "captions.txt").write_text("one\none two\none two three\n")
    assert run(["score", str(folder), "--rewards", "words", "--prompts", str(folder / "captions.txt")]) == 0
    assert [row["scores"]["words"] for row in read_jsonl(folder / "scores.jsonl")] == [1, 2, 3]
    named = [{"file": f"dog-{index}.png", "prompt": "x " * (index + 5)} for index in (2, 0, 1)]
    write_jsonl(folder / "captions.jsonl", named)
    assert run(["score", str(folder), "--rewards", "words", "--prompts", str(folder / "captions.jsonl")]) == 0
    assert [row["scores"]["words"] for row in read_jsonl(folder / "scores.jsonl")] == [5, 6, 7]
    (folder / "captions.txt").write_text("one\n")
    line = fails("score", folder, "--rewards", "words", "--prompts", folder / "captions.txt")
    assert "1 captions for 3 images" in line


# --- what is written ---


def test_the_table_and_the_sheet(folder):
    assert run(["score", str(folder), "--rewards", "bright", "--class", "dog"]) == 0
    assert (folder / "scores.csv").read_text().splitlines() == [
        "file,prompt,class_id,bright",
        "dog-0.png,a photo of a dog,,10.0",
        "dog-1.png,a photo of a dog,,20.0",
        "dog-2.png,a photo of a dog,,60.0",
    ]
    sheet = np.asarray(Image.open(folder / "best_worst.png").convert("L"))
    rows = np.split(sheet, 2)
    left_to_right = [[int(np.median(row[60:-4, x])) for x in (64, 196, 328)] for row in rows]
    assert left_to_right == [[60, 20, 10], [10, 20, 60]], "best first, then worst first"
    assert run(["score", str(folder), "--rewards", "bright", "--class", "dog"]) == 0, "the sheet is no image to score"
    assert len(read_jsonl(folder / "scores.jsonl")) == 3


def test_missing_scores_are_told_and_left_out_of_the_statistics(folder, rewards, capsys, monkeypatch):
    def score(self, images, conditions, batch_size=64):
        self.last_error = {"bright": "no answer"}
        return {"bright": torch.tensor([1.0, float("nan"), 3.0])}

    monkeypatch.setattr(Rewards, "score", score)
    assert run(["score", str(folder), "--rewards", "bright"]) == 0
    assert [row["scores"]["bright"] for row in read_jsonl(folder / "scores.jsonl")] == [1, None, 3]
    result = Result.load(folder / "summary.json")
    warning = "bright has no score for 1 images (the latest: no answer)"
    row = result.protocol["rewards"]["bright"]
    assert (result.rows[str(folder)]["bright"].value, row["missing"], row["last_error"]) == (2, 1, "no answer")
    assert (folder / "scores.partial").exists(), "the same call asks again for what is missing"
    assert result.warnings == [warning] and warning in capsys.readouterr().err


# --- interruption ---


def test_an_interrupted_job_keeps_its_scores(folder, rewards, monkeypatch, fails, capsys):
    score = Rewards.score
    arguments = ["score", str(folder), "--rewards", "bright", "--batch-size", "1"]

    def stops(self, images, conditions, batch_size=64):
        if len(self.batches) == 2:
            raise UserError("the judge is gone")
        return score(self, images, conditions, batch_size)

    monkeypatch.setattr(Rewards, "score", stops)
    assert "the judge is gone" in fails(*arguments)
    assert _no_scores(folder)
    monkeypatch.setattr(Rewards, "score", score)
    assert run(arguments) == 0
    assert len(rewards[-1].batches) == 1, "only the one that was missing"
    assert "(2 were scored before)" in " ".join(capsys.readouterr().out.split())
    assert [row["scores"]["bright"] for row in read_jsonl(folder / "scores.jsonl")] == [10, 20, 60]
    assert not (folder / "scores.partial").exists()


@pytest.mark.parametrize("change", ["rewards", "picture", "prompt", "options"])
def test_scores_of_something_else_are_not_kept(folder, rewards, monkeypatch, fails, change):
    score = Rewards.score

    def stops(self, images, conditions, batch_size=64):
        if len(self.batches) == 2:
            raise UserError("gone")
        return score(self, images, conditions, batch_size)

    monkeypatch.setattr(Rewards, "score", stops)
    fails("score", folder, "--rewards", "bright", "--batch-size", "1")
    monkeypatch.setattr(Rewards, "score", score)
    names, more = "bright", []
    if change == "rewards":
        names = "bright,words"
    elif change == "picture":
        _save(folder / "dog-0.png", 99, size=5)
    else:
        more = ["--class", "cat"] if change == "prompt" else ["--set", "bright.gain=2"]
    assert run(["score", str(folder), "--rewards", names, "--batch-size", "1", *more]) == 0
    assert len(rewards[-1].batches) == {"rewards": 3, "picture": 2, "prompt": 3, "options": 3}[change]


def test_options_of_rewards_are_read_and_checked(folder, fails, monkeypatch):
    monkeypatch.setattr("argrpo_cli.rewards.load_rewards", load_rewards)
    score = ("score", folder, "--class", "dog", "--rewards", "nano-quality")
    assert "expected REWARD.KEY=VALUE" in fails(*score, "--set", "version=2")
    assert "'clip' is not among --rewards" in fails(*score, "--set", "clip.model=x")
    assert "reward nano-quality: no option 'size'; it has none" in fails(*score, "--set", "nano-quality.size=2")


def test_what_is_missing_is_asked_for_again(folder, rewards, monkeypatch):
    answers = iter([[1.0, float("nan"), 3.0], [2.0]])
    monkeypatch.setattr(
        Rewards, "score", lambda self, images, said, batch_size: {"bright": torch.tensor(next(answers))}
    )
    for missing in (1, 0):
        assert run(["score", str(folder), "--rewards", "bright"]) == 0
        assert (folder / "scores.partial").exists() == bool(missing)
    assert [row["scores"]["bright"] for row in read_jsonl(folder / "scores.jsonl")] == [1, 2, 3]


def test_a_score_is_not_lost_when_the_other_one_comes(folder, rewards, monkeypatch):
    nan = float("nan")
    answers = iter([([1.0, 1.0, 1.0], [nan, 2.0, 2.0]), ([nan], [2.0])])

    def score(self, images, said, batch_size):
        return dict(zip(("bright", "words"), map(torch.tensor, next(answers)), strict=True))

    monkeypatch.setattr(Rewards, "score", score)
    for _ in range(2):
        assert run(["score", str(folder), "--rewards", "bright,words"]) == 0
    rows = read_jsonl(folder / "scores.jsonl")
    assert [row["scores"] for row in rows] == [{"bright": 1, "words": 2}] * 3


def test_a_reward_of_realism_that_reads_the_prompt_needs_one():
    assert check_reward("judge-quality").reads_prompt and check_reward("judge-quality").family == "realism"
    assert not check_reward("judge-fake").reads_prompt and not check_reward("maniqa").reads_prompt
    assert all(entry.reads_prompt for entry in map(check_reward, REWARDS) if entry.family == "conditional")


def test_scores_of_older_code_of_ones_own_are_not_kept(folder, fails, monkeypatch, tmp_path):
    monkeypatch.setattr("argrpo_cli.rewards.load_rewards", load_rewards)
    monkeypatch.setattr(sys, "path", [*sys.path])
    source = (
        "def reward(images, conditions):\n    global n\n    n += 1\n    return [7.0 / (n < 3)] * len(images)\nn = 0\n"
    )
    monkeypatch.chdir(make_dir(tmp_path / ".code"))
    Path("mine_to_mend.py").write_text(source)
    arguments = ("score", folder, "--rewards", "mine_to_mend:reward", "--batch-size", "1", "--class", "dog")
    assert "mine_to_mend:reward failed: ZeroDivisionError" in fails(*arguments)
    Path("mine_to_mend.py").write_text("def reward(images, conditions):\n    return [1.0] * len(images)\n")
    sys.modules.pop("mine_to_mend")
    find_function.cache_clear()
    assert run([str(one) for one in arguments]) == 0
    assert [row["scores"]["mine_to_mend:reward"] for row in read_jsonl(folder / "scores.jsonl")] == [1, 1, 1]


def test_no_score_at_all_is_a_failure(folder, capsys, monkeypatch):
    def score(self, images, conditions, batch_size=64):
        self.last_error = {"bright": "the server said 500"}
        return {"bright": torch.full((len(images),), float("nan"))}

    monkeypatch.setattr(Rewards, "score", score)
    assert run(["score", str(folder), "--rewards", "bright"]) == 2
    assert "bright scored none of the 3 images: the server said 500" in capsys.readouterr().err


def test_a_second_job_on_the_same_folder_is_refused(folder, fails, monkeypatch):
    score, told = Rewards.score, []

    def meanwhile(self, images, conditions, batch_size=64):
        if not told:
            told.append(fails("score", folder, "--rewards", "bright"))
        return score(self, images, conditions, batch_size)

    monkeypatch.setattr(Rewards, "score", meanwhile)
    assert run(["score", str(folder), "--rewards", "bright"]) == 0
    assert "another `argrpo score` writes to" in told[0]
    assert run(["score", str(folder), "--rewards", "bright"]) == 0, "and then it is free again"
