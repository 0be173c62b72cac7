"""Time and memory of a training step, by stage: `python -m argrpo_cli.bench train [RECIPE]`.

    python -m argrpo_cli.bench train nano/c2i
    python -m argrpo_cli.bench train nano/t2i --set grpo.batch_size=192 --micro-batch-sizes 96
    python -m argrpo_cli.bench train c2i_xl384 --micro-batch-sizes 4 8 16      (on a GPU)

Policies that have to be fetched are replaced by random weights of their geometry, and so is their image tokenizer:
time and memory do not depend on the values. Rewards are the recipe's own where they are bundled; others take no part,
`argrpo_cli.bench rewards` measures those. The reward then is the mean brightness, so that "reward" is the price of the
way to it.

Each way to train is one row: all weights as the recipe says, with recomputed activations, adapters (LoRA) alone, and
all weights without a reference model (no KL term), then also without guidance, each where the recipe has it, and that
in the other number format. Shares are of the first row's step; "cpu" is the processor time of all threads, which a busy
machine changes less.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from argrpo_cli.bench import parse
from argrpo_cli.bench.sampler import random_policy
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.llamagen.config import VQConfig, published_config
from argrpo_cli.policy.llamagen.policy import LlamaGen
from argrpo_cli.policy.llamagen.pretrained import VQModel
from argrpo_cli.policy.published import POLICIES
from argrpo_cli.recipe import Recipe, load_recipe
from argrpo_cli.rewards import load_rewards, reward_weights
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from argrpo_cli.training.conditions import run_conditions
from argrpo_cli.training.grpo import build_trainer, quiet_libraries
from argrpo_cli.training.launch import settle_dtype
from argrpo_cli.training.rollout import Rollout, Stopwatch
from argrpo_cli.training.scorer import BatchScorer

STAGES = ("rollout", "reward", "update")


class StageMeter(Stopwatch):
    """A stopwatch that waits for the GPU, and keeps the most memory that each stage took there."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.cuda = device.startswith("cuda")
        self.peak: dict[str, int] = defaultdict(int)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `name`; what comes after it, up to the next stage, is the update's memory."""
        self.mark("update")
        with super().measure(name):
            yield
            if self.cuda:
                torch.cuda.synchronize()
        self.mark(name)

    def mark(self, name: str) -> None:
        """The memory since the last mark belongs to `name`."""
        if self.cuda:
            torch.cuda.synchronize()
            self.peak[name] = max(self.peak[name], torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()


class StepTimes(TrainerCallback):
    """Seconds of every stage of every step."""

    def __init__(self, meter: StageMeter) -> None:
        self.meter, self.steps, self._start, self._cpu = meter, [], 0.0, 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start, self._cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.meter.mark("update")
        whole, times = time.perf_counter() - self._start, self.meter.take()
        times["rollout"] += times.pop("text", 0.0)
        self.steps.append(
            times | {"update": whole - sum(times.values()), "step": whole, "cpu": time.process_time() - self._cpu}
        )


class Brightness:
    """The cheapest reward there is."""

    names, family, scope = ("brightness",), {"brightness": "quality"}, {"brightness": "image"}
    tolerated = frozenset[str]()

    def look(self, images: Tensor, conditions: Sequence[Condition]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"brightness": images.float().mean((1, 2, 3))}, {}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a table."""
    more = [
        ("recipe", {"nargs": "?", "default": "nano/c2i"}),
        ("--steps", {"type": int, "default": 4, "help": "timed, after one that is not"}),
        ("--micro-batch-sizes", {"type": int, "nargs": "*", "help": "instead of the recipe's"}),
        ("--set", {"action": "append", "default": [], "metavar": "KEY=VALUE", "help": "change the recipe"}),
    ]
    options = parse("train", __doc__, arguments, more)
    recipe = settle_dtype(load_recipe(options.recipe, options.set), options.device)
    sizes = options.micro_batch_sizes or [recipe.grpo.micro_batch_size or recipe.grpo.batch_size]
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        base = _base(recipe, Path(folder) / "base")
        print(
            f"{recipe.name}: {recipe.grpo.batch_size} images an update, {recipe.policy.dtype}, "
            f"logprob {recipe.grpo.logprob}, median of {options.steps}"
        )
        print(
            f"{'':38}{'rollout':>10}{'reward':>10}{'update':>10}{'step':>10}{'cpu':>10}{'images/s':>10}{'share':>8}"
            "  peak memory"
        )
        first = None
        for size in sizes:
            for name, changed in _ways(recipe, base, size).items():
                seconds, peak = measure_steps(changed, options.steps, options.device, Path(folder) / "trainer")
                first = first or seconds["step"]
                cells = "".join(f"{seconds[stage]:8.2f} s" for stage in (*STAGES, "step", "cpu"))
                memory = ", ".join(f"{stage} {peak[stage] / 2**30:.1f}" for stage in STAGES if stage in peak)
                print(
                    f"{name + f', {size} at a time':38}{cells}{recipe.grpo.batch_size / seconds['step']:10.1f}"
                    f"{seconds['step'] / first:8.2f}  {memory + ' GiB' if memory else '-'}",
                    flush=True,
                )


def _ways(recipe: Recipe, base: str, micro_batch_size: int) -> dict[str, Recipe]:
    """The recipe as it is, and changed in one thing each."""
    tree = recipe.model_dump()
    tree["policy"] |= {"checkpoint": base, "trainable": "all", "lora": None}
    tree["grpo"]["micro_batch_size"] = micro_batch_size
    if not all(term.name.startswith("nano-") for term in recipe.rewards.terms):
        tree["rewards"]["terms"] = [{"name": "brightness"}]
    tree["start"] = None  # the update is measured, not what comes before
    changes = {
        "all weights": {},
        "recomputed activations": {"grpo": tree["grpo"] | {"gradient_checkpointing": True}},
        "LoRA": {"policy": tree["policy"] | {"lora": {"rank": 16, "alpha": 32.0}}},
    }
    plain: dict[str, Any] = {}
    if recipe.grpo.beta:
        changes["no reference model"] = plain = {"grpo": tree["grpo"] | {"beta": 0.0}}
    if recipe.sampling.cfg_scale > 1:
        changes["and no guidance"] = plain = plain | {"sampling": tree["sampling"] | {"cfg_scale": 1.0}}
    other = "float32" if recipe.policy.dtype == "bfloat16" else "bfloat16"
    changes[f"and in {other}"] = plain | {"policy": tree["policy"] | {"dtype": other}}
    return {name: Recipe.model_validate(tree | change) for name, change in changes.items()}


def _base(recipe: Recipe, folder: Path) -> str:
    """The policy of a recipe, or random weights of its geometry."""
    name = recipe.policy.checkpoint
    if name not in POLICIES:
        return name
    if not name.startswith("c2i"):
        raise UserError(f"{name}: only LlamaGen for classes is measured by name; give a policy folder")
    size, pixels = name.split("-")[1:3]
    policy = LlamaGen(
        random_policy(published_config(size.upper(), int(pixels)), torch.float32, "cpu"),
        VQModel(VQConfig()).eval(),
        None,
        [f"class {index}" for index in range(1000)],
        int(pixels),
        name,
    )
    policy.save(folder)
    return str(folder)


def measure_steps(recipe: Recipe, steps: int, device: str, scratch: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds of each stage of `steps` updates after a first one, and the bytes each took at most on a GPU."""
    recipe = recipe.model_copy(update={"grpo": recipe.grpo.model_copy(update={"steps": steps + 1, "warmup_steps": 0})})
    policy = load_policy(recipe.policy.checkpoint, device)
    meter = StageMeter(device)
    rollout = Rollout(recipe, run_conditions(recipe, policy), policy, meter)
    rewards, weights = Brightness(), {"brightness": 1.0}
    if recipe.rewards.terms[0].name != "brightness":
        options = {term.name: term.options for term in recipe.rewards.terms}
        rewards = load_rewards(list(options), device, options)
        rewards.mixed = recipe.policy.dtype == "bfloat16"
        weights = reward_weights(recipe.rewards, rewards.family)
    scorer = BatchScorer(rewards, weights, recipe.grpo.group_size, meter)
    times = StepTimes(meter)
    trainer = build_trainer(recipe, policy, rollout, scorer, scratch, [times])
    trainer.train()
    timed = times.steps[1:]
    return {name: statistics.median(step[name] for step in timed) for name in (*STAGES, "step", "cpu")}, dict(
        meter.peak
    )
