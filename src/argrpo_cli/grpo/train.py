"""`run_training`: a recipe in, a run directory out. Everything `argrpo train` does."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from transformers.trainer import TRAINING_ARGS_NAME

from argrpo_cli.errors import UserError
from argrpo_cli.files import cannot_write, save_png
from argrpo_cli.grids import before_after
from argrpo_cli.grpo.callbacks.checkpoints import CheckpointCallback
from argrpo_cli.grpo.callbacks.display import RunDisplay, duration, silent_console
from argrpo_cli.grpo.callbacks.grids import Gallery, GridCallback
from argrpo_cli.grpo.callbacks.metrics import MetricsCallback
from argrpo_cli.grpo.callbacks.stopping import StopCallback, StopRequest
from argrpo_cli.grpo.gathering import sharding, whole_model
from argrpo_cli.grpo.plots import draw_curves
from argrpo_cli.grpo.prompts import run_conditions
from argrpo_cli.grpo.reward_functions import BatchScorer, Rewards
from argrpo_cli.grpo.rollout import Rollout, Stopwatch
from argrpo_cli.grpo.run import Interrupted, RunDirectory, open_run, refuse_used, replace_folder
from argrpo_cli.grpo.shares import images_per_process
from argrpo_cli.grpo.trainer import ImageGRPOTrainer, build_trainer, quiet_libraries
from argrpo_cli.processes import Team, join_team
from argrpo_cli.rewards.shaping import reward_weights

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from argrpo_cli.conditions import Condition
    from argrpo_cli.policy import Policy
    from argrpo_cli.recipe import Recipe

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
TORCH_WRITER = "inline_container"  # torch.save says no more than this file of its own when the disk is full
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
        resume: continue from the newest checkpoint in `out`, or from the start where there is none. On a CPU the
            result is bit for bit that of a run that was never interrupted.
        rewards: rewards of your own, with the names that `recipe.rewards.terms` uses; by default those of the package.
        console: where progress is shown; standard output by default.

    Returns:
        The run directory, with the trained policy in `policy/`.

    Raises:
        UserError: something the user can mend; nothing is written when it shows before training starts.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved. It is a SystemExit with code 130 or 143.
    """
    out = Path(out)
    request = StopRequest()
    with quiet_libraries(), request.listening(), ExitStack() as held:
        team = join_team(recipe.policy.device, PATIENCE)
        held.enter_context(team.ending_together())
        policy, conditions, rewards = team.together(lambda: _load(recipe, out, resume, rewards, team))
        weights = reward_weights(recipe.rewards, rewards.family)
        rewards.tolerated = {name for name, weight in weights.items() if not weight}
        team.lead(lambda: held.enter_context(open_run(out, recipe, resume)))
        job = _Job(recipe, RunDirectory(out), policy, conditions, rewards, weights, request, team, console)
        job.train(resume)
    return out


def _load(
    recipe: Recipe, out: Path, resume: bool, rewards: Rewards | None, team: Team
) -> tuple[Policy, list[Condition], Rewards]:
    """All that a run needs before it writes anything: policy, conditions and rewards, each process its own."""
    if not resume:
        refuse_used(out)
    images_per_process(recipe.grpo, team.count)
    from argrpo_cli.policy.policy import choose_trainable

    policy = _load_base_policy(recipe, out, resume, team.device)
    choose_trainable(policy.model, recipe.policy.trainable)
    if resume and RunDirectory(out).notes().get("trained", _trained(policy)) != _trained(policy):
        raise UserError(f"policy.trainable: {out} was started with another choice of parameters; a run keeps its own")
    conditions = run_conditions(recipe, policy)
    if resume and RunDirectory(out).notes().get("conditions", _digest(conditions)) != _digest(conditions):
        raise UserError(
            f"conditions: {out} was started with others; a run keeps its own ({recipe.conditions.captions})"
        )
    return policy, conditions, rewards or _load_rewards(recipe, policy, conditions)


class _Job:
    """One call of `run_training`, from the opened run directory on."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        policy: Policy,
        conditions: list[Condition],
        rewards: Rewards,
        weights: dict[str, float],
        request: StopRequest,
        team: Team,
        console: Console | None,
    ) -> None:
        self.recipe, self.run, self.policy, self.request, self.team = recipe, run, policy, request, team
        self.conditions, self.rewards, self.weights = conditions, rewards, weights
        minutes = recipe.grpo.time_limit_minutes
        self.time_limit = None if minutes is None else 60 * minutes
        self.display = RunDisplay(
            recipe.name,
            recipe.grpo.steps,
            recipe.logging.log_every,
            self.time_limit,
            console=console if team.first else silent_console(),
        )
        self.gallery = Gallery(recipe, policy, conditions)

    def train(self, resume: bool) -> None:
        recipe, run, team = self.recipe, self.run, self.team
        checkpoint, start, seconds = team.from_lead(lambda: self._where_to_start(resume))
        if self._nothing_left(start):
            return
        if not Path(self.policy.model.config._name_or_path or " ").is_dir():
            self._save_base()
        trainer, metrics, stop = self._assemble(seconds)
        shared = team.from_lead(lambda: run.notes().get("sharding", "none"))
        if checkpoint is not None and shared != sharding(trainer):
            team.fail(
                f"cannot continue {run.root}, started with sharding {shared}, with {sharding(trainer)}: its "
                "checkpoints have other files; launch it with the configuration that it was started with"
            )
        base = os.path.abspath(self.policy.model.config._name_or_path)
        team.lead(
            lambda: run.note(
                base_policy=base,
                trained=_trained(self.policy),
                conditions=_digest(self.conditions),
                sharding=sharding(trainer),
                finished=None,
            )
        )
        self.display.note(
            f"{recipe.name}: {recipe.grpo.steps} updates of {recipe.grpo.batch_size} images "
            f"({recipe.grpo.batch_size // recipe.grpo.group_size} groups of {recipe.grpo.group_size})"
            + (f" by {team.count} processes" if team.count > 1 else "")
            + f" in {run.root}"
            + (f", continuing after step {start}" if start else "")
        )
        # The base policy, and whole: only when training starts is a checkpoint loaded, and the model shared out.
        before = team.lead(lambda: self.gallery.save(run, 0))
        self.request.agree(team)
        if self.request.signal is not None:
            self._interrupted(start)

        team.lead(lambda: shutil.rmtree(run.policy_dir, ignore_errors=True))  # of an earlier end, overtaken now
        self._update(trainer, checkpoint, start)
        step = trainer.state.global_step
        team.lead(lambda: draw_curves(run.metrics(), run.root / "curves.png", title=recipe.name))
        if self.request.failure is not None:
            team.fail(
                f"stopped after step {step}: {self.request.failure}; continue with: argrpo train --resume {run.root}"
            )
        if self.request.signal is not None and step < recipe.grpo.steps and not stop.out_of_time:
            self._interrupted(step)

        with whole_model(trainer):
            team.lead(lambda: self._compare(before, step))
        self._save_policy(trainer)
        limit = recipe.grpo.time_limit_minutes
        finished = {"step": step, "out_of_time": stop.out_of_time, "time_limit_minutes": limit}
        team.lead(lambda: run.note(finished=finished))
        ending = "the time limit" if stop.out_of_time else "the last step"
        self.display.note(f"finished at {ending}: {step} updates in {duration(metrics.seconds)}")

    def _where_to_start(self, resume: bool) -> tuple[Path | None, int, float]:
        """The checkpoint to start from, its step, and the seconds of training until then."""
        checkpoint = self.run.latest_checkpoint() if resume else None
        start = int(checkpoint.name.rpartition("_")[2]) if checkpoint is not None else 0
        kept = self.run.forget_metrics_after(start)
        return checkpoint, start, kept[-1]["seconds_total"] if kept else 0.0

    def _compare(self, before: Tensor, step: int) -> None:
        """The last grid, and before_after.png."""
        after = self.gallery.save(self.run, step)
        picture = before_after(before, after, self.gallery.labels, self.gallery.columns, scale=self.gallery.scale)
        save_png(self.run.root / "before_after.png", picture)

    def _nothing_left(self, start: int) -> bool:
        """Whether the run came to its end before, and the recipe allows neither more steps nor more time since."""
        finished = self.team.from_lead(lambda: self.run.notes().get("finished"))
        if finished is None or finished["step"] != start:
            return False
        same_limit = finished["time_limit_minutes"] == self.recipe.grpo.time_limit_minutes
        if start >= self.recipe.grpo.steps:
            limit = "grpo.steps"
        elif finished["out_of_time"] and same_limit:
            limit = "grpo.time_limit_minutes"
        else:
            return False
        self.display.note(f"{self.run.root} is finished after step {start}; raise {limit} with --set to go on")
        return True

    def _assemble(self, seconds_before: float) -> tuple[ImageGRPOTrainer, MetricsCallback, StopCallback]:
        recipe, run, policy, team = self.recipe, self.run, self.policy, self.team
        grpo, logging = recipe.grpo, recipe.logging
        stopwatch = Stopwatch()
        rollout = Rollout(recipe, self.conditions, policy, stopwatch, team)
        scorer = BatchScorer(
            self.rewards, self.weights, grpo.group_size, stopwatch, recipe.rewards.max_missing, self.request.fail, team
        )
        metrics = MetricsCallback(
            run, self.display, stopwatch, list(self.weights), grpo.batch_size, seconds_before, team
        )
        stop = StopCallback(self.request, metrics, grpo.updates_per_batch, self.time_limit, lambda: scorer.blank, team)
        grids = GridCallback(self.gallery, run, logging.grid_every, team)
        # The order counts: measure, decide whether to stop, then save and draw.
        callbacks = [
            metrics,
            stop,
            CheckpointCallback(
                run, policy.save_card, logging.save_every, logging.keep_checkpoints, grpo.updates_per_batch, team
            ),
            grids,
        ]
        trainer = team.together(lambda: build_trainer(recipe, policy, rollout, scorer, run.partial_dir, callbacks))
        metrics.ratio_meter = trainer.ratio_meter
        grids.whole = lambda: whole_model(trainer)
        return trainer, metrics, stop

    def _update(self, trainer: ImageGRPOTrainer, checkpoint: Path | None, start: int) -> None:
        """All updates that are left, with the display on."""
        self.display.start(start)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        except KeyboardInterrupt:  # a second signal: the user does not want to wait for the end of the step
            self.display.stop()
            latest = self.run.checkpoint_steps()
            self._interrupted(latest[-1] if latest else 0)
        except OSError as error:
            if error.errno not in WRITE_ERRORS:  # rewards may fail in ways of their own, such as a lost connection
                raise
            raise cannot_write(self.run.root, error) from error
        except SafetensorError as error:  # carries the system's reason in its text, a full disk for instance
            if "deserializing" in str(error):
                mend = "remove it to go on from the one before"
                raise UserError(f"cannot read the checkpoint {checkpoint}: it is damaged ({error}); {mend}") from error
            raise UserError(f"cannot write a checkpoint to {self.run.checkpoints_dir}: {error}") from error
        except RuntimeError as error:
            if TORCH_WRITER not in str(error):
                raise
            raise UserError(
                f"cannot write a checkpoint to {self.run.checkpoints_dir}: the file system takes no more data"
            ) from error
        finally:
            self.display.stop()
            if self.team.first:
                shutil.rmtree(self.run.partial_dir, ignore_errors=True)

    def _interrupted(self, step: int) -> None:
        self.display.note(f"stopped after step {step}; continue with: argrpo train --resume {self.run.root}")
        raise Interrupted(self.request.exit_code)

    def _save_policy(self, trainer: ImageGRPOTrainer) -> None:
        """The trained policy; the trainer gathers the parameters that are shared out, for which all must take part."""
        folder = self.run.policy_dir
        partial = _partial(folder)
        self.team.lead(lambda: shutil.rmtree(partial, ignore_errors=True))
        try:
            trainer.save_model(str(partial))
        except OSError as error:
            raise cannot_write(folder, error) from error
        except SafetensorError as error:  # carries the system's reason in its text
            raise UserError(f"cannot write {folder}: {error}") from error
        self.team.lead(lambda: self._complete(partial, folder))

    def _save_base(self) -> None:
        """A published policy has no folder of its own; the reference model and a resumed run need one."""
        folder = self.run.base_dir
        self.team.lead(lambda: self._save_whole(folder))
        self.policy.model.config._name_or_path = str(folder)

    def _save_whole(self, folder: Path) -> None:
        partial = _partial(folder)
        shutil.rmtree(partial, ignore_errors=True)
        self.policy.save(partial)
        replace_folder(partial, folder)

    def _complete(self, partial: Path, folder: Path) -> None:
        """What the trainer has written becomes a policy folder."""
        (partial / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle of settings that the recipe says better
        self.policy.save_card(partial)
        replace_folder(partial, folder)


def _partial(folder: Path) -> Path:
    """Where a folder is written before it is complete."""
    return folder.with_name(f".{folder.name}.partial")


def _load_base_policy(recipe: Recipe, out: Path, resume: bool, device: str) -> Policy:
    """The policy that training starts from; a resumed run takes the folder that it started from then."""
    from argrpo_cli.policy import load_policy

    noted = RunDirectory(out).notes().get("base_policy") if resume else None
    # Weights stay in float32 whatever policy.dtype says: bfloat16 is autocast, or small updates would be rounded away.
    chosen = recipe.policy
    return load_policy(noted or chosen.checkpoint, device, dtype="float32", text_device=chosen.text_device)


def _trained(policy: Policy) -> list[str]:
    """Names of the parameters that training may change."""
    return [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]


def _digest(conditions: list[Condition]) -> str:
    """A hash of what a run is asked to draw, in order: a file of captions may change between start and resume."""
    return hashlib.sha256(repr(conditions).encode()).hexdigest()[:16]


def _load_rewards(recipe: Recipe, policy: Policy, conditions: list[Condition]) -> Rewards:
    """The package's rewards, all of which can read all conditions."""
    from argrpo_cli.rewards import load_rewards

    options = {term.name: term.options for term in recipe.rewards.terms}
    rewards = load_rewards(list(options), str(policy.model.device), options)
    rewards.check(conditions)
    return rewards
