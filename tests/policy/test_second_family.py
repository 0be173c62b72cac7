"""A family of one file and one line goes through every command: nothing else knows what LlamaGen is."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from argrpo_cli.cli.app import run
from argrpo_cli.evals import benchmark
from argrpo_cli.images import read_image
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.open import FAMILIES
from argrpo_cli.recipe import Recipe
from argrpo_cli.shapes import Sampling
from argrpo_cli.training import run_training
from tests.evals.test_benchmark import Brightness
from tests.policy.toy_family import Toy, ToyConfig, ToyModel
from tests.training.tiny import FakeRewards, brightness, tiny_recipe


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("argrpo_cli.training.job.refresh_report", lambda *args, **keys: None)  # takes its time
    monkeypatch.setitem(FAMILIES, "toy", ("tests.policy.toy_family", "Toy"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dogs are dark and cats are bright."""
    model = ToyModel(ToyConfig(classes=2))
    with torch.no_grad():
        model.table[0, :, 0] = model.table[1, :, 3] = 1.5
    path = tmp_path_factory.mktemp("toy") / "policy"
    Toy(model.eval(), ["dog", "cat"], sampling={"cfg_scale": 2.0}).save(path)
    return path


def grey(folder: Path) -> float:
    return sum(float(read_image(file).mean()) for file in folder.glob("*.png")) / len(list(folder.glob("*.png")))


def test_sample_draws_and_the_same_seed_draws_the_same(folder: Path, tmp_path: Path) -> None:
    for out in ("dogs", "again", "cats"):
        name = "cat" if out == "cats" else "dog"
        asked = ["--policy", str(folder), "--class", name, "--n", "8", "--out", str(tmp_path / out)]
        assert run(["sample", *asked, "--device", "cpu"]) == 0
    pictures = [sorted((tmp_path / out).glob("*.png")) for out in ("dogs", "again", "cats")]
    assert [one.read_bytes() for one in pictures[0]] == [one.read_bytes() for one in pictures[1]]
    assert grey(tmp_path / "dogs") + 50 < grey(tmp_path / "cats")


@pytest.mark.parametrize("logprob", ["conditional", "guided"])
def test_training_follows_the_reward_on_policy_and_resumes(folder: Path, tmp_path: Path, logprob: str) -> None:
    def train(recipe: Recipe, out: Path, resume: bool = False) -> list[dict]:
        rewards = FakeRewards(bright=brightness)
        run_training(recipe, out, resume, rewards=rewards, console=Console(file=io.StringIO()))
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    settings = {
        "logprob": logprob, "beta": 0.01, "batch_size": 64, "learning_rate": 0.3, "save_every": 5, "steps": 10,
        "condition_dropout": 0.1, "weight_decay": 0.0,
    }  # fmt: skip
    recipe = tiny_recipe(folder, rewards=["bright"], **settings)
    lines = train(recipe, tmp_path / "run")
    assert lines[0]["ratio"] == pytest.approx(1, abs=1e-5) and lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.2 and lines[-1]["kl"] > 0
    trained = load_policy(tmp_path / "run")
    assert isinstance(trained, Toy) and trained.card.names == ("dog", "cat")
    assert trained.card.sampling == {"cfg_scale": 2.0}, "as the policy that training started from"
    train(tiny_recipe(folder, rewards=["bright"], **{**settings, "steps": 5}), tmp_path / "parts")
    train(recipe, tmp_path / "parts", resume=True)
    assert torch.equal(load_policy(tmp_path / "parts" / "policy").model.table, trained.model.table)


def test_distilled_to_what_it_was_under_guidance_it_needs_none(folder: Path, tmp_path: Path) -> None:
    """Its table can hold every distribution, so nothing is left between student and teacher."""
    distil = {
        "cfg_scale": 2.0, "lmbda": 0.3, "batch_size": 8, "steps": 80, "learning_rate": 0.1, "weight_decay": 0.0,
        "schedule": "wsd",
    }  # fmt: skip
    tree = tiny_recipe(folder).model_dump() | {"method": "distil", "distil": distil}
    run_training(Recipe.model_validate(tree), tmp_path / "run", console=Console(file=io.StringIO()))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["divergence"] > 0.1 and lines[-1]["divergence"] < 1e-4
    base, student = load_policy(folder), load_policy(tmp_path / "run" / "policy")
    assert student.card.sampling == {"cfg_scale": 1.0}
    encoded, plain = base.encode(base.conditions([0, 1])), Sampling(cfg_scale=1.0)
    guided = base.model.log_probs(encoded, Sampling(cfg_scale=2.0)).exp()
    torch.testing.assert_close(student.model.log_probs(encoded, plain).exp(), guided, atol=0.01, rtol=0)
    assert torch.equal(student.model.table[-1], base.model.table[-1])  # of no class: nobody asked


def test_a_benchmark_measures_it(folder: Path, tmp_path: Path) -> None:
    result = benchmark.run(Brightness(), [str(folder)], tmp_path / "o", device="cpu", n=4)
    ((name, row),) = result.rows.items()
    assert row["bright"].count == 8 and 0.2 < row["bright"].value < 0.8
    assert result.protocol["measured"][name]["image_size"] == 8


def test_its_entropy_along_pictures_is_that_of_its_table(folder: Path, tmp_path: Path) -> None:
    for name in ("dog", "cat"):
        asked = ["--policy", str(folder), "--class", name, "--n", "3", "--out", str(tmp_path / "pictures" / name)]
        assert run(["sample", *asked, "--device", "cpu"]) == 0
    asked = ["--policy", str(folder), "--data", str(tmp_path / "pictures"), "--out", str(tmp_path / "o")]
    assert run(["entropy", *asked, "--device", "cpu", "--cfg-scale", "2"]) == 0
    logp = torch.tensor([1.5, 0, 0, 0]).log_softmax(-1)
    rows = [json.loads(line) for line in (tmp_path / "o" / "entropy.jsonl").read_text().splitlines()]
    assert rows[0]["images"] == 6 and rows[0]["mode"] == "conditional"
    assert rows[0]["mean"] == pytest.approx(-(logp.exp() * logp).sum().item(), abs=1e-5)
    assert rows[1]["mean"] < rows[0]["mean"]
