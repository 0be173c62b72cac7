"""GenEval at full size: the official prompts, layout and results, by a policy and a detector of no learning."""

from __future__ import annotations

import io
import json
import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from argrpo_cli.cli.app import run
from argrpo_cli.evals import benchmark as b
from argrpo_cli.evals import geneval as g
from argrpo_cli.evals.geneval_pictures import read_pictures
from argrpo_cli.evals.tables import table
from argrpo_cli.geneval import prompts as prompt_sets
from argrpo_cli.geneval.detector import Objects
from argrpo_cli.geneval.observers import Observer, OfficialObserver
from argrpo_cli.geneval.prompts import COLORS, official_jsonl, official_prompts
from argrpo_cli.geneval.rules import Detection
from argrpo_cli.policy.llamagen.policy import LlamaGen
from argrpo_cli.shapes import Result
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_json, read_jsonl
from tests.geneval import goldens
from tests.training.tiny import tiny_caption_policy

FEW = official_prompts()[::12]
LABEL = {
    "name": "Mask2Former Swin-S", "source": "somewhere", "benchmarks_own": False, "weights": "1",
    "colors": {"name": "CLIP", "weights": "2"},
}  # fmt: skip


class PixelObserver(Observer):
    """Finds what a prompt asks for, where the sum of an image's pixels says so; knows colours where it is asked."""

    label, least_score = LABEL, 0.1

    def observe(self, images, prompts):
        return [self.look(int(image.sum()), prompt) for image, prompt in zip(images, prompts, strict=True)]

    def look(self, number, prompt):
        detections = {}
        for part in prompt.include:
            place = 5.0 if part.position and part.position[0] in ("left of", "above") else 300.0
            side = number % 3 and part.position is not None
            boxes = [(place * bool(side), place, place + 10, place + 10)] * (part.count + number % 2)
            detections[part.name] = [Detection(box, 0.95 - 0.01 * i, i) for i, box in enumerate(boxes)]
        detections["toothbrush"] = [Detection((0.0, 0.0, 1.0, 1.0), 0.05, 0)]
        wanted = {part.name: part.color for part in prompt.include if part.color}
        return detections, lambda name, found: [wanted[name] if number % 5 else "red" for _ in found]


@pytest.fixture(autouse=True, scope="module")
def stand_ins():
    """A tiny policy of any words for every name but the bundled ones, and a detector without a network."""

    def load(path, *rest):
        policy = tiny_caption_policy()
        policy.text_encoder.words = None  # what it does not know it takes for one word
        policy.base = path
        return policy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("argrpo_cli.policy.load_policy", load)
        patch.setattr(g, "load_observer", lambda *given: PixelObserver())
        yield


def run_geneval(out, policies=("t2i",), n=1, batch_size=64, **rest):
    return b.run(g.GenEval(), policies, out, n=n, batch_size=batch_size, device="cpu", **rest)


def judge_folder(folder, out):
    return b.run(g.GenEval(), [], out, images=folder, device="cpu")


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setitem(prompt_sets.SETS, "geneval", lambda: FEW)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("official") / "out"
    return out, run_geneval(out, sampling={"cfg_scale": 7.5, "top_k": 20})


def text_of(result):
    console = Console(width=170, record=True, file=io.StringIO())
    console.print(table(result, 170))
    return " ".join(console.export_text().split())


def test_the_official_prompts_are_drawn_in_the_layout_of_the_benchmarks_scripts(finished):
    out, _ = finished
    folders = sorted(path for path in (out / "t2i").iterdir() if path.is_dir())
    assert [path.name for path in folders] == [f"{index:05d}" for index in range(553)]
    assert "".join((path / "metadata.jsonl").read_text() for path in folders) == official_jsonl(official_prompts())
    assert {tuple(file.name for file in (path / "samples").iterdir()) for path in folders} == {("00000.png",)}


def test_the_results_are_those_that_the_official_summary_reads(finished):
    """Its arithmetic: the mean of each tag in the order of the file, then their plain mean."""
    out, result = finished
    rows = read_jsonl(out / "t2i" / "results.official.jsonl")
    assert list(rows[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert [json.loads(row["metadata"]) for row in rows] == [prompt.metadata() for prompt in official_prompts()]
    by_tag = {}
    for row in rows:
        by_tag.setdefault(row["tag"], []).append(row["correct"])
        assert (out / "t2i" / row["filename"]).is_file()
        for boxes in json.loads(row["details"]).values():
            assert all(len(box) == 5 and box[4] > (0.9 if row["tag"] == "counting" else 0.3) for box in boxes)
    part = {key.partition("/")[2]: value.value for key, value in result.rows["t2i"].items()}
    means = {tag: statistics.mean(values) for tag, values in by_tag.items()}
    assert {tag: part[tag] for tag in means} == pytest.approx(means)
    assert part["overall"] == pytest.approx(statistics.mean(means.values())) and len(means) == 6
    assert 0.1 < part["overall"] < 0.9
    assert part["correct images"] == pytest.approx(sum(row["correct"] for row in rows) / 553)
    assert part["prompts with a correct image"] == part["correct images"], "one image a prompt"


def test_a_result_says_how_it_was_made(finished):
    out, result = finished
    assert Result.load(out / "summary.json") == result
    assert result.protocol["detector"] == LABEL and result.protocol["thresholds"]["counting_threshold"] == 0.9
    assert result.protocol["sets"] == ["geneval"] and {"argrpo", "torch"} <= set(result.protocol["versions"])
    assert result.departures == ["images per prompt 1 (paper 4)", "cfg-scale 7.5 (paper 2)", "top-k 20 (paper 0)"]
    row = next(row for row in read_jsonl(out / "t2i" / "results.jsonl") if row["tag"] == "colors")
    assert row["objects"] and all(one["color"] for one in row["objects"]), "toothbrush at 0.05 is left out"
    assert Image.open(out / "failures.png").width > 400


def test_the_table_stands_beside_the_papers_and_names_the_detector(finished):
    text = text_of(finished[1])
    assert "paper: LlamaGen (base)" in text and "paper: AR-GRPO" in text and "55.0 % │ 59.3 %" in text
    assert "Mask2Former Swin-S, somewhere (not the benchmark's own weights)" in text
    assert "not as in the paper: images per prompt 1 (paper 4), cfg-scale 7.5 (paper 2), top-k 20 (paper 0)" in text


def test_stopped_while_drawing_and_while_judging_it_goes_on_to_the_same_bytes(few, tmp_path, monkeypatch):
    whole = run_geneval(tmp_path / "whole", n=2, batch_size=20)
    assert whole.departures == ["images per prompt 2 (paper 4)"], "all else is the paper's"
    sample, observe, calls = LlamaGen.sample, PixelObserver.observe, []

    def stop(calls_until):
        def stopping(method):
            def call(*given, **more):
                calls.append(1)
                if len(calls) > calls_until:
                    raise KeyboardInterrupt
                return method(*given, **more)

            return call

        return stopping

    for owner, name, method in ((LlamaGen, "sample", sample), (PixelObserver, "observe", observe)):
        calls.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, stop(2)(method))
            run_geneval(tmp_path / "again", n=2, batch_size=20)
    (tmp_path / "again" / "t2i" / FEW_SAMPLE).unlink()  # a picture that was lost is drawn again in its batch
    again = run_geneval(tmp_path / "again", n=2, batch_size=7)  # with the batch size it was begun with
    assert again == whole
    files = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()}
    assert all((tmp_path / "whole" / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)


FEW_SAMPLE = f"{FEW[3].index:05d}/samples/00001.png"


def test_a_finished_folder_gives_the_same_figures_whatever_its_names(finished, tmp_path):
    """As a run of its own, and again with the names of other tools: 0000.png."""
    out, result = finished
    other = tmp_path / "elsewhere"
    for row in read_jsonl(out / "t2i" / "results.jsonl")[:60]:
        folder = other / str(row["index"])
        (folder / "samples").mkdir(parents=True)
        (folder / "samples" / "0000.png").write_bytes((out / "t2i" / row["file"]).read_bytes())
        (folder / "metadata.jsonl").write_text((out / "t2i" / row["file"][:5] / "metadata.jsonl").read_text())
        (folder / "grid.png").write_bytes(b"")
    again = judge_folder(out / "t2i", tmp_path / "a")
    assert again.rows == result.rows and again.warnings == []
    part = judge_folder(other, tmp_path / "b")
    own = [row["correct"] for row in read_jsonl(out / "t2i" / "results.jsonl")[:60]]
    assert [row["correct"] for row in read_jsonl(tmp_path / "b" / "elsewhere" / "results.jsonl")] == own
    assert part.warnings == ["493 of the 553 official prompts have no image: overall is not the paper's"]
    with pytest.raises(UserError, match="holds an evaluation of something else"):
        judge_folder(other, tmp_path / "a")


def written(folder, texts, count=1, pixels=None):
    """A folder in the official layout with pictures of one colour."""
    for number, text in enumerate(texts):
        samples = folder / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps({"prompt": text}))
        for sample in range(count):
            image = np.full((24, 32, 3), 9 * number + sample, np.uint8) if pixels is None else pixels
            Image.fromarray(image).save(samples / f"{sample:05d}.png")
    return folder


def test_a_folder_may_ask_what_the_grammar_allows(tmp_path):
    folder = written(tmp_path / "own", ["a photo of a bench", "a photo of four toothbrushs", "a photo of a bench"], 2)
    pictures = read_pictures(folder)
    assert [prompt.index for _, prompt in pictures] == [0, 0, 554, 554, 0, 0]
    result = judge_folder(folder, tmp_path / "out")
    single = result.rows["own"]["prompts of these images/single_object"]
    assert single.count == 4 and single.error is None, "of one prompt"
    assert "AR-GRPO" not in text_of(result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "00001/samples/00001.png").unlink(), r"images are missing: 00001 has 1; expected 2 of each"),
        (lambda f: (f / "00001/metadata.jsonl").unlink(), r"cannot read .*00001/metadata\.jsonl"),
        (lambda f: (f / "00001/metadata.jsonl").write_text("{}"), "names no prompt"),
        (
            lambda f: (f / "00001/metadata.jsonl").write_text('{"prompt": "a cat"}'),
            "GenEval has no such prompt: 'a cat'",
        ),
        (
            lambda f: (f / "00001/metadata.jsonl").write_text('{"prompt": "a photo of a bench", "tag": "counting"}'),
            "are not those of GenEval's prompt 'a photo of a bench'",
        ),
        (lambda f: (f / "00000/samples/00000.png").write_bytes(b"x"), "cannot read the image"),
    ],
)
def test_a_faulty_folder_is_told_in_one_line(tmp_path, change, message):
    folder = written(tmp_path / "f", ["a photo of a bench", "a photo of a cow"], 2)
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        judge_folder(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "summary.json").exists()


def test_the_crops_whose_colours_clip_is_asked_are_the_official_ones(tmp_path, monkeypatch):
    """From the file on disk to what CLIP gets, for the golden images, masks and boxes."""
    for number, case in enumerate(case for case in goldens.crops() if not case["options"] and case["mask"] is not None):
        seen = []

        class Found:
            def detect(self, images, case=case):
                box = Detection(tuple(case["box"][:4].tolist()), 0.9, 0)
                yield Objects({"car": [box]}, {"car": [torch.from_numpy(case["mask"] > 0)]})

        class Seen:
            def classify(self, names, crops, seen=seen):
                seen += crops
                return [COLORS[0]] * len(crops)

        observer = OfficialObserver(Found(), Seen())
        observer.label = LABEL
        monkeypatch.setattr(g, "load_observer", lambda *given, observer=observer: observer)
        folder = written(tmp_path / f"f{number}", ["a photo of a red car"], pixels=case["image"])
        result = judge_folder(folder, tmp_path / f"o{number}")
        assert result.rows[f"f{number}"]["geneval/correct images"].value == 1
        np.testing.assert_array_equal(seen[0], case["crop"])
    assert number > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--detector", "nano"], "it knows the nano world alone; leave it out, or give mask2former"),
        (["--top-p", "0"], "--top-p 0: must be above 0"),
        (["--n", "181"], "--n 181: give 1 to 180 images of each of 553 prompts"),
        (["--images", "nowhere", "--cfg-scale", "3"], "--images measures finished pictures; leave out --cfg-scale"),
        (["--images", "nowhere"], "no folder nowhere"),
        (["--images", "."], "GenEval's lie as 00000/samples/00000.png"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, tmp_path_factory, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path_factory.mktemp("policy")
    tiny_caption_policy().save(folder)
    policy = [] if "--images" in arguments else ["--policy", str(folder)]
    assert run(["eval", "geneval", "--device", "cpu", *policy, *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_two_worlds_are_not_compared(monkeypatch, tmp_path):
    monkeypatch.setattr(g, "draws_nano_world", lambda card: card.base == "nano")
    with pytest.raises(UserError, match="t2i and nano draw different worlds"):
        run_geneval(tmp_path / "o", ["t2i", "nano"])


def test_settings_are_kept_with_the_batch_size(finished):
    held = read_json(finished[0] / "settings.json")
    assert held["batch_size"] == 64 and held["sampling"]["cfg_scale"] == 7.5 and held["detector"] == LABEL
