"""The run directory: where everything of a training run lies, who may write to it, and how a run is taken up again.

recipe.yaml          the resolved recipe
run.json             that recipe once more, where training started from, and whether it is finished
metrics.jsonl        one line per update
grids/               the same conditions and seeds every few updates
before_after.png, curves.png, report.html
tensorboard/         event files, with `logging.trackers` of others theirs
checkpoints/step_000020/   a policy folder with the trainer's state beside it, and checksums.json
checkpoints/damaged-step_000040/   one that was not whole when the run was taken up
policy/              the trained policy, once the run is finished
policy_ema/          the running mean of its weights, where the recipe keeps one
base/                the policy that training started from, where it came from no policy folder
start/               the run directory of the recipe's `start`, from whose policy/ this run goes on
"""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from argrpo_cli import __version__
from argrpo_cli.policy.folder import CHECKPOINT_PREFIX, CHECKPOINTS, checkpoint_folders
from argrpo_cli.recipe import dump_recipe, load_recipe
from argrpo_cli.recipe.explain import explain
from argrpo_cli.recipe.layers import Layer
from argrpo_cli.recipe.schema import Recipe
from argrpo_cli.recipe.sections import METHODS
from argrpo_cli.runs.contents import MetricsRow, Notes
from argrpo_cli.runs.disk import TEMPORARY, is_full, recover, remove_folder, sync_folder
from argrpo_cli.system.errors import UserError, first_line, shortened
from argrpo_cli.system.files import (
    cannot_write,
    make_dir,
    read_json,
    read_text,
    reason,
    writable,
    write_json,
    write_jsonl,
    write_text,
)
from argrpo_cli.system.plain import check_shape, lines_of, parse_json
from argrpo_cli.system.processes import LOCK, alone_in

START = "start"
PILOT_FILE, PILOT_SCRATCH = "pilot.yaml", ".pilot"  # a pilot's proposal, and its run directory while it runs
# What may change when a run is continued: how long, what is watched, what is kept. Anything else is another run.
CHANGEABLE = (
    *(f"{method}.{key}" for method in METHODS for key in ("steps", "time_limit_minutes")), "guards.", "logging.",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft")  # whose versions are noted


class Interrupted(SystemExit):
    """The run was stopped by a signal after its state was saved; `code` is what the process should exit with."""


class RunDirectory:
    """Paths inside a run directory, and the few things that must be read and written with care.

    Args:
        tell: shows one line to the user.
    """

    def __init__(self, root: Path, tell: Callable[[str], None] = print) -> None:
        self.root, self.tell = root, tell
        self.recipe_file, self.metrics_file = root / "recipe.yaml", root / "metrics.jsonl"
        self.notes_file = root / "run.json"
        self.policy_dir, self.ema_dir, self.base_dir = root / "policy", root / "policy_ema", root / "base"
        self.checkpoints_dir = root / CHECKPOINTS
        self.partial_dir = self.checkpoints_dir / ".partial"  # of checkpoints that are being written; nobody reads it
        self._unwritten: list[bytes] = []  # lines of metrics.jsonl that found no room on the disk
        self._spared: set[str] = set()  # what could not be made, of what a run can do without

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

    def keep_newest(self, count: int, always: Sequence[int] = ()) -> None:
        """Remove all checkpoints but the `count` newest and those of the steps `always`."""
        for step in self.checkpoint_steps()[:-count]:
            if step not in always:
                remove_folder(self.checkpoint_dir(step))

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl; a crash can cost the last line, never an earlier one.

        Where the disk is full the line is kept, and written with a later one or by `sync_metrics`.
        """
        self._unwritten.append((json.dumps(record) + "\n").encode())
        try:
            self._write_lines()
        except OSError as error:
            if not is_full(error):
                raise cannot_write(self.metrics_file, error) from error

    def sync_metrics(self) -> None:
        """Bring all lines so far to disk; before a checkpoint counts, or its records could be lost behind it.

        Raises:
            UserError: the disk is full or broken.
        """
        with writable(self.metrics_file):
            self._write_lines()
            with open(self.metrics_file, "ab") as file:
                os.fsync(file.fileno())

    def _write_lines(self) -> None:
        with open(self.metrics_file, "ab", buffering=0) as file:
            end = file.tell()
            try:
                for line in self._unwritten:
                    if file.write(line) != len(line):  # the disk took a part and takes the rest with an error
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.metrics_file))
            except OSError:
                os.truncate(self.metrics_file, end)  # no half line for the next one to run into
                raise
        self._unwritten.clear()

    def spare(self, what: str, make: Callable[[], object]) -> None:
        """Make what a run can do without, a picture for instance; a failure, whatever it is, is told of the first time.

        Nothing that a run needs (rewards, checkpoints, metrics.jsonl) may be made within.
        """
        try:
            make()
        except Exception as error:
            if what not in self._spared:
                kind = "" if isinstance(error, UserError | OSError) else f"{type(error).__name__}: "
                self.tell(f"warning: {what}: {kind}{first_line(error)}; the run goes on without it")
            self._spared.add(what)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a half-written last one is left out.

        Raises:
            UserError: another line is damaged; it is named.
        """
        lines, records = lines_of(read_text(self.metrics_file)) if self.metrics_file.exists() else [], []
        for number, line in enumerate(lines, start=1):
            where = f"{self.metrics_file}, line {number}"
            try:
                records.append(check_shape(parse_json(line), MetricsRow, where))
            except ValueError as error:
                if number < len(lines):
                    raise UserError(f"{where}: not JSON ({error}); take the line out to go on without it") from error
        return records

    def forget_metrics_after(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines of updates after `step`, which a resumed run does again; returns what is left."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        write_jsonl(self.metrics_file, kept)
        return kept

    def notes(self) -> dict[str, Any]:
        """What the run must remember beyond its recipe, see `note`; empty for a new run."""
        return read_json(self.notes_file, Notes) if self.notes_file.exists() else {}

    def note(self, **changes: Any) -> None:
        """Remember more.

        `recipe` is the one that the run was started with, in what may not change, and was last continued with in the
        rest;
        `base_policy` is the folder that training started from, the reference model of the whole run, resumed or not;
        `trained` are the names of the parameters that training may change, in the optimiser's order, or with adapters
        those of the policy that they are put on;
        `sharding` is how the optimiser's state is shared out over processes in the checkpoints;
        `finished` says at which step and under which time limit the run came to its end;
        `warnings` are what the guards found: {step, guard, text} each;
        `scale` is the guidance that was chosen from a list, and what was measured of each.
        """
        write_json(self.notes_file, self.notes() | changes)
        _sync(self.root)


@contextmanager
def open_run(root: str | os.PathLike[str], recipe: Recipe, resume: bool) -> Iterator[RunDirectory]:
    """Create a run directory, or take one up again, and hold it against other processes.

    What an earlier process left half written when it died is cleared up.

    Raises:
        UserError: without resume, the folder holds something; with resume, it is no run; another process writes to it.
    """
    run = RunDirectory(Path(root))
    if resume:
        refuse_unused(run.root)
    make_dir(run.root)
    with _lock(run.root):
        if not resume:
            refuse_used(run.root)
        for folder in (run.root, run.checkpoints_dir, run.root / "grids"):
            recover(folder)
        write_text(run.recipe_file, dump_recipe(recipe))
        run.note(recipe=recipe.model_dump(mode="json"))
        _sync(run.root.absolute().parent)
        yield run


def refuse_used(root: Path) -> None:
    """UserError when a new run cannot start in `root`, because something is there.

    What a run leaves that died before its recipe was written does not count.
    """
    run = RunDirectory(root)
    try:
        names = {path.name for path in root.iterdir()} if root.exists() else set()
    except OSError as error:
        raise UserError(f"cannot use {root} as a run directory: {reason(error)}") from error
    used = names - {LOCK} - set(fnmatch.filter(names, f"{TEMPORARY}*-{run.recipe_file.name}"))
    if used and run.recipe_file.exists():
        raise UserError(
            f"{root} already holds a run; continue it with `argrpo train --resume {root}`, "
            "or choose another folder with --out"
        )
    if used:
        raise UserError(f"{root} is not empty and not a run; choose another folder with --out")


def clear_for_pilot(folder: Path) -> None:
    """Make sure of a pilot's folder: new, or an earlier one's, which may have run a start.

    What one that was killed left of its measuring is removed.

    Raises:
        UserError: it holds something else.
    """
    own = {PILOT_FILE, PILOT_SCRATCH, START}
    if folder.exists() and not (folder.is_dir() and {one.name for one in folder.iterdir()} <= own):
        raise UserError(f"{folder} is not empty; choose another folder for {PILOT_FILE} with --out")
    shutil.rmtree(folder / PILOT_SCRATCH, ignore_errors=True)


def refuse_unused(root: Path) -> None:
    """UserError when there is no run in `root` to be taken up."""
    if not RunDirectory(root).recipe_file.is_file():
        raise UserError(
            f"{root} is not a run directory (it has no recipe.yaml), so there is nothing to resume; "
            f"start with: argrpo train RECIPE --out {root}"
        )


def refuse_edited(root: Path, recipe: Recipe) -> None:
    """UserError when the run in `root` is to be continued with another recipe than it was started with.

    It may differ in what is `CHANGEABLE`, but not in steps that a learning-rate schedule depends on. Of a run of an
    earlier version, which noted no recipe, recipe.yaml is taken to be as it was.
    """
    run = RunDirectory(root)
    noted = run.notes().get("recipe")
    try:
        before = load_recipe(run.recipe_file) if noted is None else Recipe.model_validate(noted)
    except ValidationError as error:
        raise UserError(explain(error, [Layer(str(run.notes_file), {})], noted)) from error
    schedule = recipe.optim.schedule
    free = [key for key in CHANGEABLE if schedule == "constant" or not key.endswith(".steps")]
    other = [
        f"{key} was {shortened(old)} and is {shortened(new)}"
        for key, old, new in _differences(before.model_dump(mode="json"), recipe.model_dump(mode="json"))
        if not any(f"{key}.".startswith(one.rstrip(".") + ".") for one in free)
    ]
    if other:
        keys = ", ".join(key + "*" if key.endswith(".") else key for key in free)
        why = "" if schedule == "constant" else f", and no steps, by which its {schedule} learning-rate schedule goes"
        raise UserError(
            f"{root}: {', '.join(other)}: a resumed run keeps its recipe; in recipe.yaml and by --set only {keys} can "
            f"change{why}"
        )


def _differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key and both values of whatever differs in nested plain data; None for what one of them has not."""
    inside: Iterable[Any] = ()
    if isinstance(before, dict) and isinstance(now, dict):
        inside = ((name, before.get(name), now.get(name)) for name in before | now)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        inside = zip(range(len(now)), before, now, strict=True)
    elif before != now:
        yield key, before, now
    for name, old, new in inside:
        yield from _differences(old, new, f"{key}.{name}".removeprefix("."))


def refuse_busy(root: Path) -> None:
    """UserError when another process trains in `root`; a run that starts later finds out by itself, in `open_run`."""
    with _lock(root):
        pass


def _lock(root: Path) -> AbstractContextManager[None]:
    return alone_in(root, f"another process is training in {root}; wait for it or choose another folder with --out")


def _sync(folder: Path) -> None:
    with writable(folder):
        sync_folder(folder)


def duration(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of everything that decides what is computed; packages that are not there are left out."""
    installed = {"argrpo": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def device_name(device: str) -> str:
    """The device in words: a GPU's model, or the processor's architecture and the threads that torch uses."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if device == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"
    return device


def start_notes(
    notes: Mapping[str, Any], weights: Mapping[str, float], family: Mapping[str, str], device: str
) -> dict[str, Any]:
    """What goes into run.json when training starts or goes on.

    Args:
        notes: what is there already; the first start is kept.
        weights: what each raw score counts in the total reward, 0 for a held-out one.
        family: of each reward.
        device: "cpu", "cuda:0", ...
    """
    return {
        "started": notes.get("started") or now(),
        "versions": versions(),
        "device": device_name(device),
        "rewards": {name: {"family": family.get(name), "weight": weight} for name, weight in weights.items()},
    }
