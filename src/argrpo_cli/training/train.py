"""`run_training`: a recipe in, a run directory out. What is checked and loaded here is worked on by `Job`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from argrpo_cli.policy import load_policy
from argrpo_cli.policy.open import choose_trainable
from argrpo_cli.push import check_login, push_policy
from argrpo_cli.rewards import check_reward, reward_weights
from argrpo_cli.runs.run import (
    START,
    Interrupted,
    RunDirectory,
    open_run,
    refuse_busy,
    refuse_edited,
    refuse_unused,
    refuse_used,
)
from argrpo_cli.runs.trackers import check_trackers
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.processes import Team, again, join_team
from argrpo_cli.training.conditions import Conditions, digest, run_conditions
from argrpo_cli.training.display import RunDisplay
from argrpo_cli.training.grpo import lora_config, quiet_libraries
from argrpo_cli.training.guards import check_weights
from argrpo_cli.training.job import Job
from argrpo_cli.training.launch import images_per_process, settle_dtype
from argrpo_cli.training.metrics import StopRequest
from argrpo_cli.training.real import Real, open_real
from argrpo_cli.training.saving import trained_weights
from argrpo_cli.training.streams import StreamedConditions

if TYPE_CHECKING:
    from rich.console import Console

    from argrpo_cli.policy import Policy
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.rewards import RewardSet

Loaded = tuple["Policy", Conditions, "RewardSet | None", Real | None]
PATIENCE = timedelta(hours=2)  # for the slowest of several processes: one may wait for a judge, or draw a grid


def run_training(
    recipe: Recipe,
    out: str | os.PathLike[str],
    resume: bool = False,
    *,
    rewards: RewardSet | None = None,
    console: Console | None = None,
    work: Callable[[Job, bool], None] | None = None,
) -> Path:
    """Train a policy as the recipe says, after its `start` if it has one, which is a run of its own in `out`/start.

    Under `accelerate launch` or `torchrun` all processes call this and train together; the first of them writes the run
    directory, which all must see, and reports.

    Args:
        recipe: what to do; a resumed run is given its own (`recipe.yaml` in the run directory), see `refuse_edited`.
        out: the run directory (`run.py` says what it holds). New or empty, unless `resume`.
        resume: continue from the newest whole checkpoint in `out`, or from the start where there is none. On a CPU
            the result is bit for bit that of a run that was never interrupted.
        rewards: rewards of your own, with the names that `recipe.rewards.terms` uses; by default those of the package.
        console: where progress is shown; standard output by default.
        work: what is done with the job, and `resume`, in the place of `Job.train`; a pilot's.

    Returns:
        The run directory, with the trained policy in `policy/`.

    Raises:
        UserError: something the user can mend; nothing is written when it shows before training starts.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved if training had begun. It is a SystemExit with
            code 130 or 143.
    """
    out = Path(out)
    pushes = work is None and recipe.logging.push_to_hub
    if pushes:
        check_login(recipe.logging.hub_model_id)
    request = StopRequest()
    left = out if work is None else None  # of a pilot nothing is
    with quiet_libraries(), request.listening(), _leaving_at_once(request, left, console), ExitStack() as held:
        team = join_team(recipe.policy.device, PATIENCE)
        recipe = settle_dtype(recipe, team.device)  # what the run directory has: resumed elsewhere it stays as it was
        held.enter_context(team.ending_together())
        team.together(lambda: _refuse(out, recipe, resume, team))
        first, finished, begun = recipe.start, *team.from_lead(lambda: state(out / START))
        if first is not None and not finished:
            loaded = _loaded(lambda: _load(first, out / START, begun, rewards, team, then=recipe), team, out / START)
            team.lead(lambda: held.enter_context(open_run(out, recipe, resume)))
            with ExitStack() as meanwhile:
                team.lead(lambda: meanwhile.enter_context(open_run(out / START, first, begun)))
                _work(Job(first, out / START, *loaded, request, team, console, whole=out), begun, Job.train)
            del loaded  # as large as what comes next
            request.end_of_training(team)
        loaded = _loaded(lambda: _load(recipe, out, resume, rewards, team), team, out)
        if first is None or finished:
            team.lead(lambda: held.enter_context(open_run(out, recipe, resume)))
        _work(Job(recipe, out, *loaded, request, team, console, whole=out), resume, work or Job.train)
        if pushes and team.first:
            _push(recipe, out, RunDisplay("", 0, 1, console=console).note)
    return out


def _push(recipe: Recipe, out: Path, tell: Callable[[str], None]) -> None:
    """What `logging.push_to_hub` asks for; the run is safe, and goes to the hub later where it cannot now."""
    name = recipe.logging.hub_model_id
    try:
        tell(f"on the hub         {push_policy(out, name, private=recipe.logging.hub_private_repo)}")
    except UserError as error:
        tell(f"warning: {error}; the run is finished and safe, push it with: {again('push', out, name)}")


def _loaded(load: Callable[[], Loaded], team: Team, out: Path) -> Loaded:
    """What `_load` gives in each process, with real images tokenised, which they share."""
    loaded = team.together(load)
    if (real := loaded[-1]) is not None:
        real.tokenise(team)
        noted = team.from_lead(lambda: RunDirectory(out).notes().get("real"))
        if noted not in (None, real.digest):
            team.fail(f"real.path: {out} was started with other images than there are now; a run keeps its own")
    return loaded


def _work(job: Job, resume: bool, work: Callable[[Job, bool], None]) -> None:
    with job.trackers:
        work(job, resume)


def _refuse(out: Path, recipe: Recipe, resume: bool, team: Team) -> None:
    """UserError for a folder in which this run cannot begin, or go on, before anything is loaded."""
    if not resume:
        refuse_used(out)
    else:
        refuse_unused(out)
        refuse_edited(out, recipe)
        if team.first:
            refuse_busy(out)


def state(start: Path) -> tuple[bool, bool]:
    """Whether the start of a run is at its end, and whether it was begun."""
    run = RunDirectory(start)
    return run.notes().get("finished") is not None and run.policy_dir.is_dir(), run.recipe_file.exists()


@contextmanager
def _leaving_at_once(request: StopRequest, out: Path | None, console: Console | None) -> Iterator[None]:
    """Where a signal may not wait, because nothing is being trained, leave with one line and the signal's exit code."""
    try:
        yield
    except KeyboardInterrupt:
        if request.signal is None:
            raise
        if os.environ.get("RANK", "0") == "0":
            begun = out is not None and RunDirectory(out).recipe_file.exists()
            line = f"stopped; continue with: {again('train', '--resume', out)}"
            line = line if begun else "stopped before the run began"
            RunDisplay("", 0, 1, console=console).note(line)
        raise Interrupted(request.exit_code) from None


def _load(
    recipe: Recipe, out: Path, resume: bool, rewards: RewardSet | None, team: Team, then: Recipe | None = None
) -> Loaded:
    """All that a run needs before it writes anything: policy, conditions and rewards, each process its own.

    Args:
        then: what is trained from its policy, and is checked now as far as it can be.

    Returns:
        No rewards where none are asked, and no real images.
    """
    policy = _load_base_policy(recipe, out, resume, team.device)
    check_weights(policy.model, recipe.policy.checkpoint)
    for one in (recipe,) if then is None else (then, recipe):
        images_per_process(one, team.count)
        check_trackers(one.logging.trackers)
        choose_trainable(policy, one.policy.trainable)
        if one.policy.lora is not None:
            lora_config(one.policy.lora, policy)  # raises what there is to complain of
        conditions = run_conditions(one, policy)
        if one.scored:
            names = [] if rewards else [term.name for term in one.rewards.terms]
            reward_weights(one.rewards, {name: check_reward(name).family for name in names} or rewards.family)
    notes = RunDirectory(out).notes() if resume else {}
    trained = list(trained_weights(policy.model))
    if notes.get("trained", trained) != trained:
        raise UserError(f"policy.trainable: {out} was started with another choice of parameters; a run keeps its own")
    if notes.get("conditions", digest(conditions)) != digest(conditions):
        section = recipe.conditions
        source = section.dataset.name if section.dataset is not None else section.captions
        source = "classes" if section.source == "classes" else source
        raise UserError(f"conditions: {out} was started with others; a run keeps its own ({source})")
    if then is not None and then.learns_from_images:
        open_real(then, policy)  # raises what there is to complain of
    if recipe.learns_from_images:
        return policy, conditions, None, open_real(recipe, policy)
    if not recipe.scored or (recipe.method == "distil" and "scale" in notes):
        return policy, conditions, None, None
    if rewards is None:
        from argrpo_cli.rewards import load_rewards

        options = {term.name: term.options for term in recipe.rewards.terms}
        rewards = load_rewards(list(options), str(policy.model.device), options)
        if isinstance(conditions, StreamedConditions):
            conditions.require(rewards.check)  # and pass over what they cannot read
        else:
            rewards.check(conditions)
    return policy, conditions, rewards, None


def _load_base_policy(recipe: Recipe, out: Path, resume: bool, device: str) -> Policy:
    """The policy that training starts from; a resumed run takes the folder that it started from then."""
    base = RunDirectory(out).notes().get("base_policy") if resume else None
    if recipe.start is not None:  # beside the run, wherever that was moved
        base = RunDirectory(out / START).policy_dir
    # Weights stay in float32 whatever policy.dtype says: bfloat16 is autocast, or small updates would be rounded away.
    chosen = recipe.policy
    return load_policy(base or chosen.checkpoint, device, dtype="float32", text_device=chosen.text_device)
