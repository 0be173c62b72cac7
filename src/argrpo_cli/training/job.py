"""`Job`: everything between an opened run directory and its end. `train.py` says what is done before and around it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from argrpo_cli.rewards import reward_weights
from argrpo_cli.runs.checkpoints import PolicyWriter, newest_whole_checkpoint
from argrpo_cli.runs.disk import Disk, is_full, remove_folder
from argrpo_cli.runs.learning import conclusions, spread_at_start
from argrpo_cli.runs.report import refresh_report
from argrpo_cli.runs.run import START, Interrupted, RunDirectory, duration, start_notes
from argrpo_cli.runs.trackers import Trackers
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import reason, save_png
from argrpo_cli.system.grids import before_after
from argrpo_cli.system.processes import Team, again
from argrpo_cli.training.cca import CcaTrainer
from argrpo_cli.training.conditions import Conditions, digest, load_position, save_position
from argrpo_cli.training.display import RunDisplay, silent_console
from argrpo_cli.training.distil import SCALE_IMAGES, DistilTrainer, choose_scale
from argrpo_cli.training.entropy import EntropyCallback
from argrpo_cli.training.gathering import sharding, whole_model
from argrpo_cli.training.grpo import build_trainer
from argrpo_cli.training.guards import GuardCallback
from argrpo_cli.training.image_trainer import build
from argrpo_cli.training.instruments import GradientMeter, Start, transfer, transfer_shots
from argrpo_cli.training.launch import images_per_process
from argrpo_cli.training.metrics import MetricsCallback, StopCallback, StopRequest
from argrpo_cli.training.pixel import NAMES, PixelTrainer
from argrpo_cli.training.rollout import Rollout, Stopwatch
from argrpo_cli.training.saving import (
    CheckpointCallback,
    EmaCallback,
    Gallery,
    GridCallback,
    ReferenceCallback,
    spread,
    trained_weights,
)
from argrpo_cli.training.scorer import BatchScorer
from argrpo_cli.training.selection import Selection
from argrpo_cli.training.streams import StreamedConditions

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor
    from transformers import Trainer, TrainerCallback

    from argrpo_cli.policy import Policy
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.rewards import RewardSet
    from argrpo_cli.shapes import Condition
    from argrpo_cli.training.real import Real

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
BUILDERS: dict[str, Callable[..., Trainer]] = {  # of each method's trainer
    "grpo": build_trainer,
    "distil": partial(build, DistilTrainer),
    "cca": partial(build, CcaTrainer),
    "pixel": partial(build, PixelTrainer),
}
TORCH_WRITER = "inline_container"  # torch.save says no more than this file of its own when the disk is full


@dataclass
class Job:
    """Everything between an opened run directory and its end: assemble, update, write what comes out.

    There is one in each process of the team.

    Attributes:
        rewards: None where none are asked.
        real: the images that the method learns from, tokenised; None where it needs none.
        request: whether the run is to stop.
        console: where the first process shows its progress; standard output by default.
        whole: the run directory that this one is or lies in, which the user knows.
    """

    recipe: Recipe
    root: Path
    policy: Policy
    conditions: Conditions
    rewards: RewardSet | None
    real: Real | None
    request: StopRequest
    team: Team
    console: Console | None
    whole: Path
    ema: EmaCallback | None = None
    start: Start | None = None  # of the first process

    def __post_init__(self) -> None:
        recipe, optim = self.recipe, self.recipe.optim
        self.weights: dict[str, float] = {}  # what each raw reward counts
        # What a checkpoint holds beside the trainer's own, of GRPO.
        self.states: list[BatchScorer | EntropyCallback | ReferenceCallback | Selection] = []
        if self.rewards is not None:
            self.weights = reward_weights(recipe.rewards, self.rewards.family)
            self.rewards.tolerated = {name for name, weight in self.weights.items() if not weight}
            self.rewards.mixed = recipe.policy.dtype == "bfloat16"
        self.again = again("train", "--resume", self.whole)
        self.time_limit = None if optim.time_limit_minutes is None else 60 * optim.time_limit_minutes
        held_out = [name for name, weight in self.weights.items() if not weight]
        console = self.console if self.team.first else silent_console()
        self.display = RunDisplay(
            recipe.name, optim.steps, recipe.logging.log_every, self.time_limit, held_out=held_out, console=console
        )
        self.run = RunDirectory(self.root, tell=self.display.note)
        self.disk = Disk(self.whole, self.display.note, lambda: self.request.signal is not None)
        self.writer = PolicyWriter(recipe, self.run, self.policy, self.disk, self.team)
        self.trackers = Trackers(recipe, self.run, self.display.note)
        self.gallery = Gallery(
            recipe, self.policy, self._some_conditions(recipe.logging.grid_images), self.trackers.picture
        )
        compared = recipe.logging.transfer_images if recipe.method == "grpo" else 0
        self.transfer_shots = transfer_shots(self._some_conditions(compared), recipe.seed)

    def _some_conditions(self, count: int) -> list[Condition]:
        """So many, spread over all; of a stream the first ones."""
        if isinstance(self.conditions, StreamedConditions):
            return [self.conditions[group] for group in range(count)]
        return spread(self.conditions, count)

    def train(self, resume: bool) -> None:
        """From the base policy or the newest whole checkpoint to the end of the run.

        Raises:
            UserError: the run cannot go on; what is saved is whole.
            Interrupted: a signal came.
        """
        recipe, run, team = self.recipe, self.run, self.team
        checkpoint, start, seconds = team.from_lead(lambda: self._where_to_start(resume))
        if self._nothing_left(start):
            return
        base, trained = self.writer.base(), list(trained_weights(self.policy.model))
        scale = self._scale() if recipe.method == "distil" else None
        trainer, metrics, stop = self._assemble(seconds, checkpoint, scale)
        kind, started = sharding(trainer), team.from_lead(lambda: run.notes().get("sharding", "none"))
        if checkpoint is not None and started != kind:
            team.fail(
                f"cannot continue {run.root}, started with sharding {started}, with {kind}: its checkpoints have other "
                "files; launch it with the configuration that it was started with"
            )
        family = {} if self.rewards is None else self.rewards.family
        notes = start_notes(run.notes(), self.weights, family, str(self.policy.model.device))
        notes |= {
            "tokens": self.policy.card.tokens,
            "base_policy": base,
            "trained": trained,
            "conditions": digest(self.conditions),
        }
        notes |= {} if self.real is None else {"real": self.real.digest}
        team.lead(lambda: run.note(**notes, finished=None, sharding=kind))
        self.display.note(self._opening(start, scale))
        team.lead(lambda: self.trackers.open(start))
        # The base policy, and whole: only when training starts is a checkpoint loaded, and the model shared out.
        before = team.lead(lambda: self.gallery.save(run, 0))
        if recipe.unguided:  # from here on it is another policy than the base
            self.policy.sampling = {**self.policy.sampling, "cfg_scale": 1.0}
        if checkpoint is not None:
            load_position(self.conditions, checkpoint)
            team.together(lambda: [one.load(checkpoint) for one in self.states])
        for folder in (run.policy_dir, run.ema_dir):  # an earlier end of this run is overtaken once it goes on
            team.lead(partial(remove_folder, folder))
        try:
            self._update(trainer, checkpoint, start)
            self._finish(trainer, stop, before)
        finally:
            if team.first:
                shutil.rmtree(run.partial_dir, ignore_errors=True)
                refresh_report(run, recipe, pictures=True)  # however it ended
        ending = "the time limit" if stop.out_of_time else "the last step"
        left_out = f", {metrics.left_out} of which changed nothing" if metrics.left_out else ""
        took = f"{trainer.state.global_step} updates in {duration(metrics.seconds)}"
        self.display.note(f"finished at {ending}: {took}{left_out}")
        if team.first:
            run.spare("conclusions", self._conclude)

    def rehearse(self, still: TrainerCallback) -> MetricsCallback:
        """Updates as in training until the time is up, whose gradients a callback takes away; nothing is saved.

        Raises:
            UserError: a reward or a guard would have stopped the run.
            Interrupted: a second signal came; the first ends it after the update in progress.
        """
        self.writer.base()
        trainer, metrics, _ = self._assemble(0.0, None, None)
        for callback in (CheckpointCallback, GridCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(still)
        self.display.start(0)
        self.request.training = True
        try:
            trainer.train()
        except KeyboardInterrupt:
            self.display.note("stopped; no weight was changed")
            raise Interrupted(self.request.exit_code) from None
        finally:
            self.display.stop()
        if self.request.failure is not None:
            self.team.fail(f"stopped: {self.request.failure}")
        return metrics

    def _scale(self) -> float:
        """The teacher's guidance: the recipe's, or of its list the one that was chosen when the run began."""
        scales, noted = self.recipe.distil.cfg_scale, self.team.from_lead(lambda: self.run.notes().get("scale"))
        if not isinstance(scales, list):
            return scales
        if noted is None:
            count = SCALE_IMAGES // self.team.count * self.team.count
            words = ", ".join(f"{scale:g}" for scale in scales)
            self.display.note(f"choosing distil.cfg_scale: {count} images at each of {words}")
            conditions = self._some_conditions(count)
            noted = choose_scale(self.recipe, self.policy, conditions, self.rewards, self.weights, self.team)
            self.team.lead(lambda: self.run.note(scale=noted))
            measured = ", ".join(
                f"{row['cfg_scale']:g}: {row['reward']:.4g} ± {row['error']:.2g}" for row in noted["scales"]
            )
            self.display.note(f"reward at each scale: {measured}; distil.cfg_scale {noted['cfg_scale']:g}")
        return noted["cfg_scale"]

    def _finish(self, trainer: Trainer, stop: StopCallback, before: Tensor | None) -> None:
        """What comes after the last update: the last grid and the trained policy, or why the run stopped earlier."""
        recipe, run, team = self.recipe, self.run, self.team
        self.request.agree(team)  # a guard of the first process may have found something in the last update
        step = trainer.state.global_step
        if self.request.failure is not None:
            team.fail(f"stopped after step {step}: {self.request.failure}; continue with: {self.again}")
        averaged = recipe.optim.result == "ema"
        if self.request.signal is not None and step < recipe.optim.steps and not stop.out_of_time:
            # A second signal leaves the picture out; the checkpoint is saved by now.
            mean = self.ema.in_place_of(trainer.model) if averaged else nullcontext()
            with suppress(KeyboardInterrupt), mean, whole_model(trainer):
                team.lead(lambda: self._compare(before, step))
            self._interrupted(step)
        with self.ema.in_place_of(trainer.model) if averaged else nullcontext():
            with whole_model(trainer):
                team.lead(lambda: self._compare(before, step))
            self.writer.trained(trainer, run.policy_dir)
        if averaged:
            self.display.note(f"policy/ holds the running mean of the weights ({recipe.method}.result: ema)")
        elif self.ema is not None:
            with self.ema.in_place_of(trainer.model):
                self.writer.trained(trainer, run.ema_dir)
        limit = recipe.optim.time_limit_minutes
        finished = {"step": step, "out_of_time": stop.out_of_time, "time_limit_minutes": limit}
        team.lead(lambda: run.note(finished=finished))
        if self.transfer_shots and self.request.signal is None:
            self.display.note("comparing start and result, also when sampled otherwise")
            with self.ema.in_place_of(trainer.model) if averaged else nullcontext(), whole_model(trainer):
                # The policy is written: a reward that cannot be asked any more costs no more than this.
                team.lead(lambda: run.spare("start and result compared", self._compare_samplings))

    def _conclude(self) -> None:
        for sentence in conclusions(self.run.metrics(), self.recipe.optim.batch_size, self.run.notes()):
            self.display.note(sentence)

    def _compare_samplings(self) -> None:
        """What is left of the gain when start and result are sampled otherwise, into run.json."""
        spread = spread_at_start(self.run.metrics())
        if self.start is None or not spread:
            return
        self.request.training = self.team.count > 1  # alone, a signal ends this at once: all else is written
        try:
            rows = transfer(self.start, self.transfer_shots, self.recipe.sampling, self.rewards, self.weights, spread)
        except KeyboardInterrupt:
            self.display.note("the comparison is left out; the run is finished without it")
            return
        self.run.note(transfer=rows)

    def _where_to_start(self, resume: bool) -> tuple[Path | None, int, float]:
        """The checkpoint to start from, its step, and the seconds of training until then."""
        checkpoint, optim = newest_whole_checkpoint(self.run) if resume else None, self.recipe.optim
        start = int(checkpoint.name.rpartition("_")[2]) if checkpoint is not None else 0
        if start > optim.steps:
            raise UserError(f"{self.recipe.method}.steps {optim.steps}: {self.run.root} is at step {start} already")
        if start % optim.updates_per_batch:
            raise UserError(
                f"{self.run.root} was saved after step {start}, in the middle of a batch of "
                f"{optim.updates_per_batch} updates (grpo.updates_per_batch); it cannot be continued exactly"
            )
        records = self.run.forget_metrics_after(start)
        return checkpoint, start, (records[-1].get("seconds_total") or 0.0) if records else 0.0

    def _opening(self, start: int, scale: float | None) -> str:
        optim, stage = self.recipe.optim, ""
        if self.recipe.start is not None or self.whole != self.root:
            stage = f"stage {2 if self.whole == self.root else 1} of 2, "
        what = f"{optim.batch_size // optim.group_size} groups of {optim.group_size}"
        if self.real is not None:
            what = f"of {len(self.real.conditions)} real ones"
        return (
            f"{stage}{self.recipe.name}: {optim.steps} updates of {optim.batch_size} images "
            f"({what if scale is None else f'guidance {scale:g} is distilled'})"
            + (f" by {self.team.count} processes" if self.team.count > 1 else "")
            + f" in {self.run.root}"
            + (f", continuing after step {start}" if start else "")
        )

    def _compare(self, before: Tensor | None, step: int) -> None:
        """The last grid, and before_after.png; with a start of the same pictures its base stands before the two."""
        gallery, recipe, start, base = self.gallery, self.recipe, self.recipe.start, None
        after = gallery.save(self.run, step)
        if before is None or after is None:
            return
        if start is not None and (start.seed, start.conditions) == (recipe.seed, recipe.conditions):
            base = RunDirectory(self.root / START).grid_file(0)

        def draw() -> None:
            picture = before_after(before, after, gallery.labels, gallery.columns, scale=gallery.scale, base=base)
            save_png(self.run.root / "before_after.png", picture)

        self.run.spare("before_after.png", draw)

    def _nothing_left(self, start: int) -> bool:
        """Whether the run came to its end before, and the recipe allows neither more steps nor more time since."""
        finished = self.team.from_lead(lambda: self.run.notes().get("finished"))
        if finished is None or finished["step"] != start:
            return False
        method, optim = self.recipe.method, self.recipe.optim
        if start >= optim.steps:
            limit = f"{method}.steps"
        elif finished.get("out_of_time") and finished.get("time_limit_minutes") == optim.time_limit_minutes:
            limit = f"{method}.time_limit_minutes"
        else:
            return False
        self.display.note(f"{self.run.root} is finished after step {start}; raise {limit} with --set to go on")
        return True

    def _assemble(
        self, seconds_before: float, checkpoint: Path | None, scale: float | None
    ) -> tuple[Trainer, MetricsCallback, StopCallback]:
        recipe, run, policy, team = self.recipe, self.run, self.policy, self.team
        optim, logging = recipe.optim, recipe.logging
        stopwatch = Stopwatch()
        limit, fail = recipe.rewards.max_missing, self.request.fail
        scorer = BatchScorer(
            self.rewards, self.weights, optim.group_size, stopwatch, limit, fail, team, recipe.grpo.aggregation
        )
        selection = Selection(recipe, self.conditions) if recipe.selects or recipe.scales_globally else None
        rollout = Rollout(recipe, self.conditions, policy, stopwatch, team, scorer, selection)
        grpo = recipe.method == "grpo"
        names = {"grpo": list(self.weights), "pixel": list(NAMES)}.get(recipe.method)
        metrics = MetricsCallback(run, self.display, stopwatch, names, optim.batch_size, seconds_before, team)
        stop = StopCallback(self.request, metrics, optim.updates_per_batch, self.time_limit, team)
        saved = partial(refresh_report, run, recipe, training=True)
        checkpoints = CheckpointCallback(recipe, run, self.disk, metrics, self._complete_checkpoint, saved, team)
        grids = GridCallback(self.gallery, run, logging.grid_every, team)
        counts, blank = self.weights if grpo else {}, lambda: grpo and scorer.blank
        guard = GuardCallback(recipe, counts, run, self.display, self.request, metrics, team, blank)
        share, micro = images_per_process(recipe, team.count)
        meter = GradientMeter(micro, share, optim.group_size, optim.batch_size)
        metrics.gradient_meter, metrics.updates_per_batch = meter, optim.updates_per_batch
        metrics.tokens = policy.card.tokens
        # The order counts: measure, decide whether to stop, then save and draw.
        callbacks = [meter, metrics, stop, guard]
        if optim.ema_decay:
            self.ema = EmaCallback(optim.ema_decay, checkpoint, team)
            callbacks.append(self.ema)
        callbacks += [checkpoints, grids]
        if team.first:
            metrics.watch = self.trackers.record
        own = {"grpo": scorer, "distil": scale}.get(recipe.method, self.real)
        new = BUILDERS[recipe.method]
        trainer = team.together(lambda: new(recipe, policy, rollout, own, run.partial_dir, callbacks))
        if grpo:
            metrics.ratio_meter = trainer.ratio_meter
            self.states = [scorer, *([] if selection is None else [selection]), *trainer.states]
        for key, callback in (("ema_decay", self.ema), ("reference_decay", grpo and trainer.reference)):
            if callback and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
                team.fail(
                    f"{recipe.method}.{key} needs whole weights in each process; leave it out, or take "
                    "--accelerate-config ddp"
                )
        meter.usable &= sharding(trainer) == "none"
        grids.whole = lambda: whole_model(trainer)
        start = self.start = team.lead(lambda: Start.of(policy, trainer.model, self._policy_before()))

        def measure() -> None:
            shown = [shot.condition for shot in self.gallery.shots]
            metrics.measured = start.kl(shown, self.gallery.tokens, trainer.sampling) | {"drift": start.drift()}

        grids.watch = measure
        return trainer, metrics, stop

    def _policy_before(self) -> Path | None:
        """The policy that the start started from; None where that is not this run's with other trained weights."""
        recipe = self.recipe
        if recipe.start is None or recipe.policy.lora or recipe.start.policy.lora or recipe.policy.trainable != "all":
            return None
        folder = Path(RunDirectory(self.root / START).notes().get("base_policy", ""))
        return folder if folder.is_dir() else None

    def _complete_checkpoint(self, folder: Path) -> None:
        """What makes the trainer's checkpoint a policy folder, and what else the run needs to go on from it."""
        self.writer.complete(folder)
        if self.ema is not None:
            self.ema.save(folder)
        save_position(self.conditions, folder)
        for one in self.states:
            one.save(folder)

    def _update(self, trainer: Trainer, checkpoint: Path | None, start: int) -> None:
        """All updates that are left, with the display on."""
        self.display.start(start)
        self.request.acknowledge = partial(self.display.stopping, self.recipe.optim.updates_per_batch)
        self.request.training = True
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
            self.team.exchange(None)  # at its end each looks into the folder that the first one removes below
        except KeyboardInterrupt:  # a second signal: the user does not want to wait for the end of the step
            self.display.stop()
            self._interrupted(self._saved_step())
        except UserError as error:  # of our own writing; others are about something else
            if not is_full(error):
                raise
            raise self._cannot_go_on(str(error)) from error
        except OSError as error:
            if error.errno not in WRITE_ERRORS:  # rewards may fail in ways of their own, such as a lost connection
                raise
            raise self._cannot_go_on(f"cannot write to {error.filename or self.run.root}: {reason(error)}") from error
        except SafetensorError as error:  # carries the system's reason in its text, a full disk for instance
            raise self._cannot_go_on(f"cannot write a checkpoint to {self.run.checkpoints_dir}: {error}") from error
        except RuntimeError as error:
            if TORCH_WRITER not in str(error):
                raise
            why = f"cannot write a checkpoint to {self.run.checkpoints_dir}: the file system takes no more data"
            raise self._cannot_go_on(why) from error
        finally:
            self.display.stop()

    def _saved_step(self) -> int:
        """The step that a resumed run would go on from."""
        return max(self.run.checkpoint_steps(), default=0)

    def _cannot_go_on(self, why: str) -> UserError:
        """The error that ends a run which cannot write its checkpoint; what was saved before is whole."""
        return UserError(
            f"{why}; the run is safe up to step {self._saved_step()}: mend this and continue with: {self.again}"
        )

    def _interrupted(self, step: int) -> None:
        self.display.note(f"stopped after step {step}; continue with: {self.again}")
        raise Interrupted(self.request.exit_code)
