"""DeQA-Score: what is asked, and the score in what comes back."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from argrpo_cli.rewards.judge.deqa import Deqa, build_request, expected_level, score_of, squared
from argrpo_cli.rewards.judge.server import data_url
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import to_pil
from tests.rewards.judge.fake_server import FakeServer

LEVELS = ["excellent", "good", "fair", "poor", "bad"]


def reply(logprobs: dict[str, float]) -> dict:
    """A server's reply with these next tokens, the likeliest first."""
    top = [{"token": token, "logprob": value} for token, value in sorted(logprobs.items(), key=lambda one: -one[1])]
    first = {**top[0], "top_logprobs": top} if top else {"token": "", "logprob": 0.0, "top_logprobs": []}
    return {"choices": [{"message": {"content": first["token"]}, "logprobs": {"content": [first]}}]}


def test_expectation_over_the_levels_alone():
    shares = dict(zip(LEVELS, (0.5, 0.25, 0.125, 0.1, 0.025), strict=True))
    expected = 5 * 0.5 + 4 * 0.25 + 3 * 0.125 + 2 * 0.1 + 1 * 0.025
    assert expected_level({k: math.log(v) for k, v in shares.items()}) == pytest.approx(expected, abs=1e-12)
    halved = {k: math.log(v / 2) for k, v in shares.items()} | {"nice": math.log(0.5)}
    assert score_of(reply(halved)) == pytest.approx(expected, abs=1e-12)


def test_it_is_the_softmax_of_logits_times_the_weights():
    logits = torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    expected = logits.softmax(-1) @ torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    scores = [expected_level(dict(zip(LEVELS, row.tolist(), strict=True))) for row in logits]
    assert scores == pytest.approx(expected.tolist(), abs=1e-12)


def test_extreme_logits_do_not_overflow():
    assert expected_level({"good": 5000.0, "bad": -5000.0}) == 4.0
    assert score_of(reply({"good": -9000.0, **dict.fromkeys(["excellent", "fair", "poor", "bad"], -9999.0)})) == 4.0
    with pytest.raises(ValueError, match="no log-probability"):
        expected_level({"good": -math.inf})


@pytest.mark.parametrize("mark", ["", " ", "▁", "Ġ"])
def test_tokens_are_known_with_their_mark_of_a_word(mark):
    logprobs = {f"{mark}{level}": math.log(0.2) for level in LEVELS}
    assert score_of(reply(logprobs)) == pytest.approx(3.0)


def test_of_two_tokens_for_one_level_the_likelier_counts():
    logprobs = {" good": -0.1, "good": -9.0, " bad": -3.0, "excellent": -12.0, "fair": -12.0, "poor": -12.0}
    assert score_of(reply(logprobs)) == pytest.approx(expected_level({"good": -0.1, "bad": -3.0}), abs=1e-3)


def test_an_unlisted_level_is_left_out_only_where_it_hardly_counts():
    listed = {"good": math.log(0.9), "fair": math.log(0.09)}
    assert score_of(reply(listed | {"a": math.log(1e-4)})) == pytest.approx((4 * 0.9 + 3 * 0.09) / 0.99)
    with pytest.raises(ValueError, match="only good, fair among the 3 likeliest"):
        score_of(reply(listed | {"a": math.log(0.01)}))


@pytest.mark.parametrize(
    "broken",
    [
        {},
        [],
        {"choices": []},
        {"choices": [{"logprobs": None}]},
        {"choices": [{"logprobs": {"content": []}}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": None}]}}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": 3, "logprob": 0}]}]}}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "good", "logprob": "x"}]}]}}]},
        reply({"nice": -0.1}),
        reply({}),
        *(reply(dict.fromkeys(LEVELS, -1.0) | {"good": value}) for value in (math.nan, math.inf, 3.0, 10**400)),
    ],
)
def test_a_reply_without_a_score_is_an_error_and_never_a_number(broken):
    with pytest.raises(ValueError):
        score_of(broken)


def test_the_request_is_the_published_prompt():
    request = build_request("data:image/png;base64,AAAA")
    user, assistant = request["messages"]
    assert [part["type"] for part in user["content"]] == ["text", "image_url"]
    assert user["content"][0]["text"] == "How would you rate the quality of this image?"
    assert user["content"][1]["image_url"] == {"url": "data:image/png;base64,AAAA"}
    assert assistant == {"role": "assistant", "content": "The quality of the image is"}
    assert (request["max_tokens"], request["temperature"]) == (1, 0)
    assert (request["logprobs"], request["top_logprobs"]) == (True, 20)
    assert (request["continue_final_message"], request["add_generation_prompt"]) == (True, False)


def test_images_travel_as_square_png():
    image = torch.randint(0, 256, (3, 4, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    head, data = data_url(squared(to_pil(image[None])[0])).split(",")
    assert head == "data:image/png;base64"
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert pixels.shape == (9, 9, 3)
    assert (pixels[2:6] == image.permute(1, 2, 0).numpy()).all()
    assert (pixels[:2] == (122, 116, 104)).all()
    assert (pixels[6:] == (122, 116, 104)).all()


def test_scores_by_a_server_come_in_order_and_what_is_missing_is_nan():
    """Each image is of one grey, by which the server knows it; see `fake_server`."""
    sharp = {"good": -0.001, "bad": -9.0, "fair": -20.0, "poor": -20.0, "excellent": -20.0}
    with FakeServer(models={"data": [{"id": "m"}]}) as server:
        server.whole = {7: reply(sharp), 8: reply({"a": -0.1, "the": -3.0})}
        server.script = {9: ["500", "500", "500"]}
        deqa = Deqa(url=server.url, model="m", backoff=0.001)
        images = torch.tensor([7, 8, 9, 7], dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
        scores = deqa.score(images, [Condition("")] * 4)
    assert scores.dtype == torch.float32 and deqa.remote
    assert scores[[0, 3]].tolist() == pytest.approx([4.0, 4.0], abs=1e-3)
    assert scores[1:3].isnan().all() and deqa.failures == 2
    assert "500" in deqa.last_error and "attempt 3 of 3" in deqa.last_error
    assert len(server.bodies[8]) == 3, "asked again"
    assert (
        server.bodies[7][0]["top_logprobs"] == 20
        and server.bodies[7][0]["model"] == "m"
        and "top_p" not in server.bodies[8][2]
    )


def test_without_a_server_it_says_so():
    with pytest.raises(UserError, match="deqa: url is missing"):
        Deqa()
