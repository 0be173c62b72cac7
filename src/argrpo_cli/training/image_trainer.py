"""A trainer beside TRL's: its batches are images that are drawn or fetched when an update begins, whatever the method.

Around it stands what stands around GRPO: its callbacks, checkpoints, display and processes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from argrpo_cli.seeds import of_training
from argrpo_cli.training.conditions import condition_order
from argrpo_cli.training.gathering import check_sharding
from argrpo_cli.training.grpo import lora_config, trainer_settings
from argrpo_cli.training.launch import check_alone, images_per_process

if TYPE_CHECKING:
    from argrpo_cli.policy import Policy
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.training.rollout import Rollout

Method = TypeVar("Method", bound="ImageTrainer")


class ImageTrainer(Trainer):
    """A method is a subclass with `update`, which gives the micro-batches of this process, and `compute_loss` of one.

    Args:
        rollout: reads conditions and draws images.
        base: the policy's model as it was, frozen and whole on every device; None where a method has no `compares`.

    Attributes:
        compares: with the policy as it was.
    """

    compares: ClassVar[bool] = True

    def __init__(self, *args: Any, rollout: Rollout, base: nn.Module | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.base = base
        self.model_accepts_loss_kwargs = False  # the mean of a micro-batch is divided by their number
        self.rollout = rollout
        self.sampling = replace(rollout.recipe.sampling, cfg_scale=1.0)  # what is trained
        self.share, self.micro = images_per_process(rollout.recipe, rollout.team.count)
        self._parts: list[Any] = []  # micro-batches of the update that are not trained on yet
        self._notes: dict[str, list[Tensor]] = {}

    def update(self) -> list[Any]:
        """This process's micro-batches of the update: the recipe and the number of updates done decide them."""
        raise NotImplementedError

    def slots(self) -> range:
        """The places of this process's images among all that the run looks at."""
        recipe, team = self.rollout.recipe, self.rollout.team
        first = self.state.global_step * recipe.optim.batch_size + team.index * self.share
        return range(first, first + self.share)

    def seeds(self) -> list[int]:
        """Of this process's images of the update."""
        first = self.rollout.team.index * self.share
        step, seed = self.state.global_step, self.rollout.recipe.seed
        return [of_training(seed, step, first + index) for index in range(self.share)]

    def order(self, count: int) -> list[int]:
        """Which of so many images the run looks at, in passes of a new permutation each."""
        recipe = self.rollout.recipe
        return condition_order([1.0] * count, recipe.optim.steps * recipe.optim.batch_size, recipe.seed)

    def parts(self) -> list[slice]:
        """Which of its images make each micro-batch."""
        return [slice(start, start + self.micro) for start in range(0, self.share, self.micro)]

    def note(self, **values: Tensor) -> None:
        """Remember what the log gets the means of, one number for each image; NaN where there is none."""
        for name, one in values.items():
            self._notes.setdefault(name, []).append(one.detach().flatten().cpu().double())

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The next micro-batch. What comes from the data set is not looked at."""
        if not self._parts:
            self._parts = self.update()
        return self._parts.pop(0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # not the trainer's summary at its end
            values = {name: torch.cat(parts) for name, parts in self._notes.items()}
            self._notes = {}
            if values:
                every = self.rollout.team.gather(torch.stack(list(values.values()), dim=1))
                logs |= dict(zip(values, every.nanmean(0).tolist(), strict=True))
        super().log(logs, start_time)


def build(
    kind: type[Method],
    recipe: Recipe,
    policy: Policy,
    rollout: Rollout,
    given: Any,
    output_dir: Path,
    callbacks: Sequence[TrainerCallback],
) -> Method:
    """The trainer of `policy.model`, in place; parameters that require no gradient stay as they are.

    Args:
        given: what `kind` takes beside.

    Raises:
        UserError: several GPUs without a launcher, or no layer of a LoRA target.
    """
    team, model = rollout.team, policy.model
    check_alone(team.count, model.device.type)
    base = copy.deepcopy(model).eval().requires_grad_(False) if kind.compares else None
    if recipe.policy.lora is not None:
        config = lora_config(recipe.policy.lora, policy)
        from peft import get_peft_model

        model = get_peft_model(model, config)
    settings = trainer_settings(recipe, output_dir, str(policy.model.device.type), team.count)
    batches = recipe.optim.steps * settings["gradient_accumulation_steps"] * team.count
    trainer = kind(
        model,
        TrainingArguments(**settings | {"per_device_train_batch_size": 1, "remove_unused_columns": False}),
        data_collator=lambda rows: {"rows": torch.tensor(rows)},
        train_dataset=range(batches),  # a row for each micro-batch, which is made and not read
        callbacks=list(callbacks),
        rollout=rollout,
        base=base,
        given=given,
    )
    trainer.remove_callback(PrinterCallback)
    check_sharding(trainer)
    return trainer
