"""What a run does when a guard fires."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from argrpo_cli.policy import Policy, load_policy
from argrpo_cli.policy.llamagen.policy import LlamaGen
from argrpo_cli.recipe import Recipe, load_recipe
from argrpo_cli.runs.run import CHANGEABLE, RunDirectory
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import cannot_write
from argrpo_cli.training import job as job_module
from argrpo_cli.training import run_training
from argrpo_cli.training.grpo import ImageGRPOTrainer
from argrpo_cli.training.guards import check_weights
from tests.training.guarded import guarded
from tests.training.tiny import FakeRewards, brightness, redness, tiny_policy, tiny_recipe


def train(recipe: Recipe, out: Path, resume: bool = False, rewards: FakeRewards | None = None) -> str:
    """Run, and return what was shown."""
    console = Console(file=io.StringIO(), width=80)
    run_training(recipe, out, resume, rewards=rewards or FakeRewards(), console=console)
    return console.file.getvalue()


def warnings(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "run.json").read_text()).get("warnings", [])


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def sample_otherwise(monkeypatch: pytest.MonkeyPatch, **settings: float) -> None:
    """Let rollouts draw with other settings than the recipe's."""
    sample = LlamaGen.sample

    def other(self: Policy, encoded: Any, sampling: Any = None, *args: Any, **keys: Any) -> Any:
        return sample(self, encoded, replace(sampling, **settings) if "model" in keys else sampling, *args, **keys)

    monkeypatch.setattr(LlamaGen, "sample", other)


@pytest.fixture
def warm_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts drawn at another temperature than the recipe's."""
    sample_otherwise(monkeypatch, temperature=1.1)


def test_a_run_without_trouble_warns_of_nothing(policy_folder: Path, tmp_path: Path) -> None:
    assert "warning" not in train(tiny_recipe(policy_folder, steps=3, learning_rate=1e-4), tmp_path / "run")
    assert warnings(tmp_path / "run") == []
    shown = train(tiny_recipe(policy_folder, steps=2, learning_rate=1e-4, dtype="bfloat16"), tmp_path / "bfloat16")
    assert "warning" not in shown


def test_another_temperature_in_the_sampler_is_said_and_remembered(
    policy_folder: Path, tmp_path: Path, warm_sampler: None
) -> None:
    recipe = tiny_recipe(policy_folder, steps=4)
    shown = train(recipe, tmp_path / "run")
    (line,) = [line for line in shown.splitlines() if "warning" in line]
    assert line.startswith("warning: step 1: mean |ratio - 1| to the sampler is 0.0")
    (kept,) = warnings(tmp_path / "run")
    assert (kept["step"], kept["guard"]) == (1, "ratio") and kept["text"] in line

    longer = recipe.model_copy(update={"grpo": recipe.grpo.model_copy(update={"steps": 6})})
    assert "warning" not in train(longer, tmp_path / "run", resume=True)  # said already
    assert warnings(tmp_path / "run") == [kept]
    assert metrics(tmp_path / "run")[-1]["ratio_deviation_mean"] > 0.01


def test_a_guided_sampler_with_another_scale_is_found(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample_otherwise(monkeypatch, cfg_scale=1.5)
    train(tiny_recipe(policy_folder, steps=1, logprob="guided", dtype="bfloat16"), tmp_path / "run")
    assert [one["guard"] for one in warnings(tmp_path / "run")] == ["ratio"]


def test_a_guard_stops_at_once_with_a_checkpoint_and_again_unless_it_is_changed(
    policy_folder: Path, tmp_path: Path, warm_sampler: None
) -> None:
    out = tmp_path / "run"
    recipe = guarded(tiny_recipe(policy_folder, steps=4), ratio={"action": "stop"})
    for step, resume in ((1, False), (2, True)):
        with pytest.raises(UserError, match=rf"^stopped after step {step}: mean \|ratio.*train --resume") as told:
            train(recipe, out, resume)
        assert "\n" not in str(told.value)
        assert (out / "checkpoints" / f"step_{step:06d}").is_dir() and not (out / "policy").exists()
        assert [one["step"] for one in warnings(out)] == list(range(1, step + 1))
    train(guarded(recipe, ratio={"limit": 1.0}), out, resume=True)
    assert metrics(out)[-1]["step"] == 4 and (out / "policy").is_dir()
    assert "guards." in CHANGEABLE


def test_a_stop_waits_for_the_end_of_the_batch(policy_folder: Path, tmp_path: Path, warm_sampler: None) -> None:
    recipe = guarded(tiny_recipe(policy_folder, steps=6, updates_per_batch=2), ratio={"action": "stop"})
    with pytest.raises(UserError, match=r"^stopped after step 2: mean \|ratio"):
        train(recipe, tmp_path / "run")


def test_a_stop_at_the_last_step_can_be_resumed(policy_folder: Path, tmp_path: Path, warm_sampler: None) -> None:
    recipe = guarded(tiny_recipe(policy_folder, steps=1), ratio={"action": "stop"})
    with pytest.raises(UserError, match="stopped after step 1"):
        train(recipe, tmp_path / "run")
    assert "finished" in train(recipe, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "policy").is_dir()


def test_a_lower_limit_on_resume_is_held_against_the_past_too(policy_folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(policy_folder, steps=2)
    assert "warning" not in train(recipe, tmp_path / "run")
    strict = guarded(recipe, ratio={"limit": 1e-12})
    longer = strict.model_copy(update={"grpo": recipe.grpo.model_copy(update={"steps": 3})})
    shown = train(longer, tmp_path / "run", resume=True)
    assert shown.count("warning: step 1: mean |ratio") == shown.count("warning") == 1


def test_a_learning_rate_that_is_too_large_trips_the_kl(policy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stopped after step \d+: the KL to the base policy is .*raise grpo\.beta"):
        train(tiny_recipe(policy_folder, steps=20, learning_rate=0.3, beta=0.01), tmp_path / "run")


def test_a_constant_reward_is_said(policy_folder: Path, tmp_path: Path) -> None:
    rewards = FakeRewards(bright=brightness, red=lambda images: torch.full((len(images),), 0.25))
    recipe = guarded(tiny_recipe(policy_folder, steps=5), constant_reward={"batches": 3})
    shown = train(recipe, tmp_path / "run", rewards=rewards)
    assert shown.count("warning: step 3: reward red has collapsed to 0.25") == 1
    assert [one["guard"] for one in warnings(tmp_path / "run")] == ["constant_reward"]


def test_a_held_out_reward_against_the_optimised_one_is_said_and_an_independent_one_is_not(
    policy_folder: Path, tmp_path: Path
) -> None:
    def random(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(noise.standard_normal(len(images)))

    def rising(images: torch.Tensor) -> torch.Tensor:  # whatever the policy learns
        return brightness(images) + rewards.calls / 500

    noise = np.random.default_rng(0)
    recipe = tiny_recipe(
        policy_folder, rewards=["bright", "dark", "random"], steps=40, weights={"dark": 0.0, "random": 0.0}, beta=0.0
    )
    recipe = guarded(recipe, held_out={"batches": 20})
    rewards = FakeRewards(bright=rising, dark=lambda images: -rising(images), random=random)
    train(recipe, tmp_path / "run", rewards=rewards)
    (kept,) = warnings(tmp_path / "run")
    assert kept["guard"] == "held_out" and "held-out dark fell" in kept["text"]


def test_images_without_a_score_are_said(policy_folder: Path, tmp_path: Path) -> None:
    def sometimes(images: torch.Tensor) -> torch.Tensor:
        scores = redness(images)
        scores[0] = torch.nan
        return scores

    shown = train(
        tiny_recipe(policy_folder, steps=2), tmp_path / "run", rewards=FakeRewards(bright=brightness, red=sometimes)
    )
    assert shown.count("warning: step 1: 1 of 8 images were left out") == shown.count("warning") == 1


# --- a gradient that is not a number, in whole runs


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Steps whose gradient is made NaN, in one element of one parameter."""
    steps: set[int] = set()
    real = job_module.BUILDERS["grpo"]

    def build(*args: Any) -> Any:
        trainer = real(*args)

        def poison(gradient: torch.Tensor) -> torch.Tensor:
            if trainer.state.global_step + 1 in steps:
                gradient = gradient.clone()
                gradient.view(-1)[0] = torch.nan
            return gradient

        trainer.model.lm_head.weight.register_hook(poison)
        return trainer

    monkeypatch.setitem(job_module.BUILDERS, "grpo", build)
    yield steps


def state(out: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[int, dict[str, torch.Tensor]]]:
    folder = out / "checkpoints" / f"step_{step:06d}"
    return load_file(folder / "model.safetensors"), torch.load(folder / "optimizer.pt")["state"]


def assert_same_state(out: Path, *steps: int) -> None:
    """Weights and optimiser of two checkpoints, bit for bit."""
    (weights, moments), (other_weights, other_moments) = [state(out, step) for step in steps]
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert all(torch.equal(moments[at][name], other_moments[at][name]) for at in moments for name in moments[at])


def test_a_bad_gradient_stops_with_the_state_before_it(policy_folder: Path, tmp_path: Path, poisoned: set[int]) -> None:
    out = tmp_path / "run"
    poisoned.add(3)
    recipe = tiny_recipe(policy_folder, steps=5, save_every=1)
    with pytest.raises(
        UserError, match=r"stopped after step 3: the gradient is not a number.*lower grpo\.learning_rate.*--resume"
    ):
        train(recipe, out)
    assert_same_state(out, 2, 3)
    assert metrics(out)[-1]["grad_norm"] is metrics(out)[-1]["loss"] is None
    train(load_recipe(out / "recipe.yaml"), out, resume=True)
    assert metrics(out)[-1]["step"] == 5
    assert [one["step"] for one in warnings(out)] == [3]


def test_a_bad_gradient_can_be_skipped(policy_folder: Path, tmp_path: Path, poisoned: set[int]) -> None:
    out = tmp_path / "run"
    poisoned.add(3)
    recipe = guarded(tiny_recipe(policy_folder, steps=4, save_every=1, keep_checkpoints=4), not_a_number="skip")
    shown = train(recipe, out)
    assert shown.count("warning: step 3: the gradient is not a number; the update was left out (1 in a row") == 1
    assert_same_state(out, 2, 3)
    assert not torch.equal(state(out, 3)[0]["lm_head.weight"], state(out, 4)[0]["lm_head.weight"])
    assert [one["loss"] is None for one in metrics(out)] == [False, False, True, False]
    assert [one["step"] for one in warnings(out)] == [3]


def test_skipping_ends_after_ten_in_a_row(policy_folder: Path, tmp_path: Path, poisoned: set[int]) -> None:
    poisoned.update({1, *range(3, 100)})
    recipe = guarded(tiny_recipe(policy_folder, steps=20), not_a_number="skip")
    with pytest.raises(UserError, match="stopped after step 12: the gradients of 10 updates in a row are not numbers"):
        train(recipe, tmp_path / "run")


def test_a_loss_that_is_not_a_number_is_left_out_and_forgotten(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ImageGRPOTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **keys: Any) -> torch.Tensor:
        return real(self, *args, **keys) * (torch.nan if self.state.global_step == 1 else 1)

    monkeypatch.setattr(ImageGRPOTrainer, "compute_loss", compute_loss)
    out = tmp_path / "run"
    train(guarded(tiny_recipe(policy_folder, steps=4), not_a_number="skip"), out)
    assert [one["loss"] is None for one in metrics(out)] == [False, True, False, False]
    assert [one["step"] for one in warnings(out)] == [2]


def test_weights_that_are_no_numbers_are_never_saved(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimiser step can break the weights although its gradient was fine."""
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"the weights after step 1 are not finite numbers and are not saved: .*lower"):
        train(tiny_recipe(policy_folder, learning_rate=1e38, save_every=1), out)
    assert not list((out / "checkpoints").glob("step_*"))


def test_a_warning_that_finds_no_room_ends_nothing(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is only told again in run.json with the next one."""
    note = RunDirectory.note

    def full(self: RunDirectory, **changes: Any) -> None:
        if "warnings" in changes:
            raise cannot_write(self.notes_file, OSError(errno.ENOSPC, "No space left on device"))
        note(self, **changes)

    monkeypatch.setattr(RunDirectory, "note", full)
    flat = FakeRewards(bright=brightness, red=lambda images: torch.ones(len(images)))
    recipe = guarded(tiny_recipe(policy_folder, steps=3), constant_reward={"batches": 2})
    shown = train(recipe, tmp_path / "run", rewards=flat)
    assert "warning: step 2" in shown and "finished at the last step" in shown


def test_weights_that_are_no_numbers_are_refused_before_anything_is_written(
    policy_folder: Path, tmp_path: Path
) -> None:
    check_weights(load_policy(policy_folder).model, "tiny")
    policy = tiny_policy()
    with torch.no_grad():
        policy.model.lm_head.weight[3, 5] = torch.inf
    policy.save(tmp_path / "broken")
    with pytest.raises(UserError, match=r"policy\.checkpoint .*broken: lm_head\.weight is not made of finite numbers"):
        train(tiny_recipe(tmp_path / "broken"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
