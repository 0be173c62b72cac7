"""Checkpoints that are either complete or not there: written to the side, listed in a manifest, then renamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from argrpo_cli.runs.checkpoints import write_manifest
from argrpo_cli.runs.disk import replace_folder, size_of
from argrpo_cli.system.processes import ALONE, Team

if TYPE_CHECKING:
    from argrpo_cli.runs.disk import Disk
    from argrpo_cli.runs.run import RunDirectory
    from argrpo_cli.training.callbacks.metrics import MetricsCallback


class CheckpointCallback(TrainerCallback):
    """Saves every `every` steps, after the steps `always` and whenever training stops.

    The trainer writes its checkpoint (weights, optimiser, schedule, random states) to the run's partial folder, which
    is its output folder; here it becomes a policy folder and gets its final name.

    Args:
        disk: where a checkpoint waits for room.
        metrics: whose clock stands still meanwhile.
        complete: adds to a folder with the model's own files what makes it a policy folder.
        keep: how many of the newest are kept; those of the steps `always` are never removed.
        updates_per_batch: checkpoints lie between batches, see `StopCallback`.
        with_mean: whether a checkpoint also holds a running mean of the weights.
        team: the processes that write a checkpoint together; the first one gives it its name.
    """

    def __init__(
        self,
        run: RunDirectory,
        disk: Disk,
        metrics: MetricsCallback,
        complete: Callable[[Path], None],
        every: int,
        keep: int,
        always: Sequence[int],
        updates_per_batch: int,
        with_mean: bool = False,
        team: Team = ALONE,
    ) -> None:
        self.run, self.disk, self.metrics, self.complete, self.team = run, disk, metrics, complete, team
        self.every, self.keep, self.always, self.updates_per_batch = every, keep, always, updates_per_batch
        self.with_mean = with_mean
        self._saved_at: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saved_at = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        between_batches = step % self.updates_per_batch == 0
        due = step // self.every > self._saved_at // self.every or step in self.always
        if control.should_training_stop or (due and between_batches):
            control.should_save = True
            self.metrics.leave_out(self.team.from_lead(lambda: self._wait_for_room(step, kwargs["model"])))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved_at = state.global_step
        self.team.exchange(None)  # each has written its random state and its part of a sharded optimiser
        self.team.lead(lambda: self._finish(args, state))

    def _finish(self, args: TrainingArguments, state: TrainerState) -> None:
        written = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

        def complete() -> None:
            self.complete(written)
            self.run.sync_metrics()  # the record of each step that the checkpoint contains
            write_manifest(written)

        self.metrics.leave_out(self.disk.insist(f"the checkpoint of step {state.global_step}", complete))
        replace_folder(written, self.run.checkpoint_dir(state.global_step))
        self.run.keep_newest(self.keep, self.always)

    def _wait_for_room(self, step: int, model: nn.Module) -> float:
        return self.disk.wait_for_room(f"the checkpoint of step {step}", self._expected_size(model))

    def _expected_size(self, model: nn.Module) -> int:
        """Bytes of the next checkpoint: of the one before, or of the weights, AdamW's two moments and the mean."""
        before = self.run.latest_checkpoint()
        if before is not None:
            return size_of(before)
        copies = {True: 4 if self.with_mean else 3, False: 1}  # of a parameter, trained or not
        return sum(
            parameter.numel() * parameter.element_size() * copies[parameter.requires_grad]
            for parameter in model.parameters()
        )
