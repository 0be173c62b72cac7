"""The guard rails: what each one fires on and what not, and what a run does then."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from argrpo_cli.cli.train import CHANGEABLE
from argrpo_cli.errors import UserError
from argrpo_cli.files import cannot_write
from argrpo_cli.grpo import job as job_module
from argrpo_cli.grpo import report as report_module
from argrpo_cli.grpo import rollout, run_training
from argrpo_cli.grpo.guards import SKIPPED_IN_A_ROW, Finding, Guards, bad_gradient, check_weights, trend
from argrpo_cli.grpo.run import RunDirectory
from argrpo_cli.policy import load_policy
from argrpo_cli.recipe import Recipe, load_recipe
from tests.grpo.tiny import FakeRewards, brightness, redness, tiny_policy, tiny_recipe

WEIGHTS = {"bright": 1.0, "red": 0.0}


def guarded(recipe: Recipe, **guards: Any) -> Recipe:
    """The recipe with other keys of its guards section; a dictionary overrides single keys of one guard."""
    tree = recipe.model_dump()
    for name, value in guards.items():
        tree["guards"][name] = tree["guards"][name] | value if isinstance(value, dict) else value
    return Recipe.model_validate(tree)


def record(step: int, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl of a run without trouble; `bright` and `red` are (mean, spread within groups)."""
    rewards = {name: changes.pop(name, (0.5, 0.1)) for name in WEIGHTS}
    healthy = {
        "step": step,
        "reward": rewards["bright"][0],
        "rewards": {name: {"mean": mean, "within_group_std": spread} for name, (mean, spread) in rewards.items()},
        "kl": 0.01,
        "ratio_deviation_mean": 1e-6,
        "images_left_out": 0.0,
        "groups_without_spread": 0.0,
    }
    return healthy | changes


def findings(
    records: list[dict[str, Any]],
    weights: dict[str, float] | None = None,
    grpo: dict[str, Any] | None = None,
    **guards: Any,
) -> list[Finding]:
    """All findings about records that come one after the other."""
    watch = Guards(guarded(tiny_recipe(**(grpo or {})), **guards), weights or WEIGHTS)
    found = [finding for one in records for finding in watch.look(one)]
    assert all("\n" not in finding.text for finding in found)
    return found


def steps(found: list[Finding], guard: str) -> list[int]:
    return [finding.step for finding in found if finding.guard == guard]


# --- the ratio


def test_ratio_fires_above_the_limit_of_the_dtype() -> None:
    ratios = [record(1, ratio_deviation_mean=0.009), record(2, ratio_deviation_mean=0.011)]
    assert steps(findings(ratios), "ratio") == [2]
    assert not findings([record(1, ratio_deviation_mean=0.09)], grpo={"dtype": "bfloat16"})
    (found,) = findings([record(1, ratio_deviation_mean=0.11)], grpo={"dtype": "bfloat16"})
    assert found.action == "warn" and "0.11" in found.text and "guards.ratio.limit" in found.text
    assert not findings(ratios, ratio={"limit": 0.02})


def test_ratio_looks_at_the_first_update_of_a_batch_only() -> None:
    moved = [record(step, ratio_deviation_mean=0.0 if step % 2 else 0.5) for step in range(1, 9)]
    assert not findings(moved, grpo={"updates_per_batch": 2})
    assert steps(findings(moved), "ratio") == [2]


def test_a_warning_is_given_once_and_again_after_ten_quiet_batches() -> None:
    bad = {1, 2, 3, 9, 25}
    records = [record(step, ratio_deviation_mean=0.5 if step in bad else 0.0) for step in range(1, 30)]
    assert steps(findings(records), "ratio") == [1, 25]
    assert steps(findings(records, ratio={"action": "stop"}), "ratio") == sorted(bad)
    assert not findings(records, ratio={"action": "ignore"})


# --- the KL


def test_kl_stops_when_it_is_above_the_limit_in_two_updates_in_a_row() -> None:
    kls = [0.1, 2.5, 0.1, 2.5, 2.6]
    found = findings([record(step, kl=kl) for step, kl in enumerate(kls, start=1)])
    assert [(one.step, one.guard, one.action) for one in found] == [(5, "kl", "stop")]
    assert "2.6 nats per token (limit 2)" in found[0].text
    assert not findings([record(step, kl=None) for step in range(1, 30)])  # beta 0 measures none


def test_a_tenfold_jump_of_the_kl_is_said_above_a_floor() -> None:
    def jump(usual: float, latest: float) -> list[Finding]:
        return findings([record(step, kl=usual) for step in range(1, 11)] + [record(11, kl=latest)])

    (found,) = jump(0.02, 0.25)
    assert (found.guard, found.action) == ("kl", "warn") and "jumped to 0.25" in found.text
    assert not jump(0.02, 0.19)  # less than tenfold
    assert not jump(0.002, 0.09)  # as any run that leaves zero


# --- constant rewards


def test_a_reward_without_spread_is_found_after_the_given_number_of_batches() -> None:
    constant = [record(step, bright=(0.7, 1e-8)) for step in range(1, 12)]
    (found,) = findings(constant)
    assert (found.step, found.guard, found.action) == (10, "constant_reward", "warn")
    assert "reward bright has collapsed to 0.7" in found.text
    assert steps(findings(constant, constant_reward={"batches": 3, "action": "stop"}), "constant_reward")[:2] == [3, 4]
    broken = [*constant[:5], record(6), *constant[6:]]
    assert not findings(broken)  # never ten in a row
    assert not findings([record(step, red=(0.7, 0.0)) for step in range(1, 30)])  # held out: it teaches nothing anyhow


def test_a_reward_whose_spread_falls_to_a_hundredth_has_collapsed() -> None:
    def fallen(to: float) -> list[int]:
        return steps(
            findings([record(step, bright=(0.9, 0.1 if step <= 20 else to)) for step in range(1, 35)]),
            "constant_reward",
        )

    assert fallen(0.0009) == [30]
    assert fallen(0.0011) == []


def test_updates_that_reuse_images_are_no_batches() -> None:
    records = [record(step, bright=(0.7, 0.0)) for step in range(1, 19)]
    for one in records[1::2]:
        one |= {"reward": None, "rewards": {name: {"mean": None, "within_group_std": None} for name in WEIGHTS}}
    assert not findings(records, grpo={"updates_per_batch": 2})
    records.append(record(19, bright=(0.7, 0.0)))
    assert steps(findings(records, grpo={"updates_per_batch": 2}), "constant_reward") == [19]


def test_batches_without_any_spread_have_no_gradient() -> None:
    flat = [record(step, groups_without_spread=1.0) for step in range(1, 11)]
    (found,) = findings(flat)
    assert found.step == 10 and "no policy gradient" in found.text
    assert not findings([*flat[:9], record(10, groups_without_spread=0.9)])


# --- held-out rewards


def lines(optimised: np.ndarray, held_out: np.ndarray) -> list[dict[str, Any]]:
    pairs = zip(optimised.tolist(), held_out.tolist(), strict=True)
    return [record(step, bright=(one, 0.1), red=(other, 0.1)) for step, (one, other) in enumerate(pairs, start=1)]


def test_a_held_out_reward_that_falls_while_the_optimised_one_rises_is_said_once() -> None:
    rng = np.random.default_rng(0)
    rise = np.linspace(0, 1, 100) + 0.2 * rng.standard_normal(100)
    fall = np.linspace(0, -1, 100) + 0.2 * rng.standard_normal(100)
    (found,) = findings(lines(rise, fall))
    assert (found.guard, found.action) == ("held_out", "warn") and 40 <= found.step < 100
    assert "held-out red fell by" in found.text and "optimised reward rose by" in found.text
    assert not findings(lines(rise, -fall))  # both rise
    assert not findings(lines(-rise, fall))  # both fall
    assert not findings(lines(rise[:39], 10 * fall[:39]))  # too few
    assert not findings(lines(rise, fall), weights={"bright": 1.0, "red": 1.0})


def test_a_late_turn_of_a_held_out_reward_is_seen() -> None:
    rng = np.random.default_rng(1)
    rise = np.linspace(0, 3, 300) + 0.1 * rng.standard_normal(300)
    turn = np.minimum(np.arange(300), 240) / 100 - np.maximum(np.arange(300) - 240, 0) / 50
    found = steps(findings(lines(rise, turn + 0.1 * rng.standard_normal(300))), "held_out")
    assert len(found) == 1 and 240 < found[0] <= 280


def false_alarms(noise: Callable[[int], np.ndarray], runs: int = 100) -> float:
    """The share of runs of 300 batches with a warning, where the optimised reward rises and the other has no trend."""
    rise = np.linspace(0, 1, 300)
    return sum(bool(steps(findings(lines(rise, noise(run))), "held_out")) for run in range(runs)) / runs


def test_noise_gives_hardly_any_warning() -> None:
    def white(run: int) -> np.ndarray:
        return np.random.default_rng(run).standard_normal(300)

    def correlated(run: int) -> np.ndarray:
        noise = white(run)
        for step in range(1, 300):
            noise[step] += 0.3 * noise[step - 1]
        return noise

    assert false_alarms(white) <= 0.02
    assert false_alarms(correlated) <= 0.1


def test_trend_and_its_error() -> None:
    assert trend(np.full(20, 0.3)) == (0, 0)
    rise, error = trend(np.arange(10) * 0.5)
    assert rise == pytest.approx(4.5) and error == pytest.approx(0, abs=1e-9)
    values = np.arange(50) + 20 * np.random.default_rng(0).standard_normal(50)
    (slope, _), covariance = np.polyfit(np.arange(50), values, 1, cov=True)
    plain = np.sqrt(covariance[0, 0])
    assert trend(values)[0] == pytest.approx(49 * slope)
    assert trend(values)[1] >= 49 * plain * 0.999  # larger where neighbours are alike, never smaller
    walks = [np.cumsum(np.random.default_rng(run).standard_normal(100)) for run in range(200)]
    assert np.mean([abs(rise) < 3 * error for rise, error in map(trend, walks)]) > 0.6


# --- numbers that are none


def test_images_left_out_are_said_once() -> None:
    found = findings([record(step, images_left_out=2.0 if step in (2, 90) else 0.0) for step in range(1, 100)])
    assert [(one.step, one.guard, one.action) for one in found] == [(2, "images_left_out", "warn")]
    assert "2 of 8 images" in found[0].text


def test_bad_gradients_stop_or_are_skipped_up_to_ten_in_a_row() -> None:
    assert bad_gradient(3, "stop", 1).action == "stop"
    assert bad_gradient(3, "skip", SKIPPED_IN_A_ROW - 1).action == "warn"
    assert bad_gradient(3, "skip", SKIPPED_IN_A_ROW).action == "stop"


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


# --- whole runs


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes as long as the rest of a tiny run."""
    monkeypatch.setattr(report_module, "draw_curves", lambda *args, **keys: None)


def train(recipe: Recipe, out: Path, resume: bool = False, rewards: FakeRewards | None = None) -> str:
    """Run, and return what was shown."""
    console = Console(file=io.StringIO(), width=80)
    run_training(recipe, out, resume, rewards=rewards or FakeRewards(), console=console)
    return console.file.getvalue()


def warnings(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "run.json").read_text()).get("warnings", [])


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def warm_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts drawn at another temperature than the recipe's."""
    real = rollout.sample_tokens
    monkeypatch.setattr(rollout, "sample_tokens", lambda *args, **keys: real(*args, **(keys | {"temperature": 1.1})))


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
    real = rollout.sample_tokens
    monkeypatch.setattr(rollout, "sample_tokens", lambda *args, **keys: real(*args, **(keys | {"cfg_scale": 1.5})))
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

    noise = np.random.default_rng(0)
    recipe = guarded(
        tiny_recipe(
            policy_folder, rewards=["bright", "dark", "random"], steps=60, learning_rate=1e-2, batch_size=16,
            weights={"dark": 0.0, "random": 0.0}, beta=0.01,
        ),
        held_out={"batches": 20}, kl={"action": "ignore"},
    )  # fmt: skip
    rewards = FakeRewards(bright=brightness, dark=lambda images: -brightness(images), random=random)
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
    real = job_module.build_trainer

    def build(*args: Any) -> Any:
        trainer = real(*args)

        def poison(gradient: torch.Tensor) -> torch.Tensor:
            if trainer.state.global_step + 1 in steps:
                gradient = gradient.clone()
                gradient.view(-1)[0] = torch.nan
            return gradient

        trainer.model.lm_head.weight.register_hook(poison)
        return trainer

    monkeypatch.setattr(job_module, "build_trainer", build)
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
    real = job_module.ImageGRPOTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **keys: Any) -> torch.Tensor:
        return real(self, *args, **keys) * (torch.nan if self.state.global_step == 1 else 1)

    monkeypatch.setattr(job_module.ImageGRPOTrainer, "compute_loss", compute_loss)
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


def test_the_error_of_a_trend_is_that_of_least_squares() -> None:
    """Where neighbours do not correlate positively there is no factor for it."""
    time = np.arange(40.0)
    values = 0.1 * time + np.tile([1.0, -1.0], 20)
    (slope, _), covariance = np.polyfit(time, values, 1, cov=True)
    rise, error = trend(values)
    assert rise == pytest.approx(39 * slope, rel=1e-9)
    assert error == pytest.approx(39 * covariance[0, 0] ** 0.5, rel=1e-6)


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
