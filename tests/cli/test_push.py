"""`argrpo push` and `logging.push_to_hub`, and opening what they pushed, by a stand-in of the hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from argrpo_cli.cli.app import run
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.folder import glance, mark_adapter
from argrpo_cli.policy.open import outline_policy
from argrpo_cli.push import model_card
from argrpo_cli.recipe import dump_recipe, load_recipe
from argrpo_cli.runs.run import RunDirectory
from argrpo_cli.shapes import Column, Result, Value
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import make_dir, read_json, write_json, write_text
from argrpo_cli.system.hub import check_repo, repo_of
from tests.hub_standin import hub
from tests.training.tiny import save_tiny_policy

WO = "model.layers.0.attention.wo.weight"


@pytest.fixture
def connected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have the library talk to an address, with a cache of its own, logged in."""

    def connect(address: str) -> None:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_standin")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(make_dir(tmp_path / "here"))
    return connect


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("tiny") / "policy")


@pytest.fixture
def trained(tmp_path: Path, policy: Path) -> Path:
    """A run of two updates of four, with a checkpoint and what only resuming needs."""
    root = make_dir(tmp_path / "run")
    checkpoint = root / "checkpoints" / "step_000002"
    load_policy(policy).save(checkpoint)
    write_json(checkpoint / "trainer_state.json", {})
    (checkpoint / "optimizer.pt").write_bytes(b"large")
    recipe = load_recipe("nano/c2i", ["start=null", "grpo.steps=4"], {}, tell=lambda line: None)
    write_text(root / "recipe.yaml", dump_recipe(recipe))
    row = {"name": "as trained", "start": 1.0, "trained": 1.5, "gain": 0.5, "error": 0.1, "images": 8}
    write_json(root / "run.json", {"recipe": recipe.model_dump(mode="json"), "transfer": [row]})
    (root / "before_after.png").write_bytes(b"picture")
    return root


def test_a_pushed_run_opens_by_its_name_anywhere(trained: Path, policy: Path, tmp_path, connected, capsys) -> None:
    result = Result("nano", {"fid": Column("FID", better="lower")}, {"run": {"fid": Value(3.25, 0.1, 48)}})
    result.save(tmp_path / "results.json")
    with hub(tmp_path / "hub") as address:
        connected(address)
        assert run(["push", str(trained), "me/dogs", "--results", str(tmp_path / "results.json"), "--json"]) == 0
        told = capsys.readouterr()
        assert json.loads(told.out) == {"repo": "me/dogs", "url": f"{address}/me/dogs"}
        assert "not finished: this is its policy at step 2 of 4" in told.err
        files = {path.relative_to(tmp_path / "hub").as_posix() for path in (tmp_path / "hub").rglob("*")}
        assert {f"me/dogs/{name}" for name in ("README.md", "recipe.yaml", "before_after.png", "policy.json")} <= files
        assert not {name for name in files if "optimizer" in name or "trainer_state" in name}, "no state of a run"
        front, card = (tmp_path / "hub" / "me" / "dogs" / "README.md").read_text().split("---\n")[1:]
        facts = yaml.safe_load(front)
        assert (facts["license"], facts["library_name"]) == ("mit", "argrpo") and "grpo" in facts["tags"]
        for line in (
            "**Training was not finished: this is the policy at step 2 of 4.**",
            "`nano-c2i`", 'ar.load_policy("me/dogs")', "Rewards: nano-clip, nano-quality, nano-critic.",
            "![before and after](before_after.png)", "| as trained | 1.000 | 1.500 | +0.50 ± 0.10 |",
            "| run | 3.250 ± 0.100 |",
        ):  # fmt: skip
            assert line in card
        opened = load_policy("me/dogs")
        assert opened.name == "me/dogs" and glance("me/dogs@main").reads == "classes"
        own = load_policy(policy).model.state_dict()
        assert all(torch.equal(value, own[key]) for key, value in opened.model.state_dict().items())
    assert load_policy("me/dogs").generate([0]).images.shape == opened.generate([0]).images.shape, "from the cache"
    assert outline_policy("me/dogs").policy.card.image_size == opened.image_size


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "you are not logged in; run `hf auth login`"),
        (403, "your token may not write there"),
        (500, "500"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    policy: Path, tmp_path, connected, fails, monkeypatch, status, message
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with hub(tmp_path / "hub", status) as address:
        connected(address)
        line = fails("push", policy, "me/dogs")
        assert "cannot push to me/dogs: " in line and message in line and "hf_standin" not in line


def test_what_cannot_be_pushed_is_told_before_the_hub_is_asked(tmp_path, policy: Path, fails, monkeypatch) -> None:
    monkeypatch.setattr("argrpo_cli.push.require_hub", lambda: pytest.fail("asked"))
    assert "'dogs' is no name on the hub: give USER/NAME" in fails("push", policy, "dogs")
    assert "no run directory or policy folder" in fails("push", tmp_path / "gone", "me/dogs")
    assert "comes with the package" in fails("push", "nano-c2i", "me/dogs")
    monkeypatch.setattr("argrpo_cli.push.require_hub", _no_network)
    assert "cannot push to me/dogs: the hub is not reached" in fails("push", policy, "me/dogs")


def _no_network() -> None:
    raise ConnectionError("the hub is not reached (huggingface.co: name or service not known)")


def test_names_on_the_hub_and_paths_here(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_dir(tmp_path / "runs")
    assert repo_of("me/dogs") == ("me/dogs", None) and repo_of("me/dogs@v1") == ("me/dogs", "v1")
    for name in ("runs/gone", "nano-c2i", "./me/dogs", "/me/dogs", "a/b/c", "me/dogs@"):
        assert repo_of(name) is None
    for name in ("me/dogs", "a.b/c_d-e"):
        check_repo(name)
    for name in ("me", "me/", "me/a--b", "me/a..b", "-me/dogs", "me/dogs.git", "me/" + "x" * 100):
        with pytest.raises(UserError, match="is no name on the hub"):
            check_repo(name)


def test_without_a_network_a_name_of_the_hub_is_one_line(connected, monkeypatch) -> None:
    monkeypatch.setattr("argrpo_cli.system.hub.require_hub", _no_network)
    with pytest.raises(UserError, match=r"no policy 'me/dogs': no folder here, and on the hub: cannot fetch me/dogs"):
        load_policy("me/dogs")


def test_a_network_alone_says_what_is_missing(policy: Path, tmp_path: Path) -> None:
    load_policy(policy).model.save_pretrained(tmp_path / "alone")
    for opened in (load_policy, glance):
        with pytest.raises(UserError, match=r"holds a network alone, .*policy\.json and with it the image tokenizer"):
            opened(tmp_path / "alone")


def test_the_card_of_other_bases_refers_to_their_licence(policy: Path, trained: Path) -> None:
    card = read_json(policy / "policy.json")
    for base, licence in (("t2i-xl-256", "as-the-base"), ("janus-pro-1b", "deepseek"), ("/x/mine", None)):
        text = model_card("me/x", card | {"base": base}, policy, None, {})
        facts = yaml.safe_load(text.split("---\n")[1])
        assert facts.get("license_name") == licence and ("base_model" in facts) == (licence is not None)
        assert "/x/" not in text, "no path of this machine"
    assert "recipe.yaml" in model_card("me/x", card, trained, RunDirectory(trained), {})


def test_adapters_are_pushed_merged(policy: Path, tmp_path: Path, connected) -> None:
    peft = pytest.importorskip("peft")
    base = load_policy(policy)
    adapted = peft.get_peft_model(base.model, peft.LoraConfig(target_modules=["wo"], r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    mark_adapter(tmp_path / "adapter", str(policy), {})
    with hub(tmp_path / "hub") as address:
        connected(address)
        assert run(["push", str(tmp_path / "adapter"), "me/merged", "--quiet"]) == 0
        merged, own = load_policy("me/merged"), load_policy(tmp_path / "adapter")
    weights = [one.model.state_dict()[WO] for one in (merged, own, load_policy(policy))]
    assert torch.allclose(*weights[:2]) and not torch.allclose(*weights[1:])


def test_a_recipe_that_pushes_needs_a_name_and_a_login(tmp_path: Path, monkeypatch) -> None:
    from argrpo_cli.training.train import run_training

    with pytest.raises(UserError, match="push_to_hub: where to"):
        load_recipe("nano/c2i", ["logging.push_to_hub=true"])
    with pytest.raises(UserError, match="hub_model_id: 'dogs' is no name on the hub"):
        load_recipe("nano/c2i", ["logging.hub_model_id=dogs"])
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    recipe = load_recipe("nano/c2i", ["logging.push_to_hub=true", "logging.hub_model_id=me/dogs"])
    with pytest.raises(UserError, match=r"logging\.push_to_hub: me/dogs: you are not logged in"):
        run_training(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_be_pushed_at_its_end_says_how_to_push_it(tmp_path: Path, monkeypatch) -> None:
    from argrpo_cli.training import train

    recipe, told = load_recipe("nano/c2i", ["logging.push_to_hub=true", "logging.hub_model_id=me/dogs"]), []
    monkeypatch.setattr(train, "push_policy", lambda out, name, private: f"https://hub/{name}")
    train._push(recipe, tmp_path / "run", told.append)

    def refuse(out, name, private):
        raise UserError("cannot push to me/dogs: the hub is not reached")

    monkeypatch.setattr(train, "push_policy", refuse)
    train._push(recipe, tmp_path / "run", told.append)
    assert told[0] == "on the hub         https://hub/me/dogs"
    assert told[1].endswith(f"the run is finished and safe, push it with: argrpo push {tmp_path / 'run'} me/dogs")
