"""The policies that a run writes, and whether what lies on the disk is whole.

Every policy folder (what a run starts from, a checkpoint, what comes out) is complete or not there. `checksums.json` in
a checkpoint lists its files with size and SHA-256: it is written last, before the checkpoint gets its name, and read
before a run is taken up from it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Required

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import safe_globals
from typing_extensions import TypedDict

from argrpo_cli.networks.weights import weight_shapes
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.folder import BUNDLED_POLICIES, MANIFEST, checkpoint_folders, mark_adapter
from argrpo_cli.policy.open import outline_policy
from argrpo_cli.policy.published import POLICIES
from argrpo_cli.runs.disk import PARTIAL, replace_folder, set_aside
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import (
    cannot_write,
    check_regular,
    read_json,
    read_text,
    readable,
    reason,
    writable,
    write_json,
)
from argrpo_cli.system.plain import check_shape

if TYPE_CHECKING:
    from transformers import Trainer

    from argrpo_cli.policy import Policy
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.runs.disk import Disk
    from argrpo_cli.runs.run import RunDirectory
    from argrpo_cli.system.processes import Team

STATE, MEAN, REFERENCE = "trainer_state.json", "ema.safetensors", "reference.safetensors"
# What a checkpoint of a version without manifests needs.
NEEDED = ("policy.json", "config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE)
DAMAGED = "damaged-"  # before the name of a checkpoint that is not whole


@dataclass(frozen=True)
class PolicyWriter:
    """Writes policy folders into a run directory, each whole or not at all.

    Attributes:
        disk: where a folder waits for room.
        team: the processes of the run. The first one writes; all take part where parameters are shared out.
    """

    recipe: Recipe
    run: RunDirectory
    policy: Policy
    disk: Disk
    team: Team

    def base(self) -> str:
        """The policy that training starts from, so that it can be opened again: for the KL term and by a resumed run.

        A published policy has no folder of its own, and is given one in the run; adapters do without.
        """
        folder = self.policy.model.config._name_or_path
        if folder and Path(folder).is_dir():
            return os.path.abspath(folder)
        if self.recipe.policy.lora is not None:
            chosen = self.recipe.policy.checkpoint
            return os.path.abspath(chosen) if Path(chosen).exists() else chosen
        self.team.lead(lambda: self.disk.insist("the base policy", self._write_base))
        self.policy.model.config._name_or_path = str(self.run.base_dir)
        return os.path.abspath(self.run.base_dir)

    def complete(self, folder: Path) -> None:
        """Make a policy folder of one that holds what the trainer writes of the model."""
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle of settings that the recipe says better
        (folder / "README.md").unlink(missing_ok=True)  # a model card for the hub
        if self.recipe.policy.lora is None:
            self.policy.save_card(folder)
        else:
            chosen, noted = self.recipe.policy.checkpoint, self.run.notes()["base_policy"]
            named = self.recipe.start is None and chosen in (*BUNDLED_POLICIES, *POLICIES)
            mark_adapter(folder, chosen if named else noted, self.policy.sampling)

    def trained(self, trainer: Trainer, folder: Path) -> None:
        """The policy as it is now, adapters merged into its weights; all processes must call it.

        Raises:
            UserError: it cannot be written.
        """
        what, partial = f"{folder.name}/", _partial(folder)

        def save() -> None:
            self.team.lead(lambda: shutil.rmtree(partial, ignore_errors=True))
            try:
                trainer.save_model(str(partial))  # gathers parameters that are shared out
            except OSError as error:
                raise cannot_write(folder, error) from error
            except SafetensorError as error:  # carries the system's reason in its text
                raise UserError(f"cannot write {folder}: {error}") from error

        if self.team.count == 1:
            self.disk.insist(what, save)
        else:  # what the trainer writes together cannot be tried again by one of them
            save()
        self.team.lead(lambda: self.disk.insist(what, lambda: self._finish(partial, folder)))

    def _finish(self, partial: Path, folder: Path) -> None:
        self.complete(partial)
        if self.recipe.policy.lora is None:
            replace_folder(partial, folder)
            return
        merged = _partial(folder.with_name(f"{folder.name}.merged"))
        shutil.rmtree(merged, ignore_errors=True)
        load_policy(partial).save(merged)
        replace_folder(merged, folder)
        shutil.rmtree(partial)

    def _write_base(self) -> None:
        partial = _partial(self.run.base_dir)
        shutil.rmtree(partial, ignore_errors=True)
        self.policy.save(partial)
        replace_folder(partial, self.run.base_dir)


def _partial(folder: Path) -> Path:
    """Where a folder is written before it is complete."""
    return folder.with_name(f".{folder.name}{PARTIAL}")


def newest_whole_checkpoint(run: RunDirectory) -> Path | None:
    """The newest checkpoint that is as it was written, and of use; damaged newer ones are moved aside and told of."""
    folders, base = checkpoint_folders(run.root), run.notes().get("base_policy")
    weights = weight_shapes(Path(base)) if base is not None and Path(base).is_dir() else {}
    for step, folder in reversed(folders.items()):
        damage = find_damage(folder, step, weights)
        if damage is None:
            return folder
        aside = set_aside(folder, f"{DAMAGED}{folder.name}")
        what = f"the checkpoint of step {step} is damaged: {damage}"
        run.tell(f"{what}; moved to {aside} (it can be deleted), trying the one before")
    if folders:
        run.tell("no checkpoint is whole, so the run starts from the start")
    return None


def write_manifest(folder: Path) -> None:
    """List all files of a folder, those in folders inside it too, as they are now.

    Raises:
        UserError: a file cannot be read, or the list not be written.
    """
    with writable(folder / MANIFEST):
        files = {
            path.relative_to(folder).as_posix(): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()
        }
    files.pop(MANIFEST, None)
    write_json(folder / MANIFEST, {"files": files})


def find_damage(folder: Path, step: int, weights: Mapping[str, tuple[int, ...]] | None = None) -> str | None:
    """What is wrong with the checkpoint of `step` in a few words, None when it is whole.

    A checkpoint without a manifest comes from a version that wrote none: its files must be there and readable. Whatever
    the manifest says, the trainer's own files must be what a trainer wrote after that step.

    Args:
        weights: names and shapes of what the run started from, where they are known.

    Raises:
        UserError: a file may not be read, which says nothing about the checkpoint.
    """
    try:
        listed = (folder / MANIFEST).exists()
        damage = _compare(folder) if listed else _look_through(folder)
        return damage or _wrong_step(folder, step) or _unusable(folder, step, weights or {})
    except PermissionError as error:
        raise UserError(f"cannot read the checkpoint {folder}: {reason(error)}") from error
    except OSError as error:  # a bad sector for instance
        return f"{Path(error.filename).name if error.filename else 'a file'}: {reason(error)}"


def _compare(folder: Path) -> str | None:
    try:
        files = read_json(folder / MANIFEST).get("files")
    except UserError:
        files = None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        return f"{MANIFEST} is unreadable"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.get("bytes"):
            return f"{name} has {path.stat().st_size} bytes instead of {entry.get('bytes')}"
    for name, entry in files.items():
        if _digest(folder / name) != entry:
            return f"{name} is not what was written"
    return None


def _look_through(folder: Path) -> str | None:
    for name in NEEDED:
        if not (folder / name).is_file():
            return f"{name} is missing"
    for path in sorted(folder.rglob("*")):
        if not _is_readable(path):
            return f"{path.relative_to(folder)} is cut off or damaged"
    return None


def _is_readable(path: Path) -> bool:
    """Whether a file of tensors or of JSON is whole; other files are taken to be."""
    try:
        with readable(path):
            check_regular(path)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # compares the header with the length of the file
                return True
        if path.suffix == ".json":
            return isinstance(json.loads(read_text(path)), dict)
        if path.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(path) as archive:  # what torch.save writes, with a checksum for each part
                return archive.testzip() is None
    except (SafetensorError, zipfile.BadZipFile, EOFError, NotImplementedError, UserError, ValueError, RecursionError):
        return False
    return True


class TrainerFile(TypedDict, total=False):
    """What is read of trainer_state.json."""

    global_step: Required[int]
    epoch: float | None
    max_steps: int
    num_train_epochs: int
    train_batch_size: int | None
    log_history: list[dict[str, Any]]
    stateful_callbacks: dict[str, Any] | None


def _wrong_step(folder: Path, step: int) -> str | None:
    try:
        state = json.loads(read_text(folder / STATE))  # the trainer's own, where a norm may be NaN
        TrainerState(**check_shape(state, TrainerFile, STATE))
    except (UserError, ValueError, TypeError, RecursionError):  # TypeError of a key that it does not have
        return f"{STATE} is unreadable"
    return None if state["global_step"] == step else f"{STATE} is of step {state['global_step']}"


def _unusable(folder: Path, step: int, weights: Mapping[str, tuple[int, ...]]) -> str | None:
    """Which file holds something else than the trainer would go on from, however well its checksum agrees."""
    sharded = {path.name for path in folder.iterdir() if path.is_dir()} - {"tokenizer", "text_encoder"}
    for pattern in () if sharded else CHECKS:
        if not any(folder.glob(pattern)):
            return f"{pattern} is missing"
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors") and not _is_readable(path):
            return f"{path.relative_to(folder)} is unreadable"
    shapes = weight_shapes(folder)
    if shapes and weights and shapes != weights:
        return "model.safetensors holds other weights than those that the run started from"
    for name in (MEAN, REFERENCE):
        if shapes and not weight_shapes(folder, name).items() <= shapes.items():
            return f"{name} holds other weights than the policy"
    try:
        outline_policy(folder)
    except UserError as error:
        return f"it is no policy ({error})"
    for path, check in [(path, CHECKS[pattern]) for pattern in CHECKS for path in sorted(folder.glob(pattern))]:
        try:
            check_regular(path)
            with safe_globals():
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            good = check(state, step, set(shapes.values()))
        except Exception:  # of what is no such state torch makes nearly anything
            good = False
        if not good:
            return f"{path.name} holds no state of a trainer after step {step}"
    return None


def _is_optimizer(state: Any, step: int, shapes: Collection[tuple[int, ...]]) -> bool:
    """Whether there are groups of parameters with finite rates, and moments of the weights' own shapes."""
    listed = [index for group in state["param_groups"] for index in group["params"]]
    rates = [float(group["lr"]) for group in state["param_groups"]]
    moments = [one["exp_avg"] for one in state["state"].values() if "exp_avg" in one]
    fit = not shapes or all(tuple(moment.shape) in shapes for moment in moments)
    return bool(listed) and set(state["state"]) <= set(listed) and all(map(math.isfinite, rates)) and fit


def _is_scheduler(state: Any, step: int, shapes: Collection[tuple[int, ...]]) -> bool:
    last, rates = state["last_epoch"], state["base_lrs"]  # of several processes it may count each one's steps
    return type(last) is int and last >= step and not last % max(1, step) and all(map(math.isfinite, rates))


def _is_random(state: Any, step: int, shapes: Collection[tuple[int, ...]]) -> bool:
    """Whether generators of all kinds, which nobody uses, take their states."""
    random.Random().setstate(state["python"])
    np.random.RandomState().set_state(state["numpy"])
    torch.Generator().set_state(state["cpu"])
    return True


CHECKS = {"optimizer.pt": _is_optimizer, "scheduler.pt": _is_scheduler, "rng_state*.pth": _is_random}


def _digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
