"""A policy that says in its policy.json how it is meant to be sampled, at the command line and in recipes."""

from __future__ import annotations

import pytest

from argrpo_cli.cli.app import run
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.folder import choose_sampling, glance, guidance_warning, mark_adapter, own_sampling
from argrpo_cli.recipe import load_recipe
from argrpo_cli.shapes import Sampling
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_json, read_jsonl, write_json
from tests.training.tiny import tiny_policy

OWN = {"cfg_scale": 1.0}
WARNING = "is meant to be sampled at 1: guidance is in its weights already"


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A tiny policy that says how it is sampled, saved, opened and saved again."""
    folder, policy = tmp_path_factory.mktemp("policies"), tiny_policy()
    policy.sampling = dict(OWN)
    policy.save(folder / "first")
    load_policy(folder / "first").save(folder / "again")
    return folder / "again"


def recipe_of(tmp_path, policy, more=""):
    (tmp_path / "mine.yaml").write_text(f"policy: {{checkpoint: {policy}}}\n{more}")
    return load_recipe(tmp_path / "mine.yaml")


def test_it_is_kept_by_descendants_and_known_without_torch(distilled, tmp_path):
    assert load_policy(distilled).card.sampling == OWN == glance(distilled).sampling
    assert glance("nano-c2i").sampling == {} and glance("c2i-l-384-cca").sampling == OWN
    mark_adapter(tmp_path, str(distilled), {})
    assert glance(tmp_path).sampling == OWN, "adapters that say nothing are sampled as their base"
    mark_adapter(tmp_path, "nano-c2i", OWN)
    assert glance(tmp_path).sampling == OWN and len(glance(tmp_path).names) == 24
    tiny_policy().save(tmp_path / "plain")
    assert "sampling" not in read_json(tmp_path / "plain" / "policy.json")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([1.0], r"sampling is \[1.0\]; give a mapping such as"),
        ({"cfg": 1.0}, "sampling: unknown key 'cfg'; there are cfg_scale, temperature"),
        ({"dtype": "float32"}, "sampling: unknown key 'dtype'"),
        ({"cfg_scale": "1"}, "sampling.cfg_scale is '1', expected a float"),
        ({"top_k": True}, "sampling.top_k is True, expected an int"),
        ({"top_k": 2.5}, "sampling.top_k is 2.5, expected an int"),
        ({"cfg_scale": 0.5}, r"policy.json: sampling.cfg_scale 0.5: must be 1 or more"),
        ({"top_p": float("nan")}, r"sampling.top_p nan: must be a number"),
    ],
)
def test_what_cannot_be_meant_is_named(tmp_path, said, message):
    with pytest.raises(UserError, match=message) as caught:
        own_sampling(tmp_path, {"sampling": said})
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_options_come_before_the_policys_own_and_that_before_the_default(capsys):
    default = Sampling(cfg_scale=7.5, top_k=9)
    own = {"cfg_scale": 1.0, "temperature": 0.9}
    assert choose_sampling("d", own, {"temperature": 0.5}, default) == Sampling(1.0, 0.5, 9)
    assert capsys.readouterr().err == "sampled as d says: guidance 1\n"
    assert choose_sampling("d", {}, {"top_p": 0.5}, default) == Sampling(7.5, 1.0, 9, 0.5)
    assert choose_sampling("d", own, {"cfg_scale": 1.0, "temperature": 1.0}) == Sampling(cfg_scale=1.0)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="--top-p 2: must be"):
        choose_sampling("d", own, {"top_p": 2.0})


def test_guidance_on_top_of_its_own_is_warned_of():
    assert WARNING in guidance_warning("d", OWN, 2.0)
    assert guidance_warning("d", OWN, 1.0) == guidance_warning("d", {}, 4.0) == ""


def test_sample_takes_it_and_says_so(distilled, tmp_path, capsys):
    for out, more in (("own", []), ("guided", ["--cfg-scale", "3"])):
        asked = ["--policy", str(distilled), "--class", "dog", "--n", "1", "--out", str(tmp_path / out)]
        assert run(["sample", *asked, *more, "--device", "cpu"]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if str(distilled) in line]
        (row,) = read_jsonl(tmp_path / out / "metadata.jsonl")
        assert len(lines) == 1 and row["cfg_scale"] == read_json(tmp_path / out / "settings.json")["cfg_scale"]
        assert (row["cfg_scale"], lines[0].startswith("WARNING:"), WARNING in lines[0]) == (
            (3.0, True, True) if more else (1.0, False, False)
        )
    assert run(["sample", *asked, "--device", "cpu"]) == 2
    assert "holds samples of other settings (cfg_scale)" in capsys.readouterr().err


def test_a_wrong_card_is_one_line(distilled, tmp_path, fails):
    write_json(tmp_path / "policy.json", {**read_json(distilled / "policy.json"), "sampling": {"cfg_scale": 0}})
    line = fails("sample", "--policy", tmp_path, "--out", tmp_path / "out")
    assert f"{tmp_path / 'policy.json'}: sampling.cfg_scale 0: must be 1 or more" in line


def test_a_recipe_that_says_no_guidance_draws_as_the_policy_says(distilled, tmp_path):
    assert recipe_of(tmp_path, distilled).sampling == Sampling(cfg_scale=1.0)
    assert recipe_of(tmp_path, distilled, "sampling: {cfg_scale: 3, temperature: 0.9}").sampling == Sampling(3.0, 0.9)
    assert recipe_of(tmp_path, "nano-c2i").sampling == recipe_of(tmp_path, "gone").sampling == Sampling()
    assert recipe_of(tmp_path, "nano-c2i", "start: {}").sampling.cfg_scale == 1, "guidance is in the weights by then"
    assert recipe_of(tmp_path, "nano-c2i", "start: {method: grpo}").sampling.cfg_scale == 2


@pytest.mark.parametrize("more", ["", "start: {}\n"])
def test_guided_rollouts_of_such_a_policy_are_warned_of(distilled, tmp_path, capsys, more):
    (tmp_path / "mine.yaml").write_text(
        f"policy: {{checkpoint: {'nano-c2i' if more else distilled}}}\nsampling: {{cfg_scale: 2}}\n{more}"
        "rewards: {terms: [{name: nano-quality}]}\n"
    )
    assert run(["train", str(tmp_path / "mine.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().err.count(WARNING) == 1
    assert run(["train", str(tmp_path / "mine.yaml"), "--dry-run", "--set", "sampling.cfg_scale=1"]) == 0
    told = capsys.readouterr().err
    assert WARNING not in told and "says: guidance 1\n" in told
