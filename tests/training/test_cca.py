"""Condition contrastive alignment: its loss by hand, what is held against what, and whole runs."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from argrpo_cli.policy import Policy, load_policy
from argrpo_cli.policy import tokens as shared
from argrpo_cli.runs import curves
from argrpo_cli.runs.run import Interrupted
from argrpo_cli.system.errors import UserError
from argrpo_cli.training.cca import CcaTrainer, contrast
from argrpo_cli.training.image_trainer import build
from argrpo_cli.training.real import Real, open_real
from argrpo_cli.training.rollout import Rollout
from tests.training.reals import real_recipe, save_codes
from tests.training.test_train import assert_same_run, metrics, send, train
from tests.training.tiny import CLASSES, CODES


def log_sigma(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_the_loss_of_three_images_by_hand() -> None:
    """One like any other, one without a condition, and one that is held against its own condition."""
    own, other = torch.tensor([10.0, -4.0, 2.0]), torch.tensor([-6.0, -4.0, 3.0])
    losses = contrast(own, other, torch.tensor([False, True, True]), beta=0.1, weight=300.0)
    expected = [
        (-log_sigma(1.0) - 300 * log_sigma(0.6)) / 300,
        (-log_sigma(-0.4) - log_sigma(-0.4)) / 300,
        (-log_sigma(0.2) - log_sigma(0.3)) / 300,
    ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    small = contrast(own[:1], other[:1], torch.tensor([False]), beta=0.1, weight=0.5)
    assert small.item() == pytest.approx(-log_sigma(1.0) - 0.5 * log_sigma(0.6), rel=1e-5)  # nothing to divide by


def test_its_gradient_lifts_an_image_under_its_condition_and_lowers_it_under_another() -> None:
    own, other = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    contrast(own, other, torch.tensor([False, True]), beta=0.02, weight=300.0).sum().backward()
    assert own.grad.tolist() == pytest.approx([-0.01 / 300, -0.01 / 300])  # descent adds
    assert other.grad.tolist() == pytest.approx([0.01, -0.01 / 300])


@pytest.fixture
def new(policy: Policy, tmp_path: Path) -> Callable[..., CcaTrainer]:
    def new_trainer(**keys: Any) -> CcaTrainer:
        recipe = real_recipe("cca", "tiny", save_codes(tmp_path / "codes.npz"), **keys)
        rollout = Rollout(recipe, policy.conditions(range(CLASSES)), policy)
        return build(CcaTrainer, recipe, policy, rollout, open_real(recipe, policy), tmp_path / "trainer", [])

    return new_trainer


def test_an_image_is_held_against_the_condition_of_the_next_one(new: Callable[..., CcaTrainer]) -> None:
    trainer = new(condition_dropout=0.4)
    parts = trainer.update()
    (left, right) = (torch.cat(one) for one in zip(*(part[0].condition.chunk(2) for part in parts), strict=True))
    tokens, positive = (torch.cat([part[place] for part in parts]) for place in (1, 2))
    classes = tokens[:, 0] * CLASSES // CODES  # as the codes say
    dropped = left == CLASSES
    assert torch.equal(dropped, right == CLASSES) and 0 < dropped.sum() < 8
    assert torch.equal(left[~dropped], classes[~dropped])
    assert torch.equal(right[~dropped], classes.roll(-1)[~dropped])
    assert torch.equal(positive, dropped | (classes == classes.roll(-1)))
    assert (positive & ~dropped).any(), "two of one class side by side"
    assert torch.equal(torch.cat([part[1] for part in trainer.update()]), tokens), "the step decides"


def test_every_update_drops_other_conditions(new: Callable[..., CcaTrainer]) -> None:
    trainer, patterns = new(condition_dropout=0.5), set()
    for trainer.state.global_step in range(4):
        conditions = torch.cat([part[0].condition.chunk(2)[0] for part in trainer.update()])
        patterns.add(tuple((conditions == CLASSES).tolist()))
    assert len(patterns) == 4


@pytest.mark.parametrize("parts", [None, 9 * CODES])  # logits at once
def test_the_loss_of_a_batch_is_that_of_its_logits(
    new: Callable[..., CcaTrainer], monkeypatch: pytest.MonkeyPatch, parts: int | None
) -> None:
    if parts:
        monkeypatch.setattr(shared, "LOGITS_AT_ONCE", parts)
    trainer = new(condition_dropout=0.2)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)  # so that it is another than the base
    encoded, tokens, positive = trainer.update()[0]

    def summed(model: Any, rows: slice) -> torch.Tensor:
        logp = model.logits(encoded[rows], tokens).log_softmax(-1)
        return logp.gather(-1, tokens[..., None]).sum((1, 2))

    with torch.no_grad():
        own, other = (summed(trainer.model, rows) - summed(trainer.base, rows) for rows in (slice(0, 4), slice(4, 8)))
        expected = contrast(own, other, positive, 0.1, 3.0).mean()
    loss = trainer.compute_loss(trainer.model, (encoded, tokens, positive))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and own.abs().min() > 0.1
    loss.backward()
    assert not any(one.grad is not None for one in trainer.base.parameters())


def test_training_lowers_the_loss_and_tells_images_apart(new: Callable[..., CcaTrainer]) -> None:
    trainer = new(steps=12, learning_rate=5e-3)
    trainer.train()
    logs = [one for one in trainer.state.log_history if "loss" in one]
    assert logs[0]["loss"] == pytest.approx(4 / 3 * math.log(2), rel=0.25)  # D is 0; fewer count as positive
    assert logs[-1]["loss"] < 0.65 * logs[0]["loss"]
    assert logs[-1]["told_apart"] > 0.9 and logs[-1]["gain_own"] > 0 > logs[-1]["gain_other"]


# --- runs


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_codes(tmp_path_factory.mktemp("images") / "codes.npz")


@pytest.fixture(scope="module")
def finished(policy_folder: Path, codes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("cca") / "run"
    shown = train(real_recipe("cca", policy_folder, codes), out)
    assert f"tiny: 4 updates of 8 images (of 20 real ones) in {out}\n" in shown and "told apart" in shown
    return out


def at_fetch(number: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something while the codes of a certain update are fetched."""
    count, fetch = 0, Real.tokens

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            act()
        return fetch(*args)

    monkeypatch.setattr(Real, "tokens", counted)


def test_interrupted_it_goes_on_as_if_nothing_had_been(
    finished: Path, policy_folder: Path, codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, recipe = tmp_path / "run", real_recipe("cca", policy_folder, codes)
    with pytest.raises(Interrupted):
        at_fetch(3, send(signal.SIGINT), monkeypatch)
        train(recipe, out)
    monkeypatch.undo()
    train(recipe, out, resume=True)
    assert_same_run(finished, out, step=4)


def test_what_comes_out_is_drawn_without_guidance_and_says_what_there_is_to_say(finished: Path) -> None:
    assert load_policy(finished).card.sampling == {"cfg_scale": 1.0}
    records = metrics(finished)
    for record in records:
        assert {"contrast", "told_apart", "gain_own", "gain_other", "entropy", "grad_norm"} <= record.keys()
        assert record["contrast"] == record["loss"] > 0 and "reward" not in record and "divergence" not in record
    titles = [panel.title for panel in curves.panels(records, {})]
    assert titles[:2] == ["loss of the contrast", "log-ratio of images to the base (nats)"]


def test_a_run_keeps_its_images(
    finished: Path, policy_folder: Path, codes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (finished / "run.json").read_bytes()
    monkeypatch.setattr(Real, "digest", "of others")
    with pytest.raises(UserError, match=r"real\.path: .*run was started with other images than there are now"):
        train(real_recipe("cca", policy_folder, codes, steps=6), finished, resume=True)
    assert (finished / "run.json").read_bytes() == before
