"""Ways to train: adapters instead of weights, a running mean of the weights, recomputed activations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from argrpo_cli.policy import Policy, load_policy
from argrpo_cli.recipe import Recipe
from argrpo_cli.system.errors import UserError
from tests.training.test_train import Stopped, at_batch, die, metrics, train, without_times
from tests.training.test_trainer import Build, batches, teacher_forced
from tests.training.tiny import tiny_recipe

__all__ = ["batches"]  # a fixture

LORA = {"rank": 4, "alpha": 8.0}


def with_lora(recipe: Recipe, **keys: Any) -> Recipe:
    tree = recipe.model_dump()
    tree["policy"]["lora"] = LORA | keys
    return Recipe.model_validate(tree)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_policy(folder).model.state_dict()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def lora_run(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lora") / "run"
    train(with_lora(tiny_recipe(policy_folder, save_every=2, learning_rate=1e-2)), out)
    return out


def test_adapters_move_the_layers_they_are_on_and_nothing_else(lora_run: Path, policy_folder: Path) -> None:
    before, after = weights(policy_folder), weights(lora_run / "policy")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {name for name in before if name.split(".")[-2] in {"wqkv", "wo", "w1", "w2", "w3"}}
    assert moved == layers and layers


def test_a_checkpoint_holds_adapters_alone_and_opens_as_the_whole_policy(lora_run: Path, policy_folder: Path) -> None:
    checkpoint = lora_run / "checkpoints" / "step_000004"
    assert not (checkpoint / "model.safetensors").exists()
    adapters = load_file(checkpoint / "adapter_model.safetensors")
    assert {tensor.shape[name.endswith("lora_B.weight")] for name, tensor in adapters.items()} == {LORA["rank"]}
    assert equal(weights(checkpoint), weights(lora_run / "policy"))
    assert equal(weights(lora_run), weights(lora_run / "policy"))
    # W + alpha / rank B A, by hand.
    name = "model.layers.0.attention.wqkv"
    a, b = (adapters[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    merged = weights(policy_folder)[f"{name}.weight"] + LORA["alpha"] / LORA["rank"] * b @ a
    assert torch.allclose(merged, weights(checkpoint)[f"{name}.weight"], atol=1e-6)


@pytest.mark.parametrize(("logprob", "scale"), [("conditional", None), ("guided", 2.0)])
def test_the_reference_is_the_model_without_its_adapters(
    new_trainer: Build, policy: Policy, policy_folder: Path, batches: list[dict[str, Any]], logprob: str, scale: float
) -> None:
    trainer = new_trainer(steps=3, logprob=logprob, learning_rate=1e-2, lora=LORA)
    assert trainer.ref_model is None  # no second copy
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert trainer.state.log_history[2]["kl"] > 1e-4
    assert trainer.ratio_meter.take()[2] < 1e-4  # sampled with the adapters on
    base = teacher_forced(load_policy(policy_folder), batches[2], scale)
    assert torch.allclose(batches[2]["ref_per_token_logps"], base, atol=1e-5)
    assert not torch.allclose(batches[2]["sampling_per_token_logps"], base, atol=1e-2)


def test_a_run_with_adapters_and_a_mean_resumes_exactly(policy_folder: Path, tmp_path: Path) -> None:
    start = load_policy(policy_folder)
    start.sampling = {"cfg_scale": 1.0}  # descendants are sampled as it is
    start.save(tmp_path / "start")
    recipe = with_lora(
        tiny_recipe(
            tmp_path / "start", save_every=2, learning_rate=1e-2, ema_decay=0.5, entropy_weight=0.1, entropy_target=10.0
        )
    )
    train(recipe, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "stopped", rewards=at_batch(4, die))
    train(recipe, tmp_path / "stopped", resume=True)
    for folder in ("policy", "policy_ema", "checkpoints/step_000004"):
        assert equal(weights(tmp_path / "whole" / folder), weights(tmp_path / "stopped" / folder))
        assert load_policy(tmp_path / "stopped" / folder).card.sampling == {"cfg_scale": 1.0}
    assert without_times(metrics(tmp_path / "whole")) == without_times(metrics(tmp_path / "stopped"))
    assert not equal(weights(tmp_path / "whole" / "policy"), weights(tmp_path / "whole" / "policy_ema"))


def test_training_goes_on_from_the_adapters_of_another_run(lora_run: Path, tmp_path: Path) -> None:
    """Their sum with the base is the new base, which the KL term holds to."""
    out = tmp_path / "run"
    train(tiny_recipe(lora_run / "checkpoints" / "step_000004", steps=1), out)
    assert equal(weights(out / "base"), weights(lora_run / "policy"))
    assert metrics(out)[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_adapters_without_their_base_are_one_line(lora_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    folder.mkdir()
    for file in (lora_run / "checkpoints" / "step_000004").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "policy.json").write_text(json.dumps({"adapter_of": "no-such-policy"}))
    with pytest.raises(UserError, match="no-such-policy"):
        load_policy(folder)
    (folder / "policy.json").write_text(json.dumps({"adapter_of": "nano-c2i"}))  # of other shapes
    with pytest.raises(UserError, match="cannot load the adapters") as told:
        load_policy(folder)
    assert "\n" not in str(told.value)


def test_an_unknown_target_is_refused_and_nothing_written(policy_folder: Path, tmp_path: Path) -> None:
    recipe = with_lora(tiny_recipe(policy_folder), targets=["q_proj"])
    with pytest.raises(UserError, match=r"policy\.lora\.targets: .*'q_proj'; there are wqkv, wo, w1, w3, w2"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_mean_is_the_exponential_average_of_every_update(policy_folder: Path, tmp_path: Path) -> None:
    decay, out = 0.7, tmp_path / "run"
    train(tiny_recipe(policy_folder, steps=3, save_every=1, keep_checkpoints=9, ema_decay=decay), out)
    mean = weights(policy_folder)
    for step in (1, 2, 3):
        now = weights(out / "checkpoints" / f"step_{step:06d}")
        mean = {name: decay * mean[name] + (1 - decay) * now[name] for name in mean}
    saved = weights(out / "policy_ema")
    assert all(torch.allclose(saved[name], mean[name], atol=1e-6) for name in mean)
    assert equal(weights(out / "policy"), weights(out / "checkpoints" / "step_000003"))
    train(tiny_recipe(policy_folder, steps=3, ema_decay=decay, result="ema"), tmp_path / "mean")
    assert equal(weights(tmp_path / "mean" / "policy"), saved)
    assert not (tmp_path / "mean" / "policy_ema").exists()


def test_recomputed_activations_change_nothing_but_memory(policy_folder: Path, tmp_path: Path) -> None:
    for on in (False, True):
        train(tiny_recipe(policy_folder, steps=2, logprob="guided", gradient_checkpointing=on), tmp_path / str(on))
    plain, recomputed = (weights(tmp_path / str(on) / "policy") for on in (False, True))
    assert all(torch.allclose(plain[name], recomputed[name], atol=1e-6) for name in plain)
    assert metrics(tmp_path / "True")[1]["ratio_deviation"] < 1e-4


def test_activations_are_recomputed_in_the_update_and_not_while_drawing(new_trainer: Build, policy: Policy) -> None:
    passes: dict[bool, list[bool]] = {}
    for on in (False, True):
        passes[on] = seen = []
        hook = policy.model.model.layers[0].attention.register_forward_hook(
            lambda *_, seen=seen: seen.append(torch.is_grad_enabled())
        )
        new_trainer(steps=1, gradient_checkpointing=on).train()
        hook.remove()
    assert passes[False].count(True) == 1  # the update's pass, which the backward pass needs
    assert passes[True].count(True) == 2  # and once more in the backward pass
    assert passes[True].count(False) == passes[False].count(False)
