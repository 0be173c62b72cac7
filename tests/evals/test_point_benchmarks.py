"""UniGenBench++ and WISE-Verified against a server on a local port: what is asked, read, added up and told."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from argrpo_cli.cli.app import run
from argrpo_cli.evals import point_benchmarks as j
from argrpo_cli.evals.statistics import mean_of, weighted
from argrpo_cli.evals.tables import read_results, sections
from argrpo_cli.evals.unigenbench import POINTS, UniGenBench, UniGenJudge
from argrpo_cli.evals.wise import CATEGORIES, Wise, WiseJudge
from argrpo_cli.rewards.judge.questions import UnusableReply
from argrpo_cli.shapes import Result
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_jsonl
from tests.evals.judges import PROMPTS, chat_server, draw_greys, save_two_policies, unigen_files, wise_files

DIMENSIONS = {name: points[0] for name, points in POINTS.items()}
UNIGEN_TASKS = [(prompt, [point]) for prompt, point in zip(PROMPTS, DIMENSIONS.values(), strict=False)]
UNIGEN_TASKS[0] = (PROMPTS[0], ["Style", "Attribute - Color", "Attribute - Shape"])
WISE_TASKS = list(zip(PROMPTS, CATEGORIES, strict=False))


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    return save_two_policies(tmp_path_factory.mktemp("policies"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    draw_greys(monkeypatch)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def listed(scores) -> str:
    return f"<description><analysis>['it's fine']</analysis><score>{list(scores)}</score></description>"


def unigen(policies, out, server, files, *more):
    asked = ["--policy", policies[0], *(["--baseline", policies[1]] if len(policies) > 1 else [])]
    asked += ["--url", server.url, *files, "--device", "cpu", "--out", str(out), "--set", "unigenbench.backoff=0.001"]
    return run(["eval", "unigenbench", *asked, *more])


def test_unigenbench_end_to_end(policies, tmp_path, capsys):
    """Ten prompts of one picture: picture i is the prompt i's, and the first has three points."""
    files = unigen_files(tmp_path, UNIGEN_TASKS)
    verdicts = {0: [1, 0, 1], **{grey: [int(grey in (1, 4, 7))] for grey in range(1, 10)}}
    with chat_server(UniGenJudge, lambda grey: listed(verdicts[grey])) as server:
        assert unigen(policies[:1], tmp_path / "o", server, files, "--n", "1") == 0
        said = capsys.readouterr()
        assert unigen(policies[:1], tmp_path / "o", server, files, "--n", "1") == 0
        assert all(count == 1 for count in server.attempts.values()), "verdicts are kept"
        body = server.bodies[0][0]
    result = Result.load(tmp_path / "o" / "summary.json")
    (row,) = result.rows.values()
    # Style 1/1; Attribute has 0 and 1 of the first picture and 0 of the third: 1/3; the others are one picture each.
    expected = dict.fromkeys(DIMENSIONS, 0.0) | {"Style": 1.0, "World Knowledge": 1.0, "Attribute": 1 / 3}
    expected |= {"Relationship": 1.0, "Compound": 1.0}
    assert {name: row[name].value for name in DIMENSIONS} == pytest.approx(expected)
    assert row["overall"].value == pytest.approx(sum(expected.values()) / 10)
    assert row["Attribute"].count == 3 and row["Attribute - Shape"].value == 1.0
    assert list(result.columns)[:3] == ["overall", "Style", "World Knowledge"]
    # As published: its words, in its order, before the picture.
    text, picture = body["messages"][0]["content"]
    points = str(UNIGEN_TASKS[0][1])
    explained = "".join(f"\n{point}: about {point}" for point in UNIGEN_TASKS[0][1])
    described = "".join(f"\n{point}: {point.upper()}" for point in UNIGEN_TASKS[0][1])
    assert text["text"] == (
        f"Prompt a dog; points {points}.\nCheckpoints Defination:「{explained}\n」\n"
        f"Checkpoints Description:「{described}\n」\nAgain a dog"
    )
    assert picture["type"] == "image_url" and (body["temperature"], body["max_tokens"]) == (0, 4096)
    # What a reader must know.
    told = " ".join(said.out.split())
    assert f"judge: {UniGenJudge.published}; published figures: gemini-2.5-pro" in told and "± 1" in told
    assert any("images per prompt 1 (published 4)" in text for text in result.departures)
    assert any("published figures gemini-2.5-pro" in text for text in result.departures) and not result.paper
    assert [one.title for one in sections(read_results([tmp_path / "o"]))] == [
        "UniGenBench++",
        "UniGenBench++, in detail",
    ]
    (folder,) = (path for path in (tmp_path / "o").iterdir() if path.is_dir())
    assert (folder / "images" / "9_0.png").is_file()
    line = read_jsonl(folder / "verdicts" / "verdicts.jsonl")[0]
    assert line["verdicts"] == {"Style": 1, "Attribute - Color": 0, "Attribute - Shape": 1}


def test_wise_end_to_end_against_a_baseline(policies, tmp_path):
    files = wise_files(tmp_path, WISE_TASKS)
    asked = ["--policy", policies[0], *files, "--device", "cpu"]
    both = [*asked, "--baseline", policies[1], "--out", str(tmp_path / "o"), "--diversity", "nano-judge"]
    with chat_server(WiseJudge, lambda grey: f"<think>Score: 0?</think>\n**Score**: {int(grey < 3)}") as server:
        assert run(["eval", "wise", *both, "--url", server.url]) == 0
        system, user = server.bodies[0][0]["messages"]
        assert server.bodies[0][0]["chat_template_kwargs"] == {"enable_thinking": False}
        assert server.bodies[0][0]["max_tokens"] == 500
        part = ["--limit", "2", "--set", "wise.thinking=default", "--out", str(tmp_path / "2")]
        assert run(["eval", "wise", *asked, *part, "--url", server.url]) == 0
        assert "chat_template_kwargs" not in server.bodies[0][-1]
    assert system == {"role": "system", "content": [{"type": "text", "text": "Be strict."}]}
    text = 'Judge {it}.\nPROMPT: "a dog" EXPLANATION: "shows a dog" '
    assert user["content"][0] == {"type": "text", "text": text} and user["content"][1]["type"] == "image_url"
    result = Result.load(tmp_path / "o" / "summary.json")
    own, base = result.rows.values()
    names = [name for name, _ in CATEGORIES.values()]
    assert [own[name].value for name in names] == [1, 1, 1, 0, 0, 0]
    assert own["overall"].value == pytest.approx(0.4 + 2 * 0.12) and base["overall"].value == own["overall"].value
    assert result.difference["overall"].value == 0 and "nano-judge/recall" in own
    (folder, _) = sorted(path for path in (tmp_path / "o").iterdir() if path.is_dir())
    assert sorted(path.name for path in (folder / "images").iterdir())[0] == "1.png"
    two = Result.load(tmp_path / "2" / "summary.json")
    assert list(two.columns) == ["Culture", "Time"], "no overall number of a part"


@pytest.fixture
def unigen_benchmark(tmp_path):
    with chat_server(UniGenJudge, None) as server:
        points = [one for points in POINTS.values() for one in points]
        tasks = [(f"thing {index}", points[index::5]) for index in range(5)]
        files = unigen_files(tmp_path, tasks)
        yield UniGenBench(files[1], files[3], {"url": server.url})


def test_the_numbers_are_those_of_the_published_aggregation(unigen_benchmark):
    """Recorded verdicts, added up by counting points as the published code does; errors by numpy from the formula."""
    generator = torch.Generator().manual_seed(0)
    tasks = [task for task in unigen_benchmark.tasks for _ in range(4)]
    rows = [torch.randint(0, 2, (len(task.points),), generator=generator).tolist() for task in tasks]
    rows[7] = None
    measured = unigen_benchmark.shares(tasks, rows)
    correct, total = dict.fromkeys(POINTS, 0), dict.fromkeys(POINTS, 0)
    known = [(task, row) for task, row in zip(tasks, rows, strict=True) if row]
    for task, row in known:
        for point, verdict in zip(task.points, row, strict=True):
            total[point.partition(" - ")[0]] += 1
            correct[point.partition(" - ")[0]] += verdict
    means = {name: correct[name] / total[name] for name in POINTS}
    assert {name: measured[name].value for name in POINTS} == pytest.approx(means)
    assert measured["overall"].value == pytest.approx(np.mean(list(means.values())))
    residuals = np.zeros(5)
    for task, row in known:
        for point, verdict in zip(task.points, row, strict=True):
            name = point.partition(" - ")[0]
            residuals[task.index] += (verdict - means[name]) / total[name] / 10
    assert measured["overall"].error == pytest.approx(math.sqrt(5 / 4 * (residuals**2).sum()))
    assert measured["Action - State"].value == correct_of(known, "Action - State")


def correct_of(known, point):
    own = [row[task.points.index(point)] for task, row in known if point in task.points]
    return pytest.approx(sum(own) / len(own))


def test_a_weighted_mean_of_parts_has_the_error_of_its_prompts():
    """Parts [1, 0, 0, 1] and [1, 0] of prompts 0, 0, 1, 1 and 0, 1, by hand: residuals of the prompts are, by 3/4 / 4
    and 1/4 / 2, 3/16 (1/2 - 1/2) + 1/8 * 1/2 = 1/16 and -1/16, so error^2 = 2 * 2 / 256."""
    one, two = mean_of([1.0, 0.0, 0.0, 1.0], torch.tensor([0, 0, 1, 1])), mean_of([1.0, 0.0], torch.tensor([0, 1]))
    both = weighted([one, two], [0.75, 0.25], 2)
    assert (both.value, both.error, both.count) == (0.5, pytest.approx(1 / 8), 6)
    alone = weighted([one], [1.0], 2)
    assert (alone.value, alone.error) == (one.value, one.error)
    gap = weighted([mean_of([1.0, math.nan], torch.tensor([0, 1]))], [1.0], 2)
    assert gap.value == 1.0 and gap.minus(both).value == 0.5, "units of all prompts, also where one has no verdict"
    assert math.isnan(weighted([one, mean_of([math.nan], torch.tensor([0]))], [0.5, 0.5], 2).value)


def test_wise_weighs_its_categories_as_published(tmp_path):
    with chat_server(WiseJudge, None) as server:
        categories = [name for name in CATEGORIES for _ in range(3)]
        files = wise_files(tmp_path, [(f"thing {index}", name) for index, name in enumerate(categories)])
        benchmark = Wise(files[1], files[3], {"url": server.url})
    rows = [[1], [1], [0]] + [[0], [0], [1]] * 5
    measured = benchmark.shares(benchmark.tasks, rows)
    assert measured["overall"].value == pytest.approx(0.4 * 2 / 3 + 5 * 0.12 / 3)
    squares = (0.4**2 + 5 * 0.12**2) / 3**2 * (2 / 9 * 3)  # of each category three residuals, whose squares are 2/3
    assert measured["overall"].error == pytest.approx(math.sqrt(18 / 17 * squares))


def test_a_few_missing_verdicts_are_left_out_and_many_leave_no_number(unigen_benchmark):
    tasks = [task for task in unigen_benchmark.tasks for _ in range(8)]
    rows = [[1] * len(task.points) for task in tasks]
    rows[0] = rows[9] = None
    few = unigen_benchmark.shares(tasks, rows)
    assert few["overall"].value == 1 and few["Style"].count < sum("Style" in task.points for task in tasks)
    rows[20] = None
    assert unigen_benchmark.shares(tasks, rows)["overall"].summary().value is None


READINGS = [
    (UniGenJudge, listed([1, 0]), [1, 0]),
    (UniGenJudge, "<score>\n ['1' , \"0\"]\n</score>", [1, 0]),
    (UniGenJudge, "<score>[1]</score> as I said <score>[1]</score>", [1]),
    (UniGenJudge, "<score>[1]</score> no: <score>[0]</score>", "several different lists in <score>"),
    (UniGenJudge, "<score>[1, 0.5]</score>", "neither 0 nor 1"),
    (UniGenJudge, "<score>[]</score>", "neither 0 nor 1"),
    (UniGenJudge, "<score>[1, 0", "no list in <score>"),
    (UniGenJudge, "x" * 70_000, "longer than"),
    (WiseJudge, "Score: 1", [1]),
    (WiseJudge, "**Score**: 0\nIt misses the answer.", [0]),
    (WiseJudge, "score：1", [1]),
    (WiseJudge, "1\n", [1]),
    (WiseJudge, "Score: 0 is too hard.</think> Score: 1", [1]),
    (WiseJudge, "Score: 0 or Score: 1", "two different scores"),
    (WiseJudge, "Score: 0.5", "no score of 0 or 1"),
    (WiseJudge, "Score: 10", "no score of 0 or 1"),
    (WiseJudge, "Score (0 or 1): 1", "no score of 0 or 1"),
    (WiseJudge, "Score: 0/1", "no score of 0 or 1"),
    (WiseJudge, "Score [0-1]: 1", "no score of 0 or 1"),
    (WiseJudge, "Score: 1/1", [1]),
    (WiseJudge, "Score: 0\n1. It misses the answer.", [0]),
    (WiseJudge, "I cannot judge this.", "no score of 0 or 1"),
]


@pytest.mark.parametrize(("judge", "reply", "verdict"), READINGS)
def test_replies(judge, reply, verdict):
    own = judge.__new__(judge)
    if isinstance(verdict, list):
        assert own.read_reply(reply) == verdict
    else:
        with pytest.raises(UnusableReply, match=verdict):
            own.read_reply(reply)


def test_a_reply_of_another_number_of_points_is_asked_for_again(policies, tmp_path):
    files = unigen_files(tmp_path, UNIGEN_TASKS[:1])
    with chat_server(UniGenJudge, lambda grey: listed([1, 1, 1])) as server:
        server.script = {0: [listed([1, 1])]}
        assert unigen(policies[:1], tmp_path / "o", server, files, "--n", "1") == 0
        assert server.attempts[0] == 2


def test_finished_pictures_go_by_the_published_names(tmp_path, capsys):
    files = unigen_files(tmp_path, UNIGEN_TASKS)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(10):
        for sample in range(2 if index else 0):
            Image.new("RGB", (8, 8), (index,) * 3).save(pictures / f"{index}_{sample}.png")
    asked = ["eval", "unigenbench", "--images", str(pictures), *files, "--device", "cpu", "--out", str(tmp_path / "o")]
    with chat_server(UniGenJudge, lambda grey: listed([1])) as server:
        assert run([*asked, "--url", server.url]) == 0
        assert "WARNING: 1 of 10 prompts have no picture" in capsys.readouterr().err
        assert run([*asked, "--url", server.url, "--n", "3"]) == 2
        assert "leave out --n" in capsys.readouterr().err
        (tmp_path / "none").mkdir()
        asked[3] = str(tmp_path / "none")
        assert run([*asked[:-1], str(tmp_path / "p"), "--url", server.url]) == 2
        assert "has no pictures of UniGenBench++'s prompts, which are called 0_0.png" in capsys.readouterr().err
    result = Result.load(tmp_path / "o" / "summary.json")
    assert (
        result.rows["pictures"]["World Knowledge"].value == 1
        and "images per prompt 1.8 (published 4)" in result.departures
    )


BAD = [
    (["--set", "wise.foo=1"], "reward wise: no option 'foo'; it has"),
    (["--set", "unigenbench.attempts=1"], "'unigenbench' is not among the judge's options, wise"),
    (["--url", "ftp://x"], "give one such as http://localhost:8000/v1"),
    (["--prompts", "absent.json"], "--prompts absent.json: no such file; give merge.json of github.com/PKU"),
    (["--prompts", "twice.json"], "a prompt is in it twice; give each once"),
    (["--prompts", "number.json"], "a number is in it twice; give each once"),
    (["--prompts", "list.json"], "row 1: prompt_id is no number, or Category, Prompt or Explanation no text"),
    (["--prompts", "category.json"], "row 1: no category 'Art'; there are Cultural knowledge, time, Space"),
    (["--prompts", "column.json"], "row 1: no Explanation; give a file in the benchmark's format"),
    (["--wording", "wording.py"], "--wording has no messages with Prompt and Explanation; give vllm_eval.py of PKU"),
    (["--wording", "text.py"], "--wording is not the published evaluator"),
    (["--judge", "another"], "does not have the model 'another'; it has Qwen3.5-35B-A3B"),
    (["--limit", "0"], "--limit 0: must be greater than or equal to 1"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "message"), BAD)
def test_bad_input_is_one_line_before_anything_is_drawn(tmp_path, capsys, monkeypatch, asked, message):
    monkeypatch.chdir(tmp_path)
    files = wise_files(tmp_path, WISE_TASKS)
    row = {"prompt_id": 1, "Prompt": "a dog", "Explanation": "a dog", "Category": "Space"}
    Path("twice.json").write_text(json.dumps([row, row]))
    Path("number.json").write_text(json.dumps([row, {**row, "Prompt": "a cat"}]))
    Path("list.json").write_text(json.dumps([{**row, "Category": ["Space"]}]))
    Path("category.json").write_text(json.dumps([{**row, "Category": "Art"}]))
    Path("column.json").write_text(json.dumps([{**row, "Explanation": None}]))
    Path("wording.py").write_text("x = {'text': 'only one'}")
    Path("text.py").write_text("Judge it well.")
    with chat_server(WiseJudge, None) as server:
        command = ["eval", "wise", "--policy", "nano-t2i", "--url", server.url, *files, "--out", "o", *asked]
        assert run(command) == 2
    said = capsys.readouterr().err
    assert message in " ".join(said.split()) and "Traceback" not in said and not Path("o").exists()


@pytest.mark.parametrize(
    ("index", "dims", "message"),
    [
        (1.5, {"Testpoints": ["Style"], "Testpoint Description": ["a sketch"]}, "index 1.5 is no number"),
        (1, {"Testpoints": [""], "Testpoint Description": [""]}, "the test point '' is none of UniGenBench's 27"),
        (1, {"Testpoints": [["Style"]], "Testpoint Description": ["a sketch"]}, "Testpoints.0 is ['Style']"),
        (1, {"Testpoints": ["Style"], "Testpoint Description": "x"}, "Testpoint Description is 'x'"),
        (1, {"Testpoints": ["Style"], "Testpoint Description": []}, "1 test points and 0 descriptions"),
        (1, "{", "its test points are no JSON"),
    ],
)
def test_rows_of_another_shape_are_one_line(tmp_path, index, dims, message):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"index": index, "prompt": "a dog", "sub_dims": dims}]))
    with pytest.raises(UserError, match=re.escape(message)):
        object.__new__(UniGenBench).read_tasks(path)


@pytest.mark.parametrize("name", ["unigenbench", "wise"])
def test_a_missing_server_is_said_before_anything_is_fetched(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(j, "fetch_url", lambda *_: pytest.fail("fetched"))
    assert run(["eval", name, "--policy", "nano-t2i", "--out", str(tmp_path / "o")]) == 2
    assert f"{name}: url is missing; serve" in capsys.readouterr().err


def test_the_published_files_are_fetched_at_a_fixed_commit(tmp_path, monkeypatch):
    fetched = []

    def fetch_url(url, option, sha256, note, name):
        fetched.append((url, option, len(sha256), name))
        raise UserError("no network")

    monkeypatch.setattr(j, "fetch_url", fetch_url)
    for kind in (UniGenBench, Wise):
        with pytest.raises(UserError, match="no network"):
            kind(options={"url": "http://localhost:1/v1"})
    assert fetched == [
        (
            "https://raw.githubusercontent.com/CodeGoat24/UniGenBench/49d0bcebb0b9418d975d3957c2fee10f34811d14/"
            "data/test_prompts_en.csv",
            "--prompts",
            64,
            "49d0bcebb0b9-test_prompts_en.csv",
        ),
        (
            "https://raw.githubusercontent.com/PKU-YuanGroup/WISE/eb51174483a5de2e34e8614cf9dfb3319ee7fcd0/"
            "data_verified/merge.json",
            "--prompts",
            64,
            "eb51174483a5-merge.json",
        ),
    ]


def test_published_figures_add_up():
    for row in UniGenBench.leaderboard.values():
        assert row[0] == pytest.approx(np.mean(row[1:]), abs=1e-4)
    for row in Wise.leaderboard.values():
        assert row[0] == pytest.approx(np.dot([0.4, *[0.12] * 5], row[1:]), abs=1e-4)
