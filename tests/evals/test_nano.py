"""The nano benchmark: what it measures, paired, on the bundled models; small samples."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from argrpo_cli import seeds
from argrpo_cli.evals import fidelity, nano
from argrpo_cli.evals.nano import Nano, run_nano
from argrpo_cli.evals.statistics import class_groups, mean_of
from argrpo_cli.evals.tables import table
from argrpo_cli.nano.judge import load_judge
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.protocol import Drawn, Scored
from argrpo_cli.shapes import Condition, Result, Sampling
from argrpo_cli.system.errors import UserError
from tests.evals.entropies import entropy_of
from tests.training.tiny import tiny_policy

N = 48
PER_REWARD = {"nano-clip", "nano-quality", "nano-critic", "total_reward"}
PER_SAMPLE = {"match", "match_at_size", "size", "mirrored", "recognised"} | PER_REWARD
PER_SET = {"inception_score", "fid", "sfid", "fid_corrected", "sfid_corrected"}
PER_POLICY = PER_SAMPLE | PER_SET | {"precision", "recall", "coverage", "diversity", "vendi"}
PER_POLICY |= {"entropy", "entropy_guided"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The bundled policy against a copy of itself."""
    copy = tmp_path_factory.mktemp("policy") / "copy"
    load_policy("nano-c2i").save(copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nano, "UNSEEN_SCENES", 48)
        return run_nano(["nano-c2i", str(copy)], n=N, device="cpu")


def values(result: Result, row: str = "nano-c2i") -> dict[str, float]:
    return {key: one.value for key, one in result.rows[row].items()}


def test_every_measure_has_a_value_and_an_error(pair):
    assert set(values(pair)) == set(pair.difference) == PER_POLICY
    assert set(values(pair, nano.REAL)) == PER_SAMPLE | PER_SET
    for value in pair.rows["nano-c2i"].values():
        assert math.isfinite(value.value) and value.error >= 0
    assert pair.protocol["measured"]["nano-c2i"]["weights"] == load_policy("nano-c2i").fingerprint()
    assert pair.departures == [] and "torch" in pair.protocol["versions"]


def test_a_policy_does_not_differ_from_itself(pair):
    assert all(one.value == 0 and one.error == 0 for one in pair.difference.values())


def test_real_scenes_beat_samples(pair):
    policy, real = values(pair), values(pair, nano.REAL)
    assert real["match"] > policy["match"] + 2
    assert real["recognised"] > 0.97
    assert real["inception_score"] > policy["inception_score"] + 1
    assert real["fid"] < policy["fid"] / 2 and real["sfid"] < policy["sfid"]
    for name in ("nano-clip", "nano-quality", "nano-critic"):
        assert real[name] > policy[name], name


def test_the_total_is_the_weighted_sum(pair):
    means = values(pair)
    total = sum(weight * means[name] for name, weight in pair.protocol["reward_weights"].items())
    assert means["total_reward"] == pytest.approx(total, abs=1e-4)
    assert set(pair.protocol["within_class_std"]) == PER_REWARD
    assert all(spread > 0 for spread in pair.protocol["within_class_std"].values())


def test_guidance_sharpens_the_policy(pair):
    means = values(pair)
    assert 0 < means["entropy_guided"] < means["entropy"] < math.log(1024)


def test_the_result_is_a_table(pair):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(pair, 160))
    text = " ".join(console.export_text().split())
    for word in (
        "rendering match",
        "match given class and size",
        "mirrored",
        "within-class sd: nano-clip",
        "recognised",
        "inception score",
        "sFID",
        "biased upwards",
        "difference",
        "real scenes",
        "codebook in use",
    ):
        assert word in text, word


def test_an_interrupted_evaluation_goes_on_beside_its_file(tmp_path, monkeypatch):
    """Two of three batches were drawn; the third alone is drawn then, and what is drawn is gone at the end. What comes
    out is that of one that went through, and nearly that of one in other batches."""
    policy = str(tmp_path / "tiny")
    tiny_policy(names=nano.scenes.CLASS_NAMES, image_size=nano.scenes.IMAGE_SIZE).save(policy)
    results = tmp_path / "results"
    results.mkdir()
    drawn, draw = [], nano.draw_batch
    monkeypatch.setattr(nano, "UNSEEN_SCENES", 48)

    def interrupted(policy, batch, sampling):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(len(batch))
        return draw(policy, batch, sampling)

    monkeypatch.setattr(nano, "draw_batch", interrupted)
    options = {"n": N, "batch_size": 20, "device": "cpu", "weights": {"nano-quality": 1.0}}
    with pytest.raises(KeyboardInterrupt):
        run_nano([policy], file=results / "one.json", **options)
    assert [path.name for path in results.iterdir()] == ["one.json.parts"]
    monkeypatch.setattr(nano, "draw_batch", lambda *call: drawn.append(len(call[1])) or draw(*call))
    run_nano([policy], file=results / "one.json", **options)
    assert drawn == [20, 20, 8] and [path.name for path in results.iterdir()] == ["one.json"]
    whole = run_nano([policy], file=results / "whole.json", **options)
    assert (results / "one.json").read_bytes() == (results / "whole.json").read_bytes()
    name, other = next(iter(whole.rows)), run_nano([policy], **options | {"batch_size": 17})
    assert values(other, name) == pytest.approx(values(whole, name), abs=2e-3)
    assert not whole.difference


def test_entropy_equals_the_definition():
    policy = load_policy("nano-c2i")
    encoded = policy.encode(policy.conditions([3, 9]))
    tokens = policy.sample(encoded, Sampling(), [0, 1]).tokens
    entropy = entropy_of(policy, tokens, policy.conditions([3, 9]), None, 1.0).mean(1)
    with torch.inference_mode():
        p = policy.model.logits(encoded, tokens).softmax(-1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1).mean(1), atol=1e-4, rtol=1e-4)


def test_guided_entropy_equals_the_definition():
    policy, (s, t) = load_policy("nano-c2i"), (2.0, 0.8)
    encoded = policy.encode(policy.conditions([3, 9]))
    tokens = policy.sample(encoded, Sampling(), [0, 1]).tokens
    entropy = entropy_of(policy, tokens, policy.conditions([3, 9]), s, t).mean(1)
    with torch.inference_mode():
        null = policy.encode(policy.conditions([3, 9]), torch.tensor([True, True]))
        c, u = (policy.model.logits(one, tokens) for one in (encoded, null))
        p = ((u + s * (c - u)) / t).softmax(-1)
    torch.testing.assert_close(entropy, -torch.special.xlogy(p, p).sum(-1).mean(1), atol=1e-4, rtol=1e-4)


def test_a_policy_without_guidance_has_one_entropy(tmp_path):
    policy, nano_world = load_policy("nano-c2i"), Nano()
    shots = nano_world.shots(policy, 48, 0)[:3]
    one = nano.Subject("p", "p", tmp_path, tmp_path, shots, policy.card, {}, Sampling(cfg_scale=1.0))
    nano_world.gather(policy, one, 3, nano.ALONE)
    plain, guided = (nano._store(one).column([shots], key) for key in (nano.ENTROPY, nano.GUIDED_ENTROPY))
    assert torch.equal(plain, guided) and plain.shape == (3,) and plain.min() > 0


def test_the_difference_is_trained_minus_base_in_units_of_the_base(monkeypatch):
    ids = torch.arange(N) % 24
    noise = torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = {  # the trained policy is better and varies three times as much
        "base": {"match": noise, "precision": noise > 0, "nano-clip": noise, nano.TOTAL: 2 * noise},
        "trained": {"match": noise + 5, "precision": noise > -1, "nano-clip": 3 * noise + 1, nano.TOTAL: 6 * noise + 4},
    }
    known = {name: {key: v.double() for key, v in measured.items()} for name, measured in known.items()}

    def measure(self, subject):
        self.measured[subject.name] = {key: mean_of(one) for key, one in known[subject.name].items()}
        return self.measured[subject.name]

    card = load_policy("nano-c2i").card
    conditions = [Condition("", index) for index in range(24)]
    stand_in = lambda path, *rest: SimpleNamespace(card=card, fingerprint=lambda: path, conditions=lambda _: conditions)  # noqa: E731
    monkeypatch.setattr("argrpo_cli.policy.load_policy", stand_in)
    monkeypatch.setattr(Nano, "gather", lambda *call: None)
    monkeypatch.setattr(Nano, "_measure", measure)
    monkeypatch.setattr(Nano, "references", lambda self: {nano.REAL: {"match": mean_of(torch.ones(2))}})
    monkeypatch.setattr(nano, "measure_tokenizer", lambda *rest: {"psnr": 1.0, "codebook_used": 1.0, "note": ""})
    result = run_nano(["trained", "base"], n=N, device="cpu", weights={"nano-clip": 2.0})
    for key, of_base in known["base"].items():
        change = known["trained"][key] - of_base
        assert result.difference[key].value == pytest.approx(change.mean().item(), abs=1e-6), key
        assert result.difference[key].error == pytest.approx(change.std().item() / N**0.5, abs=1e-6), key
    spread = torch.stack([noise[ids == one].std() for one in range(24)]).mean().item()
    assert result.protocol["within_class_std"] == pytest.approx({"nano-clip": spread, nano.TOTAL: 2 * spread})
    change = (4 * noise + 4).mean().item() / (2 * spread)
    assert f"changed by {change:+.2f} within-class" in table(result).caption


class Replayed:
    """Stands for a policy whose samples are the judge's own reference scenes."""

    def __init__(self, judge):
        self.judge, self.card = judge, replace(load_policy("nano-c2i").card, name="replayed")

    def conditions(self, ids):
        return [Condition("", index) for index in ids]

    def encode(self, conditions):
        return conditions

    def sample(self, encoded, sampling, seeds):
        self.places = [seed - 1_000_000 for seed in seeds]
        return Drawn(self.judge.reference_tokens[self.places], None)

    def decode(self, tokens, size=None):
        return self.judge.reference_images[self.places]


class NoRewards:
    def score(self, images, conditions, batch_size):
        return {"nano-clip": torch.zeros(len(images))}


def test_precision_is_of_samples_and_recall_of_the_set(tmp_path, monkeypatch):
    judge = load_judge()
    entropies = lambda policy, conditions, tokens, sampling: Scored(None, torch.ones(len(tokens), 64))  # noqa: E731
    monkeypatch.setattr(nano, "score_tokens", entropies)
    monkeypatch.setattr(nano, "load_rewards", lambda names, device: NoRewards())
    monkeypatch.setattr(nano, "recipe_weights", lambda: {"nano-clip": 1.0})
    ids = judge.reference_classes[:N]
    assert torch.equal(torch.arange(N) % 24, ids)
    measures = nano.measure_policy(Replayed(judge), N, Sampling(cfg_scale=1.0), 0, tmp_path / "replayed", 17)
    precise = measures["precision"].values
    assert len(precise) == N and precise.all(), "every sample is a reference scene"
    covered = fidelity.precision_recall(judge.reference_features[:N], judge.reference_features)[1]
    assert covered[:N].all()
    assert len(measures["recall"].strata[0]) == 20
    assert measures["recall"].value == pytest.approx(covered.double().mean().item())
    two = torch.nn.functional.normalize(judge.reference_features[[0, 24]].double(), dim=1)  # scenes of one class
    shares = torch.tensor([1 + two[0] @ two[1], 1 - two[0] @ two[1]]) / 2  # the eigenvalues of [[1, c], [c, 1]] / 2
    assert N == 48 and measures["vendi"].values[0].item() == pytest.approx((-shares * shares.log()).sum().exp().item())
    match = judge.reference_match
    for key, expected in (("match", match.db), ("size", match.size), ("mirrored", match.mirror)):
        torch.testing.assert_close(measures[key].values.float(), expected[:N].float())
    expected = match.db[:N] - judge.expected_db(ids, match.size[:N])
    torch.testing.assert_close(measures["match_at_size"].values.float(), expected)
    assert abs(measures["match_at_size"].value) < 0.5
    assert measures["entropy"].value == 1


def test_a_number_or_a_seed_out_of_range_is_refused_before_anything_is_drawn(monkeypatch):
    monkeypatch.setattr(Nano, "gather", lambda *call: pytest.fail("draws"))
    for seed, n in ((490, N), (-1, N)):
        with pytest.raises(UserError, match=f"--seed {seed}: give 0 to 489"):
            run_nano(["nano-c2i"], n=n, seed=seed)
    assert seeds.SPACES["nano"].least == 2 * len(nano.scenes.CLASS_NAMES) == 48
    for n in (47, 100_001):
        with pytest.raises(UserError, match=f"--n {n}: give 48 to 100000 images"):
            run_nano(["nano-c2i"], n=n)


def test_too_many_policies_and_those_of_another_world_are_refused():
    with pytest.raises(UserError, match="3 policies"):
        run_nano(["nano-c2i"] * 3)
    card = load_policy("nano-c2i").card
    for change in ({"image_size": 128}, {"names": ("dog",)}, {"reads": "captions", "words": ("a", "photo")}):
        with pytest.raises(UserError, match="does not draw the nano world's objects"):
            Nano().check(replace(card, **change))


def test_the_missing_font_is_said_not_raised(monkeypatch):
    monkeypatch.setattr(nano.scenes, "_FONT_PLACES", ())
    monkeypatch.delenv("NANO_EMOJI_FONT", raising=False)
    judge = load_judge()
    measured = nano.measure_tokenizer(judge.tokenizer, judge.reference_tokens, 0)
    assert measured["psnr"] is None and "font" in measured["note"]
    assert measured["codebook_used"] >= 0.8


def test_the_measures_are_the_metrics_on_the_judges_features():
    judge = load_judge()
    images, ids = judge.reference_images[:120].flip(-2), judge.reference_classes[:120]  # real scenes upside down
    features, spatial = judge.features(images), judge.spatial_features(images)
    measures = nano.set_measures(images, features, judge, class_groups(120, ids))
    probabilities = judge.probabilities(features)
    real, real_spatial = fidelity.Gaussian.of(judge.reference_features), fidelity.Gaussian.of(judge.reference_spatial)
    for key in ("fid", "sfid"):
        assert measures.pop(f"{key}_corrected").value < measures[key].value
    assert {key: one.value for key, one in measures.items()} == pytest.approx(
        {
            "inception_score": fidelity.inception_score(probabilities),
            "fid": fidelity.frechet_distance(fidelity.Gaussian.of(features), real),
            "sfid": fidelity.frechet_distance(fidelity.Gaussian.of(spatial), real_spatial),
        }
    )
    near = fidelity.covered(features, judge.reference_features, 5).double().mean().item()
    measures["coverage"] = nano.manifold_measures(features, judge, class_groups(120, ids))["coverage"]
    assert measures["coverage"].value == near and 0 < near < 1
    assert "coverage" not in nano.manifold_measures(features[:6], judge, class_groups(6))
    for one in measures.values():
        assert one.strata[0].shape == (20,) and 0 < one.error < 0.5 * one.value


def test_real_scenes_are_held_against_the_others():
    judge = load_judge()
    measures = nano.real_measures(judge, slice(480, 960))
    others = torch.cat([judge.reference_features[:480], judge.reference_features[960:]])
    fid = fidelity.frechet_distance(
        fidelity.Gaussian.of(judge.reference_features[480:960]), fidelity.Gaussian.of(others)
    )
    assert measures["fid"].value == pytest.approx(fid)
    assert 15 < measures["inception_score"].value < 24
