"""Janus in every command: trained with all weights and with adapters, distilled, resumed, drawn, planned."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from argrpo_cli.cli.app import run
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.janus.policy import FROZEN, Janus
from argrpo_cli.recipe import Recipe
from argrpo_cli.shapes import Sampling
from argrpo_cli.training import run_training
from tests.policy.tiny_janus import PROMPTS, tiny_janus
from tests.training.tiny import FakeRewards, brightness, tiny_recipe


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("train", "job"):
        monkeypatch.setattr(f"argrpo_cli.training.{module}.refresh_report", lambda *args, **keys: None, raising=False)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers' format: training gives it a folder of ours, for the reference."""
    folder = tmp_path_factory.mktemp("janus") / "published"
    tiny_janus().save(folder)
    (folder / "policy.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["JanusForConditionalGeneration"]}))
    return folder


def recipe(checkpoint: Path, **settings: Any) -> Recipe:
    captions = {"source": "captions", "captions": list(PROMPTS)}
    return tiny_recipe(checkpoint, rewards=["bright"], conditions=captions, **settings)


def train(recipe: Recipe, out: Path, resume: bool = False) -> list[dict]:
    rewards = FakeRewards(bright=brightness) if recipe.scored else None
    run_training(recipe, out, resume, rewards=rewards, console=Console(file=io.StringIO()))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def moved(before: Janus, after: Janus) -> set[str]:
    """Parts of the model that are no longer what they were."""
    old, new = before.model.state_dict(), after.model.state_dict()
    changed = {name for name, value in old.items() if not torch.equal(value, new[name])}
    assert not any(name.startswith(FROZEN[:3]) for name in changed)
    return {name.split(".")[1] for name in changed if not name.startswith("lm_head")}  # tied to the embeddings


@pytest.mark.parametrize("logprob", ["conditional", "guided"])
def test_training_is_on_policy_moves_what_draws_and_resumes(published: Path, tmp_path: Path, logprob: str) -> None:
    settings = {"logprob": logprob, "beta": 0.01, "steps": 3, "save_every": 2, "condition_dropout": 0.2}
    settings["tokens"] = {"method": "stage"}
    lines = train(recipe(published, **settings), tmp_path / "run")
    assert lines[0]["ratio"] == pytest.approx(1, abs=1e-4) and lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert lines[-1]["kl"] > 0
    before, after = load_policy(published), load_policy(tmp_path / "run" / "policy")
    assert moved(before, after) == {
        "language_model", "generation_embeddings", "generation_aligner", "generation_head",
    }  # fmt: skip
    assert after.card.sampling == before.card.sampling and after.card.base == str(published)
    assert after.model.config.text_config.pad_token_id == 0, "not the trainer's"
    if logprob == "guided":
        train(recipe(published, **settings | {"steps": 2}), tmp_path / "parts")
        train(recipe(published, **settings), tmp_path / "parts", resume=True)
        assert load_policy(tmp_path / "parts" / "policy").fingerprint() == after.fingerprint()


def test_adapters_are_put_on_the_language_model_and_merged(published: Path, tmp_path: Path) -> None:
    settings = {"beta": 0.01, "steps": 2, "save_every": 1, "lora": {"rank": 2, "alpha": 4.0}, "logprob": "guided"}
    settings |= {"gradient_checkpointing": True, "micro_batch_size": 4, "tokens": {"method": "guidance"}}
    lines = train(recipe(published, **settings, learning_rate=0.05), tmp_path / "run")
    assert lines[0]["ratio"] == pytest.approx(1, abs=1e-4) and lines[-1]["kl"] > 0
    before, after = load_policy(published), load_policy(tmp_path / "run" / "policy")
    assert moved(before, after) == {"language_model"}
    adapted = load_policy(tmp_path / "run" / "checkpoints" / "step_000002")
    prompts = adapted.encode(adapted.conditions(PROMPTS))
    tokens, logp = after.sample(prompts, Sampling(), [0, 1], logp="guided")
    torch.testing.assert_close(adapted.model(prompts, tokens, Sampling()).logp, logp, atol=1e-4, rtol=0)


def test_guidance_is_distilled_into_the_weights(published: Path, tmp_path: Path) -> None:
    distil = {"cfg_scale": 3.0, "batch_size": 8, "steps": 10, "learning_rate": 1e-3, "lmbda": 0.0}
    tree = recipe(published).model_dump() | {"method": "distil", "distil": distil}
    first, *_, seventh, eighth, last = (
        line["divergence"] for line in train(Recipe.model_validate(tree), tmp_path / "run")
    )
    assert first > 1 and (seventh + eighth + last) / 3 < 0.75 * first
    assert load_policy(tmp_path / "run" / "policy").card.sampling == {"cfg_scale": 1.0}


def test_the_commands_know_it(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for out in ("one", "two"):
        asked = ["--policy", str(published), "--prompt", "a red dog", "--n", "2", "--out", str(tmp_path / out)]
        assert run(["sample", *asked, "--device", "cpu"]) == 0
    first, second = ([file.read_bytes() for file in sorted((tmp_path / out).glob("*.png"))] for out in ("one", "two"))
    assert first == second and first[0] != first[1]
    assert "guidance 3" in capsys.readouterr().err, "as the folder says"
    (tmp_path / "captions.txt").write_text("\n".join(PROMPTS))
    asked = [
        "--policy",
        str(published),
        "--prompts",
        str(tmp_path / "captions.txt"),
        "--out",
        str(tmp_path / "entropy"),
    ]
    assert run(["entropy", *asked, "--device", "cpu", "--cfg-scale", "2"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "entropy" / "entropy.jsonl").read_text().splitlines()]
    assert rows[0]["mean"] > 0
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"policy: {{checkpoint: {published}, lora: {{}}}}\nconditions: {{source: captions, captions: [a dog]}}\n"
        "rewards: {terms: [{name: aesthetic}]}\n"
    )
    assert run(["train", str(file), "--dry-run"]) == 0
    plan = capsys.readouterr().err
    assert "16 pixels, 16 tokens an image" in plan and "of adapters" in plan and "training pass" in plan
