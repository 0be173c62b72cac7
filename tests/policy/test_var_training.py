"""VAR through the commands: drawn, trained by GRPO and LoRA, resumed, distilled scale by scale, planned, measured."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from argrpo_cli.cli.app import run
from argrpo_cli.evals import benchmark
from argrpo_cli.evals.imagenet import ImageNet
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.llamagen.model import Encoded
from argrpo_cli.policy.open import choose_trainable
from argrpo_cli.policy.var.config import VARConfig
from argrpo_cli.policy.var.model import VARForImageGeneration
from argrpo_cli.policy.var.policy import VAR
from argrpo_cli.policy.var.vq import MultiScaleVQ, MultiScaleVQConfig
from argrpo_cli.recipe import Recipe
from argrpo_cli.shapes import Sampling
from argrpo_cli.training import job as job_module
from argrpo_cli.training import run_training
from argrpo_cli.training.plan import plan
from tests.evals.stub_inception import StubInception, install
from tests.evals.test_imagenet import save_pictures
from tests.together import forked
from tests.training import together_worker
from tests.training.test_together import environment_of
from tests.training.tiny import FakeRewards, brightness, tiny_recipe

SCALES, CODES = [1, 2, 4], 32


@pytest.fixture(autouse=True)
def no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "refresh_report", lambda *args, **keys: None)  # takes its time


def tiny_var() -> VAR:
    """Random weights, the same on every call: 21 tokens for 8 x 8 pixels, four classes."""
    shared = {"scales": SCALES, "phis": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MultiScaleVQConfig(
            codebook_size=CODES, codebook_embed_dim=8, ch=32, encoder_ch_mult=[1], decoder_ch_mult=[1],
            num_res_blocks=1, z_channels=32, patch_size=2, **shared,
        )  # fmt: skip
        tokenizer = MultiScaleVQ(config)
        geometry = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "shared_modulation": True}
        model = VARForImageGeneration(VARConfig(vocab_size=CODES, code_dim=8, num_classes=4, **geometry, **shared))
        model.quantizer.load_state_dict(tokenizer.quantize.state_dict())
        torch.nn.init.normal_(model.head.weight, std=0.2)
        torch.nn.init.normal_(model.class_emb.weight, std=1.0)
    names = ["ant", "bee", "cat", "dog"]
    return VAR(model.eval(), tokenizer.eval(), None, names, 8, "tiny", sampling={"cfg_scale": 2.0})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("var") / "policy"
    tiny_var().save(path)
    return path


def train(recipe: Recipe, out: Path, resume: bool = False) -> list[dict[str, Any]]:
    run_training(recipe, out, resume, rewards=FakeRewards(bright=brightness), console=Console(file=io.StringIO()))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("logprob", ["conditional", "guided"])
def test_three_updates_begin_on_policy_move_all_but_the_quantisation_and_resume(
    folder: Path, tmp_path: Path, logprob: str
) -> None:
    settings = {
        "logprob": logprob, "cfg_scale": 2.0 if logprob == "guided" else 1.0, "beta": 0.01, "scale_balance": 1.0,
        "save_every": 1, "steps": 3, "condition_dropout": 0.1, "tokens": {"method": "gcpo", "confidence": 0.5},
    }  # fmt: skip
    lines = train(tiny_recipe(folder, rewards=["bright"], **settings), tmp_path / "run")
    assert lines[0]["ratio"] == pytest.approx(1, abs=1e-5) and lines[0]["ratio_deviation"] < 1e-3
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and lines[-1]["kl"] > 0
    base, trained = load_policy(folder), load_policy(tmp_path / "run")
    assert isinstance(trained, VAR) and trained.card.sampling == {"cfg_scale": 2.0}
    for (name, one), other in zip(base.model.named_parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(one, other) == name.startswith("quantizer."), name
    assert trained.tokenizer_fingerprint() == base.tokenizer_fingerprint()
    parts = tmp_path / "parts"
    train(tiny_recipe(folder, rewards=["bright"], **{**settings, "steps": 2}), parts)
    train(tiny_recipe(folder, rewards=["bright"], **settings), parts, resume=True)
    again = load_policy(parts / "policy").model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in trained.model.state_dict().items())


def test_two_processes_that_share_out_its_weights_train_as_one_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "policy").symlink_to(folder)

    def case(base: Path, out: Path) -> None:
        settings = {"batch_size": 16, "group_size": 8, "micro_batch_size": 4, "steps": 2, "beta": 0.01}
        settings |= {"logprob": "guided", "scale_balance": 1.0, "tokens": {"method": "guidance"}}
        recipe = tiny_recipe(base / "policy", **settings)
        run_training(recipe, out, rewards=FakeRewards(), console=Console(file=io.StringIO()))

    monkeypatch.setitem(together_worker.CASES, "shared", case)
    environment = {"ACCELERATE_USE_CPU": "true"} | environment_of("fsdp2")
    done = forked(partial(together_worker.main, tmp_path, ("shared",), environment), tmp_path / "printed")
    assert done.codes == [0, 0], done.err[-2000:]
    assert [json.loads((tmp_path / f"{index}.json").read_text()) for index in (0, 1)] == [{"shared": ""}] * 2
    case(tmp_path, tmp_path / "single")
    single, shared = (load_policy(tmp_path / part / "policy").model.state_dict() for part in ("single", "shared"))
    for name, value in single.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-4, atol=1e-5)
    lines = (tmp_path / "shared" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["ratio_deviation"] < 1e-3 for line in lines)


def test_balanced_scales_train_another_policy(folder: Path, tmp_path: Path) -> None:
    heads = []
    for balance in (0.0, 1.0):
        settings = {"cfg_scale": 1.0, "beta": 0.0, "steps": 1, "scale_balance": balance}
        train(tiny_recipe(folder, rewards=["bright"], **settings), tmp_path / f"{balance}")
        heads.append(load_policy(tmp_path / f"{balance}").model.head.weight)
    assert (heads[0] - heads[1]).abs().max() > 1e-4


def test_adapters_train_and_are_merged(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = {"rank": 2, "alpha": 4.0, "targets": ["mat_qkv", "proj", "fc1", "fc2"]}
    lines = train(tiny_recipe(folder, rewards=["bright"], lora=lora, steps=2, cfg_scale=1.0), tmp_path / "run")
    assert lines[0]["ratio"] == pytest.approx(1, abs=1e-5)
    base, trained = load_policy(folder).model, load_policy(tmp_path / "run" / "policy").model
    moved = {name for name, one in base.named_parameters() if not torch.equal(one, trained.get_parameter(name))}
    assert moved and all(name.split(".")[-2] in lora["targets"] for name in moved)


def test_distilled_it_needs_no_guidance_on_any_scale(folder: Path, tmp_path: Path) -> None:
    distil = {
        "cfg_scale": 3.0, "lmbda": 0.3, "batch_size": 32, "steps": 40, "learning_rate": 3e-3, "weight_decay": 0.0,
        "schedule": "wsd",
    }  # fmt: skip
    tree = tiny_recipe(folder).model_dump() | {"method": "distil", "distil": distil}
    run_training(Recipe.model_validate(tree), tmp_path / "run", console=Console(file=io.StringIO()))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    base, student = load_policy(folder), load_policy(tmp_path / "run" / "policy")
    assert student.card.sampling == {"cfg_scale": 1.0} and lines[-1]["divergence"] < lines[0]["divergence"] / 3
    encoded = Encoded(torch.arange(4).repeat(8))
    tokens = base.sample(encoded, Sampling(cfg_scale=3.0), range(32)).tokens.clone()
    whole = slice(0, tokens.numel())
    with torch.no_grad():
        plain, guided = Sampling(cfg_scale=1.0), Sampling(cfg_scale=3.0)
        goal = base.model.distribution(encoded, tokens, guided)(whole)
        before, after = (one.model.distribution(encoded, tokens, plain)(whole) for one in (base, student))
    apart = [(goal.exp() * (goal - one)).sum(-1).view(32, -1) for one in (before, after)]
    assert apart[0][:, 0].abs().max() < 1e-5, "the first scale is not guided"
    for span in (slice(1, 5), slice(5, 21)):
        assert apart[1][:, span].mean() < 0.5 * apart[0][:, span].mean()
    assert apart[0][:, 5:].mean() > apart[0][:, 1:5].mean(), "and the last the most"


def test_it_is_drawn_and_its_entropy_measured_by_the_commands(folder: Path, tmp_path: Path) -> None:
    asked = ["--policy", str(folder), "--class", "ant", "--n", "3", "--device", "cpu", "--out"]
    assert run(["sample", *asked, str(tmp_path / "one" / "ant")]) == 0
    assert run(["sample", *asked, str(tmp_path / "two" / "ant")]) == 0
    pictures = [sorted((tmp_path / part / "ant").glob("*.png")) for part in ("one", "two")]
    assert len(pictures[0]) >= 3 and [one.read_bytes() for one in pictures[0]] == [
        one.read_bytes() for one in pictures[1]
    ]
    out = tmp_path / "entropy"
    asked = ["--policy", str(folder), "--data", str(tmp_path / "one"), "--out", str(out), "--device", "cpu"]
    assert run(["entropy", *asked, "--cfg-scale", "1"]) == 0
    rows = [json.loads(line) for line in (out / "entropy.jsonl").read_text().splitlines()]
    assert rows[0]["images"] == 3 and 0 < rows[0]["mean"] < torch.tensor(CODES).log()


def test_imagenet_measures_it_sampled_as_it_says(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(StubInception(), monkeypatch.setattr)
    reference = ImageNet(reference=str(save_pictures(tmp_path / "reference", 12, seed=1)))
    result = benchmark.run(reference, [str(folder)], tmp_path / "o", device="cpu", n=22, batch_size=8)
    ((name, row),) = result.rows.items()
    assert row["fid"].value > 0 and row["fid"].count == 22
    assert result.protocol["measured"][name]["image_size"] == [8, 8]
    assert "policy says: guidance 2\n" in capsys.readouterr().err


def test_a_plan_adds_up_its_shapes(folder: Path) -> None:
    recipe = tiny_recipe(folder, scale_balance=0.7, rewards=["nano-quality"])
    one = plan(recipe)
    model = tiny_var().model
    parts = {part.name: part.bytes for part in one.memory}
    assert parts["policy, float32"] == 4 * model.num_parameters()
    assert parts["AdamW's two moments"] == 8 * sum(
        value.numel() for name, value in model.named_parameters() if not name.startswith("quantizer.")
    )
    assert "21 tokens an image" in "".join(one.sections["policy"])


def test_parts_of_it_can_be_chosen() -> None:
    policy = tiny_var()
    choose_trainable(policy, "blocks.1.")
    assert {name.split(".")[1] for name, p in policy.model.named_parameters() if p.requires_grad} == {"1"}
    choose_trainable(policy, "all")
    assert not any(p.requires_grad for p in policy.model.quantizer.parameters())
