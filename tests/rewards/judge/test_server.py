"""The judge by a server that misbehaves: the scores are right and complete, or NaN with the reason."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import re
import signal
import threading
from concurrent.futures import CancelledError
from functools import partial

import pytest
import torch
from PIL import Image

from argrpo_cli.rewards import load_reward
from argrpo_cli.rewards.judge import JudgeFake, JudgeQuality, JudgeWeird, UnifiedReward
from argrpo_cli.rewards.judge.server import MAX_RETRY_AFTER, pause, retry_after
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from tests.rewards.judge.fake_server import MODEL, FakeServer

KEY = "sk-Very.Secret/0123456789"
QUICK = {"backend": "server", "backoff": 0.001, "timeout": 300.0}  # no test waits so long


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("ARGRPO_JUDGE_API_KEY", KEY)


@pytest.fixture
def server():
    with FakeServer() as running:
        yield running


def grey(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)


def prompts(count: int) -> list[Condition]:
    return [Condition(f"a photo of {index}") for index in range(count)]


def score_one(judge) -> float:
    return judge.score(grey(7), prompts(1)).item()


def test_scores_in_the_order_of_the_images_whatever_the_order_of_the_replies(server):
    last = threading.Event()
    server.before = lambda grey: last.wait() if grey < 8 else last.set() if grey == 23 else None
    judge = JudgeQuality(url=server.url, **QUICK)
    scores = judge.score(grey(*range(24)), prompts(24))
    assert scores.tolist() == [value % 6 for value in range(24)] and scores.dtype == torch.float32
    assert judge.failures == 0 and judge.last_error == "" and judge.remote
    for index in range(24):
        first = server.bodies[index][0]["messages"][0]["content"][0]
        assert f'"a photo of {index}"' in first["text"]
    assert judge.score(grey(1)[:0], []).shape == (0,)


def test_requests_at_the_same_time_are_as_many_as_allowed(server):
    for allowed, count in ((3, 12), (16, 12)):
        together = threading.Barrier(min(allowed, count))  # none is answered before so many are there
        server.before, server.most = lambda grey, together=together: together.wait(), 0
        JudgeFake(url=server.url, concurrency=allowed, attempts=1, **QUICK).score(grey(*range(count)), prompts(count))
        assert server.most == min(allowed, count)


def test_the_request(server):
    JudgeQuality(url=server.url, **QUICK).score(grey(7), prompts(1))
    [body] = server.bodies[7]
    assert body["model"] == MODEL and body["temperature"] == 0 and body["max_tokens"] == 512 and "top_k" not in body
    assert [part["type"] for part in body["messages"][0]["content"]] == ["text", "image_url", "text"]
    assert body["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert server.visited == ["/v1/models", "/v1/chat/completions"] and set(server.keys) == {f"Bearer {KEY}"}
    JudgeFake(url=server.url.removesuffix("/v1"), image_format="jpeg", temperature=0.6, **QUICK).score(
        grey(8), prompts(1)
    )
    body = server.bodies[8][0]
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.6, 0.95, 10)


FAULTS = {
    "slow": "no full response within 0.3 s",
    "drip": "no full response within 0.3 s",
    "drip headers": "no full response within 0.3 s",
    "endless": "larger than 1048576 bytes",
    "huge": "larger than 1048576 bytes",
    "500": "answers 500",
    "dropped": "dropped: there is no response",
    "dropped within": "dropped: the response ends early",
    "dropped chunk": "dropped: the response ends early",
    "not http": "not HTTP",
    "invalid json": r"not JSON \('application/json'\)",
    "deep json": "not JSON",
    "html": r"not JSON \('text/html'\): '<html>",
    "wrong schema": r"no text in choices\[0\].message.content: '{\"result\"",
    "empty": "an empty response",
    "empty choices": "no text in choices",
    "no text": "no text in choices",
    "empty text": "the reply is empty",
    "I cannot say.": "no JSON object with a score: 'I cannot say.'",
    '{"score": 7}': "the score 7 is outside 0 to 5",
    '{"score": NaN}': "not a number",
}


@pytest.mark.parametrize(("fault", "why"), FAULTS.items())
def test_a_fault_is_tried_again_and_then_named(server, fault, why):
    server.script = {7: [fault], 8: [fault, fault]}
    judge = JudgeQuality(url=server.url, attempts=2, **QUICK)
    if (
        slow := "0.3 s" in why
    ):  # a good answer may take longer than that, so only the bad ones are waited for so briefly
        judge.timeout = 0.3
    else:
        assert judge.score(grey(6, 7, 9), prompts(3)).tolist() == [0, 1, 3]
    assert judge.score(grey(8), prompts(1)).isnan().all()
    assert server.attempts == ({8: 2} if slow else {6: 1, 7: 2, 8: 2, 9: 1}) and judge.failures == 1
    assert re.search(why, judge.last_error), judge.last_error
    assert judge.last_error.endswith("(attempt 2 of 2)") and "\n" not in judge.last_error
    assert "Secret" not in judge.last_error


FINAL = {
    "400": 'the server answers 400 \'{"error": "bad image, Bearer ',
    "401": "refuses the key (401); set ARGRPO_JUDGE_API_KEY to one that it takes",
    "redirect": "the server answers 307, a redirect to 'http://localhost:",
}


@pytest.mark.parametrize(("fault", "why"), FINAL.items())
def test_what_another_attempt_cannot_mend_is_named_at_once(server, fault, why):
    server.script = {7: [fault] * 9}
    judge = JudgeQuality(url=server.url, **QUICK)
    assert math.isnan(score_one(judge)) and server.attempts[7] == 1
    assert why in judge.last_error and "Secret" not in judge.last_error
    assert "/stolen" not in "".join(server.visited)


def test_json_under_another_content_type_is_json(server):
    server.script = {7: ["json as text"]}
    assert score_one(JudgeQuality(url=server.url, **QUICK)) == 2
    assert server.attempts[7] == 1


def test_a_server_that_asks_for_patience_gets_it(server, monkeypatch):
    server.script = {7: ["429"]}
    judge, asleep, sleep = JudgeQuality(url=server.url, **QUICK), [], asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: asleep.append(seconds) or sleep(0))
    assert score_one(judge) == 1
    assert [seconds for seconds in asleep if seconds >= 0.5] == [1.0]


def test_pauses_grow_and_are_bounded():
    def asked(value: str) -> float:
        return retry_after({"Retry-After": value})

    assert all(0.5 <= pause(1, 1.0) <= 1.0 and 2.0 <= pause(3, 1.0) <= 4.0 for _ in range(50))
    assert len({pause(1, 1.0) for _ in range(50)}) > 1
    assert pause(50, 1.0) <= 30 and pause(1, 1.0, least=7.0) == 7.0
    assert asked("5") == 5 and asked("99999999999999999999") == MAX_RETRY_AFTER
    assert asked("Wed, 21 Oct 2015 07:28:00 GMT") == 0 and asked("Wed, 21 Oct 2099 07:28:00 GMT") == MAX_RETRY_AFTER
    assert asked("-3") == asked("soon") == asked("²") == retry_after({}) == 0


def test_a_reply_without_a_score_is_drawn_anew_not_asked_for_the_same(server):
    server.script = {7: ["none", "500", '{"score": 4}']}
    assert score_one(JudgeQuality(url=server.url, **QUICK)) == 4
    assert [body["temperature"] for body in server.bodies[7]] == [0, 0.6, 0.6]


def test_a_server_that_does_not_know_top_k_is_asked_without(server):
    server.script = {7: ["none", "400"]}
    judge = JudgeQuality(url=server.url, **QUICK)
    assert score_one(judge) == 1
    assert ["top_k" in body for body in server.bodies[7]] == [False, True, False]


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("401", r"judge server http://127.0.0.1:\d+/v1: the server refuses the key \(401\); set ARGRPO_JUDGE_API_KEY"),
        ("500", "the server answers 500"),
        ("html", "is not JSON"),
        ("redirect", "redirect to 'http://localhost"),
        ("dropped", "dropped"),
        ("empty choices", None),
    ],
)
def test_a_server_that_is_not_right_is_found_out_at_the_start(server, fault, why):
    server.models_fault = fault
    with pytest.raises(UserError, match=why or "/models is no list of models") as error:
        JudgeFake(url=server.url, **QUICK)
    assert "Secret" not in str(error.value) and "\n" not in str(error.value)


def test_a_model_that_is_not_there_is_named_with_those_that_are(server):
    with pytest.raises(UserError, match=r"does not have the model 'Qwen/Qwen2.5-VL-3B'; it has Qwen.*did you mean"):
        JudgeFake(url=server.url, model="Qwen/Qwen2.5-VL-3B", **QUICK)
    server.models = {"data": [{"id": f"{KEY}\n" * 3}]}
    with pytest.raises(UserError) as error:
        JudgeFake(url=server.url, **QUICK)
    assert "Secret" not in str(error.value) and "\n" not in str(error.value)


def test_nobody_there():
    with FakeServer() as gone:
        url = gone.url
    with pytest.raises(UserError, match="the server is not reached: connection refused"):
        JudgeFake(url=url, attempts=1, **QUICK)


def test_without_a_key_none_is_sent_and_its_lack_is_named(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ARGRPO_JUDGE_API_KEY", "")  # set and empty: no key, OPENAI_API_KEY is not for this server
    JudgeFake(url=server.url, **QUICK)
    assert server.keys == [None]
    server.models_fault = "401"
    with pytest.raises(UserError, match=r"asks for a key \(401\)"):
        JudgeFake(url=server.url, **QUICK)
    monkeypatch.delenv("ARGRPO_JUDGE_API_KEY")
    server.models_fault = ""
    JudgeFake(url=server.url, **QUICK)
    assert server.keys[-1] == f"Bearer {KEY}"


def test_a_key_that_no_header_can_carry_is_not_repeated(server, monkeypatch):
    monkeypatch.setenv("ARGRPO_JUDGE_API_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(UserError, match="ARGRPO_JUDGE_API_KEY holds characters") as error:
        JudgeFake(url=server.url, **QUICK)
    assert "Secret" not in str(error.value) and error.value.__cause__ is None


def test_the_key_is_in_nothing_that_is_kept_or_printed(server, capfd, caplog):
    server.script = {value: [name] * 3 for value, name in enumerate([*FAULTS, *FINAL], start=1) if "drip" not in name}
    judge = JudgeQuality(url=server.url, attempts=1, **QUICK)
    judge.timeout = 0.2
    judge.score(grey(*range(1, 26)), prompts(25))
    seen = repr(judge) + repr(vars(judge)) + judge.url + judge.last_error
    seen += caplog.text + "".join(capfd.readouterr())
    assert judge.failures >= 20 and "Secret" not in seen


def test_no_part_of_the_key_is_left_where_a_text_is_cut(server):
    for before in range(55, 80):
        server.script[before] = ["x" * before + KEY]
    judge = JudgeQuality(url=server.url, attempts=1, **QUICK)
    for before in range(55, 80):
        assert judge.score(grey(before), prompts(1)).isnan() and "sk-" not in judge.last_error


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"backend": "sever"}, "backend 'sever' is unknown; there are local, server; did you mean 'server'"),
        ({"backend": "server"}, "url missing; give its url"),
        ({"url": "http://localhost:1"}, "backend is 'local' and url given"),
        ({"backend": "server", "url": "localhost:8000"}, "url is 'localhost:8000'; give one such as"),
        ({"backend": "server", "url": "http://[::1"}, "cannot be read"),
        ({"backend": "server", "url": "http://me:hunter2@host/v1"}, "the url has a user"),
        ({"backend": "server", "url": "http://host/v1?token=hunter2"}, "has a user, parameters"),
        ({"reading": "logit"}, "reading 'logit' is for the 0/1 questions"),
        ({"reading": "guess"}, "reading 'guess' is unknown; there are generate, logit"),
        ({"attempts": 0}, "attempts is 0"),
        ({"backend": "server", "url": "http://host", "concurrency": 0}, "concurrency is 0"),
        ({"backend": "server", "url": "http://host", "timeout": 0}, "timeout is 0"),
        ({"backend": "server", "url": "http://host", "temperature": -1}, "temperature is -1"),
        (
            {"backend": "server", "url": "http://host", "image_format": "gif"},
            "image_format 'gif' is unknown; there are png, jpeg",
        ),
    ],
)
def test_options_that_are_none(options, why):
    with pytest.raises(UserError, match=why) as error:
        load_reward("judge-quality", options=options)
    assert "hunter2" not in str(error.value)


def test_logit_needs_the_model_here(server):
    with pytest.raises(UserError, match="judge-weird: reading 'logit' needs the model in this process"):
        JudgeWeird(url=server.url, reading="logit", **QUICK)


def test_yes_no_questions_take_nothing_between(server):
    server.reply = lambda grey: json.dumps({"score": grey / 10})
    scores = JudgeWeird(url=server.url, attempts=1, **QUICK).score(grey(0, 5, 10), prompts(3))
    assert scores[0] == 0 and scores[1].isnan() and scores[2] == 1


@pytest.mark.parametrize("how", ["Ctrl-C", "stop"])
def test_breaking_off_does_not_wait_for_the_server(server, how):
    server.script = {value: ["slow"] for value in range(8)}
    judge = JudgeFake(url=server.url, concurrency=4, **QUICK)
    if how == "Ctrl-C":
        kick, error = partial(signal.pthread_kill, threading.main_thread().ident, signal.SIGINT), KeyboardInterrupt
    else:  # from another thread
        kick, error = judge.stop, CancelledError

    def when_it_waits():
        while server.now < 4 and not sum(server.attempts.values()):
            server.closing.wait(0.01)
        kick()

    threading.Thread(target=when_it_waits, daemon=True).start()
    with pytest.raises(error):  # the server never answers
        judge.score(grey(*range(8)), prompts(8))


def test_it_can_be_asked_where_an_event_loop_runs(server):
    async def notebook():
        return score_one(JudgeQuality(url=server.url, **QUICK))

    assert asyncio.run(notebook()) == 1


def test_unified_reward_reads_the_final_score_of_a_512_pixel_image():
    with FakeServer(
        lambda grey: f"It fits.\nFinal Score: {grey}", {"data": [{"id": UnifiedReward.published}]}
    ) as server:
        reward = UnifiedReward(url=server.url, backoff=0.001, attempts=1)
        scores = reward.score(grey(1, 4, 6), [Condition("a [red]\ncar")] * 3)
        assert scores[:2].tolist() == [1, 4] and scores[2].isnan()
        assert reward.remote and reward.failures == 1 and "the score 6 is outside 1 to 5" in reward.last_error
        content = server.bodies[1][0]["messages"][0]["content"]
        assert content[1]["text"].endswith("Text Caption: [a [red] car]") and server.bodies[1][0]["temperature"] == 0
        assert _size(content[0]["image_url"]["url"]) == (512, 512)
    with pytest.raises(UserError, match="a prompt is empty"):
        reward.check([Condition("a"), Condition(" ")])
    with pytest.raises(UserError, match="unified-reward: url is missing"):
        UnifiedReward()


def _size(url: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))).size
