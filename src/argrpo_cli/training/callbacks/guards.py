"""Acts on what the guards find: says it, remembers it in run.json, stops the run; leaves bad gradients out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from argrpo_cli.system.processes import ALONE, Team
from argrpo_cli.training.guards import Finding, Guards, bad_gradient

if TYPE_CHECKING:
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.runs.run import RunDirectory
    from argrpo_cli.training.callbacks.display import RunDisplay
    from argrpo_cli.training.callbacks.metrics import MetricsCallback
    from argrpo_cli.training.callbacks.stopping import StopRequest


class GuardCallback(TrainerCallback):
    """Stands after MetricsCallback, whose record it reads, and before the checkpoint is written.

    The weights that are saved are always finite numbers: an update with a gradient that is none changes neither them
    nor the optimiser, and weights that are none are not saved.

    Args:
        weights: what each raw reward counts.
    """

    def __init__(
        self,
        recipe: Recipe,
        weights: Mapping[str, float],
        run: RunDirectory,
        display: RunDisplay,
        request: StopRequest,
        metrics: MetricsCallback,
        team: Team = ALONE,
    ) -> None:
        self.recipe, self.run, self.display, self.request, self.metrics = recipe, run, display, request, metrics
        self.team = team
        self.guards = Guards(recipe, weights)
        self._in_a_row = 0  # updates left out because their gradient was not a number
        self._left_out = False  # the latest was
        self._remembered: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run goes through its past first: what was said then is not said again."""
        if not state.is_world_process_zero:
            return
        noted = self.run.notes().get("warnings", [])
        self._remembered = [warning for warning in noted if warning["step"] <= state.global_step]
        if self._remembered != noted:
            self._write()  # the others belong to updates that are done again
        said = {(warning["step"], warning["guard"]) for warning in self._remembered}
        for record in self.run.metrics():
            for finding in self.guards.look(record):
                if finding.action == "warn" and (finding.step, finding.guard) not in said:
                    self._warn(finding)  # of a guard that was set to a lower limit since

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Gradients are clipped by now, by a norm that is not a number if one of them is not.
        parameters = [one for one in kwargs["model"].parameters() if one.grad is not None]
        self._left_out = bool(parameters) and not _is_finite([one.grad for one in parameters])
        if not self._left_out:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        for parameter in parameters:
            parameter.grad = None  # not a zero, which momentum and weight decay would still act on
        finding = bad_gradient(state.global_step + 1, self.recipe.guards.not_a_number, self._in_a_row)
        self._act(finding, state.is_world_process_zero)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:  # the trainer's summary at its end
            return
        step, norm = state.global_step, logs.get("grad_norm")
        restart = f"start again with a lower grpo.learning_rate; --resume {self.run.root} has the last checkpoint"
        if norm is not None and not math.isfinite(norm) and not self._left_out:
            # Too large for its norm to be a number, or an engine that makes its step before anyone can look.
            self.team.fail(f"the gradient of step {step} is not a finite number and could not be left out: {restart}")
        if state.is_world_process_zero:
            for finding in self.guards.look(self.metrics.record):
                self._act(finding, True)
        # Asked at the end of a step, a stop would come one update late. Several processes have to agree on it there.
        batch_done = step % self.recipe.grpo.updates_per_batch == 0
        if self.request.failure is not None and args.world_size == 1 and batch_done:
            control.should_training_stop = control.should_save = True
        if control.should_save and not _is_finite([one.detach() for one in kwargs["model"].parameters()]):
            self.team.fail(f"the weights after step {step} are not finite numbers and are not saved: {restart}")

    def _act(self, finding: Finding, first: bool) -> None:
        """Stop or warn; the first process alone shows and remembers it."""
        if finding.action == "stop":
            self.request.fail(finding.text)
            if first:
                self._remember(finding)
        elif first:
            self._warn(finding)

    def _warn(self, finding: Finding) -> None:
        self.display.note(Text.assemble(("warning:", "yellow"), f" step {finding.step}: {finding.text}"))
        self._remember(finding)

    def _remember(self, finding: Finding) -> None:
        self._remembered.append({"step": finding.step, "guard": finding.guard, "text": finding.text})
        self._write()

    def _write(self) -> None:
        """All of them each time, so what a full disk did not take is there with the next."""
        self.run.spare(lambda: self.run.note(warnings=self._remembered))


def _is_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether all are made of finite numbers; where they are sharded, of all processes together."""
    from torch.distributed.tensor import DTensor

    norm = torch.nn.utils.get_total_norm(tensors)
    return bool((norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite())
