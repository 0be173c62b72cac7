"""The nano benchmark: what it measures, paired, on the bundled models; small samples."""

from __future__ import annotations

import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from argrpo_cli.evals import fidelity, nano
from argrpo_cli.evals.nano_table import table
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.llamagen.entropy import token_entropy
from argrpo_cli.shapes import Sampling
from argrpo_cli.system.errors import UserError

N = 48
PER_REWARD = {"nano-clip", "nano-quality", "nano-critic", "total_reward"}
PER_SAMPLE = {"match", "match_at_size", "size", "mirrored", "recognised"} | PER_REWARD
PER_SET = {"inception_score", "fid", "sfid", "fid_corrected", "sfid_corrected"}
PER_POLICY = PER_SAMPLE | PER_SET | {"precision", "recall", "diversity", "entropy", "entropy_guided"}


@pytest.fixture(scope="module")
def results():
    """The bundled policy against itself, and alone in other batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nano, "UNSEEN_SCENES", 48)
        pair = nano.evaluate(["nano-c2i", "nano-c2i"], nano.Sampling(N), device="cpu")
        alone = nano.evaluate(["nano-c2i"], nano.Sampling(N), batch_size=17, device="cpu")
    return pair, alone


def test_every_measure_has_a_mean_and_an_error(results):
    pair, alone = results
    assert set(alone["policies"]["nano-c2i"]) == PER_POLICY
    assert set(alone["real"]) == PER_SAMPLE | PER_SET
    for value in alone["policies"]["nano-c2i"].values():
        assert math.isfinite(value["mean"]) and value["error"] >= 0
    assert "difference" not in alone and set(pair["difference"]) == PER_POLICY
    assert alone["weights"] == {"nano-c2i": load_policy("nano-c2i").fingerprint()} and "torch" in alone["versions"]


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
    assert real["inception_score"]["mean"] > policy["inception_score"]["mean"] + 1
    assert real["fid"]["mean"] < policy["fid"]["mean"] / 2 and real["sfid"]["mean"] < policy["sfid"]["mean"]
    for name in ("nano-clip", "nano-quality", "nano-critic"):
        assert real[name]["mean"] > policy[name]["mean"], name


def test_the_total_is_the_weighted_sum(results):
    _, alone = results
    means = alone["policies"]["nano-c2i"]
    total = sum(weight * means[name]["mean"] for name, weight in alone["reward_weights"].items())
    assert means["total_reward"]["mean"] == pytest.approx(total, abs=1e-4)
    assert set(alone["within_class_std"]) == PER_REWARD
    assert all(spread > 0 for spread in alone["within_class_std"].values())


def test_guidance_sharpens_the_policy(results):
    means = results[1]["policies"]["nano-c2i"]
    assert 0 < means["entropy_guided"]["mean"] < means["entropy"]["mean"] < math.log(1024)


def test_the_result_is_plain_json_and_a_table(results):
    pair, _ = results
    assert json.loads(json.dumps(pair)) == pair
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(pair))
    text = console.export_text()
    for word in (
        "rendering match",
        "match given class and size",
        "mirrored",
        "within-class sd, nano-clip",
        "recognised",
        "inception score",
        "sFID",
        "biased upwards",
        "difference",
        "real scenes",
        "codebook in use",
    ):
        assert word in text


def test_entropy_equals_the_definition():
    policy = load_policy("nano-c2i")
    encoded = policy.encode(policy.conditions([3, 9]))
    tokens = policy.sample(encoded, Sampling(), [0, 1]).tokens
    entropy = token_entropy(policy, tokens, policy.conditions([3, 9]), None, 1.0).mean(1)
    with torch.inference_mode():
        p = policy.model.logits(encoded, tokens).softmax(-1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1).mean(1), atol=1e-4, rtol=1e-4)


def test_guided_entropy_equals_the_definition():
    policy, (s, t) = load_policy("nano-c2i"), (2.0, 0.8)
    encoded = policy.encode(policy.conditions([3, 9]))
    tokens = policy.sample(encoded, Sampling(), [0, 1]).tokens
    entropy = token_entropy(policy, tokens, policy.conditions([3, 9]), s, t).mean(1)
    with torch.inference_mode():
        null = policy.encode(policy.conditions([3, 9]), torch.tensor([True, True]))
        c, u = (policy.model.logits(one, tokens) for one in (encoded, null))
        p = ((u + s * (c - u)) / t).softmax(-1)
    torch.testing.assert_close(entropy, -torch.special.xlogy(p, p).sum(-1).mean(1), atol=1e-4, rtol=1e-4)


def test_the_difference_is_trained_minus_base_in_units_of_the_base(monkeypatch):
    ids = torch.arange(N) % 24
    noise = torch.randn(N, generator=torch.Generator().manual_seed(0))
    known = {  # the trained policy is better and varies three times as much
        "base": {"match": noise, "precision": noise > 0, "nano-clip": noise, nano.TOTAL: 2 * noise},
        "trained": {"match": noise + 5, "precision": noise > -1, "nano-clip": 3 * noise + 1, nano.TOTAL: 6 * noise + 4},
    }
    known = {name: {key: v.float() for key, v in values.items()} for name, values in known.items()}
    monkeypatch.setattr(nano, "open_nano_policy", lambda path, device: SimpleNamespace(fingerprint=lambda: path))
    monkeypatch.setattr(nano.Bench, "real_values", lambda bench, with_classes=True: {"match": torch.ones(2)})
    monkeypatch.setattr(nano.Bench, "policy_values", lambda bench, policy, *rest: known[policy.fingerprint()])
    monkeypatch.setattr(nano, "measure_tokenizer", lambda *rest: {"psnr": 1.0, "codebook_used": 1.0, "note": ""})
    result = nano.evaluate(["trained", "base"], nano.Sampling(N), device="cpu", weights={"nano-clip": 2.0})
    for key, of_base in known["base"].items():
        change = known["trained"][key] - of_base
        assert result["difference"][key]["mean"] == pytest.approx(change.mean().item(), abs=1e-6), key
        assert result["difference"][key]["error"] == pytest.approx(change.std().item() / N**0.5, abs=1e-6), key
    spread = torch.stack([noise[ids == one].std() for one in range(24)]).mean().item()
    assert result["within_class_std"] == pytest.approx({"nano-clip": spread, nano.TOTAL: 2 * spread})
    change = (4 * noise + 4).mean().item() / (2 * spread)
    assert f"changed by {change:+.2f} within-class" in table(result).caption


class Replayed:
    """Stands for a policy whose samples are the judge's own reference scenes."""

    text_encoder = None

    def __init__(self, judge):
        self.judge, self.drawn = judge, 0

    def conditions(self, ids):
        return ids

    def sample(self, conditions, **settings):
        self.drawn += len(conditions)
        return self.judge.reference_tokens[self.drawn - len(conditions) : self.drawn]

    def decode(self, tokens):
        return self.judge.reference_images[: len(tokens)]


class NoRewards:
    def score(self, images, conditions, batch_size):
        return {"nano-clip": torch.zeros(len(images))}


def test_precision_is_of_samples_and_recall_of_the_set(monkeypatch):
    judge = nano.load_judge()
    monkeypatch.setattr(nano, "token_entropy", lambda policy, tokens, *rest: torch.ones(len(tokens), 64))
    sampling, ids = nano.Sampling(N, cfg_scale=1.0), judge.reference_classes[:N]
    assert torch.equal(sampling.class_ids, ids)
    monkeypatch.setattr(nano, "load_rewards", lambda names, device: NoRewards())
    bench = nano.Bench(judge, {"nano-clip": 1.0}, batch_size=17)
    values = bench.policy_values(Replayed(judge), sampling, "replayed")
    assert len(values["precision"]) == N and values["precision"].all(), "every sample is a reference scene"
    covered = fidelity.precision_recall(judge.reference_features[:N], judge.reference_features)[1]
    assert covered[:N].all()
    assert len(values["recall"]) == 20
    assert values["recall"].mean().item() == pytest.approx(covered.double().mean().item())
    found = judge.reference_match
    torch.testing.assert_close(values["match"], found.db[:N])
    torch.testing.assert_close(values["size"], found.size[:N].float())
    torch.testing.assert_close(values["mirrored"], found.mirror[:N].float())
    expected = judge.expected_db(ids, found.size[:N])
    torch.testing.assert_close(values["match_at_size"], found.db[:N] - expected)
    assert abs(values["match_at_size"].mean()) < 0.5


def test_a_seed_that_reaches_the_critics_training_samples_is_refused(monkeypatch):
    class Reached(Exception):
        pass

    def reach(name):
        raise Reached

    monkeypatch.setattr(nano, "resolve_device", reach)
    with pytest.raises(Reached):
        nano.evaluate(["nano-c2i"], nano.Sampling(99_999, seed=489))
    for seed, n in ((490, N), (489, 100_000), (-1, N)):
        with pytest.raises(UserError, match=f"seed {seed} is out of range"):
            nano.evaluate(["nano-c2i"], nano.Sampling(n, seed=seed))


def test_the_missing_font_is_said_not_raised(monkeypatch):
    monkeypatch.setattr(nano.scenes, "_FONT_PLACES", ())
    monkeypatch.delenv("NANO_EMOJI_FONT", raising=False)
    judge = nano.load_judge()
    measured = nano.measure_tokenizer(judge.tokenizer, judge.reference_tokens, 0)
    assert measured["psnr"] is None and "font" in measured["note"]
    assert measured["codebook_used"] >= 0.8


def test_too_few_samples_and_too_many_policies_are_refused():
    with pytest.raises(UserError, match="47 samples"):
        nano.evaluate(["nano-c2i"], nano.Sampling(47))
    with pytest.raises(UserError, match="3 policies"):
        nano.evaluate(["nano-c2i"] * 3)
