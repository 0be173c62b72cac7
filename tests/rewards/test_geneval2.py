"""The reward `geneval2`: how likely the expected answers are to a model here, to one behind a server, to a detector."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy.stats import gmean, poisson_binom

from argrpo_cli.geneval.nano_answers import answer, check_question, count_distribution
from argrpo_cli.geneval.nano_detector import Found
from argrpo_cli.geneval.prompts import NANO_COLORS
from argrpo_cli.geneval.questions import Question, find_item, holistic, nano_items, variants
from argrpo_cli.nano.tokens import decode, load_held_out, load_tokenizer
from argrpo_cli.rewards import check_options, check_reward, load_reward
from argrpo_cli.rewards.base import Needs
from argrpo_cli.rewards.geneval2 import GenEval2
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from tests.rewards.judge.fake_server import FakeServer
from tests.rewards.judge.tiny_vlm import tiny_qwen3

MODEL = GenEval2.published
CAPTION = Condition("a photo of a red dog")
WORDS = ["Yes", "yes", " yes", "one", " one", "One"]  # " Yes" and " One" begin with a space, and "1" is a byte


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """The benchmark's judge in miniature, which has some variants as tokens of their own."""
    path = tmp_path_factory.mktemp("vlm")
    for part in tiny_qwen3(WORDS):
        part.save_pretrained(path)
    return GenEval2(model=str(path))


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (3, 3, 56, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_first_token_rule_sums_what_variants_begin_with_and_the_exact_one_does_not(reward, images):
    question = Question("How many dogs are in the image?", "one", "count")
    ((got,),) = reward.ask(images[:1], [[question]])
    local, tokenizer = reward.local, reward.local.processor.tokenizer
    text = local._chat(("", "How many dogs are in the image? Answer in one word."))
    shares = local.model(**local._inputs([images[0].permute(1, 2, 0).numpy()], [text])).logits[0, -1].softmax(-1)
    share = {word: shares[tokenizer.encode(word)[0]].item() for word in ("one", "One", " one", " ", "1")}
    assert tokenizer.encode(" One")[0] == tokenizer.encode(" 1")[0] == tokenizer.encode(" ")[0], "the case at hand"
    published = share["one"] + share["One"] + share[" one"] + 2 * share[" "] + share["1"]
    assert got.published == pytest.approx(published, rel=1e-4)
    assert got.exact == pytest.approx(published - 2 * share[" "], rel=1e-4) and share[" "] > 1e-6
    assert got.likeliest == (tokenizer.decode([int(shares.argmax())]).lower() in variants("one"))


def test_a_batch_of_questions_gives_what_each_gives_alone(reward, images):
    conditions = [Condition("a photo of two dogs"), CAPTION, Condition("a photo of a red dog and a blue cat")]
    asked = [find_item(one.prompt).questions for one in conditions]
    together = reward.ask(images, asked)
    for image, own, answers in zip(images, asked, together, strict=True):
        alone = [reward.ask(image[None], [[one]])[0][0] for one in own]
        assert [one.exact for one in answers] == pytest.approx([one.exact for one in alone], rel=1e-3)
    assert [len(own) for own in together] == [2, 3, 6] and len({one.exact for one in together[2]}) == 6
    scores = reward.score(images, conditions)
    assert scores.tolist() == pytest.approx([gmean([one.exact for one in own]) for own in together], rel=1e-3)
    assert scores.dtype == torch.float32 and reward.failures == 0


def test_a_tokenizer_without_the_answer_as_a_token_is_refused(reward, images):
    with pytest.raises(UserError, match="geneval2: in this model's tokenizer 'seven hundred' is not one token"):
        reward.ask(images[:1], [[Question("How many?", "seven hundred", "count")]])


def listed(**shares: float):
    """A server's response with these next tokens."""
    top = [{"token": word.replace("_", " "), "logprob": math.log(share)} for word, share in shares.items()]
    return {"choices": [{"message": {"content": "?"}, "logprobs": {"content": [{"top_logprobs": top}]}}]}


def grey(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)


def scripted(body):
    """How many dogs: one with 0.5 + 0.25 + 0.125; red: 0.64; any: 1."""
    text = body["messages"][0]["content"][-1]["text"]
    if text.startswith("How many"):
        return listed(one=0.5, **{"1": 0.25, "_One": 0.125, "two": 0.125})
    return listed(Yes=0.6, yes=0.04, No=0.36) if "red" in text else listed(Yes=1.0)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("ARGRPO_JUDGE_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with FakeServer(models={"data": [{"id": MODEL}]}) as running:
        running.whole = dict.fromkeys(range(256), scripted)
        yield running


def of_server(server, **options):
    return GenEval2(backend="server", url=server.url, backoff=0.001, **options)


def test_a_servers_likeliest_tokens_are_summed_once_each(server):
    scores = of_server(server).score(grey(7, 8), [CAPTION] * 2)
    assert scores.tolist() == pytest.approx([gmean([0.875, 0.64, 1.0])] * 2)
    mean = of_server(server, mean="arithmetic").score(grey(7), [CAPTION])
    assert mean.item() == pytest.approx((0.875 + 0.64 + 1.0) / 3)
    body = server.bodies[7][0]
    assert (body["max_tokens"], body["temperature"], body["logprobs"], body["top_logprobs"]) == (1, 0, True, 20)
    assert "top_k" not in body and body["messages"][0]["content"][-1]["text"].endswith(" Answer in one word.")


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("429", "answers 429"),
        ("500", "answers 500"),
        ("dropped", "the connection was dropped"),
        ("html", "not JSON"),
        ("invalid json", "not JSON"),
        ("Yes", "has no top_logprobs"),
    ],
)
def test_a_fault_is_tried_again_and_then_a_missing_score(server, fault, why, monkeypatch):
    monkeypatch.setattr("argrpo_cli.rewards.judge.server.retry_after", lambda headers: 0.0)
    server.script = {7: [fault], 8: [fault] * 2}
    judge = of_server(server, attempts=2, concurrency=1)
    scores = judge.score(grey(7, 8), [CAPTION] * 2).tolist()
    assert scores[0] == pytest.approx(gmean([0.875, 0.64, 1.0])) and math.isnan(scores[1])
    assert judge.failures == 1 and why in judge.last_error
    assert server.attempts == {7: 4, 8: 4}, "the failed question again, the others once"


def test_what_the_likeliest_tokens_leave_open_is_missing_and_what_they_exclude_is_zero(server):
    server.whole = {7: listed(No=0.5, Maybe=0.2), 8: listed(No=0.99, Maybe=0.001)}
    judge = of_server(server)
    assert math.isnan(judge.score(grey(7), [CAPTION]).item()) and "leave 0.30 for 'one' unlisted" in judge.last_error
    ((got,),) = judge.ask(grey(8), [[holistic("a dog")]])
    assert got.exact == got.published == 0.0 and not got.likeliest and got.reason == ""
    server.whole = {9: listed(YES=0.59, Yes=0.3, _yes=0.1, Maybe=0.001)}
    ((got,),) = of_server(server).ask(grey(9), [[holistic("a dog")]])
    assert got.exact == pytest.approx(0.4), "YES is no variant"


def test_questions_may_come_from_a_file_and_prompts_without_any_are_refused(tmp_path, server):
    line = {
        "prompt": "a dog in a hat",
        "atom_count": 2,
        "vqa_list": [["Is there a red hat?", "Yes"]],
        "skills": ["object"],
    }
    (tmp_path / "own.jsonl").write_text(json.dumps(line) + "\n")
    judge = of_server(server, questions=tmp_path / "own.jsonl")
    judge.check([Condition("a dog in a hat"), CAPTION])
    assert judge.score(grey(7), [Condition("a dog in a hat")]).item() == pytest.approx(0.64)
    with pytest.raises(UserError, match="GenEval has no such prompt: 'a hat in a dog'"):
        judge.check([Condition("a hat in a dog")])


# the nano detector


def found(name, score, color="red", box=(0.0, 0.0, 10.0, 10.0)):
    colors = tuple(0.9 if one == color else 0.1 / 7 for one in NANO_COLORS)
    return Found(name, box, score, color, colors)


def ask(objects, text, word="Yes"):
    return answer(objects, Question(text, word, "object"))


def test_the_number_of_objects_is_poisson_binomial():
    scores = [0.9, 0.8, 0.1]
    assert count_distribution(scores) == pytest.approx(poisson_binom(scores).pmf([0, 1, 2, 3]))
    assert count_distribution([]) == [1.0]
    dogs = [found("dog", score) for score in scores] + [found("cat", 1.0)]
    two = ask(dogs, "How many dogs are in the image?", "two")
    assert two.exact == two.published == pytest.approx(0.9 * 0.8 * 0.9 + 0.1 * 0.1 * 0.8 + 0.9 * 0.2 * 0.1)
    assert two.likeliest and not ask(dogs, "How many dogs are in the image?", "one").likeliest
    assert ask(dogs, "How many dogs are in the image?", "four").exact == 0.0


def test_objects_colours_and_places():
    objects = [found("dog", 0.8), found("dog", 0.4, "blue"), found("cat", 0.9, box=(0.0, 40.0, 10.0, 50.0))]
    assert ask(objects, "Are there any dogs in the image?").exact == 0.8
    red = 0.8 * (0.8 * 0.9 + 0.4 * 0.1 / 7) / 1.2
    assert (
        ask(objects, "Is the dog red?").exact == pytest.approx(red) and not ask(objects, "Are the dogs red?").likeliest
    )
    assert ask(objects, "Is the dog above the cat?").exact == pytest.approx(0.72)
    assert ask(objects, "Is the cat above the dog?").exact == ask(objects, "Is the cat above the bird?").exact == 0.0
    assert ask([], "Is the dog red?") == (0.0, 0.0, False, "")


def test_it_can_be_asked_what_nano_prompts_ask_and_nothing_else():
    for item in nano_items():
        for question in item.questions:
            check_question(question)
    with pytest.raises(UserError, match="the nano detector cannot be asked 'Is the dog happy\\?' \\(Yes\\)"):
        ask([], "Is the dog happy?")
    with pytest.raises(UserError, match="give another judge"):
        GenEval2(backend="nano").check([Condition("a photo of a toaster")])


def test_scenes_answer_their_own_prompts_and_not_those_of_others():
    tokens, conditions = load_held_out("captions")
    images, conditions = decode(load_tokenizer(), tokens[:24]), conditions[:24]
    nano = load_reward("geneval2", options={"backend": "nano"})
    own, others = nano.score(images, conditions), nano.score(images, conditions[1:] + conditions[:1])
    assert own.mean() > 0.75 and others.mean() < 0.1 and not nano.remote


def test_what_it_needs():
    reward = check_reward("geneval2")
    assert reward.needs({"backend": "nano"}) == Needs()
    assert reward.needs({"backend": "server", "url": "http://x/v1"}).server
    here = reward.needs({})
    assert here.network == MODEL and here.weights is None and here.files[0].repo == MODEL


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"backend": "nano", "url": "http://x/v1"}, "backend is 'nano' and url given"),
        ({"backend": "nano", "model": "x"}, "backend is 'nano' and model given"),
        ({"backend": "detector"}, "backend 'detector' is unknown; there are local, server, nano"),
        ({"mean": "harmonic"}, "mean 'harmonic' is unknown; there are geometric, arithmetic"),
    ],
)
def test_options_that_are_none(options, why):
    with pytest.raises(UserError, match=why):
        check_options("geneval2", options)
