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
from argrpo_cli.evals import drawbench as d
from argrpo_cli.evals import drawbench_prompts as p
from argrpo_cli.evals import drawbench_scores as s
from argrpo_cli.evals.drawbench_images import Drawing
from argrpo_cli.images import read_image
from argrpo_cli.policy import Policy, load_policy
from argrpo_cli.rewards import RewardSet, load_rewards
from argrpo_cli.score import score_images
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_json, read_jsonl
from tests.captioned import save_captioned_policy
from tests.torchrun import torchrun
from tests.training.tiny import tiny_caption_policy

PROMPTS = p.PromptList("mine", ("a red dog", "a blue cat", "a dog"))
DRAWING = Drawing(per_prompt=2)
DIVISORS = {"clip": 1, "deqa": 5, "pickscore": 26}


class Brightness:
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

    monkeypatch.setattr(s, "load_rewards", load)
    monkeypatch.setattr(Brightness, "calls", 0)
    return kinds


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    policy = tiny_caption_policy()
    policy.save(folder / "one")
    nn.init.normal_(policy.model.lm_head.weight, std=0.3)
    policy.save(folder / "two")
    return [str(folder / "one"), str(folder / "two")]


def measure(policies, out, rewards=tuple(DIVISORS), prompts=PROMPTS, drawing=DRAWING, **rest):
    return d.run_drawbench(policies, prompts, out, rewards, drawing, device="cpu", **rest)


def test_columns_come_in_the_units_of_table_4(policies, tmp_path):
    result = measure(policies[:1], tmp_path / "o")
    ((name, own),) = result["policies"].items()
    rows = read_jsonl(tmp_path / "o" / name / "images" / "metadata.jsonl")
    bright = [read_image(tmp_path / "o" / name / "images" / row["file"]).mean() / 255 for row in rows]
    mean = sum(bright) / 6
    assert own["clip"]["value"] == pytest.approx(mean, abs=1e-6)
    assert own["deqa"]["value"] == pytest.approx((1 + mean) / 5, abs=1e-6)
    assert own["pickscore"]["value"] == pytest.approx((1 + mean) / 26, abs=1e-6)
    assert own["deqa"]["error"] == pytest.approx(own["clip"]["error"] / 5, abs=1e-7)
    assert {s.TABLE_4[name].divisor for name in ("clip", "hpsv2", "aesthetic", "imagereward")} == {1.0}
    assert s.TABLE_4["unified-reward"].divisor == 5
    assert read_json(tmp_path / "o" / "summary.json") == result
    assert result["paper"]["AR-GRPO"] == {"clip": 0.274, "deqa": 0.551, "pickscore": 0.769}


def test_each_picture_of_each_prompt_has_a_seed_of_its_own(policies, tmp_path, monkeypatch):
    seen = []
    real = Policy.sample
    monkeypatch.setattr(
        Policy, "sample", lambda self, c, **k: seen.append((k["seeds"], k["cfg_scale"])) or real(self, c, **k)
    )
    measure(policies, tmp_path / "o", ["clip"])
    (one, scale), (two, _) = seen
    assert one == two and len(set(one)) == 6 and scale == 2.0
    measure(policies[:1], tmp_path / "other", ["clip"], drawing=Drawing(per_prompt=2, seed=1))
    assert not set(seen[2][0]) & set(one)


def test_errors_are_clustered_by_prompt():
    # Two prompts of two pictures: sums of residuals -2 and 2, so error^2 = 2/1 * 8 / 16.
    found = d.prompt_mean([1.0, 3.0, 3.0, 5.0], 2)
    assert found == {"value": 3.0, "error": 1.0, "images": 4, "prompts": 2}
    # Pictures that repeat one another tell no more than one of each prompt.
    once = d.prompt_mean([1.0, 2.0, 6.0], 1)
    assert d.prompt_mean([1.0, 1.0, 2.0, 2.0, 6.0, 6.0], 2)["error"] == pytest.approx(once["error"])
    assert once["error"] == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    with_gaps = d.prompt_mean([1.0, None, None, None, 2.0, 2.0], 2)
    assert (with_gaps["images"], with_gaps["prompts"]) == (3, 2) and with_gaps["value"] == pytest.approx(5 / 3)
    assert d.prompt_mean([1.0, 2.0], 2)["error"] is None
    assert d.prompt_mean([None], 1)["value"] is None


def test_the_difference_is_paired_picture_by_picture():
    one, two = [1.0, 2.0, 4.0, 5.0], [0.5, 2.0, 3.0, 5.0]
    scores = {"clip": s.Scores({"a": list(one), "b": list(two)})}
    result = d.summarise(scores, PROMPTS, DRAWING, {"a": {"image_size": 256}, "b": {"image_size": 256}}, {})
    difference = d.prompt_mean([x - y for x, y in zip(one, two, strict=True)], 2)
    assert result["difference"]["clip"] == difference
    assert difference["value"] == 0.375 and difference["error"] == pytest.approx(0.125)
    assert difference["error"] < result["policies"]["a"]["clip"]["error"]


def test_interrupted_and_resumed_equals_uninterrupted(policies, tmp_path, monkeypatch):
    whole = measure(policies, tmp_path / "whole", batch_size=2)
    real_sample, real_score, calls = Policy.sample, Brightness.score, []

    def interrupt(limit, real):
        def call(*args, **rest):
            calls.append(1)
            if len(calls) > limit:
                raise KeyboardInterrupt
            return real(*args, **rest)

        calls.clear()
        return call

    monkeypatch.setattr(Policy, "sample", interrupt(2, real_sample))
    with pytest.raises(KeyboardInterrupt):
        measure(policies, tmp_path / "o", batch_size=2)
    assert not (tmp_path / "o" / "summary.json").exists()
    monkeypatch.setattr(Policy, "sample", real_sample)
    monkeypatch.setattr(Brightness, "score", interrupt(4, real_score))
    with pytest.raises(KeyboardInterrupt):
        measure(policies, tmp_path / "o", batch_size=2)
    monkeypatch.setattr(Brightness, "score", real_score)
    journal = next((tmp_path / "o").glob("*/scores/clip.jsonl"))
    journal.write_text(journal.read_text() + '{"file": "cut o')
    Brightness.calls = 0
    again = measure(policies, tmp_path / "o", batch_size=4)  # the pictures keep to the batches they were begun in
    assert Brightness.calls == 3 * 12 - 8
    assert again == whole
    for file in (tmp_path / "whole").glob("*/images/*"):
        assert file.read_bytes() == (tmp_path / "o" / file.relative_to(tmp_path / "whole")).read_bytes()


def test_a_column_is_added_without_drawing_or_scoring_again(policies, tmp_path, monkeypatch):
    measure(policies[:1], tmp_path / "o", ["clip"])
    monkeypatch.setattr(Policy, "sample", lambda *_, **__: pytest.fail("drawn again"))
    Brightness.calls = 0
    result = measure(policies[:1], tmp_path / "o", ["clip", "deqa"])
    assert Brightness.calls == 6
    assert list(result["columns"]) == ["clip", "deqa"]


def test_a_column_alone_is_added_to_those_of_an_earlier_call(policies, tmp_path):
    whole = measure(policies, tmp_path / "whole", ["clip", "deqa"])
    measure(policies, tmp_path / "o", ["clip"])
    added = measure(policies, tmp_path / "o", ["deqa"])
    assert added == whole == read_json(tmp_path / "o" / "summary.json")


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
    text = "\n".join(told["warnings"])
    assert "clip with model=another; the paper's column has it as it comes" in text and "url" not in text
    assert "pixels, the paper has 256" in text


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
    journal = next((tmp_path / "o").glob("*/scores/clip.jsonl"))
    journal.write_text("".join(journal.read_text().splitlines(True)[:3]))  # two of six
    monkeypatch.setattr(Bright, "__init__", lambda self: Brightness.__init__(self, -1.0))
    Brightness.calls = 0
    second = measure(policies[:1], tmp_path / "o", ["clip"])
    assert Brightness.calls == 6
    hashes = [result["protocol"]["rewards"]["clip"]["weights"] for result in (first, second)]
    assert hashes[0] != hashes[1] and all(len(one) == 16 for one in hashes)


def test_a_reward_that_fails_is_a_dash_and_a_note(policies, tmp_path, rewards):
    rewards["deqa"] = Offline
    result = measure(policies[:1], tmp_path / "o", ["deqa", "clip", "unified-reward"])
    ((name, own),) = result["policies"].items()
    assert own["deqa"]["value"] is None and own["deqa"]["missing"] == 6
    assert own["unified-reward"]["value"] is None and own["clip"]["value"] is not None
    told = "\n".join(result["warnings"])
    assert f"deqa has no score for 6 of 6 pictures of {name}: " in told and "the server does not answer" in told
    assert "unified-reward: url is missing" in told
    console = Console(width=160, record=True)
    console.print(d.table(result))
    line = next(line for line in console.export_text().splitlines() if "DeQA" in line)
    assert "–" in line and "0.546" in line and "0.551" in line


def test_nothing_measured_is_an_error(policies, tmp_path, rewards):
    rewards["deqa"] = Offline
    with pytest.raises(
        UserError, match=r"nothing could be measured: deqa has no .* not answer; unified-reward has no .* url is"
    ):
        measure(policies[:1], tmp_path / "o", ["deqa", "unified-reward"])
    rewards["deqa"] = Brightness
    assert measure(policies[:1], tmp_path / "o", ["deqa"])["policies"]


def test_a_few_missing_scores_are_left_out_and_many_leave_no_mean():
    about = {"a": {"image_size": 256}}
    few = d.summarise({"clip": s.Scores({"a": [None] + [0.5] * 19}, missing="why")}, PROMPTS, DRAWING, about, {})
    assert few["policies"]["a"]["clip"]["value"] == 0.5 and few["policies"]["a"]["clip"]["missing"] == 1
    assert any("clip has no score for 1 of 20 pictures of a: why" in text for text in few["warnings"])
    many = d.summarise({"clip": s.Scores({"a": [None] * 2 + [0.5] * 18})}, PROMPTS, DRAWING, about, {})
    assert many["policies"]["a"]["clip"]["value"] is None
    cut = d.summarise({"clip": s.Scores({"a": [0.5] * 19 + [None]}, fault="gone")}, PROMPTS, DRAWING, about, {})
    assert cut["policies"]["a"]["clip"]["value"] is None, "the first prompts are not all prompts"


def test_missing_scores_are_asked_for_again(policies, tmp_path, rewards):
    rewards["deqa"] = Silent
    first = measure(policies[:1], tmp_path / "o", ["clip", "deqa"], batch_size=6)
    assert any("1 of 6 pictures" in text and "no number" in text for text in first["warnings"])
    rewards["deqa"] = Brightness
    Brightness.calls = 0
    again = measure(policies[:1], tmp_path / "o", ["clip", "deqa"], batch_size=6)
    assert Brightness.calls == 1
    assert not any("deqa" in text for text in again["warnings"])


def test_the_protocol_tells_how_it_was_measured(policies, tmp_path):
    result = measure(policies[:1], tmp_path / "o", ["clip"], options={"clip": {"model": "x"}})
    protocol, (name,) = result["protocol"], result["policies"]
    assert protocol["policies"][name]["weights"] == load_policy(policies[0]).fingerprint()
    assert protocol["sampling"]["cfg_scale"] == 2.0 and protocol["images_per_prompt"] == 2
    assert protocol["prompts"]["sha256"] == PROMPTS.sha256 and protocol["prompts"]["count"] == 3
    assert protocol["rewards"]["clip"]["options"] == {"model": "x"}
    assert protocol["versions"]["torch"] == torch.__version__.split("+")[0] or protocol["versions"]["torch"]
    assert "images per prompt 2, the paper has 5" in result["warnings"]


def test_argrpo_score_reads_the_pictures(policies, tmp_path):
    result = measure(policies[:1], tmp_path / "o", ["clip"])
    (name,) = result["policies"]
    scored = score_images([tmp_path / "o" / name / "images"], ["nano-clip"], out=tmp_path / "s", device="cpu")
    assert scored.result.protocol["images"] == 6
    assert [row["prompt"] for row in read_jsonl(tmp_path / "s" / "scores.jsonl")][::2] == list(PROMPTS.prompts)


def test_two_processes_find_what_one_does(tmp_path):
    """Each draws every other batch, and then scores one of the columns."""
    policy = str(save_captioned_policy(tmp_path / "policy" / "mine"))
    (tmp_path / "prompts.txt").write_text("a photo of a dog\na photo of two cars\na photo of a cake\n")
    asked = ["eval", "drawbench", "--policy", policy, "--prompts", str(tmp_path / "prompts.txt"), "--per-prompt", "2"]
    asked += ["--columns", "nano-clip,nano-quality", "--batch-size", "2", "--device", "cpu", "--out"]
    assert run([*asked, str(tmp_path / "alone")]) == 0
    done = torchrun(["-m", "argrpo_cli", *asked, str(tmp_path / "out")])
    assert done.returncode == 0, done.stderr
    alone, together = (read_json(tmp_path / name / "summary.json") for name in ("alone", "out"))
    assert together == alone and list(next(iter(alone["policies"].values()))) == ["nano-clip", "nano-quality"]
    files = [path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*.png")]
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file
    assert done.stdout.count("images, scores and summary.json in") == 1, "one of them reports"


def test_a_folder_is_not_used_for_two_evaluations(policies, tmp_path):
    measure(policies[:1], tmp_path / "o", ["clip"])
    with pytest.raises(UserError, match=r"holds an evaluation of something else \(cfg_scale\); choose another --out"):
        measure(policies[:1], tmp_path / "o", ["clip"], drawing=Drawing(2, cfg_scale=3.0))
    with pytest.raises(UserError, match=r"something else \(weights\)"):
        measure(policies[1:], tmp_path / "o", ["clip"])
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").write_text("")
    with pytest.raises(UserError, match="x is not empty"):
        measure(policies[:1], tmp_path / "x", ["clip"])


@pytest.mark.parametrize(
    ("rewards_asked", "drawing", "message"),
    [
        ([], DRAWING, "--columns is empty"),
        (["clip", "clip"], DRAWING, "--columns names 'clip' twice"),
        (["clap"], DRAWING, "reward 'clap' is unknown"),
        (["clip"], Drawing(0), "--n 0: give 1 to 33333"),
        (["clip"], Drawing(seed=5_000), "--seed 5000: give 0 to 4999"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_drawn(policies, tmp_path, rewards_asked, drawing, message):
    with pytest.raises(UserError, match=message):
        measure(policies[:1], tmp_path / "o", rewards_asked, drawing=drawing)
    assert not (tmp_path / "o").exists()


def test_the_command_prints_the_table_and_warns(policies, tmp_path, capfd):
    (tmp_path / "prompts.txt").write_text("a red dog\na dog\n")
    asked = ["--policy", policies[0], "--baseline", policies[1], "--prompts", str(tmp_path / "prompts.txt"), "--n", "2"]
    code = run(
        ["eval", "drawbench", *asked, "--columns", "clip, deqa", "--device", "cpu", "--out", str(tmp_path / "o")]
    )
    told = capfd.readouterr()
    assert code == 0, told.err
    assert "DrawBench, 2 prompts" in told.out and "WARNING: the prompts of" in told.out
    result = read_json(tmp_path / "o" / "summary.json")
    assert set(result["difference"]) == {"clip", "deqa"}
    assert run(["eval", "drawbench", *asked, "--columns", "clip", "--set", "hpsv2.version=2.0"]) == 2
    assert "'hpsv2' is not among --columns clip" in capfd.readouterr().err
    assert run(["eval", "drawbench", "--policy", "nano-c2i", "--prompts", "nano", "--out", str(tmp_path / "c")]) == 2
    assert "draws classes, and DrawBench asks with captions" in capfd.readouterr().err


def test_the_command_offers_what_the_library_has():
    defaults = {name: one.default for name, one in inspect.signature(BENCHMARKS["drawbench"]).parameters.items()}
    assert defaults["columns"].split(",") == list(s.TABLE_4)
    assert defaults["prompts"] == p.HUB and defaults["n"] == Drawing().per_prompt
    assert defaults["cfg_scale"] == Drawing().cfg_scale
