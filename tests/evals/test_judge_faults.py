"""A judge that fails, for every benchmark that asks one: another attempt, or a missing value that is counted, shown,
asked for again by the same command, and in no number."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from argrpo_cli.cli.app import run
from argrpo_cli.evals.unigenbench import UniGenJudge
from argrpo_cli.evals.wise import WiseJudge
from argrpo_cli.rewards.geneval2 import GenEval2
from argrpo_cli.rewards.judge import UnifiedReward
from argrpo_cli.rewards.judge.deqa import LEVELS, Deqa
from argrpo_cli.shapes import Result
from argrpo_cli.system.files import read_jsonl
from tests.evals.judges import PROMPTS, chat_server, draw_greys, save_two_policies, unigen_files, wise_files
from tests.rewards.judge.fake_server import completion

FAULTS = ["429", "500", "dropped", "html", "invalid json", "I cannot say."]  # the last has no logprobs either
PATIENT, SHORT = "300", "0.3"  # seconds; the short ones only where no answer comes


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_two_policies(tmp_path_factory.mktemp("policies"))[0]


def with_logprobs(text, others=("Yes", "No")):
    """A response whose next token is one of several for certain."""
    top = [{"token": one, "logprob": 0.0 if one == text else -50.0} for one in others]
    choice = {**completion(text)["choices"][0], "logprobs": {"content": [{"top_logprobs": top}]}}
    return {"choices": [choice]}


# Judge, its reply (or response) to a picture of an even and of an odd grey, those scores in the column's unit, column.
CASES = {
    "unigenbench": (UniGenJudge, ("<score>[1]</score>", "<score>[0]</score>"), (1, 0), "Style"),
    "wise": (WiseJudge, ("Score: 1", "Score: 0"), (1, 0), "Culture"),
    "unified-reward": (UnifiedReward, ("Final Score: 4", "Final Score: 1"), (4 / 5, 1 / 5), "unified-reward"),
    "deqa": (Deqa, (with_logprobs("good", LEVELS), with_logprobs("bad", LEVELS)), (4 / 5, 1 / 5), "deqa"),
    "geneval2": (GenEval2, (with_logprobs("Yes"), with_logprobs("No")), (1, 0), "gm"),
}
JUDGED = ("unigenbench", "wise")


def command(name, policy, folder, url, timeout=PATIENT):
    judge = CASES[name][0]
    shared = ["--policy", policy, "--n", "1", "--device", "cpu", "--out", str(folder / "o")]
    settings = [f"--set={name}.{text}" for text in ("attempts=2", f"timeout={timeout}", "backoff=0.001")]
    if name == "unigenbench":
        files = unigen_files(folder, [(prompt, ["Style"]) for prompt in PROMPTS])
    elif name == "wise":
        files = wise_files(folder, [(prompt, "Cultural knowledge") for prompt in PROMPTS])
    elif name == "geneval2":
        asked = {"atom_count": 1, "vqa_list": [["Is it?", "Yes"]], "skills": ["object"]}
        lines = [json.dumps({"prompt": prompt, **asked}) for prompt in PROMPTS]
        (folder / "prompts.jsonl").write_text("\n".join(lines))
        files = ["--prompts", str(folder / "prompts.jsonl"), "--judge", judge.published]
    if name in (*JUDGED, "geneval2"):
        return ["eval", name, *shared, *files, "--url", url, *settings]
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    prompts = ["--prompts", str(folder / "prompts.txt"), "--columns", name]
    return ["eval", "drawbench", *shared, *prompts, *settings, f"--set={name}.url={url}"]


@pytest.mark.parametrize("name", CASES)
def test_every_fault_ends_in_another_attempt_or_a_missing_value(name, policy, tmp_path, monkeypatch, capsys):
    judge, replies, scores, column = CASES[name]
    draw_greys(monkeypatch)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(0))  # a server that asks for patience gets none here
    whole = isinstance(replies[0], dict)
    each = 2 if name == "geneval2" else 1  # requests about a picture
    with chat_server(judge, lambda grey: replies[grey % 2]) as server:
        if whole:
            server.whole = {grey: replies[grey % 2] for grey in range(len(PROMPTS))}
        count = len(FAULTS)
        for place, fault in enumerate(FAULTS):
            server.script[place] = [fault] * 2 * each  # both attempts
            server.script[place + count] = [fault]
        asked = command(name, policy, tmp_path, server.url)

        # Too many are missing for a mean, and all are counted.
        assert run(asked) == 2
        missing = f"nothing could be measured: .* {count} of {len(PROMPTS)} pictures"
        assert re.search(missing, capsys.readouterr().err)
        attempts = [2 * each] * count + [1 + each] * count + [each] * (20 - 2 * count)
        assert [server.attempts[grey] for grey in range(20)] == attempts

        # Asked again are those that are missing, and no other; now they are slow.
        server.script = {place: ["slow"] * 2 * each for place in range(count)}
        server.attempts.clear()
        assert run(command(name, policy, tmp_path, server.url, SHORT)) == 2
        assert re.search(f"{missing}.* no full response within 0.3 s", capsys.readouterr().err)
        assert dict(server.attempts) == dict.fromkeys(range(count), 2 * each)

        # One stays without.
        server.script = {2: ["500"] * 9}
        server.attempts.clear()
        assert run(asked) == 0
        assert dict(server.attempts) == {place: each * (2 if place == 2 else 1) for place in range(count)}
    told = capsys.readouterr()
    result = Result.load(tmp_path / "o" / "summary.json")
    (value,) = (row[column] for row in result.rows.values())
    known = [scores[grey % 2] for grey in range(len(PROMPTS)) if grey != 2]
    assert value.count == len(known) and value.value == pytest.approx(sum(known) / len(known), abs=1e-6)
    (warning,) = (text for text in result.warnings if " pictures" in text)
    assert " 1 of 20 pictures" in warning and "answers 500" in warning
    assert "WARNING: " in told.err and "1 of 20 pictures" in told.err
    if name == "geneval2":
        rows = read_jsonl(next((tmp_path / "o").glob("*/answers.jsonl")))
        lacking = ["published" not in row["answers"][0] for row in rows]
    else:
        file, key = ("verdicts.jsonl", "verdicts") if name in JUDGED else ("scores.jsonl", "scores")
        rows = read_jsonl(next((tmp_path / "o").glob(f"*/*/{file}")))
        lacking = [row[key] in (None, {name: None}) for row in rows]
    assert lacking == [grey == 2 for grey in range(20)]
