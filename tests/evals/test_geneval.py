"""GenEval in the nano world: the bundled detector on real scenes, drawn by a policy that only replays them."""

from __future__ import annotations

import io
import json
import math
import statistics

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from argrpo_cli.cli.app import run
from argrpo_cli.evals import geneval as g
from argrpo_cli.evals.geneval_scores import part_scores
from argrpo_cli.evals.geneval_sheet import COLUMNS, PAD, SIDE, captions, failure_sheet
from argrpo_cli.evals.geneval_table import table
from argrpo_cli.geneval.prompts import prompt_set
from argrpo_cli.policy import Policy, load_policy
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_jsonl
from tests.captioned import replayed, save_captioned_policy
from tests.torchrun import ROOT, torchrun
from tests.training.tiny import tiny_caption_policy

SMALL = g.GenEvalSettings(per_prompt=1, sets=("geneval-nano",))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return str(save_captioned_policy(tmp_path_factory.mktemp("captioned") / "mine"))


@pytest.fixture(autouse=True, scope="module")
def sampled():
    """Real scenes instead of what a policy that has learnt nothing draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "sample", replayed)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, policy, sampled):
    out = tmp_path_factory.mktemp("geneval") / "out"
    return out, g.run_geneval([policy], out, SMALL)


def name_of(result):
    (name,) = result["scores"]
    return name


def test_what_is_written(finished):
    out, result = finished
    name = name_of(result)
    rows = read_jsonl(out / name / "results.jsonl")
    assert len(rows) == 84 == len(list((out / name / "images").iterdir()))
    assert 10 < sum(row["correct"] for row in rows) < 74, "scenes of the prompt and scenes of others"
    assert json.loads((out / "summary.json").read_text()) == result
    part = result["scores"][name]["geneval-nano"]
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
    assert sum(line[name]["correct"] for line in lines) == sum(row["correct"] for row in rows)
    assert Image.open(out / "failures.png").width > 400


def test_an_interrupted_evaluation_goes_on_to_the_same_result(finished, policy, tmp_path, monkeypatch):
    out, result = finished
    drawn = []

    def stop_in_the_second_batch(self, conditions, **rest):
        if len(drawn) == 1:
            raise KeyboardInterrupt
        drawn.append(len(conditions))
        return replayed(self, conditions, **rest)

    monkeypatch.setattr(Policy, "sample", stop_in_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        g.run_geneval([policy], tmp_path / "o", SMALL, batch_size=50)
    left = []
    monkeypatch.setattr(Policy, "sample", lambda self, c, **rest: left.append(len(c)) or replayed(self, c, **rest))
    again = g.run_geneval([policy], tmp_path / "o", SMALL, batch_size=50)
    assert left == [34]
    assert again == result
    for file in (f"{name_of(result)}/results.jsonl", "prompts.jsonl"):
        assert (tmp_path / "o" / file).read_text() == (out / file).read_text()


def test_two_processes_find_what_one_does(policy, tmp_path):
    alone = g.run_geneval([policy], tmp_path / "alone", g.GenEvalSettings(per_prompt=1))
    done = torchrun(
        [str(ROOT / "tests/captioned.py"), "eval", "geneval", "--policy", policy, "--per-prompt", "1", "--device",
         "cpu", "--out", str(tmp_path / "out")]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == alone
    files = [path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*") if path.is_file()]
    assert len(files) > 224
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file
    assert done.stdout.count("failures as a picture") == 1, "one of them reports"


def test_a_folder_is_not_used_for_two_evaluations(finished, policy, tmp_path):
    out, _ = finished
    with pytest.raises(UserError, match="holds an evaluation of something else \\("):
        g.run_geneval([policy], out, g.GenEvalSettings(per_prompt=1, seed=1, sets=("geneval-nano",)))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        g.run_geneval([policy], tmp_path / "x", SMALL)


def test_two_policies_are_compared_prompt_by_prompt_with_the_same_seeds(policy, tmp_path, monkeypatch):
    other = load_policy(policy)
    other.base = "another one"  # replays other scenes
    other.save(tmp_path / "other")
    seeds = []
    monkeypatch.setattr(Policy, "sample", lambda self, c, **k: seeds.append(k["seeds"]) or replayed(self, c, **k))
    monkeypatch.chdir(tmp_path)
    result = g.run_geneval([policy, "other"], tmp_path / "o", SMALL, batch_size=84)
    assert seeds[0] == seeds[1]
    scores, part = result["scores"], "geneval-nano"
    (first, second), difference = scores, result["difference"][part]
    assert second == "other"
    for tag, score in difference.items():
        assert score["mean"] == pytest.approx(scores[first][part][tag]["mean"] - scores[second][part][tag]["mean"])
    assert difference["overall"]["mean"] != 0
    a, b = (read_jsonl(tmp_path / "o" / name / "results.jsonl") for name in (first, second))
    pairs = [x["correct"] - y["correct"] for x, y in zip(a, b, strict=True) if x["tag"] == "single_object"]
    assert difference["single_object"]["error"] == pytest.approx(statistics.stdev(pairs) / math.sqrt(len(pairs)))


def test_the_difference_of_a_category_has_the_error_of_its_prompts():
    prompts = SMALL.prompts
    good = [{"index": p.index, "correct": 1.0} for p in prompts]
    bad = [{"index": p.index, "correct": float(i % 2)} for i, p in enumerate(prompts)]
    difference = [{**a, "correct": a["correct"] - b["correct"]} for a, b in zip(good, bad, strict=True)]
    part = part_scores(difference, SMALL.prompts)
    singles = [row["correct"] for row, p in zip(difference, prompts, strict=True) if p.tag == "single_object"]
    mean = sum(singles) / len(singles)
    spread = sum((v - mean) ** 2 for v in singles) / (len(singles) - 1)
    assert part["single_object"]["mean"] == pytest.approx(mean)
    assert part["single_object"]["error"] == pytest.approx(math.sqrt(spread / len(singles)))
    assert part["color_attr"]["error"] is None, "one prompt has no error"


def test_seeds_differ_between_images():
    settings = g.GenEvalSettings(per_prompt=4)
    seeds = [settings.image_seed(place, sample) for place in range(224) for sample in range(4)]
    assert len(set(seeds)) == 896 and min(seeds) == g.FIRST_SEED
    assert g.GenEvalSettings(seed=1).image_seed(0, 0) > max(seeds)


def test_the_table_names_the_baseline_first(finished):
    _, result = finished
    own = result["scores"][name_of(result)]
    both = {**result, "scores": {"mine": own, "base": own}, "difference": own}
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(table(both))
    text = console.export_text()
    assert text.index("base") < text.index("mine") < text.index("difference")
    assert "nano-detector" in text and "color_attr" in text


def test_the_sheet_has_a_cell_for_every_failure(finished):
    out, result = finished
    folder = out / name_of(result)
    rows = [row for row in read_jsonl(folder / "results.jsonl") if not row["correct"]][:7]
    sheet = failure_sheet(rows, folder / "images")
    one = failure_sheet(rows[:1], folder / "images")
    assert (sheet.width, sheet.height) == (COLUMNS * one.width, 2 * one.height)


def test_the_longest_prompt_and_reason_fit_below_a_picture():
    prompt = max((one.text for name in g.NANO_SETS for one in prompt_set(name)), key=len)
    color = "expected purple traffic light>=1, found 0 purple; and 1 orange"
    reason = f"{color}\n{color}"
    lines = [text for text, _ in captions({"prompt": prompt, "reason": reason})]
    assert " ".join(lines) == f"{prompt} {color} {color}"


def test_a_label_stays_in_its_picture(tmp_path):
    Image.new("RGB", (64, 64), (0, 0, 255)).save(tmp_path / "a.png")
    found = {"class": "traffic light", "box": [55.0, 60.0, 64.0, 64.0], "score": 0.9, "color": "purple"}
    row = {"file": "a.png", "tag": "colors", "prompt": "a photo", "reason": "", "objects": [found]}
    sheet = np.asarray(failure_sheet([row], tmp_path)).astype(int)
    outside = np.ones(sheet.shape[:2], bool)
    outside[PAD : PAD + SIDE, PAD : PAD + SIDE] = False
    outside[PAD + SIDE :] = False  # the captions
    assert (sheet[outside] == 255).all(), "nothing is drawn over the edge"
    bare = np.asarray(failure_sheet([{**row, "objects": []}], tmp_path)).astype(int)
    changed = np.flatnonzero((sheet != bare).any((0, 2)))
    assert changed[0] < PAD + 0.6 * SIDE, "the label was moved to the left of its box"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "nano-c2i"], "nano-c2i draws classes"),
        (["--policy", "nano-t2j"], "no policy 'nano-t2j'"),
        (["--baseline", "POLICY"], "the same policy"),
        (["--n", "0"], "--n 0: give 1 to 446 images per prompt"),
        (["--n", "447"], "--n 447: give 1 to 446"),
        (["--seed", "10000"], "--seed 10000: give 0 to 9999"),
        (["--out", "file"], "it is a file, not a folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(policy, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    given = [policy if argument == "POLICY" else argument for argument in arguments]
    assert run(["eval", "geneval", *([] if "--policy" in given else ["--policy", policy]), *given]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_policy_of_another_world_is_refused(tmp_path):
    tiny_caption_policy().save(tmp_path / "tiny")
    with pytest.raises(UserError, match="does not draw the nano world"):
        g.run_geneval([str(tmp_path / "tiny")], tmp_path / "o", SMALL)


def test_torn_results_are_named(finished, policy, tmp_path):
    out = tmp_path / "o"
    (out / name_of(finished[1])).mkdir(parents=True)
    (out / "settings.json").write_text((finished[0] / "settings.json").read_text())
    (out / name_of(finished[1]) / "results.jsonl").write_text('{"file": ')
    with pytest.raises(UserError, match=r"results\.jsonl, line 1: not JSON"):
        g.run_geneval([policy], out, SMALL)
