"""What test_together.py lets several processes do: whole runs, one after the other.

How each case ended here is written to FOLDER/<process>.json: "" for well, or what was raised.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import argrpo_cli.nano.judge  # noqa: F401 (before the forks)
from argrpo_cli.policy import tokens as shared
from argrpo_cli.policy.llamagen.policy import LlamaGen
from argrpo_cli.recipe import Recipe
from argrpo_cli.system.errors import UserError
from argrpo_cli.training import job, run_training
from tests.training.tiny import CODES, FakeRewards, brightness, redness, tiny_recipe

# A group in each micro-batch, and in each of two processes: what one process sees of the gradient, two see together.
COARSE = 60  # steps of a reward, so few that groups without spread occur
LEVELS = {"bright": 0.1, "red": 0.9}
PLAIN = {"batch_size": 16, "group_size": 8, "micro_batch_size": 8, "steps": 5, "save_every": 2, "grid_every": 2}


def process() -> int:
    """Which of the processes this is."""
    return int(os.environ.get("RANK", "0"))


def plain(folder: Path, out: Path) -> None:
    run_training(tiny_recipe(folder / "policy", **PLAIN), out, rewards=FakeRewards())


def straddling(folder: Path, out: Path) -> None:
    """One group on two processes, whose codes are compared, in micro-batches, two updates from a batch, images without
    a score, and groups that are drawn again for another condition because all score alike."""
    recipe = tiny_recipe(
        folder / "policy", batch_size=8, group_size=8, micro_batch_size=2, updates_per_batch=2, steps=4,
        condition_dropout=0.2, dynamic_sampling=4, spread_floor=0.5, scale_rewards="global", weights={"red": 0.0},
        tokens={"method": "stage"}, beta=0.1, beta_end=0.05, reference_decay=0.5, entropy_controller="reasongen",
        entropy_step=0.01, entropy_weight_max=0.05,
    )  # fmt: skip

    def some_missing(images: torch.Tensor) -> torch.Tensor:
        return brightness(images).mul(COARSE).round().masked_fill(redness(images) > 0.005, torch.nan)

    run_training(recipe, out, rewards=FakeRewards(bright=some_missing, red=redness))


def comparing(folder: Path, out: Path) -> None:
    """Rewards that compare a group, on two processes, or all images; one that remembers earlier updates, and one that
    reads the policy. Two processes stop on the way and go on."""
    keys = {"batch_size": 16, "group_size": 8, "micro_batch_size": 4, "save_every": 2, "beta": 0.05}
    keys |= {"aggregation": "normalize_then_sum", "scale_rewards": "none", "grid_every": 2}
    recipe = tiny_recipe(folder / "policy", **keys).model_dump()
    nano = {"features": "nano"}
    recipe["rewards"]["terms"] = [
        {"name": "stage-entropy", "weight": 0.4},
        {"name": "loo-fid", "weight": 2.0, "options": {**nano, "decay": 0.5}},
        {"name": "nano-quality"},
        {"name": "clusters", "options": {**nano, "clusters": 3}},
    ]
    for steps in (2, 4) if "RANK" in os.environ else (4,):
        recipe["grpo"]["steps"] = steps
        run_training(Recipe.model_validate(recipe), out, resume=out.exists())


def level(folder: Path, out: Path) -> None:
    """A reward that tells nothing apart, for a group on two processes."""
    recipe = tiny_recipe(folder / "policy", batch_size=8, group_size=8, micro_batch_size=2, steps=2, beta=0.0)
    both = {name: lambda images, value=value: torch.full((len(images),), value) for name, value in LEVELS.items()}
    run_training(recipe, out, rewards=FakeRewards(**both))


def captions(folder: Path, out: Path) -> None:
    """Captions that each process has for itself, guided log-probabilities, logits that are computed again, and a
    distillation before."""
    shared.LOGITS_AT_ONCE, whole = 9 * CODES, shared.LOGITS_AT_ONCE
    asked = {"source": "captions", "captions": ["a dog", "a red cat", "a blue dog", "a cat"]}
    recipe = tiny_recipe(folder / "captions", conditions=asked, logprob="guided", micro_batch_size=2, steps=3)
    keys = {"batch_size": 8, "micro_batch_size": 2, "steps": 3, "learning_rate": 1e-3, "cfg_scale": [2.0, 5.0]}
    recipe = Recipe.model_validate({**recipe.model_dump(), "start": {"distil": {**keys, "beta": 0.5, "lmbda": 0.2}}})
    job.SCALE_IMAGES = 8
    out = folder / "run_of_captions"
    run_training(recipe, out, rewards=FakeRewards())
    shared.LOGITS_AT_ONCE = whole


def stopped(folder: Path, out: Path) -> None:
    """A signal reaches one process of the two."""
    rewards = FakeRewards()
    rewards.on_batch = lambda batch: os.kill(os.getpid(), signal.SIGTERM) if batch == 3 and process() == 1 else None
    run_training(tiny_recipe(folder / "policy", **PLAIN), out, rewards=rewards)


def resumed(folder: Path, out: Path) -> None:
    run_training(tiny_recipe(folder / "policy", **PLAIN), folder / "stopped", resume=True, rewards=FakeRewards())


def failing(folder: Path, out: Path) -> None:
    """A reward that one process cannot ask."""

    def asked(batch: int) -> None:
        if batch == 2 and process() == 1:
            raise UserError("the judge is out")

    rewards = FakeRewards()
    rewards.on_batch = asked
    run_training(tiny_recipe(folder / "policy", **PLAIN), out, rewards=rewards)


def refused(folder: Path, out: Path) -> None:
    """A fault that the second process alone finds before training."""
    name = "policy" if process() == 0 else "nothing"
    run_training(tiny_recipe(folder / name, **PLAIN), out, rewards=FakeRewards())


def moving(folder: Path, out: Path) -> None:
    """A reference that follows weights which are nowhere whole, where they are shared out."""
    run_training(tiny_recipe(folder / "policy", **PLAIN, reference_decay=0.5), out, rewards=FakeRewards())


def broken(folder: Path, out: Path) -> None:
    """The sampler of one process finds weights that are not numbers."""
    draw = LlamaGen.sample

    def complain(*args: Any, **options: Any) -> Any:
        raise UserError("the logits are not numbers")

    LlamaGen.sample = complain if process() == 1 else draw
    try:
        run_training(tiny_recipe(folder / "policy", **PLAIN), out, rewards=FakeRewards())
    finally:
        LlamaGen.sample = draw


CASES: dict[str, Callable[[Path, Path], None]] = {
    one.__name__: one
    for one in (plain, straddling, comparing, level, captions, stopped, resumed, failing, refused, moving, broken)
}


def accelerate_shards_on_cpus() -> None:
    """accelerate turns FSDP on for GPUs only; torch has it on CPUs too, and this lets a test use it there."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    begin = PartialState.__init__

    def begin_as_gpu(self: PartialState, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin_as_gpu


def main(folder: Path, cases: Sequence[str], environment: Mapping[str, str]) -> int:
    os.environ |= environment
    job.refresh_report = lambda *args, **keys: None  # which takes its time
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        accelerate_shards_on_cpus()
    ends = {}
    for name in cases:
        try:
            CASES[name](folder, folder / name)
            ends[name] = ""
        except (UserError, SystemExit) as error:
            ends[name] = f"{type(error).__name__} {error}"
    (folder / f"{process()}.json").write_text(json.dumps(ends))
    return 0
