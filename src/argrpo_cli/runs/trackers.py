"""What a run tells experiment trackers: TensorBoard, Weights & Biases, trackio, as `logging.trackers` names them."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from argrpo_cli.system.errors import UserError

if TYPE_CHECKING:
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.runs.run import RunDirectory
    from argrpo_cli.training.callbacks.metrics import MetricsCallback

# What each is imported as and installed by.
PACKAGES = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "trackio": ("trackio", "trackio"),
}
GRID = "grid"  # the name under which pictures go

# Names that stay as they are from version to version, and what they are called in a record of metrics.jsonl.
SCALARS = {
    "reward/total": "reward",
    "reward/within_group_std": "within_group_std",
    "reward/groups_without_spread": "groups_without_spread",
    "reward/images_left_out": "images_left_out",
    "policy/kl": "kl",
    "policy/entropy": "entropy",
    "policy/entropy_weight": "entropy_weight",
    "policy/ratio": "ratio",
    "policy/ratio_deviation_mean": "ratio_deviation_mean",
    "policy/ratio_deviation": "ratio_deviation",
    "policy/clip_low": "clip_low",
    "policy/clip_high": "clip_high",
    "optim/loss": "loss",
    "optim/grad_norm": "grad_norm",
    "optim/learning_rate": "learning_rate",
}


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record of metrics.jsonl under their names in a tracker; what was not measured is left out."""
    named = {name: record.get(key) for name, key in SCALARS.items()}
    for reward, measured in record.get("rewards", {}).items():
        for key in ("mean", "within_group_std"):
            named[f"reward/{reward}/{key}"] = measured.get(key)
    named |= {
        f"speed/{key}": value for key, value in record.items() if key.startswith(("images_per_second", "seconds"))
    }
    return {name: value for name, value in named.items() if value is not None}


def check_trackers(names: Iterable[str]) -> None:
    """Find out before training whether the packages are there.

    Raises:
        UserError: one is missing; the line has the command that installs it.
    """
    for name in names:
        module, package = PACKAGES[name]
        try:
            import_module(module)
        except ImportError as error:
            raise UserError(
                f"logging.trackers: {name} cannot be imported ({error}); `pip install {package}`, "
                "or leave it out, e.g. --set logging.trackers=[]"
            ) from error


class Tracker(Protocol):
    """Where the numbers and pictures of one run go."""

    def scalars(self, values: dict[str, float], step: int) -> None: ...

    def picture(self, path: Path, step: int) -> None: ...

    def close(self, exit_code: int) -> None: ...


class TensorBoard:
    """Event files in `<run>/tensorboard`. What an earlier process wrote from step `first` on is purged when read."""

    def __init__(self, run: RunDirectory, first: int) -> None:
        self.first = first
        self.writer = import_module(PACKAGES["tensorboard"][0]).SummaryWriter(
            str(run.root / "tensorboard"), purge_step=first
        )

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a killed run keeps what it has logged

    def picture(self, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        if step < self.first:
            return  # the base policy's, which a resumed run draws again
        with Image.open(path) as image:
            self.writer.add_image(GRID, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self, exit_code: int) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases; its local files go to `<run>/wandb`. Online or offline as WANDB_MODE says."""

    def __init__(self, recipe: Recipe, run: RunDirectory, run_id: str, note: Callable[[str], None]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # the terminal is the display's
        wandb = import_module("wandb")
        self.image = wandb.Image
        self.run = wandb.init(
            project=recipe.logging.project,
            name=recipe.name,
            id=run_id,
            resume="allow",
            config=recipe.model_dump(mode="json"),
            allow_val_change=True,  # a resumed run may have more steps
            dir=str(run.root),
            settings=wandb.Settings(silent=True, console="off"),
        )
        if self.run.url:  # none offline
            note(f"wandb: {self.run.url}")

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def picture(self, path: Path, step: int) -> None:
        self.run.log({GRID: self.image(str(path))}, step=step)

    def close(self, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)


class Trackio:
    """A run of trackio, local or in a Space as TRACKIO_SPACE_ID says. It knows runs by name, so the name has the id."""

    def __init__(self, recipe: Recipe, run_id: str) -> None:
        self.trackio = import_module("trackio")
        with contextlib.redirect_stdout(io.StringIO()):
            self.trackio.init(
                project=recipe.logging.project,
                name=f"{recipe.name}-{run_id}",
                config=recipe.model_dump(mode="json"),
                resume="allow",
                embed=False,
            )

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.trackio.log(values, step=step)

    def picture(self, path: Path, step: int) -> None:
        self.trackio.log({GRID: self.trackio.Image(path)}, step=step)

    def close(self, exit_code: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.trackio.finish()


class Trackers:
    """All trackers of a run. One that fails is left after one line: tracking never ends a run.

    Made before a resumed run cuts metrics.jsonl back to its checkpoint: W&B and trackio have the updates in it already,
    and are not told twice. (A process that was killed between its metrics and its trackers leaves one update out.)

    Args:
        note: shows a line.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory, note: Callable[[str], None]) -> None:
        self.recipe, self.run, self.note = recipe, run, note
        records, noted = run.metrics(), run.notes().get("trackers", {})
        self.id = noted.get("id") or secrets.token_hex(4)
        self.told = max(noted.get("told", -1), records[-1]["step"] if records else -1)
        self._open: dict[str, Tracker] = {}

    def open(self, start: int) -> None:
        """Begin, or go on after step `start`."""
        if not self.recipe.logging.trackers:
            return
        self.run.note(trackers={"id": self.id, "told": self.told})
        make: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(self.run, start + 1 if start else 0),
            "wandb": lambda: WandB(self.recipe, self.run, self.id, self.note),
            "trackio": lambda: Trackio(self.recipe, self.id),
        }
        for name in dict.fromkeys(self.recipe.logging.trackers):
            try:
                self._open[name] = make[name]()
            except Exception as error:
                self._leave(name, error)

    def record(self, record: Mapping[str, Any]) -> None:
        """Tell them the record of an update."""
        values = scalars(record)
        self._each(record["step"], lambda tracker: tracker.scalars(values, record["step"]))

    def picture(self, path: Path, step: int) -> None:
        """Give them the grid after `step` updates."""
        self._each(step, lambda tracker: tracker.picture(path, step))

    def close(self, exit_code: int = 0) -> None:
        """Send what is left."""
        for name, tracker in list(self._open.items()):
            try:
                tracker.close(exit_code)
            except Exception as error:
                self._leave(name, error)
        self._open = {}

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        code = getattr(error, "code", None)  # of Interrupted
        self.close(0 if error is None else code if isinstance(code, int) else 1)

    def _each(self, step: int, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            if name != "tensorboard" and step <= self.told:
                continue
            try:
                tell(tracker)
            except Exception as error:
                self._leave(name, error)

    def _leave(self, name: str, error: Exception) -> None:
        self._open.pop(name, None)
        lines = str(error).strip().splitlines()
        why = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        self.note(f"warning: the tracker {name} failed and is told nothing more ({why}); training goes on")


class TrackerCallback(TrainerCallback):
    """Passes the record of each update on; comes after the metrics."""

    def __init__(self, trackers: Trackers, metrics: MetricsCallback) -> None:
        self.trackers, self.metrics = trackers, metrics

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs and state.is_world_process_zero:
            self.trackers.record(self.metrics.record)
