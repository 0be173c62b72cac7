"""GenEval in the nano world: the bundled detector on real scenes, drawn by a policy that only replays them."""

from __future__ import annotations

import dataclasses
import io
import math
import shutil
import statistics

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from argrpo_cli.cli.app import run
from argrpo_cli.evals import benchmark as b
from argrpo_cli.evals import geneval as g
from argrpo_cli.evals.geneval_pictures import COLUMNS, PAD, SIDE, captions, failure_sheet
from argrpo_cli.evals.tables import table
from argrpo_cli.geneval.nano_detector import NANO_THRESHOLDS
from argrpo_cli.geneval.prompts import prompt_set
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.llamagen.policy import LlamaGen
from argrpo_cli.shapes import Result
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_jsonl
from tests.captioned import replayed
from tests.together import together
from tests.training.tiny import tiny_caption_policy


def run_geneval(policies, out, sets=("geneval-nano",), n=1, **rest):
    return b.run(g.GenEval(sets=sets), policies, out, n=n, **rest)


@pytest.fixture(autouse=True, scope="module")
def policy(policy_of_scenes):
    return policy_of_scenes


@pytest.fixture(scope="module")
def finished(tmp_path_factory, policy):
    out = tmp_path_factory.mktemp("geneval") / "out"
    return out, run_geneval([policy], out)


def name_of(result):
    (name,) = result.rows
    return name


def test_what_is_written(finished):
    out, result = finished
    name = name_of(result)
    rows = read_jsonl(out / name / "results.jsonl")
    assert len(rows) == 84 == len(list((out / name / "images").iterdir()))
    assert 10 < sum(row["correct"] for row in rows) < 74, "scenes of the prompt and scenes of others"
    assert Result.load(out / "summary.json") == result
    part = {key.partition("/")[2]: value for key, value in result.rows[name].items()}
    tags = ["position", "colors", "color_attr", "counting", "single_object", "two_object"]
    assert list(part) == [*tags, "overall", *g.TOTALS]
    counts = {tag: sum(row["tag"] == tag for row in rows) for tag in tags}
    for tag in tags:
        share = sum(row["correct"] for row in rows if row["tag"] == tag) / counts[tag]
        assert part[tag].value == pytest.approx(share) and part[tag].count == counts[tag]
    assert part["overall"].value == pytest.approx(sum(part[tag].value for tag in tags) / 6)
    assert part["color_attr"].error is None, "one prompt has no error"
    assert all(bool(row["reason"]) != row["correct"] for row in rows)
    lines = read_jsonl(out / "prompts.jsonl")
    assert [line["index"] for line in lines] == [row["index"] for row in rows]
    assert sum(line[name]["correct"] for line in lines) == sum(row["correct"] for row in rows)
    assert Image.open(out / "failures.png").width > 400


def test_an_interrupted_evaluation_goes_on_to_the_same_result(finished, policy, tmp_path, monkeypatch):
    out, result = finished
    drawn = []

    def stop_in_the_second_batch(self, encoded, *rest):
        if len(drawn) == 1:
            raise KeyboardInterrupt
        drawn.append(len(encoded))
        return replayed(self, encoded, *rest)

    monkeypatch.setattr(LlamaGen, "sample", stop_in_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        run_geneval([policy], tmp_path / "o", batch_size=50)
    left = []
    monkeypatch.setattr(LlamaGen, "sample", lambda self, e, *rest: left.append(len(e)) or replayed(self, e, *rest))
    again = run_geneval([policy], tmp_path / "o", batch_size=50)
    assert left == [34]
    assert again == result
    for file in (f"{name_of(result)}/results.jsonl", "prompts.jsonl"):
        assert (tmp_path / "o" / file).read_text() == (out / file).read_text()


def test_two_processes_find_what_one_does(policy, tmp_path):
    alone = run_geneval([policy], tmp_path / "alone", None)
    asked = ["eval", "geneval", "--policy", policy, "--per-prompt", "1", "--device", "cpu"]
    done = together([*asked, "--out", str(tmp_path / "out")], tmp_path / "printed")
    assert done.codes == [0, 0], done.err
    assert Result.load(tmp_path / "out" / "summary.json") == alone
    files = [path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*") if path.is_file()]
    assert len(files) > 224
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file
    assert done.out.count("failures as a picture") == 1, "one of them reports"


def test_a_folder_is_not_used_for_two_evaluations(finished, policy, tmp_path):
    out, _ = finished
    with pytest.raises(UserError, match="holds an evaluation of something else \\("):
        run_geneval([policy], out, seed=1)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        run_geneval([policy], tmp_path / "x")


def test_two_policies_are_compared_prompt_by_prompt_with_the_same_seeds(policy, tmp_path, monkeypatch):
    other = load_policy(policy)
    other.base = "another one"  # replays other scenes
    other.sampling = {"cfg_scale": 1.0}
    other.save(tmp_path / "other")
    seeds, scales = [], []

    def sample(self, encoded, sampling, own):
        seeds.append(own)
        scales.append(sampling.cfg_scale)
        return replayed(self, encoded, sampling, own)

    monkeypatch.setattr(LlamaGen, "sample", sample)
    monkeypatch.chdir(tmp_path)
    result = run_geneval([policy, "other"], tmp_path / "o", batch_size=84)
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 84
    first, second = result.rows
    assert second == "other" and scales == [2.0, 1.0], "each in its own way"
    assert result.departures[1:] == ["cfg-scale 1 (paper 2) of other"]
    assert result.protocol["measured"]["other"]["sampling"] == {"cfg_scale": 1.0}
    for key, one in result.difference.items():
        assert one.value == pytest.approx(result.rows[first][key].value - result.rows[second][key].value)
    assert result.difference["geneval-nano/overall"].value != 0
    a, b = (read_jsonl(tmp_path / "o" / name / "results.jsonl") for name in (first, second))
    pairs = [x["correct"] - y["correct"] for x, y in zip(a, b, strict=True) if x["tag"] == "single_object"]
    error = result.difference["geneval-nano/single_object"].error
    assert error == pytest.approx(statistics.stdev(pairs) / math.sqrt(len(pairs)))


def test_the_table_names_the_baseline_first(finished):
    _, result = finished
    own = result.rows[name_of(result)]
    both = dataclasses.replace(result, rows={"mine": own, "base": own}, difference=own)
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(table(both, 150))
    text = console.export_text()
    assert text.index("base") < text.index("mine") < text.index("difference")
    assert "nano-detector" in text and "color attr" in text


def test_figures_stay_whole_on_a_narrow_terminal(finished):
    _, result = finished
    own = result.rows[name_of(result)]
    rows = {"runs-a-long-name-of-a-run-policy": own, "nano-t2i": own}
    both = dataclasses.replace(result, rows=rows, difference=own, paper={"AR-GRPO": {}, "LlamaGen (base)": {}})
    console = Console(width=66, record=True, file=io.StringIO())
    console.print(table(both, 66))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 66
    (line,) = (line for line in lines if "counting ↑" in line)
    value = own["geneval-nano/counting"]
    assert line.count(f"{100 * value.value:.1f}") == 3
    assert lines[lines.index(line) + 1].count(f"± {100 * value.error:.1f} %") == 3


def test_the_sheet_has_a_cell_for_every_failure(finished):
    out, result = finished
    folder = out / name_of(result)
    rows = [row for row in read_jsonl(folder / "results.jsonl") if not row["correct"]][:7]
    sheet = failure_sheet(rows, folder / "images", NANO_THRESHOLDS)
    one = failure_sheet(rows[:1], folder / "images", NANO_THRESHOLDS)
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
    sheet = np.asarray(failure_sheet([row], tmp_path, NANO_THRESHOLDS)).astype(int)
    outside = np.ones(sheet.shape[:2], bool)
    outside[PAD : PAD + SIDE, PAD : PAD + SIDE] = False
    outside[PAD + SIDE :] = False  # the captions
    assert (sheet[outside] == 255).all(), "nothing is drawn over the edge"
    bare = np.asarray(failure_sheet([{**row, "objects": []}], tmp_path, NANO_THRESHOLDS)).astype(int)
    changed = np.flatnonzero((sheet != bare).any((0, 2)))
    assert changed[0] < PAD + 0.6 * SIDE, "the label was moved to the left of its box"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "nano-c2i"], "nano-c2i draws classes"),
        (["--policy", "nano-t2j"], "no policy 'nano-t2j'"),
        (["--baseline", "POLICY"], "the same policy"),
        (["--n", "0"], "--n 0: give 1 to"),
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
        run_geneval([str(tmp_path / "tiny")], tmp_path / "o")


def test_a_finished_evaluation_is_told_again_and_a_torn_one_named(finished, policy, tmp_path, monkeypatch):
    out = tmp_path / "o"
    shutil.copytree(finished[0], out)
    monkeypatch.setattr(LlamaGen, "sample", lambda *_: pytest.fail("drawn again"))
    assert run_geneval([policy], out) == finished[1]
    (out / "summary.json").write_text('{"format": ')
    with pytest.raises(UserError, match=r"cannot read .*summary\.json: not JSON"):
        run_geneval([policy], out)
