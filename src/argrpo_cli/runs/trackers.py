"""What a run tells experiment trackers: TensorBoard, Weights & Biases, trackio, as `logging.trackers` names them."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from argrpo_cli.system.errors import UserError, first_line

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from argrpo_cli.recipe import Recipe
    from argrpo_cli.runs.run import RunDirectory

MODULES = {"tensorboard": "torch.utils.tensorboard"}  # what is not imported by the name that it is installed by
GRID = "grid"  # the name under which pictures go

# Names that stay as they are from version to version, and what they are called in a record of metrics.jsonl.
_DIVERGENCE = ("divergence", "divergence_teacher", "divergence_student")
_ENTROPY = ("entropy", "cross_entropy", "entropy_weight")
_CONTRAST = ("contrast", "told_apart", "gain_own", "gain_other")
_GROUPS = ("groups_without_spread", "groups_replaced", "images_extra")
_RATIO = ("ratio", "ratio_deviation_mean", "ratio_deviation", "clip_low", "clip_high")
SCALARS = {"reward/total": "reward"} | {
    f"{group}/{key}": key
    for group, keys in {
        "reward": ("within_group_std", *_GROUPS, "images_left_out", "advantage_std", "gain"),
        "policy": (*_DIVERGENCE, *_CONTRAST, "kl", "kl_start", "kl_base", "kl_efficiency", *_ENTROPY, *_RATIO),
        "optim": ("loss", "grad_norm", "learning_rate", "noise_scale", "noise_scale_least", "updates_left_out"),
    }.items()
    for key in keys
}


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record of metrics.jsonl under their names in a tracker; what was not measured is left out."""
    named = {name: record.get(key) for name, key in SCALARS.items()}
    for reward, measured in record.get("rewards", {}).items():
        for key in ("mean", "within_group_std"):
            named[f"reward/{reward}/{key}"] = measured.get(key)
    named |= {f"drift/{part}": value for part, value in (record.get("drift") or {}).items()}
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
        try:
            import_module(MODULES.get(name, name))
        except ImportError as error:
            raise UserError(
                f"logging.trackers: {name} cannot be imported ({error}); `pip install {name}`, "
                "or leave it out, e.g. --set logging.trackers=[]"
            ) from error


class Trackers:
    """All trackers of a run, by accelerate. One that fails is left after one line: tracking never ends a run.

    TensorBoard's event files go to `<run>/tensorboard`; what an earlier process wrote of updates that are done again is
    purged when read. The local files of W&B go to `<run>/wandb`; it is online or offline as WANDB_MODE says. trackio is
    local or in a Space as TRACKIO_SPACE_ID says; it knows runs by name, so the name has the id.

    Made before a resumed run cuts metrics.jsonl back to its checkpoint: W&B and trackio have the updates in it already,
    and are not told twice. (A process that was killed between its metrics and its trackers leaves one update out.)

    Args:
        note: shows a line.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory, note: Callable[[str], None]) -> None:
        self.recipe, self.run, self.note = recipe, run, note
        records, noted = run.metrics(), run.notes().get("trackers", {})
        self.id = noted.get("id") or secrets.token_hex(4)
        self.known = max(noted.get("told", -1), records[-1]["step"] if records else -1)
        self.first = 0  # what TensorBoard is told of: the steps from here on
        self._open: dict[str, GeneralTracker] = {}

    def open(self, start: int) -> None:
        """Begin, or go on after step `start`."""
        names = self.recipe.logging.trackers
        if not names:
            return
        self.run.note(trackers={"id": self.id, "told": self.known})
        self.first = start + 1 if start else 0
        os.environ.setdefault("WANDB_SILENT", "true")  # the terminal is the display's
        for name in dict.fromkeys(names):
            with self._leaving(name), contextlib.redirect_stdout(io.StringIO()):
                tracker = self._tracker(name)
                tracker.start()
                self._open[name] = tracker
        if "wandb" in self._open:
            with self._leaving("wandb"):
                if url := self._open["wandb"].tracker.url:  # none offline
                    self.note(f"wandb: {url}")

    def _tracker(self, name: str) -> GeneralTracker:
        from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

        if name == "tensorboard":
            return TensorBoardTracker(name, self.run.root, purge_step=self.first)
        project, config = self.recipe.logging.project, self.recipe.model_dump(mode="json")
        if name == "trackio":
            own = f"{self.recipe.name}-{self.id}"
            return TrackioTracker(project, name=own, config=config, resume="allow", embed=False)
        settings = import_module(name).Settings(silent=True, console="off")
        return WandBTracker(
            project,
            name=self.recipe.name,
            id=self.id,
            resume="allow",
            config=config,
            allow_val_change=True,  # a resumed run may have more steps
            dir=str(self.run.root),
            settings=settings,
        )

    def record(self, record: Mapping[str, Any]) -> None:
        """Tell them the record of an update."""
        values, step = scalars(record), record["step"]
        for name, tracker in self._to_tell(step):
            with self._leaving(name):
                tracker.log(values, step=step)

    def picture(self, path: Path, step: int) -> None:
        """Give them the grid after `step` updates."""
        from PIL import Image

        for name, tracker in self._to_tell(step):
            with self._leaving(name):
                if name == "trackio":
                    tracker.log({GRID: import_module(name).Image(path)}, step=step)
                    continue
                with Image.open(path) as image:
                    if name == "wandb":
                        tracker.log_images({GRID: [image]}, step=step)
                    else:
                        tracker.log_images({GRID: np.asarray(image.convert("RGB"))[None]}, step, dataformats="NHWC")
                        tracker.tracker.flush()  # a killed run keeps what it has drawn

    def close(self, exit_code: int = 0) -> None:
        """Send what is left."""
        for name, tracker in list(self._open.items()):
            with self._leaving(name), contextlib.redirect_stdout(io.StringIO()):
                if name == "wandb":  # accelerate has no word for a run that failed
                    tracker.tracker.finish(exit_code=exit_code)
                else:
                    tracker.finish()
        self._open = {}

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        interrupted = isinstance(error, SystemExit) and isinstance(error.code, int)
        self.close(0 if error is None else error.code if interrupted else 1)

    def _to_tell(self, step: int) -> list[tuple[str, GeneralTracker]]:
        """Those that do not know yet what there is to say of a step."""
        return [
            (name, tracker)
            for name, tracker in self._open.items()
            if step >= self.first and (name == "tensorboard" or step > self.known)
        ]

    @contextlib.contextmanager
    def _leaving(self, name: str) -> Iterator[None]:
        """A tracker that fails within is told nothing more."""
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            why, kind = first_line(error), type(error).__name__
            why = why if why == kind else f"{kind}: {why}"
            self.note(f"warning: the tracker {name} failed and is told nothing more ({why}); training goes on")
