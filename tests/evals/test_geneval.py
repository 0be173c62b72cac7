"""GenEval in the nano world, on the bundled policy and detector; few images."""

from __future__ import annotations

import io
import json
import math
import statistics

import pytest
import torch
from PIL import Image
from rich.console import Console

from argrpo_cli.cli.app import run
from argrpo_cli.errors import UserError
from argrpo_cli.evals import geneval as g
from argrpo_cli.evals.geneval_sheet import COLUMNS, failure_sheet
from argrpo_cli.files import read_jsonl, write_jsonl
from argrpo_cli.policy import load_policy
from tests.grpo.tiny import tiny_caption_policy

SMALL = g.Protocol(per_prompt=1, sets=("geneval-nano",))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("geneval") / "out"
    return out, g.run_geneval(["nano-t2i"], out, SMALL)


def test_what_is_written(finished):
    out, result = finished
    rows = read_jsonl(out / "nano-t2i" / "results.jsonl")
    assert len(rows) == 84 == len(list((out / "nano-t2i" / "images").iterdir()))
    assert json.loads((out / "summary.json").read_text()) == result
    part = result["scores"]["nano-t2i"]["geneval-nano"]
    tags = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    assert list(part) == [*tags, "overall"]
    counts = {tag: sum(row["tag"] == tag for row in rows) for tag in tags}
    for tag in tags:
        share = sum(row["correct"] for row in rows if row["tag"] == tag) / counts[tag]
        assert part[tag]["mean"] == pytest.approx(share) and part[tag]["prompts"] == counts[tag]
    assert part["overall"]["mean"] == pytest.approx(sum(part[tag]["mean"] for tag in tags) / 6)
    assert all(bool(row["reason"]) != row["correct"] for row in rows)
    lines = read_jsonl(out / "prompts.jsonl")
    assert [line["index"] for line in lines] == [row["index"] for row in rows]
    assert sum(line["nano-t2i"]["correct"] for line in lines) == sum(row["correct"] for row in rows)
    assert Image.open(out / "failures.png").width > 400


def test_an_interrupted_evaluation_goes_on_to_the_same_result(finished, tmp_path, monkeypatch):
    out, result = finished
    sample, drawn = g.Policy.sample, []

    def stop_in_the_second_batch(self, conditions, **rest):
        if len(drawn) == 1:
            raise KeyboardInterrupt
        drawn.append(len(conditions))
        return sample(self, conditions, **rest)

    monkeypatch.setattr(g.Policy, "sample", stop_in_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        g.run_geneval(["nano-t2i"], tmp_path / "o", SMALL, batch_size=50)
    monkeypatch.undo()
    left = []
    monkeypatch.setattr(g.Policy, "sample", lambda self, c, **rest: left.append(len(c)) or sample(self, c, **rest))
    again = g.run_geneval(["nano-t2i"], tmp_path / "o", SMALL, batch_size=50)
    assert left == [34]
    assert again == result
    for file in ("nano-t2i/results.jsonl", "prompts.jsonl"):
        assert (tmp_path / "o" / file).read_text() == (out / file).read_text()


def test_a_folder_is_not_used_for_two_evaluations(finished, tmp_path):
    out, _ = finished
    with pytest.raises(UserError, match="holds an evaluation of something else; choose another --out"):
        g.run_geneval(["nano-t2i"], out, g.Protocol(per_prompt=1, seed=1, sets=("geneval-nano",)))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        g.run_geneval(["nano-t2i"], tmp_path / "x", SMALL)


def test_two_policies_are_compared_prompt_by_prompt_with_the_same_seeds(tmp_path, monkeypatch):
    other = load_policy("nano-t2i")
    with torch.no_grad():
        other.model.lm_head.weight.mul_(0.5)  # a hotter, so a worse policy
    other.save(tmp_path / "hot")
    seeds = []
    sample = g.Policy.sample
    monkeypatch.setattr(g.Policy, "sample", lambda self, c, **k: seeds.append(k["seeds"]) or sample(self, c, **k))
    monkeypatch.chdir(tmp_path)
    result = g.run_geneval(["nano-t2i", "hot"], tmp_path / "o", SMALL, batch_size=84)
    assert seeds[0] == seeds[1]
    scores, part = result["scores"], "geneval-nano"
    assert list(scores) == ["nano-t2i", "hot"]
    for tag, score in result["difference"][part].items():
        assert score["mean"] == pytest.approx(scores["nano-t2i"][part][tag]["mean"] - scores["hot"][part][tag]["mean"])
    assert result["difference"][part]["overall"]["mean"] > 0.1
    a, b = (read_jsonl(tmp_path / "o" / name / "results.jsonl") for name in ("nano-t2i", "hot"))
    pairs = [x["correct"] - y["correct"] for x, y in zip(a, b, strict=True) if x["tag"] == "single_object"]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    assert result["difference"][part]["single_object"]["error"] == pytest.approx(error)


def test_the_difference_of_a_category_has_the_error_of_its_prompts():
    prompts = SMALL.prompts
    good = [{"index": p.index, "correct": 1.0} for p in prompts]
    bad = [{"index": p.index, "correct": float(i % 2)} for i, p in enumerate(prompts)]
    difference = [{**a, "correct": a["correct"] - b["correct"]} for a, b in zip(good, bad, strict=True)]
    part = g._scores(difference, SMALL)["geneval-nano"]
    singles = [row["correct"] for row, p in zip(difference, prompts, strict=True) if p.tag == "single_object"]
    mean = sum(singles) / len(singles)
    spread = sum((v - mean) ** 2 for v in singles) / (len(singles) - 1)
    assert part["single_object"]["mean"] == pytest.approx(mean)
    assert part["single_object"]["error"] == pytest.approx(math.sqrt(spread / len(singles)))
    assert part["color_attr"]["error"] is None, "one prompt has no error"


def test_seeds_differ_between_images():
    protocol = g.Protocol(per_prompt=4)
    seeds = [protocol.image_seed(place, sample) for place in range(224) for sample in range(4)]
    assert len(set(seeds)) == 896 and min(seeds) == g.FIRST_SEED
    assert g.Protocol(seed=1).image_seed(0, 0) > max(seeds)


def test_the_table_names_the_baseline_first(finished):
    _, result = finished
    both = {**result, "scores": {"mine": result["scores"]["nano-t2i"], "base": result["scores"]["nano-t2i"]}}
    both["difference"] = result["scores"]["nano-t2i"]
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(g.table(both))
    text = console.export_text()
    assert text.index("base") < text.index("mine") < text.index("difference")
    assert "nano-detector" in text and "color_attr" in text


def test_the_sheet_shows_every_failure_with_its_reason(finished):
    out, _ = finished
    rows = read_jsonl(out / "nano-t2i" / "results.jsonl")[:7]
    sheet = failure_sheet(rows, out / "nano-t2i" / "images")
    one = failure_sheet(rows[:1], out / "nano-t2i" / "images")
    assert (sheet.width, sheet.height) == (COLUMNS * one.width, 2 * one.height)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "nano-c2i"], "nano-c2i draws classes"),
        (["--policy", "nano-t2j"], "no policy 'nano-t2j'"),
        (["--baseline", "nano-t2i"], "the same policy"),
        (["--n", "0"], "--n 0: give 1 to 446 images per prompt"),
        (["--n", "447"], "--n 447: give 1 to 446"),
        (["--seed", "10000"], "--seed 10000: give 0 to 9999"),
        (["--images", "x"], "--images is for eval nano"),
        (["--out", "file"], "it is a file, not a folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert run(["eval", "geneval", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_policy_of_another_world_is_refused(tmp_path):
    tiny_caption_policy().save(tmp_path / "tiny")
    with pytest.raises(UserError, match="does not draw the nano world"):
        g.run_geneval([str(tmp_path / "tiny")], tmp_path / "o", SMALL)


def test_torn_results_are_named(finished, tmp_path):
    out = tmp_path / "o"
    (out / "nano-t2i").mkdir(parents=True)
    (out / "settings.json").write_text((finished[0] / "settings.json").read_text())
    write_jsonl(out / "nano-t2i" / "results.jsonl", [])
    (out / "nano-t2i" / "results.jsonl").write_text('{"file": ')
    with pytest.raises(UserError, match=r"results\.jsonl, line 1: not JSON"):
        g.run_geneval(["nano-t2i"], out, SMALL)
