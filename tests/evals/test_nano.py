"""The nano benchmark: what it measures, paired, on the bundled models; small samples."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console

from argrpo_cli.errors import UserError
from argrpo_cli.evals import nano
from argrpo_cli.policy import load_policy

N = 48
PER_SAMPLE = {"match", "recognised", "nano-clip", "nano-quality", "nano-critic", "total_reward"}
PER_POLICY = PER_SAMPLE | {"precision", "recall", "diversity", "entropy", "entropy_guided"}


@pytest.fixture(scope="module")
def results():
    """The bundled policy against itself, and alone in other batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nano, "UNSEEN_SCENES", 48)
        pair = nano.evaluate(["nano-c2i", "nano-c2i"], n=N, device="cpu")
        alone = nano.evaluate(["nano-c2i"], n=N, batch_size=17, device="cpu")
    return pair, alone


def test_every_measure_has_a_mean_and_an_error(results):
    pair, alone = results
    assert set(alone["policies"]["nano-c2i"]) == PER_POLICY
    assert set(alone["real"]) == PER_SAMPLE
    for value in alone["policies"]["nano-c2i"].values():
        assert math.isfinite(value["mean"]) and value["error"] >= 0
    assert "difference" not in alone and set(pair["difference"]) == PER_POLICY


def test_a_policy_does_not_differ_from_itself(results):
    pair, _ = results
    assert all(value == {"mean": 0.0, "error": 0.0} for value in pair["difference"].values())


def test_the_batch_size_changes_nothing(results):
    pair, alone = results
    for key, value in alone["policies"]["nano-c2i"].items():
        assert pair["policies"]["nano-c2i"][key]["mean"] == pytest.approx(value["mean"], abs=2e-3), key


def test_real_scenes_beat_samples(results):
    _, alone = results
    policy, real = alone["policies"]["nano-c2i"], alone["real"]
    assert real["match"]["mean"] > policy["match"]["mean"] + 2
    assert real["recognised"]["mean"] > 0.97
    for name in ("nano-clip", "nano-quality", "nano-critic"):
        assert real[name]["mean"] > policy[name]["mean"], name


def test_the_total_is_the_weighted_sum(results):
    _, alone = results
    means = alone["policies"]["nano-c2i"]
    total = sum(weight * means[name]["mean"] for name, weight in alone["reward_weights"].items())
    assert means["total_reward"]["mean"] == pytest.approx(total, abs=1e-4)
    assert alone["within_class_std"] > 0


def test_guidance_sharpens_the_policy(results):
    means = results[1]["policies"]["nano-c2i"]
    assert 0 < means["entropy_guided"]["mean"] < means["entropy"]["mean"] < math.log(1024)


def test_the_result_is_plain_json_and_a_table(results):
    pair, _ = results
    assert json.loads(json.dumps(pair)) == pair
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(nano.table(pair))
    text = console.export_text()
    for word in ("rendering match", "recognised", "difference", "real scenes", "codebook in use"):
        assert word in text


def test_entropy_equals_the_definition():
    policy = load_policy("nano-c2i")
    ids = torch.tensor([3, 9])
    tokens = policy.sample(policy.conditions([3, 9]), seeds=[0, 1])
    entropy = nano.token_entropy(policy, tokens, ids, None, 1.0)
    with torch.inference_mode():
        p = policy.model(torch.cat([ids[:, None], tokens[:, :-1]], 1)).logits.softmax(-1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1).mean(1), atol=1e-4, rtol=1e-4)
    assert policy.model.guidance_scale is None, "left as it was"


def test_the_missing_font_is_said_not_raised(monkeypatch):
    monkeypatch.setattr(nano.scenes, "_FONT_PLACES", ())
    monkeypatch.delenv("NANO_EMOJI_FONT", raising=False)
    judge = nano.load_judge()
    measured = nano.measure_tokenizer(judge.tokenizer, judge.reference_tokens, 0)
    assert measured["psnr"] is None and "font" in measured["note"]
    assert measured["codebook_used"] >= 0.8


def test_too_few_samples_and_too_many_policies_are_refused():
    with pytest.raises(UserError, match="47 samples"):
        nano.evaluate(["nano-c2i"], n=47)
    with pytest.raises(UserError, match="3 policies"):
        nano.evaluate(["nano-c2i"] * 3)
