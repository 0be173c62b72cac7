"""A pilot measures and proposes, and changes nothing."""

from __future__ import annotations

import io
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from argrpo_cli.cli.train import train as command
from argrpo_cli.policy import load_policy
from argrpo_cli.recipe import Recipe, dump_recipe, load_recipe
from argrpo_cli.runs.learning import estimate
from argrpo_cli.runs.run import Interrupted, clear_for_pilot
from argrpo_cli.system.errors import UserError
from argrpo_cli.training import pilot
from argrpo_cli.training.pilot import Measured, Stillness, measure, pilot_recipe, propose, run_pilot
from tests.training.tiny import FakeRewards, tiny_recipe

FOUND = Measured(
    updates=20, images=160, signal=2.0, error=0.5, noise=800.0, reward=1.0, spread=0.5, effective=1.0, advantages=0.9,
    tokens=16, seconds={"text": 0.0, "rollout": 1.0, "reward": 0.1, "update": 1.0}, memory=10**9,
)  # fmt: skip


def recipe(**grpo: Any) -> Recipe:
    """A run of 80,000 images, 40 an update, in groups of 4."""
    return tiny_recipe(**{"batch_size": 40, "steps": 2000, "beta": 0.2} | grpo)


def test_the_batch_goes_to_the_noise_scale_and_the_rate_with_its_root() -> None:
    changes, reasons = propose(recipe(), FOUND)  # 800 / 2 = 400 images
    assert changes == {"batch_size": 400, "steps": 200, "learning_rate": 0.0032}
    assert reasons[0] == "batch_size 400: the noise scale is 400 ± 100 images, and the run has 80,000 images"


def test_a_hundred_updates_are_left_and_a_batch_is_not_made_smaller() -> None:
    assert propose(recipe(steps=500), FOUND)[0]["batch_size"] == 200  # 20,000 images
    changes, reasons = propose(recipe(batch_size=800), FOUND)
    assert changes == {}
    assert "learning_rate 0.001: as it is" in reasons[1]


def test_a_signal_below_its_error_leaves_a_bound() -> None:
    found = replace(FOUND, signal=0.4, error=0.3)
    assert found.noise_scale is None
    assert found.noise_scale_least == pytest.approx(800)
    assert "800 images at least" in propose(recipe(), found)[1][0]
    assert "not known" in propose(recipe(), replace(FOUND, signal=None, error=None, noise=None))[1][0]


@pytest.mark.parametrize(
    ("beta", "proposed", "why"),
    [
        (0.0, 0.0, "as it is; guards.kl"),
        (0.05, 0.0, "guards.kl stops at 32 nats"),  # (0.9 / 0.05)² / 2 = 162 nats
        (0.2, 0.2, "ends at 10.1 nats an image and a gain of 4.5"),
        (0.9, 0.3, "ends at 0.5 nats an image and a gain of 1 deviations; this leaves room for 3"),
    ],
)
def test_beta_follows_from_where_its_term_would_end(beta: float, proposed: float, why: str) -> None:
    changes, reasons = propose(recipe(beta=beta), FOUND)
    assert changes.get("beta", beta) == proposed
    assert why in next(reason for reason in reasons if reason.startswith("beta"))


def test_what_cannot_be_mended_by_numbers_is_said() -> None:
    _, reasons = propose(recipe(steps=20), replace(FOUND, effective=0.2))
    assert "800 images are few against the noise scale" in reasons[-2]
    assert "20% of the groups have spread" in reasons[-1]


def test_gradients_of_all_updates_are_compared_with_each_other() -> None:
    """|G|² = 0.2, S = 4 in 50 numbers: 30 updates of 8 images in blocks of 2, and the error that is claimed."""
    draw, ratios, found = np.random.default_rng(0), [], None
    for _ in range(40):
        still, records = Stillness(), []
        for _ in range(30):
            blocks = draw.normal(size=(4, 50)) * np.sqrt(4 / 50 / 2) + np.sqrt(0.2 / 50)
            model = torch.nn.Linear(50, 1, bias=False)
            model.weight.grad = torch.tensor(blocks.mean(0, keepdims=True)).float()
            still.on_pre_optimizer_step(None, None, None, model=model)
            assert model.weight.grad is None
            signal, noise = estimate((blocks**2).sum(1).mean(), (blocks.mean(0) ** 2).sum(), few=2, many=8)
            records.append({
                "reward": 0.0, "within_group_std": 1.0, "groups_without_spread": 0.0, "advantage_std": 1.0,
                "gradient_signal": signal, "gradient_noise": noise,
                **{f"seconds_{stage}": 1.0 for stage in ("text", "rollout", "reward", "update")},
            })  # fmt: skip
        found = measure(records, still, block=2, batch_size=8, tokens=16, memory=0)
        ratios.append((found.signal - 0.2) / found.error)
    assert found.noise == pytest.approx(4, rel=0.1)
    assert abs(np.mean(ratios)) < 0.6
    assert 0.7 < np.std(ratios) < 1.3
    with pytest.raises(UserError, match="--pilot: 3 updates were measured, and 4 are the least"):
        measure(records[:3], still, block=2, batch_size=8, tokens=16, memory=0)


def test_a_pilot_runs_in_parts_of_whole_groups() -> None:
    assert pilot_recipe(recipe(), 1.0).grpo.micro_batch_size == 20
    assert pilot_recipe(recipe(micro_batch_size=2), 1.0).grpo.micro_batch_size == 2
    assert pilot_recipe(recipe(batch_size=24), 1.0, processes=3).grpo.micro_batch_size == 8
    assert pilot_recipe(recipe(), 1.0).grpo.time_limit_minutes == 1.0


@pytest.fixture
def parent(policy_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_recipe(tiny_recipe(policy_folder, steps=100)))
    return path


def small_pilot(parent: Path, folder: Path, rewards: FakeRewards, *overrides: str) -> str:
    console = Console(file=io.StringIO(), width=200)
    run_pilot(load_recipe(parent, overrides), parent, folder, 10.0, rewards=rewards, console=console)
    return console.file.getvalue()


def test_a_pilot_writes_a_recipe_and_changes_no_weight(
    parent: Path, policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pilot, "MOST_UPDATES", 5)
    jobs = []
    measured = pilot._measure
    monkeypatch.setattr(pilot, "_measure", lambda job: (jobs.append(job), measured(job))[1])
    folder = tmp_path / "pilot"
    shown = small_pilot(parent, folder, FakeRewards(), "seed=9")
    assert [path.name for path in folder.iterdir()] == ["pilot.yaml"]
    proposal = load_recipe(folder / "pilot.yaml")
    assert (proposal.name, proposal.seed) == ("tiny-pilot", 9)
    assert proposal.rewards == load_recipe(parent).rewards
    assert str(folder / "pilot.yaml") in shown
    assert "gradient noise scale" in shown
    trained = jobs[0].policy.model.state_dict()
    for name, weight in load_policy(policy_folder).model.state_dict().items():
        assert torch.equal(trained[name], weight)


def test_a_signal_ends_a_pilot_with_what_is_known(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = FakeRewards()
    rewards.on_batch = lambda number: os.kill(os.getpid(), signal.SIGINT) if number == 4 else None
    with pytest.raises(Interrupted) as stop:
        small_pilot(parent, tmp_path / "pilot", rewards)
    assert stop.value.code == 130
    assert (tmp_path / "pilot" / "pilot.yaml").read_text().startswith("# Proposed by a pilot of 4 updates, 32 images,")


def test_a_pilot_runs_a_start_once_and_measures_what_came_out_of_it(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pilot, "MOST_UPDATES", 4)
    tree = tiny_recipe(policy_folder, steps=100, cfg_scale=1.0).model_dump()
    distil = {"cfg_scale": 3.0, "batch_size": 4, "steps": 2, "learning_rate": 1e-3}
    whole = Recipe.model_validate(tree | {"start": {"distil": distil}, "out": str(tmp_path / "run")})
    (tmp_path / "whole.yaml").write_text(dump_recipe(whole))
    folder = tmp_path / "pilot"
    small_pilot(tmp_path / "whole.yaml", folder, FakeRewards())
    ended = (folder / "start" / "run.json").read_bytes()
    proposal = load_recipe(folder / "pilot.yaml")
    assert proposal.start is None
    assert proposal.policy.checkpoint == str(folder / "start" / "policy")
    clear_for_pilot(folder)
    small_pilot(tmp_path / "whole.yaml", folder, FakeRewards())
    assert (folder / "start" / "run.json").read_bytes() == ended
    with pytest.raises(UserError, match=r"--pilot: .*start is the start of another recipe; choose another folder"):
        small_pilot(tmp_path / "whole.yaml", folder, FakeRewards(), "start.distil.cfg_scale=2.5")
    (tmp_path / "run").mkdir()
    (folder / "start").rename(tmp_path / "run" / "start")  # as the run itself would have it
    small_pilot(tmp_path / "whole.yaml", folder, FakeRewards())
    assert load_recipe(folder / "pilot.yaml").policy.checkpoint == str(tmp_path / "run" / "start" / "policy")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        clear_for_pilot(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resume": Path("run")}, "--pilot: .* --resume continues a run"),
        ({"recipe": "nano/c2i", "dry_run": True}, "--pilot: .* --dry-run computes nothing"),
        ({"recipe": "nano/c2i", "minutes": 0.0}, "--minutes 0: must be above 0"),
        ({"recipe": "nano/c2i", "pilot": False, "minutes": 2.0}, "--minutes 2: of a pilot"),
        (
            {"recipe": "nano/c2i", "set_": ["method=distil"]},
            "--pilot: measures GRPO, and method .* is distil",
        ),
    ],
)
def test_options_that_say_nothing_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command(**{"pilot": True} | options)
