"""Keeps report.html up to date while a run trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from argrpo_cli.runs.report import refresh_report

if TYPE_CHECKING:
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.runs.run import RunDirectory


class ReportCallback(TrainerCallback):
    """Writes the report with every checkpoint; the one at the end of a run is written when all else is done."""

    def __init__(self, run: RunDirectory, recipe: Recipe, note: Callable[[str], None]) -> None:
        self.run, self.recipe, self.note = run, recipe, note

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and not control.should_training_stop:
            refresh_report(self.run, self.recipe, self.note, training=True)
