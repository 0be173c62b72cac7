"""What a run keeps of its policy: checkpoints that are complete or not there, a running mean of its weights, and grids:
the same conditions and seeds drawn again and again, so that one sees the policy change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from argrpo_cli.draw import draw_batch
from argrpo_cli.runs.checkpoints import MEAN, REFERENCE, write_manifest
from argrpo_cli.runs.disk import replace_folder
from argrpo_cli.seeds import of_training
from argrpo_cli.shapes import Shot
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import save_png
from argrpo_cli.system.grids import image_grid
from argrpo_cli.system.processes import ALONE, Team

if TYPE_CHECKING:
    from argrpo_cli.policy import Policy
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.runs.disk import Disk
    from argrpo_cli.runs.run import RunDirectory
    from argrpo_cli.shapes import Condition
    from argrpo_cli.training.metrics import MetricsCallback

GRID_STEP = -1  # stands for "no step" in the seeds: no rollout ever draws a grid's image


@dataclass(eq=False)
class CheckpointCallback(TrainerCallback):
    """Saves every `logging.save_every` steps, after `logging.keep_steps` and whenever training stops.

    The trainer writes its checkpoint (weights, optimiser, schedule, random states) to the run's partial folder, which
    is its output folder; here it becomes a policy folder and gets its final name.

    Attributes:
        disk: where a checkpoint waits for room.
        metrics: whose clock stands still meanwhile.
        complete: adds to a folder with the model's own files what makes it a policy folder.
        saved: called in the first process after each but the last.
        team: the processes that write a checkpoint together; the first one gives it its name.
    """

    recipe: Recipe
    run: RunDirectory
    disk: Disk
    metrics: MetricsCallback
    complete: Callable[[Path], None]
    saved: Callable[[], None]
    team: Team = ALONE

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved_at = state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        between_batches = step % self.recipe.optim.updates_per_batch == 0  # see `StopCallback`
        every, keep = self.recipe.logging.save_every, self.recipe.logging.keep_steps
        due = step // every > self._saved_at // every or step in keep
        if control.should_training_stop or (due and between_batches):
            control.should_save = True
            wait = partial(self.disk.wait_for_room, f"the checkpoint of step {step}")
            self.metrics.leave_out(self.team.from_lead(lambda: wait(self._expected_size(kwargs["model"]))))

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved_at = state.global_step
        self.team.exchange(None)  # each has written its random state and its part of a sharded optimiser
        self.team.lead(lambda: self._finish(args, state))
        if self.team.first and not control.should_training_stop:
            self.saved()

    def _finish(self, args: TrainingArguments, state: TrainerState) -> None:
        written = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

        def complete() -> None:
            self.complete(written)
            self.run.sync_metrics()  # the record of each step that the checkpoint contains
            write_manifest(written)

        self.metrics.leave_out(self.disk.insist(f"the checkpoint of step {state.global_step}", complete))
        replace_folder(written, self.run.checkpoint_dir(state.global_step))
        self.run.keep_newest(self.recipe.logging.keep_checkpoints, self.recipe.logging.keep_steps)

    def _expected_size(self, model: nn.Module) -> int:
        """Bytes of the next checkpoint: of the one before, or of the weights, AdamW's two moments and the mean."""
        before = self.run.latest_checkpoint()
        if before is not None:
            return sum(path.stat().st_size for path in before.rglob("*") if path.is_file())
        optim = self.recipe.optim
        moving = self.recipe.method == "grpo" and self.recipe.grpo.reference_decay < 1
        copies = {True: 3 + bool(optim.ema_decay) + moving, False: 1}  # of a parameter, trained or not
        return sum(
            parameter.numel() * parameter.element_size() * copies[parameter.requires_grad]
            for parameter in model.parameters()
        )


class EmaCallback(TrainerCallback):
    """After each update, mean <- decay mean + (1 - decay) weights, in float32, for the weights that are trained.

    An update that is left out (`GuardCallback`, which comes before) leaves the mean as it is, too.

    The mean starts at the base policy: with n updates it still holds a share decay^n of it.

    Args:
        decay: between 0 and 1.
        checkpoint: the one that the run is resumed from, which holds the mean up to there.
        team: the processes of the run, each of which keeps the mean.
    """

    def __init__(self, decay: float, checkpoint: Path | None, team: Team = ALONE) -> None:
        self.decay, self.checkpoint, self.team = decay, checkpoint, team
        self.mean: dict[str, Tensor] = {}
        self._average = get_ema_multi_avg_fn(decay)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.mean = {name: weight.detach().float().clone() for name, weight in trained_weights(kwargs["model"]).items()}
        if self.checkpoint is None:
            return
        file = self.checkpoint / MEAN
        if not file.is_file():
            self.team.fail(f"{self.checkpoint} has no {MEAN}: the run was started without ema_decay")
        _copy(load_file(file), self.mean)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._left_out = all(weight.grad is None for weight in trained_weights(kwargs["model"]).values())

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._left_out:
            return
        weights = trained_weights(kwargs["model"])
        with torch.no_grad():
            self._average(list(self.mean.values()), [weights[name].float() for name in self.mean], state.global_step)

    def save(self, folder: Path) -> None:
        """Add the mean to a checkpoint."""
        save_file({name: value.cpu() for name, value in self.mean.items()}, folder / MEAN)

    def in_place_of(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within this context the model's trained weights are the mean."""
        return in_place(model, self.mean)


class ReferenceCallback(EmaCallback):
    """After every `every` updates, reference <- decay reference + (1 - decay) policy, for the weights that are trained.

    Args:
        model: the policy's, before the trainer wraps it.
        reference: that of the KL term, as the run begins a copy of the base.
    """

    def __init__(self, decay: float, every: int, model: nn.Module, reference: nn.Module) -> None:
        super().__init__(decay, None)
        weights = dict(reference.named_parameters())
        self.every, self.mean = every, {name: weights[name].data for name in trained_weights(model)}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """There is nothing to copy: the mean is the reference itself."""

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        self._left_out &= self.every == 1  # of several updates the others have moved the policy

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            super().on_step_end(args, state, control, **kwargs)

    def save(self, folder: Path) -> None:
        """Add the reference to a checkpoint."""
        save_file({name: value.cpu() for name, value in self.mean.items()}, folder / REFERENCE)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: it has no reference.
        """
        if not (folder / REFERENCE).is_file():
            raise UserError(f"{folder} has no {REFERENCE}: the run was started without reference_decay")
        _copy(load_file(folder / REFERENCE), self.mean)


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@contextmanager
def in_place(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context these are the model's trained weights; its own wait on the CPU."""
    own = trained_weights(model)
    kept = {name: own[name].detach().to("cpu", copy=True) for name in weights}
    _copy(weights, own)
    try:
        yield
    finally:
        _copy(kept, own)


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in source.items():
            target[name].copy_(tensor)


def spread(conditions: Sequence[Condition], count: int) -> list[Condition]:
    """So many conditions in their order, evenly spread, the first one included; repeating only where they are fewer."""
    total = len(conditions)
    rows = [index * total // count for index in range(count)]
    if count >= total:
        rows = sorted(index % total for index in range(count))
    return [conditions[row] for row in rows]


class Gallery:
    """Draws `logging.grid_images` images, spread over the conditions, from the policy as it is and as it says itself
    that it is sampled; what it does not say is as in the rollouts.

    Attributes:
        shots: what is shown, repeating only when there are fewer conditions than images; always of the same seeds.
        labels: a short name under each image.
        columns: of a grid.
        scale: how often each pixel is repeated, so that small images can be seen.
        tokens: int64 [N, T] of the latest grid.
        watch: called with the file and the step of every grid that was written.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        conditions: Sequence[Condition],
        watch: Callable[[Path, int], None] = lambda file, step: None,
    ) -> None:
        count, shown = recipe.logging.grid_images, spread(conditions, recipe.logging.grid_images)
        # A student is drawn as it is trained, without guidance, and so is the policy that it was.
        own = {"cfg_scale": 1.0} if recipe.unguided else policy.card.sampling
        self.policy, self.sampling = policy, replace(recipe.sampling, **own)
        self.shots = [Shot(one, of_training(recipe.seed, GRID_STEP, index)) for index, one in enumerate(shown)]
        self.labels = [
            one.prompt.removeprefix("a photo of ") if one.class_id is None else policy.card.names[one.class_id]
            for one in shown
        ]
        self.columns = min(count, 8 if count > 12 else 6)
        self.scale = 2 if policy.card.image_size < 128 else 1
        self.watch = watch
        self.tokens: Tensor | None = None
        self._drawn: tuple[int, Tensor] | None = None

    def save(self, run: RunDirectory, step: int) -> Tensor | None:
        """Draw, write the grid of `step`, and return the images, uint8 [N, 3, H, W] on the CPU.

        The latest grid is not drawn twice. None where the images cannot be drawn, which is said.
        """
        if self._drawn is None or self._drawn[0] != step:
            self._drawn = None
            run.spare("grids", lambda: self._make(run.grid_file(step), step))
        return None if self._drawn is None else self._drawn[1]

    @torch.inference_mode()
    def _make(self, file: Path, step: int) -> None:
        self.tokens, images = draw_batch(self.policy, self.shots, self.sampling)
        self._drawn = step, images.cpu()
        save_png(file, image_grid(self._drawn[1], self.columns, labels=self.labels, scale=self.scale))
        self.watch(file, step)


class GridCallback(TrainerCallback):
    """Writes a grid every `every` steps and after the last.

    Attributes:
        whole: gathers the parameters of a sharded model while the first process draws; see `gathering.whole_model`.
        watch: called in the first process after each that was drawn, with the parameters still whole.
    """

    def __init__(self, gallery: Gallery, run: RunDirectory, every: int, team: Team = ALONE) -> None:
        self.gallery, self.run, self.every, self.team = gallery, run, every, team
        self.whole: Callable[[], AbstractContextManager[object]] = nullcontext  # the trainer's is known after it
        self.watch: Callable[[], None] = lambda: None

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Also when the run is being interrupted: resumed, it goes on after this step.
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            with self.whole():
                self.team.lead(lambda: self._save(state.global_step))

    def _save(self, step: int) -> None:
        if self.gallery.save(self.run, step) is not None:
            self.run.spare("what is measured with a grid", self.watch)
