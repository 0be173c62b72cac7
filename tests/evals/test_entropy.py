"""Policy entropy: its definition, the split, samples of prompts, checkpoints of a run."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch

from argrpo_cli.cli.app import run
from argrpo_cli.evals import entropy as e
from argrpo_cli.evals.entropy_results import result_of, subjects_of_run
from argrpo_cli.geneval.prompts import TAGS, parse_prompt
from argrpo_cli.nano.tokens import load_held_out
from argrpo_cli.policy import load_policy
from argrpo_cli.shapes import Result, Sampling, Value
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_jsonl, write_json
from tests.captioned import save_captioned_policy
from tests.evals.entropies import entropy_of, measure
from tests.training.tiny import CODES, TOKENS, tiny_caption_policy, tiny_policy


def test_conditional_and_guided_entropy_of_captions_equal_the_definition():
    policy, scale, temperature = tiny_caption_policy(), 2.5, 0.7
    asked = policy.conditions(["a dog", "a red cat a dog"])
    tokens = policy.sample(policy.encode(asked), Sampling(), [0, 1]).tokens
    with torch.inference_mode():
        c, u = (policy.model.logits(policy.encode(asked, torch.tensor([null] * 2)), tokens) for null in (False, True))
    for cfg_scale, logits in ((None, c), (scale, u + scale * (c - u))):
        p = (logits / temperature).softmax(-1)
        expected = -torch.special.xlogy(p, p).sum(-1)
        measured = entropy_of(policy, tokens, asked, cfg_scale, temperature)
        assert measured.shape == (2, TOKENS)
        torch.testing.assert_close(measured, expected, atol=1e-4, rtol=1e-4)


def test_a_policy_that_knows_nothing_has_the_entropy_of_its_vocabulary():
    policy = tiny_policy()
    torch.nn.init.zeros_(policy.model.lm_head.weight)
    tokens = torch.zeros(3, TOKENS, dtype=torch.long)
    measured = entropy_of(policy, tokens, policy.conditions([0, 1, 2]))
    torch.testing.assert_close(measured, torch.full((3, TOKENS), math.log(CODES)))


def test_statistics_treat_the_image_as_the_unit():
    values = torch.tensor([[1.0, 3.0], [2.0, 4.0], [6.0, 8.0]])
    row = e.statistics(e.tally(values[None]), 0)
    assert row["images"] == 3
    assert row["mean"] == pytest.approx(4.0)
    assert row["standard_error"] == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    assert row["by_position"] == pytest.approx([3.0, 5.0])
    assert row["high"] - row["low"] == pytest.approx(2 * 1.959964 * row["standard_error"])


def test_the_split_holds_scenes_that_the_policy_knows_best():
    tokens, conditions = load_held_out("classes")
    assert tokens.shape == (1008, 64) and len(conditions) == 1008
    policy = load_policy("nano-c2i")
    assert policy.conditions([one.class_id for one in conditions[:48]]) == conditions[:48]

    def loss(asked):
        with torch.inference_mode():
            return -policy.model(policy.encode(asked), tokens[:48]).logp.mean()

    assert loss(conditions[:48]) < loss(conditions[1:49]) - 0.1, "tokens and conditions belong together"


def test_the_captions_of_the_split_are_the_benchmarks_kind():
    tokens, conditions = load_held_out("captions")
    assert tokens.shape == (1008, 64)
    tags = Counter(parse_prompt(one.prompt).tag for one in conditions)
    assert set(tags) == set(TAGS) and min(tags.values()) > 100


def test_several_policies_are_compared_scene_by_scene():
    rows = measure([e.NamedPolicy("nano-c2i", "a"), e.NamedPolicy("nano-c2i", "b")], e.Question(limit=6))
    assert [(row["policy"], row["mode"]) for row in rows] == [(p, m) for p in "ab" for m in e.MODES]
    assert "change" not in rows[0]
    assert rows[2]["change"] == 0 and rows[2]["change_error"] == 0
    assert rows[1]["mean"] < rows[0]["mean"], "guidance makes a policy surer"
    assert len(rows[0]["by_position"]) == 64
    assert json.loads(json.dumps(rows)) == rows


def test_the_change_is_the_second_minus_the_first_paired(tmp_path):
    policy = load_policy("nano-c2i")
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(1.3)  # a surer policy
    policy.save(tmp_path / "surer")
    subjects = [e.NamedPolicy("nano-c2i", "a"), e.NamedPolicy(str(tmp_path / "surer"), "b")]
    rows = measure(subjects, e.Question(limit=24), Sampling(cfg_scale=3.0, temperature=0.7))
    tokens, conditions = (part[:24] for part in load_held_out("classes"))
    own = [entropy_of(load_policy(one.path), tokens, conditions, None, 0.7).mean(1) for one in subjects]
    paired = own[1] - own[0]
    assert rows[2]["change"] == pytest.approx(paired.mean().item(), abs=1e-5) and rows[2]["change"] < -0.1
    assert rows[2]["change_error"] == pytest.approx(paired.std().item() / 24**0.5, rel=1e-3)
    assert rows[2]["change_error"] < 0.7 * rows[2]["standard_error"], "paired"


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    return str(save_captioned_policy(tmp_path_factory.mktemp("captioned") / "mine"))


def test_policies_of_different_tasks_are_not_compared(captioned):
    with pytest.raises(UserError, match=r"nano-c2i and .*mine are measured on different scenes"):
        measure([e.NamedPolicy("nano-c2i", "a"), e.NamedPolicy(captioned, "b")], e.Question(limit=4))


def test_prompts_are_walked_along_samples_of_the_policy_itself(captioned):
    again = [measure([e.NamedPolicy(captioned, "t")], e.Question("geneval", limit=4, seed=s)) for s in (0, 0, 1)]
    assert again[0] == again[1] != again[2]
    assert again[0][0]["images"] == 4 and again[0][0]["prompts"] == "geneval-nano"


def test_samples_are_drawn_as_they_are_measured(captioned, monkeypatch):
    drawn, draw_batch = [], e.draw_batch

    def watched(policy, batch, sampling):
        drawn.append(sampling)
        return draw_batch(policy, batch, sampling)

    monkeypatch.setattr(e, "draw_batch", watched)
    sampling = Sampling(cfg_scale=3.0, temperature=0.7, top_k=5)
    measure([e.NamedPolicy(captioned, "t")], e.Question("geneval", limit=2), sampling)
    assert drawn == [sampling]


def test_each_policy_is_measured_under_its_own_guidance(captioned, tmp_path, capsys):
    own = load_policy(captioned)
    own.sampling = {"cfg_scale": 1.0}
    own.save(tmp_path / "own")
    named = (("base", captioned), ("one", str(tmp_path / "own")), ("two", str(tmp_path / "own")))
    subjects = [e.NamedPolicy(path, name) for name, path in named]
    rows = measure(subjects, e.Question("geneval", limit=2), {"temperature": 0.7})
    assert [row["cfg_scale"] for row in rows[1::2]] == [2.0, 1.0, 1.0] and {row["temperature"] for row in rows} == {0.7}
    assert rows[3]["mean"] == rows[2]["mean"] and rows[1]["mean"] != rows[0]["mean"], "of one unguided it is the same"
    assert capsys.readouterr().err.count("sampled as one says: guidance 1\n") == 1, "and of two the same: said once"
    protocol = result_of(rows).protocol
    assert "cfg_scale" not in protocol["sampling"] and protocol["measured"]["base"]["sampling"] == {"cfg_scale": 2.0}


def test_the_checkpoints_of_a_run_are_its_base_and_every_step(tmp_path):
    base = tmp_path / "base"
    tiny_policy().save(base)
    for step in (10, 5):
        tiny_policy().save(tmp_path / "run" / "checkpoints" / f"step_{step:06d}")
    tiny_policy().save(tmp_path / "run" / "policy")
    write_json(tmp_path / "run" / "run.json", {"base_policy": str(base), "finished": {"step": 12}})
    found = subjects_of_run(tmp_path / "run")
    assert [(one.name, one.step) for one in found] == [("base", 0), ("step 5", 5), ("step 10", 10), ("step 12", 12)]
    write_json(tmp_path / "run" / "run.json", {"base_policy": str(base), "finished": {"step": 10}})
    assert [one.step for one in subjects_of_run(tmp_path / "run")] == [0, 5, 10]
    with pytest.raises(UserError, match="is no run directory"):
        subjects_of_run(tmp_path)
    for gone in ({}, {"base_policy": str(tmp_path / "gone")}):
        write_json(tmp_path / "run" / "run.json", gone)
        with pytest.raises(UserError, match=r"the base policy of .* is gone"):
            subjects_of_run(tmp_path / "run")


def test_the_command_as_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["entropy", "--split", "val", "--n", "4"]) == 0
    assert "4 images, split val" in " ".join(capsys.readouterr().out.split())
    rows = read_jsonl(tmp_path / "entropy" / "entropy.jsonl")
    assert [row["mode"] for row in rows] == ["conditional", "guided"]
    assert (tmp_path / "entropy" / "curve.png").stat().st_size > 5000
    result = Result.load(tmp_path / "entropy" / "summary.json")
    assert result.rows["nano-c2i"]["guided"] == Value(rows[1]["mean"], rows[1]["standard_error"], 4)
    assert result.protocol["sampling"]["cfg_scale"] == 2 and not result.difference


def test_two_policies_are_told_as_a_policy_and_its_baseline():
    """The first on the command line is what others are compared with; in a result the baseline comes second."""
    rows = measure([e.NamedPolicy("nano-c2i", "a"), e.NamedPolicy("nano-c2i", "b")], e.Question(limit=4))
    result = result_of(rows)
    assert list(result.rows) == ["b", "a"] and list(result.columns) == list(e.MODES)
    assert result.difference == {mode: Value(0.0, 0.0, 4) for mode in e.MODES}
    assert result.protocol["measured"]["b"]["against"] == "a"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "train"], "no split 'train'; there is val"),
        (["--split", "val", "--prompts", "geneval"], "not both"),
        (["--policy", "nano-c2i", "--prompts", "geneval"], "draws classes and reads no prompts"),
        (["--prompts", "geneva"], "no captions 'geneva'"),
        (["--n", "1"], "--n 1: an interval needs 2"),
        (["--prompts", "one.txt"], "holds one caption"),
        (["--prompts", "geneval", "--seed", "10000"], "--seed 10000: give 0 to 9999"),
        (["--run", "nowhere"], "nowhere is no run directory"),
        (["--policy", "nano-c2i", "--policy", "nano-c2i"], "names nano-c2i twice"),
        (["--out", "file"], "it is a file, not a folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(captioned, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "one.txt").write_text("a photo of a dog\n")
    reader = ["--policy", captioned] if "--prompts" in arguments and "--policy" not in arguments else []
    assert run(["entropy", *arguments, *reader]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "one.txt"]


def test_without_noise_there_is_no_entropy(tmp_path, capsys):
    assert run(["entropy", "--temperature", "0", "--out", str(tmp_path / "out")]) == 2
    assert "--temperature 0: without noise there is no entropy" in capsys.readouterr().err


def test_a_folder_with_other_things_or_other_entropy_is_left_alone(captioned, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["entropy", "--n", "4"]) == 0
    assert run(["entropy", "--n", "6"]) == 0, "the same question again"
    capsys.readouterr()
    assert run(["entropy", "--n", "4"]) == 2
    assert "holds the entropy on 6 images, more than --n 4; choose another --out" in capsys.readouterr().err
    assert run(["entropy", "--prompts", "geneval", "--policy", captioned, "--n", "4"]) == 2
    assert "entropy holds the entropy on other images; choose another --out" in capsys.readouterr().err
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"x")
    assert run(["entropy", "--n", "4", "--out", "images"]) == 2
    assert "images is not empty (there is a.png)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["a.png"]
