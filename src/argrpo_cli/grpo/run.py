"""The run directory: where everything of a training run lies, who may write to it, and how a run is taken up again.

recipe.yaml          the resolved recipe
run.json             where training started from, and whether it is finished
metrics.jsonl        one line per update
grids/               the same conditions and seeds every few updates
before_after.png, curves.png
checkpoints/step_000020/   a policy folder with the trainer's state beside it
policy/              the trained policy, once the run is finished
base/                the policy that training started from, where it came from no policy folder
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from argrpo_cli.errors import UserError
from argrpo_cli.files import cannot_write, make_dir, read_json, read_text, reason, write_json, write_jsonl, write_text
from argrpo_cli.policy.policy import CHECKPOINT_PREFIX, CHECKPOINTS, checkpoint_folders
from argrpo_cli.recipe import dump_recipe

if TYPE_CHECKING:
    from argrpo_cli.recipe import Recipe


class Interrupted(SystemExit):
    """The run was stopped by a signal after its state was saved; `code` is what the process should exit with."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside a run directory, and the few things that must be read and written with care."""

    root: Path

    @property
    def recipe_file(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def notes_file(self) -> Path:
        return self.root / "run.json"

    @property
    def checkpoints_dir(self) -> Path:
        return self.root / CHECKPOINTS

    @property
    def partial_dir(self) -> Path:
        """Where checkpoints are written before they are complete; nobody reads it."""
        return self.checkpoints_dir / ".partial"

    @property
    def policy_dir(self) -> Path:
        return self.root / "policy"

    @property
    def base_dir(self) -> Path:
        return self.root / "base"

    def grid_file(self, step: int) -> Path:
        return self.root / "grids" / f"step_{step:06d}.png"

    def checkpoint_dir(self, step: int) -> Path:
        return self.checkpoints_dir / f"{CHECKPOINT_PREFIX}{step:06d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return list(checkpoint_folders(self.root))

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        steps = self.checkpoint_steps()
        return self.checkpoint_dir(steps[-1]) if steps else None

    def keep_newest(self, count: int) -> None:
        """Remove all checkpoints but the `count` newest."""
        for step in self.checkpoint_steps()[:-count]:
            shutil.rmtree(self.checkpoint_dir(step))

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl; a crash can cost the last line, never an earlier one."""
        try:
            with open(self.metrics_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise cannot_write(self.metrics_file, error) from error

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a half-written last one is left out."""
        if not self.metrics_file.exists():
            return []
        records = []
        for line in read_text(self.metrics_file).splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def forget_metrics_after(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines of updates after `step`, which a resumed run does again; returns what is left."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        write_jsonl(self.metrics_file, kept)
        return kept

    def notes(self) -> dict[str, Any]:
        """What the run must remember beyond its recipe, see `note`; empty for a new run."""
        return read_json(self.notes_file) if self.notes_file.exists() else {}

    def note(self, **changes: Any) -> None:
        """Remember more.

        `base_policy` is the folder that training started from, the reference model of the whole run, resumed or not;
        `trained` are the names of the parameters that training may change, in the optimiser's order;
        `sharding` is how the optimiser's state is shared out over processes in the checkpoints;
        `finished` says at which step and under which time limit the run came to its end.
        """
        write_json(self.notes_file, self.notes() | changes)


@contextmanager
def open_run(root: str | os.PathLike[str], recipe: Recipe, resume: bool) -> Iterator[RunDirectory]:
    """Create a run directory, or take one up again, and hold it against other processes.

    Raises:
        UserError: without resume, the folder holds something; with resume, it is no run; another process writes to it.
    """
    run = RunDirectory(Path(root))
    if resume and not run.recipe_file.is_file():
        raise UserError(f"{run.root} is not a run directory (it has no recipe.yaml), so there is nothing to resume")
    make_dir(run.root)
    with _lock(run.root):
        if not resume:
            refuse_used(run.root)
        if run.partial_dir.exists():
            shutil.rmtree(run.partial_dir)
        write_text(run.recipe_file, dump_recipe(recipe))
        yield run


def refuse_used(root: Path) -> None:
    """UserError when a new run cannot start in `root`, because something is there."""
    run = RunDirectory(root)
    try:
        used = run.root.exists() and any(path.name != ".lock" for path in run.root.iterdir())
    except OSError as error:
        raise UserError(f"cannot use {root} as a run directory: {reason(error)}") from error
    if used and run.recipe_file.exists():
        raise UserError(
            f"{root} already holds a run; continue it with `argrpo train --resume {root}`, "
            "or choose another folder with --out"
        )
    if used:
        raise UserError(f"{root} is not empty and not a run; choose another folder with --out")


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    lock = FileLock(root / ".lock")  # released by the system when the process dies, however it dies
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"another process is training in {root}; wait for it or choose another folder with --out"
        ) from error
    except OSError as error:
        raise cannot_write(root / ".lock", error) from error
    try:
        yield
    finally:
        lock.release()


def replace_folder(partial: Path, final: Path) -> None:
    """Give a completely written folder its final name; an older one of that name goes away."""
    try:
        for path in partial.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        make_dir(final.parent)
        os.replace(partial, final)
    except OSError as error:
        raise cannot_write(final, error) from error
