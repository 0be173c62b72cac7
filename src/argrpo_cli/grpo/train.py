"""`run_training`: a recipe in, a run directory out. Everything `argrpo train` does."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from argrpo_cli.devices import resolve_device
from argrpo_cli.errors import UserError
from argrpo_cli.files import cannot_write, save_png
from argrpo_cli.grids import before_after
from argrpo_cli.grpo.callbacks.checkpoints import CheckpointCallback
from argrpo_cli.grpo.callbacks.display import RunDisplay, duration
from argrpo_cli.grpo.callbacks.grids import Gallery, GridCallback
from argrpo_cli.grpo.callbacks.metrics import MetricsCallback
from argrpo_cli.grpo.callbacks.report import ReportCallback
from argrpo_cli.grpo.callbacks.stopping import StopCallback, StopRequest
from argrpo_cli.grpo.callbacks.trackers import TrackerCallback, Trackers, check_trackers
from argrpo_cli.grpo.prompts import run_conditions
from argrpo_cli.grpo.provenance import start_notes
from argrpo_cli.grpo.report import refresh_report
from argrpo_cli.grpo.reward_functions import BatchScorer, Rewards
from argrpo_cli.grpo.rollout import Rollout, Stopwatch
from argrpo_cli.grpo.run import Interrupted, RunDirectory, open_run, refuse_used, replace_folder
from argrpo_cli.grpo.trainer import ImageGRPOTrainer, build_trainer, quiet_libraries
from argrpo_cli.rewards.shaping import reward_weights

if TYPE_CHECKING:
    from rich.console import Console

    from argrpo_cli.conditions import Condition
    from argrpo_cli.policy import Policy
    from argrpo_cli.recipe import Recipe

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
TORCH_WRITER = "inline_container"  # torch.save says no more than this file of its own when the disk is full


def run_training(
    recipe: Recipe,
    out: str | os.PathLike[str],
    resume: bool = False,
    *,
    rewards: Rewards | None = None,
    console: Console | None = None,
) -> Path:
    """Train a policy by GRPO as the recipe says.

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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("training with several processes is not in this version; start one process, without a launcher")
    request = StopRequest()
    with quiet_libraries(), request.listening():
        if not resume:
            refuse_used(out)
        check_trackers(recipe.logging.trackers)
        from argrpo_cli.policy.policy import choose_trainable

        policy = _load_base_policy(recipe, out, resume)
        choose_trainable(policy.model, recipe.policy.trainable)
        if resume and RunDirectory(out).notes().get("trained", _trained(policy)) != _trained(policy):
            raise UserError(
                f"policy.trainable: {out} was started with another choice of parameters; a run keeps its own"
            )
        conditions = run_conditions(recipe, policy)
        if resume and RunDirectory(out).notes().get("conditions", _digest(conditions)) != _digest(conditions):
            raise UserError(
                f"conditions: {out} was started with others; a run keeps its own ({recipe.conditions.captions})"
            )
        rewards = rewards or _load_rewards(recipe, policy, conditions)
        weights = reward_weights(recipe.rewards, rewards.family)
        rewards.tolerated = {name for name, weight in weights.items() if not weight}
        with open_run(out, recipe, resume) as run:
            job = _Job(recipe, run, policy, conditions, rewards, weights, request, console)
            with job.trackers:
                job.train(resume)
    return out


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
        console: Console | None,
    ) -> None:
        self.recipe, self.run, self.policy, self.request = recipe, run, policy, request
        self.conditions, self.rewards, self.weights = conditions, rewards, weights
        minutes = recipe.grpo.time_limit_minutes
        self.time_limit = None if minutes is None else 60 * minutes
        self.display = RunDisplay(
            recipe.name,
            recipe.grpo.steps,
            recipe.logging.log_every,
            self.time_limit,
            held_out=[name for name, weight in weights.items() if not weight],
            console=console,
        )
        self.gallery = Gallery(recipe, policy, conditions)
        self.trackers = Trackers(recipe, run, self.display.note)
        self.gallery.watchers.append(self.trackers.picture)

    def train(self, resume: bool) -> None:
        recipe, run = self.recipe, self.run
        checkpoint = run.latest_checkpoint() if resume else None
        start = int(checkpoint.name.rpartition("_")[2]) if checkpoint is not None else 0
        kept = run.forget_metrics_after(start)
        seconds = kept[-1]["seconds_total"] if kept else 0.0
        if self._nothing_left(start):
            return
        if not Path(self.policy.model.config._name_or_path or " ").is_dir():
            self._save_base()
        trainer, metrics, stop = self._assemble(seconds)
        base = os.path.abspath(self.policy.model.config._name_or_path)
        run.note(base_policy=base, trained=_trained(self.policy), conditions=_digest(self.conditions), finished=None)
        run.note(**start_notes(run.notes(), self.weights, self.rewards.family, str(self.policy.model.device)))
        self.display.note(
            f"{recipe.name}: {recipe.grpo.steps} updates of {recipe.grpo.batch_size} images "
            f"({recipe.grpo.batch_size // recipe.grpo.group_size} groups of {recipe.grpo.group_size}) in {run.root}"
            + (f", continuing after step {start}" if start else "")
        )
        self.trackers.open(start)
        before = self.gallery.save(run, 0)  # the base policy: a checkpoint is loaded only when training starts
        if self.request.signal is not None:
            self._interrupted(start)

        shutil.rmtree(run.policy_dir, ignore_errors=True)  # of an earlier end of this run, overtaken now
        self._update(trainer, checkpoint, start)
        step = trainer.state.global_step
        if self.request.failure is not None:
            raise UserError(
                f"stopped after step {step}: {self.request.failure}; continue with: argrpo train --resume {run.root}"
            )
        if self.request.signal is not None and step < recipe.grpo.steps and not stop.out_of_time:
            self._interrupted(step)

        after = self.gallery.save(run, step)
        picture = before_after(before, after, self.gallery.labels, self.gallery.columns, scale=self.gallery.scale)
        save_png(run.root / "before_after.png", picture)
        self._save_policy()
        limit = recipe.grpo.time_limit_minutes
        run.note(finished={"step": step, "out_of_time": stop.out_of_time, "time_limit_minutes": limit})
        refresh_report(run, recipe, self.display.note)  # with the last pictures
        ending = "the time limit" if stop.out_of_time else "the last step"
        self.display.note(f"finished at {ending}: {step} updates in {duration(metrics.seconds)}")

    def _nothing_left(self, start: int) -> bool:
        """Whether the run came to its end before, and the recipe allows neither more steps nor more time since."""
        finished = self.run.notes().get("finished")
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
        recipe, run, policy = self.recipe, self.run, self.policy
        grpo, logging = recipe.grpo, recipe.logging
        stopwatch = Stopwatch()
        rollout = Rollout(recipe, self.conditions, policy, stopwatch)
        scorer = BatchScorer(
            self.rewards, self.weights, grpo.group_size, stopwatch, recipe.rewards.max_missing, self.request.fail
        )
        metrics = MetricsCallback(run, self.display, stopwatch, list(self.weights), grpo.batch_size, seconds_before)
        stop = StopCallback(self.request, metrics, grpo.updates_per_batch, self.time_limit, lambda: scorer.blank)
        # The order counts: measure, decide whether to stop, then save and draw.
        callbacks = [
            metrics,
            TrackerCallback(self.trackers, metrics),
            stop,
            CheckpointCallback(
                run, policy.save_card, logging.save_every, logging.keep_checkpoints, grpo.updates_per_batch
            ),
            GridCallback(self.gallery, run, logging.grid_every),
            ReportCallback(run, recipe, self.display.note),
        ]
        trainer = build_trainer(recipe, policy, rollout, scorer, run.partial_dir, callbacks)
        metrics.ratio_meter = trainer.ratio_meter
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
            shutil.rmtree(self.run.partial_dir, ignore_errors=True)
            refresh_report(self.run, self.recipe, self.display.note, curves=True)  # however it ended

    def _interrupted(self, step: int) -> None:
        self.display.note(f"stopped after step {step}; continue with: argrpo train --resume {self.run.root}")
        raise Interrupted(self.request.exit_code)

    def _save_policy(self) -> None:
        self._save_to(self.run.policy_dir)

    def _save_base(self) -> None:
        """A published policy has no folder of its own; the reference model and a resumed run need one."""
        self._save_to(self.run.base_dir)
        self.policy.model.config._name_or_path = str(self.run.base_dir)

    def _save_to(self, folder: Path) -> None:
        partial = self.run.root / f".{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        self.policy.save(partial)
        replace_folder(partial, folder)


def _load_base_policy(recipe: Recipe, out: Path, resume: bool) -> Policy:
    """The policy that training starts from; a resumed run takes the folder that it started from then."""
    from argrpo_cli.policy import load_policy

    noted = RunDirectory(out).notes().get("base_policy") if resume else None
    # Weights stay in float32 whatever policy.dtype says: bfloat16 is autocast, or small updates would be rounded away.
    chosen = recipe.policy
    return load_policy(
        noted or chosen.checkpoint, resolve_device(chosen.device), dtype="float32", text_device=chosen.text_device
    )


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
