"""How every network of the nano world learns: one loop over a lesson.

A lesson (`policies.py`, `rewards.py`, `judges.py`) is a function that prepares its material from a `Setting`, makes its
network and returns a `Lesson`: what to lose, how to measure, how to save. `learn` does the rest.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from argrpo_cli.nano.tokens import load_tokenizer
from argrpo_cli.networks.weights import save_model
from argrpo_cli.policy.llamagen.pretrained import VQModel
from argrpo_cli.system.files import WEIGHTS, atomic_path, make_dir


@dataclass
class Setting:
    """What a lesson is given.

    Attributes:
        name: of the network and of its folder.
        seed: decides the material, the network's first weights and the batches.
        weights: folder of the networks that this one builds on.
        log: takes a line of text.
        compiles: whether torch.compile is worth its minute; it needs a C++ compiler.
    """

    name: str
    seed: int = 0
    weights: Path = WEIGHTS
    log: Callable[[str], None] = print
    compiles: bool = False

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.generator = torch.Generator().manual_seed(self.seed)  # of the batches

    def say(self, line: str) -> None:
        """Log a line with the network's name and the time since the beginning."""
        self.log(f"{self.name}: {line}, {time.monotonic() - self.started:.0f} s")

    def rng(self, offset: int) -> np.random.Generator:
        """Numbers for one part of the material."""
        return np.random.default_rng(self.seed + offset)

    @cached_property
    def vq(self) -> VQModel:
        """The tokenizer among the earlier networks."""
        return load_tokenizer(self.weights / "nano-vq")

    def rows(self, count: int, of: int) -> Tensor:
        """`count` row numbers below `of`, int64, with repetition."""
        return torch.randint(of, (count,), generator=self.generator)


@dataclass
class Lesson:
    """A network with all that its training needs.

    Attributes:
        loss: of a batch, by the number of the step: a number, or a vector of the parts that it is the sum of.
        measure: what the network, in evaluation mode, does on material that it does not learn from, in words.
        save: writes the network into a folder.
        every: steps between measurements.
        warmup, horizon: of the learning rate, see `cosine_with_warmup`; the horizon is `steps` unless given.
        max_grad_norm: gradients are clipped to it.
        kept: at every measurement all that it takes to go on is written down, and `learn` goes on from there. The loss
            of such a lesson draws from `Setting.generator` alone.
    """

    network: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    loss: Callable[[int], Tensor]
    measure: Callable[[], str]
    save: Callable[[Path], None]
    steps: int
    every: int = 200
    warmup: int = 100
    horizon: int | None = None
    max_grad_norm: float = 1.0
    kept: bool = False


def learn(
    make_lesson: Callable[[Setting], Lesson], folder: str | Path, setting: Setting, steps: int | None = None
) -> nn.Module:
    """Train a network from the setting's seed, save it in `folder` and return it, in evaluation mode.

    Takes `steps` steps, by default the lesson's own number, down the gradients of its loss. Every so many, and at the
    end, what `measure` says is logged.

    Raises:
        RuntimeError: the loss is no number any more.
    """
    torch.manual_seed(setting.seed)
    lesson = make_lesson(setting)
    network, optimizers = lesson.network.train(), lesson.optimizers
    steps = lesson.steps if steps is None else steps
    curve = cosine_with_warmup(lesson.warmup, lesson.horizon or steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, curve) for one in optimizers]
    stateful = {"network": network} | {
        f"{kind}{i}": one
        for kind, some in (("optimizer", optimizers), ("schedule", schedules))
        for i, one in enumerate(some)
    }
    first, progress = 0, Path(folder) / "progress.pt"
    if lesson.kept and progress.is_file():
        state = torch.load(progress, weights_only=True)
        first = state["step"]
        setting.generator.set_state(state["generator"])
        for name, one in stateful.items():
            one.load_state_dict(state[name])
        setting.say(f"goes on after step {first}")
    for step in range(first, steps):
        loss = lesson.loss(step)
        network.zero_grad(set_to_none=True)
        loss.sum().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), lesson.max_grad_norm)
        for one in (*optimizers, *schedules):
            one.step()
        if (step + 1) % lesson.every == 0 or step + 1 == steps:
            parts = " + ".join(f"{part:.3f}" for part in loss.flatten().tolist())
            if not loss.isfinite().all():
                raise RuntimeError(f"the loss is {parts} at step {step + 1}")
            network.eval()
            setting.say(f"step {step + 1}/{steps}, loss {parts}; unseen: {lesson.measure()}")
            network.train()
            if lesson.kept:
                state = {name: one.state_dict() for name, one in stateful.items()}
                state |= {"step": step + 1, "generator": setting.generator.get_state()}
                with atomic_path(make_dir(folder) / "progress.pt") as file:
                    torch.save(state, file)
    network.eval()
    lesson.save(Path(folder))
    progress.unlink(missing_ok=True)
    return network


def cosine_with_warmup(warmup: int, steps: int) -> Callable[[int], float]:
    """Factor on the learning rate: linear from 0 to 1 over `warmup` steps, then half a cosine down to 0 at `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return factor


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """Optimiser groups: matrices and kernels decay, biases, gains and other vectors do not."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def muon_and_adamw(
    parameters: Iterable[tuple[str, nn.Parameter]], layers: str, lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices with `layers` in their names, AdamW at rate `lr` for all else."""
    named = dict(parameters)
    matrices = {name: one for name, one in named.items() if layers in name and one.ndim == 2}
    others = [one for name, one in named.items() if name not in matrices]
    return [
        torch.optim.Muon(matrices.values(), lr=0.02, weight_decay=0.05),
        torch.optim.AdamW(decay_groups(others, 0.05), lr=lr, betas=(0.9, 0.95)),
    ]


def save_half(model: PreTrainedModel, folder: Path) -> None:
    """Save a copy in float16 safetensors."""
    save_model(copy.deepcopy(model).to(torch.float16), make_dir(folder))
