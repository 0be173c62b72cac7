"""Checkpoints that are either complete or not there: written to the side, then renamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from argrpo_cli.grpo.run import replace_folder
from argrpo_cli.processes import ALONE, Team

if TYPE_CHECKING:
    from argrpo_cli.grpo.run import RunDirectory


class CheckpointCallback(TrainerCallback):
    """Saves every `every` steps and whenever training stops, and keeps the newest `keep`.

    The trainer writes its checkpoint (weights, optimiser, schedule, random states) to the run's partial folder, which
    is its output folder; here it becomes a policy folder and gets its final name.

    Args:
        complete: adds to a folder with the model's own files what makes it a policy folder.
        updates_per_batch: checkpoints lie between batches, see `StopCallback`.
        team: the processes that write a checkpoint together; the first one gives it its name.
    """

    def __init__(
        self,
        run: RunDirectory,
        complete: Callable[[Path], None],
        every: int,
        keep: int,
        updates_per_batch: int,
        team: Team = ALONE,
    ) -> None:
        self.run, self.complete, self.every, self.keep, self.team = run, complete, every, keep, team
        self.updates_per_batch = updates_per_batch
        self._saved_at: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saved_at = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        between_batches = step % self.updates_per_batch == 0
        due = step // self.every > self._saved_at // self.every
        if control.should_training_stop or (due and between_batches):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved_at = state.global_step
        self.team.exchange(None)  # each has written its random state and its part of a sharded optimiser
        self.team.lead(lambda: self._finish(args, state))

    def _finish(self, args: TrainingArguments, state: TrainerState) -> None:
        written = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        (written / "training_args.bin").unlink(missing_ok=True)  # a pickle of settings that the recipe says better
        self.complete(written)
        replace_folder(written, self.run.checkpoint_dir(state.global_step))
        self.run.keep_newest(self.keep)
