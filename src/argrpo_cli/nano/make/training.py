"""What the trainers of the nano world share: the loop, half-precision saving, a small command line."""

from __future__ import annotations

import argparse
import copy
import inspect
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from argrpo_cli.system.files import WEIGHTS

TASKS = ("classes", "captions")


def cosine_with_warmup(warmup: int, steps: int) -> Callable[[int], float]:
    """Factor on the learning rate: linear from 0 to 1 over `warmup` steps, then half a cosine down to 0 at `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return factor


def decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict]:
    """Optimiser groups: matrices and kernels decay, biases, gains and other vectors do not."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def fit(
    network: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    steps: int,
    lesson: Callable[[int], Tensor],
    report: Callable[[int, float], None],
    every: int = 200,
    warmup: int = 100,
    horizon: int | None = None,
    max_grad_norm: float = 1.0,
) -> None:
    """Take `steps` steps down the gradients of `lesson(step)`, clipped to a norm, and leave `network` in eval mode.

    `report(steps done, loss)` is called every so many steps, and at the end, with the network in eval mode.
    The learning rate follows `cosine_with_warmup(warmup, horizon)`; the horizon is `steps` unless given.
    """
    curve = cosine_with_warmup(warmup, horizon or steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, curve) for one in optimizers]
    network.train()
    for step in range(steps):
        loss = lesson(step)
        network.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm)
        for one in (*optimizers, *schedules):
            one.step()
        if step % every == every - 1 or step == steps - 1:
            network.eval()
            report(step + 1, loss.item())
            network.train()
    network.eval()


def save_half(model: PreTrainedModel, folder: str | Path) -> None:
    """Save a copy in float16 safetensors; the folder is replaced only once the new one is complete."""
    folder = Path(folder)
    fresh = folder.with_name(folder.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    half = copy.deepcopy(model).to(torch.float16)
    half.save_pretrained(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def trainer_cli(train: Callable, name: str) -> None:
    """`python -m argrpo_cli.nano.train_x [OUT] [--seed] [--steps] [--weights]`."""
    parser = argparse.ArgumentParser(description=f"Train {name} of the nano world.")
    parser.add_argument("out", nargs="?", type=Path, help="folder to write (default: the package's own)")
    parser.add_argument("--seed", type=int, default=0)
    known = inspect.signature(train).parameters
    if "steps" in known:
        parser.add_argument("--steps", type=int)
    if "weights" in known:  # the tokenizer, the first of all, builds on none
        parser.add_argument("--weights", type=Path, help="folder of the earlier networks (default: the package's own)")
    if "task" in known:
        parser.add_argument("--task", choices=TASKS, help="what the scenes are scenes of (default: classes)")
    given = {k: v for k, v in vars(parser.parse_args()).items() if v is not None}
    out = given.pop("out", WEIGHTS / (f"{name}-t2i" if given.get("task") == "captions" else name))
    out.parent.mkdir(parents=True, exist_ok=True)
    train(out, log=lambda line: print(line, flush=True), **given)
