"""The same conditions and seeds drawn again and again, so that one sees the policy change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from argrpo_cli.draw import draw_batch
from argrpo_cli.seeds import of_training
from argrpo_cli.shapes import Shot
from argrpo_cli.system.files import save_png
from argrpo_cli.system.grids import image_grid
from argrpo_cli.system.processes import ALONE, Team

if TYPE_CHECKING:
    from PIL import Image

    from argrpo_cli.policy import Policy
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.runs.run import RunDirectory
    from argrpo_cli.shapes import Condition

GRID_STEP = -1  # stands for "no step" in the seeds: no rollout ever draws a grid's image


class Gallery:
    """Draws `logging.grid_images` images, spread over the conditions, from the policy as it is.

    Attributes:
        shots: what is shown, repeating only when there are fewer conditions than images; always of the same seeds.
        labels: a short name under each image.
        columns: of a grid.
        scale: how often each pixel is repeated, so that small images can be seen.
        watchers: called with the file and the step of every grid that was written.
    """

    def __init__(self, recipe: Recipe, policy: Policy, conditions: Sequence[Condition]) -> None:
        count, total = recipe.logging.grid_images, len(conditions)
        self.policy, self.sampling = policy, recipe.sampling
        if count < total:
            rows = [index * total // count for index in range(count)]  # evenly spread, first one included
        else:
            rows = sorted(index % total for index in range(count))
        seeds = [of_training(recipe.seed, GRID_STEP, index) for index in range(count)]
        self.shots = [Shot(conditions[row], seed) for row, seed in zip(rows, seeds, strict=True)]
        shown = [shot.condition for shot in self.shots]
        self.labels = [
            one.prompt.removeprefix("a photo of ") if one.class_id is None else policy.card.names[one.class_id]
            for one in shown
        ]
        self.columns = min(count, 8 if count > 12 else 6)
        self.scale = 2 if policy.card.image_size < 128 else 1
        self.watchers: list[Callable[[Path, int], None]] = []

    @torch.inference_mode()
    def draw(self) -> Tensor:
        """Images uint8 [N, 3, H, W] on the CPU."""
        return draw_batch(self.policy, self.shots, self.sampling)[1].cpu()

    def save(self, run: RunDirectory, step: int) -> Tensor:
        """Draw, write the grid of `step`, and return the images."""
        images = self.draw()
        grid = image_grid(images, self.columns, labels=self.labels, scale=self.scale)
        run.spare(lambda: self._keep(run.grid_file(step), grid, step))
        return images

    def _keep(self, file: Path, grid: Image.Image, step: int) -> None:
        save_png(file, grid)
        for watch in self.watchers:
            watch(file, step)


class GridCallback(TrainerCallback):
    """Writes a grid every `every` steps; the one after the last step is drawn when training is over.

    Attributes:
        whole: gathers the parameters of a sharded model while the first process draws; see `gathering.whole_model`.
    """

    def __init__(self, gallery: Gallery, run: RunDirectory, every: int, team: Team = ALONE) -> None:
        self.gallery, self.run, self.every, self.team = gallery, run, every, team
        self.whole: Callable[[], AbstractContextManager[object]] = nullcontext  # the trainer's is known after it

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Also when the run is being interrupted: resumed, it goes on after this step.
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            with self.whole():
                self.team.lead(lambda: self.gallery.save(self.run, state.global_step))
