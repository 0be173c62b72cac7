"""Controllers of the entropy bonus, schedules of beta and of the reference: by hand, in training, and resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from argrpo_cli.policy import Policy
from argrpo_cli.recipe import dump_recipe, load_recipe
from argrpo_cli.system.errors import UserError
from argrpo_cli.training.entropy import EntropyCallback, LooFid, ReasonGen, controller
from argrpo_cli.training.grpo import ImageGRPOTrainer
from argrpo_cli.training.saving import ReferenceCallback
from tests.training.test_train import Stopped, at_batch, die, metrics, train, without_times
from tests.training.test_trainer import Build
from tests.training.tiny import CODES, tiny_recipe

# LOO-FID's law


def test_the_exponential_law_by_hand() -> None:
    """100 updates of 32 codes; base 2e-3, target 0.78 ln V, gain 3, dead band 0.015."""
    law = LooFid(2e-3, 0.78, 4e-3, 32, 100)
    assert law.weight(0) == 7e-5 and law.weight(1) == pytest.approx(4e-4) and law.weight(5) == law.weight(85) == 2e-3
    assert law.weight(91) == pytest.approx(2e-3 * (1 + math.cos(math.pi * 0.4)) / 2)
    weights = {}
    for share in (0.68, 0.77, 0.79, 0.80, 0.10):
        law.observe(share * math.log(32))
        weights[share] = law.weight(50)
    assert weights[0.77] == weights[0.79] == 2e-3  # within the band
    assert weights[0.68] == pytest.approx(2e-3 * math.exp(3 * 0.1))
    assert weights[0.80] == pytest.approx(2e-3 * math.exp(-3 * 0.02))
    assert weights[0.10] == 4e-3  # no more than the largest


# ReasonGen's


def test_the_sinh_law_is_adam_on_its_own_loss() -> None:
    """-lambda (target - H), by torch's Adam and autograd."""
    law = ReasonGen(math.asinh(1e-3), 3.0, 5e-4, 2e-3)
    psi = torch.tensor(math.asinh(1e-3), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([psi], lr=5e-4)
    for entropy in (2.5, 2.0, 3.2, 4.0, 4.5, 4.5, 4.4, 4.0, 3.9, 4.0, 4.1, 4.2):
        law.observe(entropy)
        adam.zero_grad()
        (psi.sinh() * (entropy - 3.0)).backward()
        adam.step()
        with torch.no_grad():
            psi.copy_(psi.sinh().clamp(-2e-3, 2e-3).asinh())
        assert law.weight(0) == pytest.approx(psi.sinh().item(), rel=1e-9)
    assert law.weight(0) < 0  # above the target entropy is taken away


def test_below_its_target_the_weight_rises_to_its_bound() -> None:
    law = ReasonGen(0.0, 7.0, 5e-5, 1e-4)
    for count in range(1, 4):
        law.observe(5.0)
        assert law.weight(0) == pytest.approx(min(count, 2) * 5e-5)


def test_the_exponential_law_goes_on_from_its_state() -> None:
    law, other = (LooFid(2e-3, 0.78, 4e-3, 32, 100) for _ in range(2))
    assert law.state() == {}
    law.observe(2.0)
    other.restore(law.state())
    assert other == law and other.weight(50) > 2e-3


def test_a_controller_is_as_published_where_the_recipe_says_nothing() -> None:
    law = controller(tiny_recipe(entropy_controller="loo_fid").grpo, 16384)
    assert law == LooFid(2.2e-3, 0.78, 4e-3, 16384, 4)
    law = controller(tiny_recipe(entropy_controller="reasongen").grpo, 16384)
    assert law == ReasonGen(0.0, pytest.approx(7.0), 5e-5, 5e-3)
    keys = {"entropy_weight": 0.01, "entropy_weight_max": 0.02}
    recipe = tiny_recipe(entropy_controller="loo_fid", entropy_target=math.log(8), **keys)
    assert controller(recipe.grpo, 64) == LooFid(0.01, pytest.approx(0.5), 0.02, 64, 4)
    assert controller(tiny_recipe(entropy_target=3.0).grpo, 64) is None  # TRL's own


def test_what_is_published_stays_in_the_recipe_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(tiny_recipe(entropy_controller="loo_fid")))
    assert load_recipe(file).grpo.entropy_weight == 2.2e-3
    assert load_recipe(file, ["grpo.entropy_weight=0"]).grpo.entropy_weight == 0


@pytest.mark.parametrize("name", ["loo_fid", "reasongen"])
def test_the_weight_in_training_follows_the_entropy_of_the_update_before(new_trainer: Build, name: str) -> None:
    keys = {"entropy_weight": 0.5, "entropy_weight_max": 2.0, "entropy_target": 3.0, "entropy_step": 0.1}
    trainer = new_trainer(steps=4, micro_batch_size=2, entropy_controller=name, updates_per_batch=2, **keys)
    trainer.train()
    logs = [one for one in trainer.state.log_history if "entropy" in one]
    law = controller(tiny_recipe(steps=4, entropy_controller=name, **keys).grpo, CODES)
    for step, log in enumerate(logs):
        assert log["entropy_coef"] == pytest.approx(law.weight(step))
        law.observe(log["entropy"])
    assert len({log["entropy_coef"] for log in logs}) == 4


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "has no entropy.json: the run was started without grpo.entropy_controller"),
        ('{"psi": 1e9}', "psi"),
        ('{"psi": "x"}', "psi"),
        ("[]", "cannot read"),
    ],
)
def test_a_checkpoint_without_a_state_of_use_is_one_line(tmp_path: Path, text: str | None, why: str) -> None:
    if text is not None:
        (tmp_path / "entropy.json").write_text(text)
    with pytest.raises(UserError, match=why):
        EntropyCallback(ReasonGen(0.0, 7.0, 5e-5, 5e-3), None).load(tmp_path)


# beta


def test_beta_goes_to_its_end() -> None:
    line = tiny_recipe(beta=0.2, beta_end=0.05, steps=8, updates_per_batch=2).grpo
    assert [line.beta_at(step) for step in (0, 2, 4, 6)] == pytest.approx([0.2, 0.15, 0.1, 0.05])
    curve = tiny_recipe(beta=0.0, beta_end=0.4, beta_schedule="cosine", steps=5).grpo
    assert [curve.beta_at(step) for step in (0, 1, 2, 4)] == pytest.approx([0.0, 0.4 * (1 - 0.5**0.5) / 2, 0.2, 0.4])
    assert tiny_recipe(beta=0.2, steps=1, beta_end=0.1).grpo.beta_at(0) == 0.2
    assert tiny_recipe(beta=0.2).grpo.beta_at(3) == 0.2


def test_beta_of_an_update_is_that_of_its_batch(new_trainer: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where it is 0 there is no KL term, however large it was before."""
    trainer = new_trainer(steps=4, updates_per_batch=2, beta=0.3, beta_end=0.0)
    seen, compute_loss = [], ImageGRPOTrainer.compute_loss

    def spy(self: ImageGRPOTrainer, *args: Any, **keys: Any) -> Tensor:
        seen.append(self.beta)
        return compute_loss(self, *args, **keys)

    monkeypatch.setattr(ImageGRPOTrainer, "compute_loss", spy)
    trainer.train()
    assert seen == [0.3, 0.3, 0.0, 0.0]
    assert ["kl" in log for log in trainer.state.log_history[:4]] == [True, True, False, False]


# the reference


@pytest.mark.parametrize(("decay", "every"), [(0.75, 1), (0.0, 2)])
def test_the_reference_follows_the_policy(new_trainer: Build, policy: Policy, decay: float, every: int) -> None:
    base = {name: value.clone() for name, value in policy.model.named_parameters()}
    trainer = new_trainer(steps=3, beta=0.1, reference_decay=decay, reference_every=every)
    policies: list[dict[str, torch.Tensor]] = []

    class Keep(TrainerCallback):
        def on_step_end(self, *args: Any, **keys: Any) -> None:
            policies.append({name: value.detach().clone() for name, value in policy.model.named_parameters()})

    trainer.add_callback(Keep())
    trainer.train()
    for name, value in trainer.ref_model.named_parameters():
        expected = base[name]
        for step, one in enumerate(policies, start=1):
            if step % every == 0:
                expected = decay * expected + (1 - decay) * one[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
        assert not torch.equal(value, policies[-1][name])


def test_a_policy_that_took_the_place_of_the_reference_has_no_distance_from_it(new_trainer: Build) -> None:
    trainer = new_trainer(steps=4, beta=0.1, reference_decay=0.0, reference_every=2)
    trainer.train()
    kl = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert kl[0] == pytest.approx(0, abs=1e-9) and kl[2] == pytest.approx(0, abs=1e-9)
    assert kl[1] > 1e-6 and kl[3] > 1e-6


@pytest.mark.parametrize(("decay", "every", "moves"), [(0.0, 2, True), (0.5, 1, False)])
def test_a_reference_that_is_due_moves_although_the_latest_update_was_left_out(
    decay: float, every: int, moves: bool
) -> None:
    """By updates before that one, where there are any since it last moved."""
    model, reference = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before, state = reference.weight.detach().clone(), TrainerState(global_step=2)
    callback = ReferenceCallback(decay, every, model, reference)
    callback.on_pre_optimizer_step(None, state, None, model=model)  # nothing has a gradient
    callback.on_step_end(None, state, None, model=model)
    assert torch.equal(reference.weight, model.weight if moves else before)


# all of it


def test_a_run_with_all_of_it_resumes_exactly(policy_folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        policy_folder, steps=8, save_every=4, updates_per_batch=4, micro_batch_size=4,
        tokens={"method": "gcpo", "confidence": 0.5}, beta=0.2, beta_end=0.1, beta_schedule="cosine",
        reference_decay=0.5, entropy_controller="reasongen", entropy_target=3.3, entropy_weight=0.1,
        entropy_weight_max=0.5, entropy_step=0.01, learning_rate=1e-2,
    )  # fmt: skip
    train(recipe, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "stopped", rewards=at_batch(2, die))
    train(recipe, tmp_path / "stopped", resume=True)
    checkpoints = [tmp_path / run / "checkpoints" / "step_000008" for run in ("whole", "stopped")]
    for file in ("model.safetensors", "reference.safetensors"):
        one, other = (load_file(folder / file) for folder in checkpoints)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert (checkpoints[0] / "entropy.json").read_text() == (checkpoints[1] / "entropy.json").read_text()
    assert without_times(metrics(tmp_path / "whole")) == without_times(metrics(tmp_path / "stopped"))
    assert json.loads((checkpoints[0] / "entropy.json").read_text())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"reference_decay": 0.9, "beta": 0.0}, "reference_decay 0.9 moves the reference .* set beta"),
        ({"reference_every": 5}, "reference_every 5 has no part in reference_decay 1"),
        ({"reference_decay": 0.9, "lora": {"rank": 2}}, "with policy.lora the reference .* does not move"),
    ],
)
def test_what_makes_no_sense_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_recipe(**keys)
