"""`run_training`: a recipe in, a run directory out. Everything `argrpo train` does; the work itself is in `job.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from argrpo_cli.policy import load_policy
from argrpo_cli.policy.open import choose_trainable
from argrpo_cli.rewards.shaping import reward_weights
from argrpo_cli.runs.run import Interrupted, RunDirectory, open_run, refuse_busy, refuse_unused, refuse_used
from argrpo_cli.runs.trackers import check_trackers
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.processes import Team, join_team
from argrpo_cli.training.callbacks.display import RunDisplay
from argrpo_cli.training.callbacks.stopping import StopRequest
from argrpo_cli.training.grpo import lora_config, quiet_libraries
from argrpo_cli.training.guards import check_weights
from argrpo_cli.training.job import Job, digest, trained_parameters
from argrpo_cli.training.prompts import Conditions, require, run_conditions
from argrpo_cli.training.scorer import Rewards
from argrpo_cli.training.shares import images_per_process

if TYPE_CHECKING:
    from rich.console import Console

    from argrpo_cli.policy import Policy
    from argrpo_cli.recipe import Recipe

PATIENCE = timedelta(hours=2)  # for the slowest of several processes: one may wait for a judge, or draw a grid


def run_training(
    recipe: Recipe,
    out: str | os.PathLike[str],
    resume: bool = False,
    *,
    rewards: Rewards | None = None,
    console: Console | None = None,
) -> Path:
    """Train a policy by GRPO as the recipe says.

    Under `accelerate launch` or `torchrun` all processes call this and train together; the first of them writes the run
    directory, which all must see, and reports.

    Args:
        recipe: what to do; a resumed run is given its own (`recipe.yaml` in the run directory).
        out: the run directory (`run.py` says what it holds). New or empty, unless `resume`.
        resume: continue from the newest whole checkpoint in `out`, or from the start where there is none. On a CPU
            the result is bit for bit that of a run that was never interrupted.
        rewards: rewards of your own, with the names that `recipe.rewards.terms` uses; by default those of the package.
        console: where progress is shown; standard output by default.

    Returns:
        The run directory, with the trained policy in `policy/`.

    Raises:
        UserError: something the user can mend; nothing is written when it shows before training starts.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved if training had begun. It is a SystemExit with
            code 130 or 143.
    """
    out = Path(out)
    request = StopRequest()
    with quiet_libraries(), request.listening(), _leaving_at_once(request, out, console), ExitStack() as held:
        team = join_team(recipe.policy.device, PATIENCE)
        held.enter_context(team.ending_together())
        policy, conditions, rewards = team.together(lambda: _load(recipe, out, resume, rewards, team))
        weights = reward_weights(recipe.rewards, rewards.family)
        rewards.tolerated = {name for name, weight in weights.items() if not weight}
        team.lead(lambda: held.enter_context(open_run(out, recipe, resume)))
        job = Job(recipe, RunDirectory(out), policy, conditions, rewards, weights, request, team, console)
        with job.trackers:
            job.train(resume)
    return out


@contextmanager
def _leaving_at_once(request: StopRequest, out: Path, console: Console | None) -> Iterator[None]:
    """Where a signal may not wait, because nothing is being trained, leave with one line and the signal's exit code."""
    try:
        yield
    except KeyboardInterrupt:
        if request.signal is None:
            raise
        if os.environ.get("RANK", "0") == "0":
            begun = RunDirectory(out).recipe_file.exists()
            line = f"stopped; continue with: argrpo train --resume {out}" if begun else "stopped before the run began"
            RunDisplay("", 0, 1, console=console).note(line)
        raise Interrupted(request.exit_code) from None


def _load(
    recipe: Recipe, out: Path, resume: bool, rewards: Rewards | None, team: Team
) -> tuple[Policy, Conditions, Rewards]:
    """All that a run needs before it writes anything: policy, conditions and rewards, each process its own."""
    if not resume:
        refuse_used(out)
    else:
        refuse_unused(out)
        if team.first:
            refuse_busy(out)
    images_per_process(recipe.grpo, team.count)
    check_trackers(recipe.logging.trackers)
    policy = _load_base_policy(recipe, out, resume, team.device)
    check_weights(policy.model, recipe.policy.checkpoint)
    choose_trainable(policy, recipe.policy.trainable)
    if recipe.policy.lora is not None:
        lora_config(recipe.policy.lora, policy)  # raises what there is to complain of
    notes = RunDirectory(out).notes() if resume else {}
    if notes.get("trained", trained_parameters(policy)) != trained_parameters(policy):
        raise UserError(f"policy.trainable: {out} was started with another choice of parameters; a run keeps its own")
    conditions = run_conditions(recipe, policy)
    if notes.get("conditions", digest(conditions)) != digest(conditions):
        raise UserError(f"conditions: {out} was started with others; a run keeps its own ({_named(recipe)})")
    return policy, conditions, rewards or _load_rewards(recipe, policy, conditions)


def _load_base_policy(recipe: Recipe, out: Path, resume: bool, device: str) -> Policy:
    """The policy that training starts from; a resumed run takes the folder that it started from then."""
    noted = RunDirectory(out).notes().get("base_policy") if resume else None
    # Weights stay in float32 whatever policy.dtype says: bfloat16 is autocast, or small updates would be rounded away.
    chosen = recipe.policy
    return load_policy(noted or chosen.checkpoint, device, dtype="float32", text_device=chosen.text_device)


def _named(recipe: Recipe) -> str:
    """Where the recipe's conditions come from, for a message."""
    section = recipe.conditions
    if section.source == "classes":
        return "classes"
    return str(section.captions) if section.dataset is None else section.dataset.name


def _load_rewards(recipe: Recipe, policy: Policy, conditions: Conditions) -> Rewards:
    """The package's rewards, all of which can read all conditions."""
    from argrpo_cli.rewards import load_rewards

    options = {term.name: term.options for term in recipe.rewards.terms}
    rewards = load_rewards(list(options), str(policy.model.device), options)
    require(conditions, rewards.check)
    return rewards
