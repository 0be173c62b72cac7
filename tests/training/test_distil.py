"""Guidance distilled into the weights, as a run of its own and as the start of another."""

from __future__ import annotations

import io
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from trl.experimental.gkd import GKDTrainer

from argrpo_cli.policy import Policy, load_policy
from argrpo_cli.policy import tokens as shared
from argrpo_cli.recipe import Recipe, load_recipe
from argrpo_cli.runs import curves
from argrpo_cli.runs.run import Interrupted
from argrpo_cli.system.errors import UserError
from argrpo_cli.training import run_training
from argrpo_cli.training.distil import DistilTrainer, divergence, smallest_of_the_best
from argrpo_cli.training.image_trainer import build
from argrpo_cli.training.rollout import Rollout
from tests.training.test_train import Stopped, assert_same_run, die, metrics, send, train
from tests.training.tiny import CLASSES, CODES, FakeRewards, tiny_recipe

DISTIL = {"batch_size": 8, "micro_batch_size": 4, "steps": 4, "learning_rate": 1e-3, "lmbda": 0.5, "cfg_scale": 3.0}


def distil_recipe(folder: Path | str = "tiny", lora: dict[str, Any] | None = None, **keys: Any) -> Recipe:
    """Of method distil; `keys` are of its section, `logging` of that one, and dtype and temperature of theirs."""
    others = {key: keys.pop(key) for key in ("dtype", "temperature") if key in keys}
    logging = {"save_every": 2, "grid_every": 100, "grid_images": 4, **keys.pop("logging", {})}
    tree = tiny_recipe(folder, lora=lora, **others).model_dump() | {"method": "distil", "distil": DISTIL | keys}
    return Recipe.model_validate(tree | {"logging": logging})


def started_recipe(folder: Path, **grpo: Any) -> Recipe:
    """GRPO unguided after a distillation."""
    tree = tiny_recipe(folder, **{"steps": 3, "save_every": 2, "cfg_scale": 1.0, **grpo}).model_dump()
    return Recipe.model_validate(tree | {"start": {"distil": DISTIL}})


# --- the divergence


def test_divergences_of_two_coins_computed_by_hand() -> None:
    teacher, student = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    reverse = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    # beta 1/4: the mixture is (0.3125, 0.6875).
    teacher_part = 0.5 * math.log(0.5 / 0.3125) + 0.5 * math.log(0.5 / 0.6875)
    student_part = 0.25 * math.log(0.25 / 0.3125) + 0.75 * math.log(0.75 / 0.6875)
    expected = {0.0: forward, 1.0: reverse, 0.25: 0.25 * teacher_part + 0.75 * student_part}
    for beta, value in expected.items():
        assert divergence(teacher, student, beta).item() == pytest.approx(value, rel=1e-5)
        assert divergence(teacher, teacher, beta).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_it_is_what_trl_computes_and_so_is_its_gradient(beta: float) -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 7), torch.randn(2, 3, 7, requires_grad=True)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=0.7, reduction="sum")
    ours = divergence((teacher / 0.7).log_softmax(-1), (student / 0.7).log_softmax(-1), beta)
    assert ours.shape == (2, 3) and ours.sum().item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours.sum(), theirs)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


# --- the trainer


@pytest.fixture
def stepped(policy: Policy, tmp_path: Path) -> Callable[..., Any]:
    """The trainer of a run after so many updates."""

    def step(**keys: Any) -> Any:
        recipe = distil_recipe(**keys)
        rollout = Rollout(recipe, policy.conditions(range(CLASSES)), policy)
        trainer = build(DistilTrainer, recipe, policy, rollout, recipe.distil.cfg_scale, tmp_path / "trainer", [])
        trainer.train()
        return trainer

    return step


def test_the_student_moves_and_the_teacher_does_not(stepped: Callable[..., Any], policy_folder: Path) -> None:
    base = load_policy(policy_folder).model.state_dict()
    trainer = stepped(steps=1)
    assert all(torch.equal(one, base[name]) for name, one in trainer.base.state_dict().items())
    assert not any(one.requires_grad or one.grad is not None for one in trainer.base.parameters())
    student = trainer.model.state_dict()
    assert {name for name in base if torch.equal(base[name], student[name])} == set()
    null = base["model.class_embedding.weight"][-1]
    assert torch.allclose(student["model.class_embedding.weight"][-1], null, rtol=1e-3)  # but for weight decay


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.03)])
def test_the_loss_is_the_mean_over_all_tokens_in_whatever_parts(
    stepped: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, dtype: str, tolerance: float
) -> None:
    """By hand, of the images that the first update draws."""
    monkeypatch.setattr(shared, "LOGITS_AT_ONCE", 9 * CODES)  # logits are computed again in the backward pass
    trainer = stepped(steps=1, lmbda=0.0, temperature=0.8, gradient_checkpointing=True, dtype=dtype)
    (log,) = [one for one in trainer.state.log_history if "loss" in one]
    trainer.state.global_step = 0
    encoded, tokens = trainer._draw()
    with torch.no_grad():
        plain = (trainer.base.logits(encoded, tokens) / 0.8).log_softmax(-1)
        guided = (trainer.base.logits(encoded, tokens, 3.0) / 0.8).log_softmax(-1)
    expected = (guided.exp() * (guided - plain)).sum(-1).mean().item()
    assert log["loss"] == log["divergence_teacher"] == pytest.approx(expected, rel=tolerance)
    assert log["entropy"] == pytest.approx(-(plain.exp() * plain).sum(-1).mean().item(), rel=tolerance)
    assert expected > 1e-3


def test_who_draws_is_decided_by_the_seed_and_in_the_asked_share(stepped: Callable[..., Any]) -> None:
    logs = [one for one in stepped(steps=12, lmbda=0.5).state.log_history if "loss" in one]
    drew = ["divergence_student" in one for one in logs]
    assert all(("divergence_teacher" in one) != student for one, student in zip(logs, drew, strict=True))
    assert 3 <= sum(drew) <= 9


def test_the_student_draws_unguided_from_its_own_weights(
    stepped: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    draw = Rollout.draw

    def watch(self: Rollout, model: Any, encoded: Any, seeds: Any, trainer: Any, sampling: Any, **keys: Any) -> Any:
        asked.append((model is trainer.base, sampling.cfg_scale))
        return draw(self, model, encoded, seeds, trainer, sampling, **keys)

    monkeypatch.setattr(Rollout, "draw", watch)
    stepped(steps=8)
    assert set(asked) == {(True, 3.0), (False, 1.0)}


# --- runs


def at_draw(number: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something while a certain batch is drawn."""
    count, draw = 0, Rollout.draw

    def counted(*args: Any, **keys: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            act()
        return draw(*args, **keys)

    monkeypatch.setattr(Rollout, "draw", counted)


@pytest.fixture(scope="module")
def finished(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a start that nothing disturbed."""
    out = tmp_path_factory.mktemp("started") / "run"
    shown = train(started_recipe(policy_folder), out)
    assert f"stage 1 of 2, tiny-start: 4 updates of 8 images (guidance 3 is distilled) in {out / 'start'}\n" in shown
    assert f"stage 2 of 2, tiny: 3 updates of 8 images (2 groups of 4) in {out}\n" in shown
    return out


def test_a_start_is_a_run_of_its_own_and_training_goes_on_from_it(finished: Path, policy_folder: Path) -> None:
    recipe = load_recipe(finished / "recipe.yaml")
    assert load_recipe(finished / "start" / "recipe.yaml") == recipe.start
    assert [record["step"] for record in metrics(finished / "start")] == [1, 2, 3, 4]
    base, start, end = (load_policy(one) for one in (policy_folder, finished / "start", finished))
    notes = json.loads((finished / "run.json").read_text())
    assert notes["base_policy"] == str(finished / "start" / "policy")
    assert metrics(finished)[0]["kl"] == pytest.approx(0, abs=1e-6)  # against what was distilled
    assert 0 < metrics(finished)[-1]["kl_start"] < metrics(finished)[-1]["kl_base"]  # the latter to the undistilled
    assert "kl_base" not in metrics(finished / "start")[-1]
    weights = [one.model.lm_head.weight for one in (base, start, end)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert base.sampling == {} and start.sampling == end.sampling == {"cfg_scale": 1.0}
    assert load_policy(finished / "start" / "checkpoints" / "step_000002").sampling == {"cfg_scale": 1.0}


def test_its_records_say_what_there_is_to_say_of_a_distillation(finished: Path) -> None:
    records = metrics(finished / "start")
    for record in records:
        assert {"divergence", "entropy", "grad_norm", "learning_rate", "images_per_second"} <= record.keys()
        assert record["divergence"] == record["loss"] > 0
        assert [record["divergence_teacher"], record["divergence_student"]].count(None) == 1
        assert "reward" not in record and "kl" not in record
    assert [panel.title for panel in curves.panels(records, {})][:2] == [
        "divergence to the guided teacher (nats per token)", "policy entropy (nats per token)"
    ]  # fmt: skip


@pytest.mark.parametrize("number", [3, 6])  # in the start, and after it
def test_interrupted_in_either_stage_it_goes_on_as_if_nothing_had_been(
    finished: Path, policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out, recipe, console = tmp_path / "run", started_recipe(policy_folder), Console(file=io.StringIO(), width=200)
    with pytest.raises(Interrupted):
        at_draw(number, send(signal.SIGINT), monkeypatch)
        run_training(recipe, out, rewards=FakeRewards(), console=console)
    step = number if number < 4 else number - 4
    assert console.file.getvalue().splitlines()[-1] == (
        f"stopped after step {step}; continue with: argrpo train --resume {out}"
    )
    assert (out / "start" / "policy").is_dir() == (number > 4)
    with pytest.raises(Stopped):  # and once more, in the second
        at_draw(3 if number == 3 else 1, die, monkeypatch)
        train(recipe, out, resume=True)
    monkeypatch.undo()
    train(recipe, out, resume=True)
    assert_same_run(finished / "start", out / "start", step=4)
    assert_same_run(finished, out, step=3)


def test_a_start_that_is_finished_is_passed_over(finished: Path, policy_folder: Path) -> None:
    before = (finished / "start" / "run.json").read_bytes()
    shown = train(started_recipe(policy_folder), finished, resume=True)
    assert "is finished after step 3; raise grpo.steps" in shown and "stage 1" not in shown
    assert (finished / "start" / "run.json").read_bytes() == before


def test_what_is_wrong_with_the_second_stage_is_told_before_the_first(policy_folder: Path, tmp_path: Path) -> None:
    tree = started_recipe(policy_folder).model_dump()
    tree["policy"]["trainable"] = "layers.9."
    with pytest.raises(UserError, match=r"no parameter's name contains 'layers\.9\.'"):
        train(Recipe.model_validate(tree), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_adapters_of_both_stages(policy_folder: Path, tmp_path: Path) -> None:
    """The start's policy is whole; the adapters after it are those of that one."""
    first = distil_recipe(policy_folder, lora={"rank": 2}, steps=2)
    recipe = started_recipe(policy_folder, lora={"rank": 2}, steps=1).model_copy(update={"start": first})
    train(recipe, tmp_path / "run")
    start, checkpoint = tmp_path / "run" / "start", tmp_path / "run" / "checkpoints" / "step_000001"
    card = json.loads((checkpoint / "policy.json").read_text())
    assert card == {"adapter_of": str(start / "policy"), "sampling": {"cfg_scale": 1.0}}
    assert (start / "policy" / "model.safetensors").is_file()
    assert (start / "checkpoints" / "step_000002" / "adapter_model.safetensors").is_file()
    whole, opened = load_policy(tmp_path / "run" / "policy"), load_policy(checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), opened.model.parameters(), strict=True))
    assert whole.sampling == opened.sampling == load_policy(start).sampling == {"cfg_scale": 1.0}


# --- the choice of a scale


def test_the_smallest_scale_within_one_error_of_the_best_by_hand() -> None:
    """Behind the best (4) by (2, 2, 2, 2) at 1.5, by (1, -1, 1, -0.2) at 2: 0.2 ± 0.49, and by more at 6."""
    best = torch.tensor([3.0, 4.0, 5.0, 6.0, math.nan])
    behind = {1.5: [2.0, 2, 2, 2, 0], 2.0: [1, -1, 1, -0.2, 0], 4.0: [0.0] * 5, 6.0: [1, 0, 1, 1, 0]}
    choice = smallest_of_the_best({scale: best - torch.tensor(by) for scale, by in behind.items()})
    assert choice["cfg_scale"] == 2.0
    rows = {row["cfg_scale"]: row for row in choice["scales"]}
    assert rows[4.0]["reward"] == pytest.approx(4.5) and rows[4.0]["error"] == pytest.approx(1.2909944 / 2)
    assert rows[2.0]["behind"] == pytest.approx(0.2) and rows[2.0]["behind_error"] == pytest.approx(0.9797959 / 2)
    assert rows[1.5]["behind"] == pytest.approx(2.0) and rows[1.5]["behind_error"] == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(UserError, match="no scores"):
        smallest_of_the_best({2.0: torch.full((3,), math.nan)})


def test_of_a_list_the_rewards_choose_once(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argrpo_cli.training.job.SCALE_IMAGES", 8)
    recipe, out, rewards = distil_recipe(policy_folder, cfg_scale=[6.0, 1.5], steps=2), tmp_path / "run", FakeRewards()
    with pytest.raises(Stopped):
        at_draw(2, die, monkeypatch)
        train(recipe, out, rewards=rewards)
    assert rewards.calls == 2
    notes = json.loads((out / "run.json").read_text())["scale"]
    assert [row["cfg_scale"] for row in notes["scales"]] == [1.5, 6.0]
    asked_again: Any = lambda images: pytest.fail("asked again")  # noqa: E731
    shown = train(recipe, out, resume=True, rewards=FakeRewards(bright=asked_again, red=asked_again))
    assert f"(guidance {notes['cfg_scale']:g} is distilled)" in shown
