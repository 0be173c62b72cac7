"""DrawBench: a policy of random weights and rewards that measure brightness, through the real path."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from rich.console import Console
from torch import nn

from argrpo_cli.cli.app import run
from argrpo_cli.cli.evals import BENCHMARKS
from argrpo_cli.evals import benchmark as b
from argrpo_cli.evals import drawbench as d
from argrpo_cli.evals.drawbench_prompts import HUB, PromptList
from argrpo_cli.evals.statistics import mean_of
from argrpo_cli.evals.tables import table
from argrpo_cli.images import read_image
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.llamagen.policy import LlamaGen
from argrpo_cli.rewards import Reward, RewardSet, check_reward, load_rewards
from argrpo_cli.score import score_images
from argrpo_cli.shapes import Result
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_json, read_jsonl
from tests.captioned import save_captioned_policy
from tests.together import together
from tests.training.tiny import tiny_caption_policy

PROMPTS = PromptList("mine", ("a red dog", "a blue cat", "a dog"))
DIVISORS = {"clip": 1, "deqa": 5, "pickscore": 26}


class Brightness(Reward):
    """A reward between 1 and 2, so that it lies in every range that is asked for."""

    calls = 0

    def __init__(self, low: float = 1.0):
        self.network, self.low = nn.Linear(1, 1), low
        nn.init.constant_(self.network.weight, low)
        nn.init.zeros_(self.network.bias)

    def score(self, images, conditions):
        Brightness.calls += len(images)
        return self.low + images.float().mean(dim=(1, 2, 3)) / 255


class Offline(Brightness):
    def score(self, images, conditions):
        raise UserError("the server does not answer")


class Silent(Brightness):
    """No score for the first of its images."""

    last_error = "the reply was no number"

    def score(self, images, conditions):
        scores = super().score(images, conditions)
        scores[0] = math.nan
        return scores


class Bright(Brightness):
    def __init__(self):
        super().__init__(0.0)


@pytest.fixture(autouse=True)
def rewards(monkeypatch):
    """Name of a reward to the class that stands for it."""
    kinds = {"clip": Bright, "deqa": Brightness, "pickscore": Brightness}

    def load(names, device, options):
        if kinds.get(names[0]) is None:
            return load_rewards(names, device, options)
        return RewardSet({name: kinds[name]() for name in names}, device)

    monkeypatch.setattr(d, "load_rewards", load)
    monkeypatch.setattr("argrpo_cli.rewards.check_weights", lambda name, options: None)  # theirs are not looked at
    monkeypatch.setattr(Brightness, "calls", 0)
    monkeypatch.setattr("argrpo_cli.rewards.check_weights", lambda name, options: None)  # no network is needed
    return kinds


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    policy = tiny_caption_policy()
    policy.save(folder / "one")
    nn.init.normal_(policy.model.lm_head.weight, std=0.3)
    policy.save(folder / "two")
    return [str(folder / "one"), str(folder / "two")]


def measure(policies, out, rewards=tuple(DIVISORS), options=None, n=2, **rest):
    return b.run(d.DrawBench(PROMPTS, rewards, options), policies, out, device="cpu", n=n, **rest)


def row_of(result):
    ((name, own),) = result.rows.items()
    return name, own


def means(scores, per_prompt=2):
    """Policy to the mean of its scores, so many in a row being of one prompt."""
    return {
        name: scores.mean(name, [place // per_prompt for place in range(len(values))])
        for name, values in scores.values.items()
    }


def test_columns_come_in_the_units_of_table_4(policies, tmp_path):
    result = measure(policies[:1], tmp_path / "o")
    name, own = row_of(result)
    rows = read_jsonl(tmp_path / "o" / name / "images" / "metadata.jsonl")
    bright = [read_image(tmp_path / "o" / name / "images" / row["file"]).mean() / 255 for row in rows]
    mean = sum(bright) / 6
    assert own["clip"].value == pytest.approx(mean, abs=1e-6)
    assert own["deqa"].value == pytest.approx((1 + mean) / 5, abs=1e-6)
    assert own["pickscore"].value == pytest.approx((1 + mean) / 26, abs=1e-6)
    assert own["deqa"].error == pytest.approx(own["clip"].error / 5, abs=1e-7)
    assert {check_reward(name).divisor for name in ("clip", "hpsv2", "aesthetic", "imagereward")} == {1.0}
    assert check_reward("unified-reward").divisor == 5
    assert Result.load(tmp_path / "o" / "summary.json") == result
    assert result.paper["AR-GRPO"] == {"clip": 0.274, "deqa": 0.551, "pickscore": 0.769}


def test_each_picture_of_each_prompt_has_a_seed_of_its_own(policies, tmp_path, monkeypatch):
    seen = []
    real = LlamaGen.sample
    monkeypatch.setattr(
        LlamaGen, "sample", lambda self, c, how, seeds: seen.append((seeds, how.cfg_scale)) or real(self, c, how, seeds)
    )
    measure(policies, tmp_path / "o", ["clip"])
    (one, scale), (two, _) = seen
    assert one == two and len(set(one)) == 6 and scale == 2.0
    measure(policies[:1], tmp_path / "other", ["clip"], seed=1)
    assert not set(seen[2][0]) & set(one)


def test_errors_are_clustered_by_prompt():
    # Two prompts of two pictures: sums of residuals -2 and 2, so error^2 = 2/1 * 8 / 16.
    mean = means(d.Scores({"a": [1.0, 3.0, 3.0, 5.0]}))["a"].summary()
    assert (mean.value, mean.error, mean.count) == (3.0, 1.0, 4)
    assert means(d.Scores({"a": [1.0, 2.0]}))["a"].summary().error is None, "one prompt has no error"


def test_the_difference_is_paired_picture_by_picture():
    both = means(d.Scores({"a": [1.0, 2.0, 4.0, 5.0], "b": [0.5, 2.0, 3.0, 5.0]}))
    difference = both["a"].minus(both["b"])
    assert difference.value == 0.375 and difference.error == pytest.approx(0.125)
    assert difference.error < both["a"].error


def test_interrupted_and_resumed_equals_uninterrupted(policies, tmp_path, monkeypatch):
    whole = measure(policies, tmp_path / "whole", batch_size=2)
    real_sample, real_score, calls = LlamaGen.sample, Brightness.score, []

    def interrupt(limit, real):
        def call(*args, **rest):
            calls.append(1)
            if len(calls) > limit:
                raise KeyboardInterrupt
            return real(*args, **rest)

        calls.clear()
        return call

    monkeypatch.setattr(LlamaGen, "sample", interrupt(2, real_sample))
    with pytest.raises(KeyboardInterrupt):
        measure(policies, tmp_path / "o", batch_size=2)
    assert not (tmp_path / "o" / "summary.json").exists()
    monkeypatch.setattr(LlamaGen, "sample", real_sample)
    monkeypatch.setattr(Brightness, "score", interrupt(4, real_score))
    with pytest.raises(KeyboardInterrupt):
        measure(policies, tmp_path / "o", batch_size=2)
    monkeypatch.setattr(Brightness, "score", real_score)
    Brightness.calls = 0
    again = measure(policies, tmp_path / "o", batch_size=4)  # the pictures keep to the batches they were begun in
    assert Brightness.calls == 3 * 12 - 8
    assert again == whole
    for file in (tmp_path / "whole").glob("*/images/*"):
        assert file.read_bytes() == (tmp_path / "o" / file.relative_to(tmp_path / "whole")).read_bytes()


def test_a_column_is_added_without_drawing_or_scoring_again(policies, tmp_path, monkeypatch):
    measure(policies[:1], tmp_path / "o", ["clip"])
    monkeypatch.setattr(LlamaGen, "sample", lambda *_, **__: pytest.fail("drawn again"))
    Brightness.calls = 0
    result = measure(policies[:1], tmp_path / "o", ["clip", "deqa"])
    assert Brightness.calls == 6
    assert list(result.columns) == ["clip", "deqa"]


def test_a_column_alone_is_added_to_those_of_an_earlier_call(policies, tmp_path):
    whole = measure(policies, tmp_path / "whole", ["clip", "deqa"])
    measure(policies, tmp_path / "o", ["clip"])
    added = measure(policies, tmp_path / "o", ["deqa"])
    assert added == whole == Result.load(tmp_path / "o" / "summary.json")


def test_another_server_address_asks_for_no_score_again(policies, tmp_path, rewards):
    measure(policies[:1], tmp_path / "o", ["deqa"], options={"deqa": {"url": "http://a:8000/v1"}})
    Brightness.calls = 0
    for options in ({"deqa": {"url": "http://b:8001/v1", "timeout": 9.0}}, {}):
        measure(policies[:1], tmp_path / "o", ["deqa"], options=options)
    assert Brightness.calls == 0


def test_an_option_that_a_reward_has_not_is_refused_before_anything_is_drawn(policies, tmp_path):
    with pytest.raises(UserError, match="reward deqa: no option 'foo'; it has url"):
        measure(policies[:1], tmp_path / "o", ["clip", "deqa"], options={"deqa": {"foo": 1}})
    assert not (tmp_path / "o").exists()


def test_what_is_measured_otherwise_than_in_table_4_is_told(policies, tmp_path, rewards):
    options = {"clip": {"model": "another"}, "deqa": {"url": "http://a"}}
    told = measure(policies[:1], tmp_path / "o", ["clip", "deqa"], options=options)
    text = "\n".join(told.departures)
    assert "clip with model=another; the paper's column has it as it comes" in text and "url" not in text
    assert "pixels (paper 256)" in text and "images per prompt 2 (paper 5)" in text


def test_scores_of_other_options_or_pictures_are_not_kept(policies, tmp_path, rewards):
    measure(policies[:1], tmp_path / "o", ["clip"])
    Brightness.calls = 0
    measure(policies[:1], tmp_path / "o", ["clip"], options={"clip": {"model": "another"}})
    assert Brightness.calls == 6
    measure(policies[:1], tmp_path / "o", ["clip"], options={"clip": {"model": "another"}})
    assert Brightness.calls == 6
    next((tmp_path / "o").glob("*/images/001*.png")).unlink()
    measure(policies[:1], tmp_path / "o", ["clip"], options={"clip": {"model": "another"}})
    assert Brightness.calls == 7


def test_scores_of_other_weights_are_not_mixed(policies, tmp_path, rewards, monkeypatch):
    first = measure(policies[:1], tmp_path / "o", ["clip"])
    (journal,) = (tmp_path / "o").glob("*/scores/*/*.jsonl")
    journal.write_text("".join(journal.read_text().splitlines(True)[:2]))  # two of six
    monkeypatch.setattr(Bright, "__init__", lambda self: Brightness.__init__(self, -1.0))
    Brightness.calls = 0
    second = measure(policies[:1], tmp_path / "o", ["clip"])
    assert Brightness.calls == 6
    hashes = [result.protocol["rewards"]["clip"]["weights"] for result in (first, second)]
    assert hashes[0] != hashes[1] and all(len(one) == 16 for one in hashes)


def test_a_reward_that_fails_is_a_dash_and_a_note(policies, tmp_path, rewards):
    rewards["deqa"] = Offline
    result = measure(policies[:1], tmp_path / "o", ["deqa", "clip", "unified-reward"])
    name, own = row_of(result)
    assert own["deqa"].value is None and own["deqa"].count == 0
    assert own["unified-reward"].value is None and own["clip"].value is not None
    told = "\n".join(result.warnings)
    assert f"deqa has no score for 6 of 6 pictures of {name}: " in told and "the server does not answer" in told
    assert "unified-reward: url is missing" in told
    console = Console(width=160, record=True)
    console.print(table(result, 160))
    line = next(line for line in console.export_text().splitlines() if "DeQA" in line)
    assert "–" in line and "0.546" in line and "0.551" in line


def test_nothing_measured_is_an_error(policies, tmp_path, rewards):
    rewards["deqa"] = Offline
    with pytest.raises(
        UserError, match=r"nothing could be measured: deqa has no .* not answer; unified-reward has no .* url is"
    ):
        measure(policies[:1], tmp_path / "o", ["deqa", "unified-reward"])
    rewards["deqa"] = Brightness
    assert measure(policies[:1], tmp_path / "o", ["deqa"]).rows


def test_a_few_missing_scores_are_left_out_and_many_leave_no_mean():
    few = d.Scores({"a": [math.nan] + [0.5] * 19}, missing="why")
    assert means(few)["a"].value == 0.5 and means(few)["a"].count == 19
    assert few.warnings("clip") == ["clip has no score for 1 of 20 pictures of a: why"]
    many = d.Scores({"a": [math.nan] * 2 + [0.5] * 18})
    assert means(many)["a"].summary().value is None
    cut = d.Scores({"a": [0.5] * 19 + [math.nan]}, fault="gone")
    assert means(cut)["a"].summary().value is None, "the first prompts are not all prompts"


def test_a_pair_with_a_missing_score_is_no_difference():
    """One policy lacks the first picture and the other the last but one; 38 pairs of 20 prompts are left."""
    scores = d.Scores({"a": [math.nan] + [3.0] * 39, "b": [1.0] * 37 + [1.5, math.nan, 1.5]})
    both = means(scores)
    difference = both["a"].minus(both["b"])
    alone = mean_of([math.nan, *[2.0] * 36, 1.5, math.nan, 1.5], [place // 2 for place in range(40)])
    assert (difference.value, difference.error, difference.count) == (alone.value, alone.error, 38)
    assert difference.value == pytest.approx((36 * 2.0 + 2 * 1.5) / 38)
    assert scores.warnings("clip")[-1] == "clip of the difference: of the 38 of 40 pairs that have both scores"


def test_missing_scores_are_asked_for_again(policies, tmp_path, rewards):
    rewards["deqa"] = Silent
    first = measure(policies[:1], tmp_path / "o", ["clip", "deqa"], batch_size=6)
    assert any("1 of 6 pictures" in text and "no number" in text for text in first.warnings)
    rewards["deqa"] = Brightness
    Brightness.calls = 0
    again = measure(policies[:1], tmp_path / "o", ["clip", "deqa"], batch_size=6)
    assert Brightness.calls == 1
    assert not any("deqa" in text for text in again.warnings)


def test_the_protocol_tells_how_it_was_measured(policies, tmp_path):
    result = measure(policies[:1], tmp_path / "o", ["clip"], options={"clip": {"model": "x"}})
    protocol, (name,) = result.protocol, result.rows
    assert protocol["measured"][name]["weights"] == load_policy(policies[0]).fingerprint()
    assert protocol["sampling"]["cfg_scale"] == 2.0 and protocol["images per prompt"] == 2
    assert protocol["prompts"]["sha256"] == PROMPTS.sha256 and protocol["prompts"]["count"] == 3
    assert protocol["rewards"]["clip"]["options"] == {"model": "x"}
    assert protocol["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_argrpo_score_reads_the_pictures(policies, tmp_path):
    result = measure(policies[:1], tmp_path / "o", ["clip"])
    (name,) = result.rows
    scored, *_ = score_images([tmp_path / "o" / name / "images"], ["nano-clip"], out=tmp_path / "s", device="cpu")
    assert scored.protocol["images"] == 6
    assert [row["prompt"] for row in read_jsonl(tmp_path / "s" / "scores.jsonl")][::2] == list(PROMPTS.prompts)


def test_two_processes_find_what_one_does(tmp_path):
    """Each draws and scores every other batch."""
    policy = str(save_captioned_policy(tmp_path / "policy" / "mine"))
    (tmp_path / "prompts.txt").write_text("a photo of a dog\na photo of two cars\na photo of a cake\n")
    asked = ["eval", "drawbench", "--policy", policy, "--prompts", str(tmp_path / "prompts.txt"), "--per-prompt", "2"]
    asked += ["--columns", "nano-clip,nano-quality", "--diversity", "nano-judge", "--batch-size", "2"]
    asked += ["--device", "cpu", "--out"]
    assert run([*asked, str(tmp_path / "alone")]) == 0
    done = together([*asked, str(tmp_path / "out")], tmp_path / "printed")
    assert done.codes == [0, 0], done.err
    alone, shared = (read_json(tmp_path / name / "summary.json") for name in ("alone", "out"))
    assert shared == alone
    columns = ["nano-clip", "nano-quality", "nano-judge/vendi", "nano-judge/distance", "nano-judge/vendi_within"]
    assert list(next(iter(alone["rows"].values()))) == columns
    files = [path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*.png")]
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file
    assert done.out.count("images, scores and summary.json in") == 1, "one of them reports"


def test_a_folder_is_not_used_for_two_evaluations(policies, tmp_path):
    measure(policies[:1], tmp_path / "o", ["clip"])
    with pytest.raises(UserError, match=r"holds an evaluation of something else \(sampling\.cfg_scale\); choose"):
        measure(policies[:1], tmp_path / "o", ["clip"], sampling={"cfg_scale": 3.0})
    with pytest.raises(UserError, match=r"something else \(policies\)"):
        measure(policies[1:], tmp_path / "o", ["clip"])
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").write_text("")
    with pytest.raises(UserError, match="x is not empty"):
        measure(policies[:1], tmp_path / "x", ["clip"])


@pytest.mark.parametrize(
    ("asked", "settings", "message"),
    [
        ([], {}, "--columns is empty"),
        (["clip", "clip"], {}, "--columns names 'clip' twice"),
        (["clap"], {}, "reward 'clap' is unknown"),
        (["clip"], {"n": 0}, "--n 0: give 1 to 33333"),
        (["clip"], {"seed": 5_000}, "--seed 5000: give 0 to 4999"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_drawn(policies, tmp_path, asked, settings, message):
    with pytest.raises(UserError, match=message):
        measure(policies[:1], tmp_path / "o", asked, **settings)
    assert not (tmp_path / "o").exists()


def test_the_command_prints_the_table_and_warns(policies, tmp_path, capfd):
    (tmp_path / "prompts.txt").write_text("a red dog\na dog\n")
    asked = ["--policy", policies[0], "--baseline", policies[1], "--prompts", str(tmp_path / "prompts.txt"), "--n", "2"]
    code = run(
        ["eval", "drawbench", *asked, "--columns", "clip, deqa", "--device", "cpu", "--out", str(tmp_path / "o")]
    )
    told = capfd.readouterr()
    assert code == 0, told.err
    assert "DrawBench (table 4)" in told.out and "WARNING: the prompts of" in told.err
    result = read_json(tmp_path / "o" / "summary.json")
    assert set(result["difference"]) == {"clip", "deqa"}
    assert run(["eval", "drawbench", *asked, "--columns", "clip", "--set", "hpsv2.version=2.0"]) == 2
    assert "'hpsv2' is not among --columns clip" in capfd.readouterr().err
    assert run(["eval", "drawbench", "--policy", "nano-c2i", "--prompts", "nano", "--out", str(tmp_path / "c")]) == 2
    assert "draws classes, and eval drawbench asks with captions" in capfd.readouterr().err


def test_the_command_offers_what_the_library_has():
    defaults = {name: one.default for name, one in inspect.signature(BENCHMARKS["drawbench"]).parameters.items()}
    assert defaults["columns"].split(",") == list(d.TABLE_4)
    assert defaults["prompts"] == HUB and defaults["n"] == d.DrawBench.n
