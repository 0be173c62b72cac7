"""Which scores and verdicts stand, and which are made again: DrawBench's scores, GenEval's judgements."""

from __future__ import annotations

import importlib
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from argrpo_cli.evals import benchmark, geneval
from argrpo_cli.evals.benchmark import Subject
from argrpo_cli.evals.drawbench import DrawBench
from argrpo_cli.evals.drawbench_prompts import PromptList
from argrpo_cli.evals.geneval import OFFICIAL_RESULTS, RESULTS, GenEval
from argrpo_cli.geneval.nano_detector import NANO_THRESHOLDS
from argrpo_cli.geneval.observers import Observer
from argrpo_cli.geneval.prompts import official_prompts
from argrpo_cli.geneval.rules import OFFICIAL, Detection
from argrpo_cli.rewards.custom import Custom, find_function
from argrpo_cli.shapes import Condition, Shot
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_jsonl
from argrpo_cli.system.processes import ALONE

COUNTING = next(prompt for prompt in official_prompts() if prompt.tag == "counting" and prompt.include[0].count == 2)


def save_picture(path, value, side=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(path, compress_level=0)


# --- DrawBench ---


@pytest.fixture
def own_reward(tmp_path, monkeypatch):
    """Writes the module of a reward of one's own; as in a new process, it is read anew."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(body):
        (tmp_path / "reward_kept.py").write_text(f"def reward(images, conditions, weights):\n    return {body}\n")
        forget()

    def forget():
        sys.modules.pop("reward_kept", None)
        find_function.cache_clear()
        importlib.invalidate_caches()

    yield write
    forget()


@pytest.fixture
def score(tmp_path, monkeypatch):
    """Scores two pictures by it, and tells the scores and how many it was asked for."""
    asked, real = [], Custom.score
    monkeypatch.setattr(Custom, "score", lambda self, *given: asked.extend(given[1]) or real(self, *given))
    (tmp_path / "weights.txt").write_text("1.5")
    for value in (10, 20):
        save_picture(tmp_path / "images" / f"{value}.png", value)

    def call():
        asked.clear()
        shots = [Shot(Condition("a dog"), 0, f"{value}.png") for value in (10, 20)]
        subject = Subject("a", "a", tmp_path / "a", tmp_path / "images", shots, None, {})
        options = {"reward_kept:reward": {"weights": str(tmp_path / "weights.txt")}}
        bench = DrawBench(PromptList("mine", ("a dog",)), list(options), options)
        bench.measure_all([subject], 8, ALONE)
        (scores,) = bench.scores.values()
        assert not scores.fault
        return scores.values["a"], len(asked)

    return call


def test_scores_are_kept_until_a_file_that_an_option_names_changes(own_reward, score, tmp_path):
    own_reward("images[:, 0, 0, 0] + float(open(weights).read())")
    assert score() == ([11.5, 21.5], 2)
    assert score() == ([11.5, 21.5], 0), "kept"
    (tmp_path / "weights.txt").write_text("100.5")
    assert score() == ([110.5, 120.5], 2)
    (tmp_path / "weights.txt").write_text("200.5")
    os.utime(tmp_path / "weights.txt", (1_000_000_000, 1_000_000_000))
    assert score() == ([210.5, 220.5], 2), "of the same size, of another time"
    assert score() == ([210.5, 220.5], 0)


def test_scores_are_kept_until_the_source_of_a_reward_of_ones_own_changes(own_reward, score):
    own_reward("images[:, 0, 0, 0] * 1.0")
    assert score() == ([10.0, 20.0], 2)
    own_reward("images[:, 0, 0, 0] * 1.0")
    assert score() == ([10.0, 20.0], 0), "written again, and the same"
    own_reward("images[:, 0, 0, 0] * -0.5")
    assert score() == ([-5.0, -10.0], 2)


# --- GenEval ---


class Found(Observer):
    """Two objects of what is asked for, and a third where a picture is bright; how surely, `scores` say."""

    label = {"name": "found"}  # noqa: RUF012

    def __init__(self, thresholds=OFFICIAL, scores=(0.95, 0.93, 0.91)):
        self.thresholds, self.scores = thresholds, scores

    def observe(self, images, prompts):
        return [
            ({prompt.include[0].name: self.boxes(3 if image.float().mean() > 128 else 2)}, None)
            for image, prompt in zip(images, prompts, strict=True)
        ]

    def boxes(self, count):
        return [
            Detection((8.0 * place, 1.0, 8.0 * place + 5, 6.5), self.scores[place], place) for place in range(count)
        ]


def judged(folder, observer):
    """Rows of results.jsonl and of the official format, for a dark picture and a bright one of two objects."""
    shots = [Shot(Condition(COUNTING.text), 0, f"{number}.png") for number in range(2)]
    for shot, value in zip(shots, (10, 250), strict=True):
        save_picture(folder / shot.file, value)
    bench = GenEval()
    bench.targets, bench.observer = [COUNTING] * 2, observer
    bench.measure(Subject("a", "a", folder / "out", folder, shots, None, {}), 8, ALONE)
    rows = read_jsonl(folder / "out" / RESULTS)
    assert rows == bench.rows["a"]
    return rows, read_jsonl(folder / "out" / OFFICIAL_RESULTS)


def test_objects_count_from_the_judges_own_threshold(tmp_path):
    """For counting: above 0.4 in the nano world, above 0.9 officially."""
    name = COUNTING.include[0].name
    assert (NANO_THRESHOLDS.counting_threshold, OFFICIAL.counting_threshold) == (0.4, 0.9)
    nano, _ = judged(tmp_path / "nano", Found(NANO_THRESHOLDS, (0.8, 0.6, 0.5)))
    assert [row["correct"] for row in nano] == [True, False] and nano[1]["reason"] == f"expected {name}<3, found 3"
    doubtful, _ = judged(tmp_path / "doubtful", Found(NANO_THRESHOLDS, (0.8, 0.6, 0.3)))
    assert [row["correct"] for row in doubtful] == [True, True]
    official, _ = judged(tmp_path / "official", Found(OFFICIAL, (0.8, 0.6, 0.5)))
    assert [row["reason"] for row in official] == [f"expected {name}>=2, found 0"] * 2


def test_official_results_have_the_boxes_that_counted(tmp_path):
    name = COUNTING.include[0].name
    _, rows = judged(tmp_path / "sure", Found())
    two = [[0.0, 1.0, 5.0, 6.5, 0.95], [8.0, 1.0, 13.0, 6.5, 0.93]]
    assert [json.loads(row["details"]) for row in rows] == [{name: two}, {name: [*two, [16.0, 1.0, 21.0, 6.5, 0.91]]}]
    _, rows = judged(tmp_path / "unsure", Found(scores=(0.95, 0.6, 0.5)))
    assert [json.loads(row["details"]) for row in rows] == [{name: two[:1]}] * 2


def judge_folder(folder, out):
    return benchmark.run(GenEval(), [], out, images=folder, device="cpu")


def test_a_folder_whose_prompts_changed_places_does_not_get_its_old_verdicts(tmp_path, monkeypatch):
    monkeypatch.setattr(geneval, "load_observer", lambda *given: Found())
    folder, asked = tmp_path / "pictures", [prompt.text for prompt in official_prompts()[:2]]
    for number, place in enumerate((0, 1, 0)):
        save_picture(folder / f"0000{number}/samples/00000.png", 10)
        (folder / f"0000{number}" / "metadata.jsonl").write_text(json.dumps({"prompt": asked[place]}))
    result = judge_folder(folder, tmp_path / "out")
    assert result.departures == ["images per prompt 1 or 2 (paper 4)"]
    (folder / "00002" / "metadata.jsonl").write_text(json.dumps({"prompt": asked[1]}))
    with pytest.raises(UserError, match=r"out holds an evaluation of something else \(images.files\)"):
        judge_folder(folder, tmp_path / "out")


def test_a_folder_whose_pictures_changed_does_not_get_its_old_verdicts(tmp_path, monkeypatch):
    monkeypatch.setattr(geneval, "load_observer", lambda *given: Found())
    folder, files = tmp_path / "pictures", [f"00000/samples/0000{number}.png" for number in range(2)]
    for file in files:
        save_picture(folder / file, 10)
    (folder / "00000" / "metadata.jsonl").write_text(json.dumps({"prompt": COUNTING.text}))

    def correct(out):
        return judge_folder(folder, tmp_path / out).rows["pictures"]["geneval/correct images"].value

    assert correct("first") == 1.0 == correct("first")
    status = (folder / files[0]).stat()
    save_picture(folder / files[0], 250)
    assert (folder / files[0]).stat().st_size == status.st_size, "as large as before"
    os.utime(folder / files[0], ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    with pytest.raises(UserError, match=r"first holds an evaluation of something else \(images.files\)"):
        correct("first")
    assert correct("second") == 0.5
    status = (folder / files[1]).stat()
    save_picture(folder / files[1], 250, side=24)
    os.utime(folder / files[1], ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=r"second holds an evaluation of something else \(images.files\)"):
        correct("second")
    assert correct("third") == 0.0
