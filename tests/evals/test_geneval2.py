"""GenEval 2: the means of judges' answers, and the whole path with the nano detector, a model here and a server."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy.stats import gmean

from argrpo_cli.cli.app import run
from argrpo_cli.evals import benchmark as b
from argrpo_cli.evals import geneval2 as g
from argrpo_cli.evals.tables import table
from argrpo_cli.geneval import questions as q
from argrpo_cli.rewards.geneval2 import GenEval2 as Judge
from argrpo_cli.shapes import Result
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_jsonl
from tests.rewards.judge.fake_server import FakeServer
from tests.rewards.judge.tiny_vlm import tiny_qwen3
from tests.together import together

MOST = 20  # of the nano prompts
LINES = [  # in words that nano policies read
    {
        "prompt": "two red cars",
        "atom_count": 3,
        "vqa_list": [["How many cars are in the image?", "two"], ["Are the cars red?", "Yes"], ["Any cars?", "Yes"]],
        "skills": ["count", "attribute", "object"],
    },
    {"prompt": "a dog", "atom_count": 1, "vqa_list": [["How many dogs are there?", "one"]], "skills": ["count"]},
]


@pytest.fixture(autouse=True, scope="module")
def policy(policy_of_scenes):
    return policy_of_scenes


@pytest.fixture(scope="module")
def finished(tmp_path_factory, policy):
    out = tmp_path_factory.mktemp("geneval2") / "out"
    return out, evaluate([policy], out, limit=MOST)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return str(path)


def evaluate(policies, out, prompts=None, options=None, limit=None, **rest):
    return b.run(g.GenEval2(prompts, options, limit), policies, out, device="cpu", **rest)


def name_of(result):
    return next(iter(result.rows))


def answers(*published, exact=0.5):
    return [
        None if one is None else {"published": one, "exact": one * exact, "likeliest": one > 0.5} for one in published
    ]


# the numbers


def test_the_columns_are_those_of_an_independent_computation():
    dog, cars = q.Item("a dog", 1, (q.Question("?", "one", "count"),)), read(LINES[0])
    items = [cars, cars, dog, dog]
    scores = [[0.9, 0.8, 0.5], [0.4, 0.1, 1.0], [0.6], [0.2]]
    whole = [0.7, 0.3, 0.9, 0.1]
    got = g.measures(items, [answers(*own, last) for own, last in zip(scores, whole, strict=True)])
    gm = [gmean(own) for own in scores]
    assert got["gm"].value == pytest.approx(np.mean(gm), abs=1e-12)
    assert got["am"].value == pytest.approx((2.2 / 3 + 1.5 / 3 + 0.6 + 0.2) / 4, abs=1e-12)
    assert got["tifa"].value == pytest.approx((2 / 3 + 1 / 3 + 1 + 0) / 4, abs=1e-12), "0.5 is not above 0.5"
    assert got["vqascore"].value == pytest.approx(0.5, abs=1e-12)
    assert got["gm_exact"].value == pytest.approx(np.mean(gm) / 2, abs=1e-12)
    assert got["count"].value == pytest.approx((0.9 + 0.4 + 0.6 + 0.2) / 4, abs=1e-12), "over answers, as published"
    assert got["attribute"].value == pytest.approx(0.45) and got["object"].value == pytest.approx(0.75)
    assert got["3 atoms"].value == pytest.approx(np.mean(gm[:2])) and got["1 atoms"].value == pytest.approx(0.4)
    assert {name: one.count for name, one in got.items()} == {
        **dict.fromkeys(("gm", "am", "tifa", "vqascore", "gm_exact", "am_exact", "count"), 4),
        **dict.fromkeys(("attribute", "object", "3 atoms", "1 atoms"), 2),
    }
    # Two clusters: the means of the prompts, whose difference is all the spread there is.
    spread = abs(np.mean(gm[:2]) - np.mean(gm[2:])) / 2
    assert got["gm"].error == pytest.approx(spread, abs=1e-12)
    assert math.isnan(got["3 atoms"].error), "one prompt has no error"


def read(line):
    questions = zip(line["vqa_list"], line["skills"], strict=True)
    return q.Item(line["prompt"], line["atom_count"], tuple(q.Question(*pair, skill) for pair, skill in questions))


def test_a_missing_answer_takes_its_picture_out_and_too_many_take_the_number():
    cars = read(LINES[0])
    whole, lacking = answers(0.9, 0.8, 0.5), answers(None, 0.1, 0.1)
    got = g.measures([cars._replace(prompt=str(place)) for place in range(40)], [whole] * 38 + [lacking] * 2)
    assert got["gm"].value == pytest.approx(gmean([0.9, 0.8, 0.5])) and got["gm"].count == 38
    assert got["count"].value == pytest.approx(0.9) and got["count"].count == 38
    assert got["attribute"].value == pytest.approx((38 * 0.8 + 2 * 0.1) / 40)
    got = g.measures([cars] * 40, [whole] * 37 + [lacking] * 3)  # 7.5% of them
    assert math.isnan(got["gm"].value) and math.isnan(got["3 atoms"].value) and math.isnan(got["count"].value)
    assert got["attribute"].value > 0.7


# the nano world


def test_the_nano_version_runs_to_a_result_that_opens_everywhere(finished, tmp_path, capfd):
    out, result = finished
    assert Result.load(out / "summary.json") == result
    own = result.rows[name_of(result)]
    assert list(own) == ["gm", "am", "tifa", "object", "attribute", "count", "position"] + [
        f"{atoms} atoms" for atoms in (2, 3, 4, 5)
    ]
    assert all(0 < own[key].value < 1 and own[key].error > 0 for key in ("gm", "am", "tifa", "object", "count"))
    assert own["gm"].count == MOST and own["5 atoms"].count == 5
    assert own["object"].count == q.count_skills(q.nano_items()[::4])["object"] > MOST
    rows = read_jsonl(out / name_of(result) / "answers.jsonl")
    scores = [[answer["published"] for answer in row["answers"]] for row in rows]
    assert own["gm"].value == pytest.approx(np.mean([gmean(row) if min(row) else 0 for row in scores]), abs=1e-9)
    assert json.loads((out / name_of(result) / "score_lists.json").read_text()) == scores
    assert result.protocol["judge"]["model"] == "nano-detector" and result.protocol["judge"]["weights"]
    assert result.protocol["prompts"]["count"] == MOST and "prompts geneval2-nano, 20 of them" in result.departures[0]
    assert any("5 atoms compose nano words" in text for text in result.warnings)
    assert Image.open(out / "geneval2.png").width > 600
    console = Console(width=100, record=True)  # the name of the policy is a long one
    console.print(table(result, 100))
    text = console.export_text()
    assert "GenEval 2: 20 images" in text and "count" in text and "Soft-TIFA GM ↑" in text
    assert run(["eval", "report", str(out), "--out", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "GenEval 2, Soft-TIFA GM by atoms" in page and "images: 20" in page
    capfd.readouterr()


def test_interrupted_while_it_asks_it_goes_on_to_the_same_result(finished, policy, tmp_path, monkeypatch):
    out, result = finished
    asked, real = [], Judge.ask

    def stop(self, images, questions):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(images))
        return real(self, images, questions)

    monkeypatch.setattr(Judge, "ask", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate([policy], tmp_path / "o", limit=MOST, batch_size=8)
    monkeypatch.setattr(Judge, "ask", lambda self, *rest: asked.append(len(rest[0])) or real(self, *rest))
    again = evaluate([policy], tmp_path / "o", limit=MOST, batch_size=8)
    assert asked == [8, 8, 4], "two before, one after"
    assert again == result
    file = f"{name_of(result)}/answers.jsonl"
    assert (tmp_path / "o" / file).read_text() == (out / file).read_text()
    with pytest.raises(UserError, match=r"holds an evaluation of something else \(sampling.seed"):
        evaluate([policy], tmp_path / "o", limit=MOST, seed=1)


def test_two_processes_find_what_one_does(finished, policy, tmp_path):
    out, result = finished
    asked = ["eval", "geneval2", "--policy", policy, "--device", "cpu", "--limit", str(MOST)]
    asked += ["--out", str(tmp_path / "out")]
    done = together(asked, tmp_path / "printed")
    assert done.codes == [0, 0], done.err
    assert Result.load(tmp_path / "out" / "summary.json") == result
    file = f"{name_of(result)}/answers.jsonl"
    assert (tmp_path / "out" / file).read_bytes() == (out / file).read_bytes()


def test_a_baseline_is_compared_picture_by_picture(finished, policy, tmp_path, monkeypatch):
    shutil.copytree(policy, tmp_path / "other")
    card = tmp_path / "other" / "policy.json"
    card.write_text(card.read_text().replace('"base": "', '"base": "another '))  # replays other scenes
    result = evaluate([policy, str(tmp_path / "other")], tmp_path / "o", limit=8)
    first, second = result.rows.values()
    for key, value in result.difference.items():
        assert value.value == pytest.approx(first[key].value - second[key].value, abs=1e-9) and value.error is not None


def test_finished_pictures_are_judged_too(finished, tmp_path):
    out, result = finished
    images = tmp_path / "drawn"
    shutil.copytree(out / name_of(result) / "images", images)
    rows = [{"file": f"{place:05d}-0.png", "prompt": item.prompt} for place, item in enumerate(q.nano_items()[::4])]
    (images / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:15]))
    got = evaluate([], tmp_path / "o", q.NANO, {"backend": "nano"}, MOST, images=images)
    assert got.rows["drawn"]["2 atoms"] == result.rows[name_of(result)]["2 atoms"]
    assert "5 of the 20 prompts have no image" in got.warnings and "5 atoms" not in got.rows["drawn"]
    (images / "metadata.jsonl").write_text(json.dumps({**rows[0], "prompt": "a horse in a hat"}))
    with pytest.raises(UserError, match=r"00000-0\.png shows 'a horse in a hat', which is no prompt of geneval2-nano"):
        evaluate([], tmp_path / "other", q.NANO, {"backend": "nano"}, images=images)


# a judge that reads


def listed(**shares):
    top = [{"token": word.replace("_", " "), "logprob": math.log(share)} for word, share in shares.items()]
    return {"choices": [{"message": {"content": "?"}, "logprobs": {"content": [{"top_logprobs": top}]}}]}


def scripted(body):
    text = body["messages"][0]["content"][-1]["text"]
    if text.startswith("How many"):
        return listed(two=0.6, **{"2": 0.1, "one": 0.25, "_One": 0.05})
    return listed(Yes=0.8, No=0.2) if "Answer in one word." in text else listed(yes=0.4, No=0.6)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("ARGRPO_JUDGE_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with FakeServer(models={"data": [{"id": Judge.published}]}) as running:
        running.whole = dict.fromkeys(range(256), scripted)
        yield running


def test_a_server_is_asked_from_the_command_line_to_the_result(policy, prompts, server, tmp_path, capfd):
    command = ["eval", "geneval2", "--policy", policy, "--prompts", prompts, "--url", server.url, "--device", "cpu"]
    command += ["--set", "geneval2.backoff=0.001", "--out", str(tmp_path / "o")]
    assert run(command) == 0, capfd.readouterr().err
    result = Result.load(tmp_path / "o" / "summary.json")
    own = result.rows[name_of(result)]
    assert own["gm"].value == pytest.approx((gmean([0.7, 0.8, 0.8]) + 0.3) / 2)
    assert own["am"].value == pytest.approx((2.3 / 3 + 0.3) / 2) and own["vqascore"].value == pytest.approx(0.4)
    assert own["tifa"].value == pytest.approx((1 + 0) / 2) and own["count"].value == pytest.approx(0.5)
    assert "gm_exact" not in own and own["gm"].count == 2 and own["gm"].error > 0
    assert any("of a server's 20 likeliest" in text for text in result.departures)
    assert "http" not in json.dumps(result.protocol)
    asked = sum(server.attempts.values())
    assert run(command) == 0 and sum(server.attempts.values()) == asked == 6, "nothing is asked twice"
    assert Result.load(tmp_path / "o" / "summary.json") == result


def test_answers_without_probabilities_are_missing_counted_told_and_asked_for_again(policy, prompts, server, tmp_path):
    options = {"backend": "server", "url": server.url, "backoff": 0.001, "attempts": 2}
    broken = []

    def odd(body):
        """Fails for one question, always."""
        text = body["messages"][0]["content"][-1]["text"]
        if "dogs" not in text:
            return scripted(body)
        broken.append(text)
        return {"choices": [{"message": {"content": "two"}}]}

    server.whole = dict.fromkeys(range(256), odd)
    result = evaluate([policy], tmp_path / "o", prompts, options)
    own = result.rows[name_of(result)]
    assert own["gm"].value is None and own["1 atoms"].value is None, "one of two is more than a twentieth"
    assert own["3 atoms"].value == pytest.approx(gmean([0.7, 0.8, 0.8]))
    assert own["attribute"].value == pytest.approx(0.8)
    (text,) = [one for one in result.warnings if "no answer" in one]
    assert "no answer to 1 of 6 questions, about 1 of 2 pictures, whose means are missing" in text
    assert "no top_logprobs" in text and broken
    rows = read_jsonl(tmp_path / "o" / name_of(result) / "answers.jsonl")
    assert "published" not in rows[1]["answers"][0] and "published" in rows[0]["answers"][0]
    assert not (tmp_path / "o" / name_of(result) / "score_lists.json").exists()
    server.whole = dict.fromkeys(range(256), scripted)
    mended = evaluate([policy], tmp_path / "o", prompts, options)
    assert mended.rows[name_of(mended)]["gm"].value == pytest.approx((gmean([0.7, 0.8, 0.8]) + 0.3) / 2)
    assert not any("no answer" in one for one in mended.warnings)


def test_a_model_in_this_process_has_the_corrected_values_beside_the_published(policy, prompts, tmp_path):
    for part in tiny_qwen3(["Yes", " yes", "two", "one"]):
        part.save_pretrained(tmp_path / "vlm")
    options = {"model": str(tmp_path / "vlm")}
    result = evaluate([policy], tmp_path / "o", prompts, options)
    own = result.rows[name_of(result)]
    assert 0 < own["gm_exact"].value < own["gm"].value and own["vqascore"].value > 0
    rows = read_jsonl(tmp_path / "o" / name_of(result) / "answers.jsonl")
    exact = [gmean([answer["exact"] for answer in row["answers"][:-1]]) for row in rows]
    assert own["gm_exact"].value == pytest.approx(np.mean(exact))
    assert "judge vlm (published: Qwen/Qwen3-VL-8B-Instruct)" in result.departures
    assert result.protocol["judge"]["weights"]
    assert str(tmp_path / "vlm") not in (tmp_path / "o" / "summary.json").read_text().replace(str(policy), "")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--judge", "nano", "--url", "http://x/v1"], "backend is 'nano' and url given"),
        (["--set", "geneval2.mean=arithmetic"], "geneval2.mean: every mean is measured, of the questions of --prompts"),
        (["--set", "geneval2.speed=3"], "reward geneval2: no option 'speed'"),
        (["--prompts", "/nowhere.jsonl"], "cannot read /nowhere.jsonl: no such file"),
        (["--policy", "nano-c2i"], "nano-c2i draws classes, and eval geneval2 asks with captions"),
        (["--judge", "/nowhere"], "there is no model folder '/nowhere'"),
        (["--limit", "0"], "--limit 0"),
        (["--n", "2000"], "give 1 to 1250 images of each of 80 prompts"),
    ],
)
def test_what_cannot_be_is_refused(arguments, why, tmp_path, capfd):
    assert run(["eval", "geneval2", "--device", "cpu", "--out", str(tmp_path / "o"), *arguments]) == 2
    assert why in capfd.readouterr().err and not (tmp_path / "o").exists()
