"""The policies that a run writes: what it starts from, every checkpoint, what comes out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from transformers.trainer import TRAINING_ARGS_NAME

from argrpo_cli.policy import load_policy
from argrpo_cli.policy.adapters import mark_adapter
from argrpo_cli.policy.folder import BUNDLED_POLICIES, CARD, POLICIES
from argrpo_cli.runs.folders import replace_folder
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import cannot_write

if TYPE_CHECKING:
    from argrpo_cli.policy import Policy
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.runs.disk import Disk
    from argrpo_cli.runs.run import RunDirectory
    from argrpo_cli.system.processes import Team
    from argrpo_cli.training.grpo import ImageGRPOTrainer


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
            mark_adapter(folder, CARD, chosen if chosen in (*BUNDLED_POLICIES, *POLICIES) else noted)

    def trained(self, trainer: ImageGRPOTrainer, folder: Path) -> None:
        """The policy as it is now, adapters merged into its weights; all processes must call it.

        Raises:
            UserError: it cannot be written.
        """
        what = f"{folder.name}/"
        if self.team.count == 1:
            self.disk.insist(what, lambda: self._write_trained(trainer, folder, lambda finish: finish()))
        else:  # what the trainer writes together cannot be tried again by one of them
            self._write_trained(trainer, folder, lambda finish: self.disk.insist(what, finish))

    def _write_trained(
        self, trainer: ImageGRPOTrainer, folder: Path, finishing: Callable[[Callable[[], None]], object]
    ) -> None:
        partial = _partial(folder)
        self.team.lead(lambda: shutil.rmtree(partial, ignore_errors=True))
        try:
            trainer.save_model(str(partial))  # gathers parameters that are shared out
        except OSError as error:
            raise cannot_write(folder, error) from error
        except SafetensorError as error:  # carries the system's reason in its text
            raise UserError(f"cannot write {folder}: {error}") from error
        self.team.lead(lambda: finishing(lambda: self._finish(partial, folder)))

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
    return folder.with_name(f".{folder.name}.partial")
