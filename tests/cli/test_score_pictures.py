"""`argrpo score` of folders as people have them: torn pictures, pipes, sub-folders, captions in files."""

from __future__ import annotations

import json
import os
import weakref
from functools import partial

import numpy as np
import pytest
from PIL import Image

from argrpo_cli.cli.app import run
from argrpo_cli.image_prompts import find_items
from argrpo_cli.images import Item
from argrpo_cli.score import score_rows
from argrpo_cli.shapes import Condition, Result
from argrpo_cli.system.errors import BadPicture, UserError
from argrpo_cli.system.files import read_jsonl, write_jsonl
from tests.cli.test_score import Rewards


@pytest.fixture
def seen(monkeypatch):
    """Replace the rewards by brightness, and the length of the prompt; the brightness of all that was looked at."""
    seen: list[int] = []

    class Noted(Rewards):
        def score(self, images, conditions, batch_size=64):
            if max(images.shape[2:]) > 50 * min(images.shape[2:]):
                raise BadPicture("too oblong")
            seen.extend(int(one) for one in images.float().mean(dim=(1, 2, 3)))
            return super().score(images, conditions, batch_size)

    monkeypatch.setattr("argrpo_cli.rewards.load_rewards", lambda names, device="cpu", options=None: Noted(names, 0))
    monkeypatch.setattr("argrpo_cli.cli.options.check_rewards", lambda names, options: None)
    return seen


def picture(path, value: int, size: tuple[int, int] = (4, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)


@pytest.fixture
def folder(tmp_path):
    """Four good pictures among six bad ones."""
    for index, value in ((1, 10), (2, 20), (10, 30), (11, 40)):
        picture(tmp_path / f"{index}.png", value)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "3 torn.png")
    (tmp_path / "3 torn.png").write_bytes((tmp_path / "3 torn.png").read_bytes()[:4000])
    (tmp_path / "4 text.png").write_text("not a picture")
    os.mkfifo(tmp_path / "5 pipe.png")
    (tmp_path / "6 zero.png").symlink_to("/dev/zero")
    (tmp_path / "7 gone.png").symlink_to("nowhere")
    picture(tmp_path / "8 long.png", 5, (1, 60))
    return tmp_path


BAD = ("3 torn.png", "4 text.png", "5 pipe.png", "6 zero.png", "7 gone.png", "8 long.png")
NAMES = ["1.png", "2.png", *BAD, "10.png", "11.png"]


def test_good_pictures_are_scored_among_bad_ones_and_not_again(folder, seen, capsys):
    arguments = ["score", str(folder), "--rewards", "bright", "--batch-size", "3"]
    for call in range(2):
        assert run(arguments) == 2
        out, err = capsys.readouterr()
        assert [err.count(name) for name in BAD] == [1] * 6 and "30.0000" not in err
        assert "6 of 10 images could not be read and have no scores" in err.splitlines()[-1]
        assert "WARNING: 6 images cannot be read" in err and ("(4 were scored before)" in out) == bool(call)
        rows = read_jsonl(folder / "scores.jsonl")
        assert [row["file"] for row in rows] == NAMES
        assert [row["scores"]["bright"] for row in rows] == [10, 20, *[None] * 6, 30, 40]
        result = Result.load(folder / "summary.json")
        assert list(result.protocol["unreadable"]) == list(BAD)
        assert (result.rows[str(folder)]["bright"].value, result.rows[str(folder)]["bright"].count) == (25, 4)
        assert seen == [10, 20, 30, 40], "the second call looks at none of them again"
    for name in BAD:
        (folder / name).unlink()
    picture(folder / "3 torn.png", 50)
    assert run(arguments) == 0
    assert seen == [10, 20, 30, 40, 50], "the one that was mended"
    assert not (folder / "scores.partial").exists()


def test_strict_stops_at_the_first_bad_picture(folder, seen, capsys):
    arguments = ["score", str(folder), "--rewards", "bright", "--batch-size", "2"]
    assert run([*arguments, "--strict"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "3 torn.png" in error and "4 text.png" not in error
    assert not (folder / "scores.jsonl").exists() and seen == [10, 20]
    assert run(arguments) == 2 and seen == [10, 20, 30, 40]


def test_where_nothing_can_be_read_nothing_is_written(folder, seen, fails, capsys, monkeypatch):
    for name, why in (("5 pipe.png", "it is a pipe"), ("4 text.png", "it is not an image")):
        with monkeypatch.context() as patch:
            patch.setattr("argrpo_cli.rewards.load_rewards", None)  # nothing is loaded for that
            assert f"{name}: {why}" in fails("score", folder / name, "--rewards", "bright")
    capsys.readouterr()
    assert run(["score", *(str(folder / name) for name in BAD[:3]), "--rewards", "bright"]) == 2
    said = capsys.readouterr().err
    assert [said.count(name) for name in BAD[:3]] == [1, 1, 1] and "none of the 3 images could be read" in said
    assert {path.name for path in folder.iterdir()} == set(NAMES)


def test_of_large_pictures_one_is_in_memory(monkeypatch):
    monkeypatch.setattr("argrpo_cli.images.LARGE", 15)
    monkeypatch.setattr("argrpo_cli.images.MOST_BYTES", 48)
    alive: list[weakref.ref] = []
    held: list[int] = []

    def image(name: str, most: int | None = None) -> np.ndarray | None:
        if most is not None and most < 16:
            return None
        held.append(sum(one() is not None for one in alive))
        pixels = np.zeros((3, 4, 4), np.uint8)
        alive.append(weakref.ref(pixels))
        return pixels

    items = [Item(name, name, partial(image, name)) for name in "abcd"]
    rewards = Rewards(["bright"], "cpu")
    assert len(score_rows(rewards, items)) == 4
    assert held == [0, 0, 0, 0] and rewards.batches == [(1, 3, 4, 4)] * 4


# --- what they show ---


def test_class_folders_say_what_pictures_show(tmp_path):
    for file in ("n02099601/n02099601_10.JPEG", "golden_retriever/2.png", "val/orange/IMG_3.png", "part 2/cat_4.png"):
        picture(tmp_path / "a" / file, 1)
    picture(tmp_path / "a" / "007" / "000123.png", 1)
    images = find_items([tmp_path / "a"])
    conditions = {item.file: item.condition for item in images.items}
    assert conditions["n02099601/n02099601_10.JPEG"] == Condition("a photo of a golden retriever", 207)
    assert conditions["golden_retriever/2.png"] == Condition("a photo of a golden retriever")
    assert conditions["val/orange/IMG_3.png"] == Condition("a photo of an orange")
    assert conditions["part 2/cat_4.png"] == Condition("a photo of a cat")
    assert conditions["007/000123.png"] is None
    assert "names of folders and files (golden_retriever/2.png: 'a photo of a golden retriever')" in images.note


def test_captions_one_a_line_go_in_natural_order_and_that_is_said(tmp_path, seen, capsys):
    for index in range(12):
        picture(tmp_path / "a" / f"{index}.png", index)
    captions = tmp_path / "captions.txt"
    captions.write_text("".join(f"{index} {'x ' * index}\n" for index in range(12)))
    assert run(["score", str(tmp_path / "a"), "--rewards", "words,bright", "--prompts", str(captions)]) == 0
    rows = read_jsonl(tmp_path / "a" / "scores.jsonl")
    assert [row["scores"] for row in rows] == [{"words": index + 1, "bright": index} for index in range(12)]
    said = capsys.readouterr().err
    assert "captions.txt go to the images in this order: 0.png: '0', 1.png: '1 x', 2.png: '2 x x', ..., 11.png" in said


@pytest.fixture
def pair(tmp_path):
    for name in "ab":
        picture(tmp_path / "p" / f"{name}.png", 1)
    return tmp_path / "p"


@pytest.mark.parametrize("name", ["OCR.JSONL", "ocr.jsonl", "ocr.Json", "ocr.CSV"])
def test_captions_of_rows_go_by_file_whatever_the_letters_of_the_ending(name, pair, tmp_path):
    rows = [{"file": "b.png", "prompt": "of b"}, {"file": "a.png", "prompt": "of a"}, {"file": "c.png", "prompt": "c"}]
    if name == "ocr.Json":
        (tmp_path / name).write_text(json.dumps(rows))
    elif name == "ocr.CSV":
        (tmp_path / name).write_text("file,prompt\nb.png,of b\na.png,of a\nc.png,c\n")
    else:
        write_jsonl(tmp_path / name, rows)
    images = find_items([pair], captions=tmp_path / name)
    assert [(item.file, item.condition.prompt) for item in images.items] == [("a.png", "of a"), ("b.png", "of b")]
    assert any("for no image of the set: c.png" in remark for remark in images.remarks)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file": "b.png", "prompt": "x"}, {"prompt": "y"}], "row 2: 'file' = None; name the file in every row"),
        ([{"prompt": "y"}, {"file": "b.png", "prompt": "x"}], "row 1: 'file' = None; name the file in every row"),
        ([{"file": "", "prompt": "x"}, {"file": "", "prompt": "y"}], "row 1: 'file' = ''; name the file in every row"),
        ([{"file": 1, "prompt": "x"}, {"file": 2, "prompt": "y"}], "row 1: 'file' = 1"),
        ([{"file": "a.png", "prompt": "x"}, {"file": "a.png", "prompt": "y"}], "row 2: a second caption for a.png"),
        ([{"file": "a.png", "prompt": "x"}, {"file": "c.png", "prompt": "y"}], "no caption for b.png"),
        ([{"prompt": ["x", "y"]}, {"prompt": []}], "line 1: 'prompt' holds 2 captions; give one for each picture"),
    ],
)
def test_captions_that_cannot_be_paired_are_refused(rows, message, pair, tmp_path):
    write_jsonl(tmp_path / "captions.jsonl", rows)
    with pytest.raises(UserError, match=message):
        find_items([pair], captions=tmp_path / "captions.jsonl")


def test_pictures_that_metadata_does_not_list_are_named_and_one_listed_twice_is_refused(pair):
    picture(pair / "sub" / "c.png", 1)
    write_jsonl(pair / "metadata.jsonl", [{"file": "a.png", "prompt": "x"}])
    (remark,) = find_items([pair]).remarks
    assert "does not list them: b.png, sub/c.png" in remark
    write_jsonl(pair / "metadata.jsonl", [{"file": "a.png", "prompt": "x"}, {"file": "a.png", "prompt": "y"}])
    with pytest.raises(UserError, match=r"lists a\.png twice"):
        find_items([pair])


def test_sub_folders_that_were_drawn_say_what_their_pictures_show(pair):
    picture(pair / "cat" / "c.png", 1)
    write_jsonl(pair / "cat" / "metadata.jsonl", [{"file": "c.png", "prompt": "a dog on a mat", "seed": 4}])
    by_file = {item.file: item for item in find_items([pair]).items}
    assert by_file["cat/c.png"].condition == Condition("a dog on a mat") and by_file["cat/c.png"].extra == {"seed": 4}
    (pair / "cat" / "settings.json").write_text('{"command": "sample"}')
    (pair / "cat" / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match="cat is unfinished"):
        find_items([pair])


def test_a_name_that_is_no_prompt_for_a_reward_is_named_with_the_mend(tmp_path, capsys):
    picture(tmp_path / "dog.png", 10, (64, 64))
    os.mkfifo(tmp_path / "pipe.png")
    assert run(["score", str(tmp_path), "--rewards", "nano-clip"]) == 2
    assert "1 of 2 images could not be read" in capsys.readouterr().err
    picture(tmp_path / "zebu.png", 10, (64, 64))
    assert run(["score", str(tmp_path), "--rewards", "nano-clip"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("argrpo: error: zebu.png: nano-clip does not know the word 'zebu' in the prompt")
    assert told.endswith("the prompt was read from its name: give --prompt, --class or --prompts")
