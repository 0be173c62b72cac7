"""An exponential moving average of the trained weights: what the run's noise averages out to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from argrpo_cli.system.processes import ALONE, Team

FILE = "ema.safetensors"  # in a checkpoint


class EmaCallback(TrainerCallback):
    """After each update, mean <- decay mean + (1 - decay) weights, in float32, for the weights that are trained.

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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.mean = {name: weight.detach().float().clone() for name, weight in _trained(kwargs["model"]).items()}
        if self.checkpoint is None:
            return
        file = self.checkpoint / FILE
        if not file.is_file():
            self.team.fail(f"{self.checkpoint} has no {FILE}: the run was started without grpo.ema_decay")
        for name, saved in load_file(file).items():
            self.mean[name].copy_(saved)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        weights = _trained(kwargs["model"])
        with torch.no_grad():
            self._average(list(self.mean.values()), [weights[name].float() for name in self.mean], state.global_step)

    def save(self, folder: Path) -> None:
        """Add the mean to a checkpoint."""
        save_file({name: value.cpu() for name, value in self.mean.items()}, folder / FILE)

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Within this context the model's trained weights are the mean."""
        weights = _trained(model)
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(self.mean[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(kept[name])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
