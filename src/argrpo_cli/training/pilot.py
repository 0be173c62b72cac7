"""`argrpo train RECIPE --pilot`: some minutes that measure what a run would meet, and a proposal made of it.

The run's own trainer draws, scores and differentiates, and its weights stay as they are: the gradients of all updates
are added up instead, and so are of the policy that the run would start from, and compared with each other.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from argrpo_cli.recipe import load_recipe
from argrpo_cli.recipe.text import write_yaml
from argrpo_cli.runs.curves import STAGES, Record
from argrpo_cli.runs.learning import ERRORS, SATURATED, estimate
from argrpo_cli.runs.run import PILOT_FILE, PILOT_SCRATCH, START, Interrupted, RunDirectory, duration
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import write_text
from argrpo_cli.system.processes import join_team, peak_memory
from argrpo_cli.training.launch import settle_dtype
from argrpo_cli.training.saving import trained_weights
from argrpo_cli.training.train import PATIENCE, run_training, state

if TYPE_CHECKING:
    from rich.console import Console

    from argrpo_cli.recipe import Recipe
    from argrpo_cli.rewards import RewardSet
    from argrpo_cli.training.job import Job

ENOUGH = 4  # updates below which there is no error of anything
MOST_UPDATES = 2000  # should the minutes be many
LEAST_UPDATES = 100  # that a proposal leaves of the images of the recipe: fewer cannot bend with the policy
FEW = 3.0  # noise scales, of images, with which a run can be expected to learn something
MOST_GAIN = 3.0  # deviations that a KL term should leave room for: more than runs reach
NO_CLIPPING = 1e30  # a norm: gradients are compared as they are


class Stillness(TrainerCallback):
    """Adds up the gradients of all updates and takes them away before the optimiser sees them: it then does nothing."""

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}
        self.updates = 0

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for name, weight in trained_weights(kwargs["model"]).items():
            if weight.grad is not None:
                self.total[name] = self.total[name] + weight.grad if name in self.total else weight.grad
                weight.grad = None
        self.updates += 1

    def square(self) -> float:
        """|mean gradient|² over all updates."""
        norms = [torch.linalg.vector_norm(one.float()) for one in self.total.values()]
        return sum(norm.item() ** 2 for norm in norms) / self.updates**2


@dataclass(frozen=True)
class Measured:
    """What a pilot found, of the policy that the run would start from.

    Attributes:
        updates, images: how many were measured, and images in all.
        signal, error, noise: |G|² and its standard error, and S, see `learning.NoiseScale`; None where one update has
            one block of images.
        reward, spread: mean total reward, and its mean standard deviation within groups.
        effective: share of groups with spread.
        advantages: standard deviation of the advantages.
        tokens: T, of an image.
        seconds: of an update, by stage.
        memory: bytes at the worst moment, of the GPU or of this process.
    """

    updates: int
    images: int
    signal: float | None
    error: float | None
    noise: float | None
    reward: float
    spread: float
    effective: float
    advantages: float
    tokens: int
    seconds: Mapping[str, float]
    memory: int

    @property
    def noise_scale(self) -> float | None:
        """In images; None when the signal is not above its error."""
        return self.noise / self.signal if self.signal is not None and self.signal > ERRORS * self.error else None

    @property
    def noise_scale_least(self) -> float | None:
        """What it is at least."""
        return None if self.signal is None else self.noise / (max(0.0, self.signal) + ERRORS * self.error)

    @property
    def noise_words(self) -> str:
        """The noise scale with its error, or what else is known of it."""
        if self.signal is None:
            return "not known"
        scale = self.noise_scale
        if scale is None:
            return f"{self.noise_scale_least:,.0f} images at least"
        return f"{scale:,.0f} ± {scale * self.error / self.signal:,.0f} images"


def run_pilot(
    recipe: Recipe,
    parent: Path,
    folder: Path,
    minutes: float,
    *,
    rewards: RewardSet | None = None,
    console: Console | None = None,
) -> Path:
    """Measure for some minutes what a run of the recipe would meet, print it, and write a proposal.

    The first signal ends the measuring after the update in progress and still proposes, the second ends at once.

    Args:
        recipe: that of the run. Where it has a start, GRPO is measured from what came out of that, see `after_start`.
        parent: the file of that recipe, which the proposal extends.
        folder: for the proposal, see `runs.run.clear_for_pilot`.
        rewards, console: as in `run_training`.

    Returns:
        The proposal, a recipe.

    Raises:
        UserError: the recipe cannot be run, or too little was measured.
        Interrupted: a signal came.
    """

    recipe = after_start(recipe, folder, rewards, console)

    def work(job: Job, resume: bool) -> None:
        found = _measure(job)
        if job.team.first:
            changes, reasons = propose(recipe, found)
            show(recipe, found, reasons, job.display.console)
            path = write_proposal(folder, parent, recipe, changes, reasons, found)
            job.display.note(f"proposal   {path}")
            job.display.note(f"train it   argrpo train {path}")
        if job.request.signal is not None:
            raise Interrupted(job.request.exit_code)

    scratch = folder / PILOT_SCRATCH
    try:
        own = pilot_recipe(recipe, minutes, int(os.environ.get("WORLD_SIZE", "1")))
        run_training(own, scratch, rewards=rewards, console=console, work=work)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return folder / PILOT_FILE


def after_start(recipe: Recipe, folder: Path, rewards: RewardSet | None, console: Console | None) -> Recipe:
    """The recipe without its start, from the policy with which that ends.

    Where the run has been through this very start, that is its result. Else the start is run now, as a run of its own
    in `folder`/start, which is resumed if a signal ended it and serves further pilots.

    Raises:
        UserError: `folder` holds the start of another recipe.
    """
    if recipe.start is None:
        return recipe
    team = join_team(recipe.policy.device, PATIENCE)
    first = settle_dtype(recipe.start, team.device)

    def find() -> tuple[Path, bool, bool]:
        """Where the start is, whether it was begun, whether it is at its end."""
        for root in (recipe.run_dir / START, folder / START):
            finished, begun = state(root)
            same = begun and load_recipe(RunDirectory(root).recipe_file) == first
            if same and finished:
                break
        if begun and not same:
            raise UserError(f"--pilot: {root} is the start of another recipe; choose another folder with --out")
        return root, begun, finished

    root, begun, finished = team.from_lead(find)
    if not finished:
        run_training(first, root, resume=begun, rewards=rewards, console=console)
    policy = recipe.policy.model_copy(update={"checkpoint": str(RunDirectory(root).policy_dir)})
    return recipe.model_copy(update={"start": None, "policy": policy})


def _measure(job: Job) -> Measured:
    still = Stillness()
    metrics = job.rehearse(still)
    block, memory = metrics.gradient_meter.block, peak_memory(str(job.policy.model.device))
    return measure(metrics.records, still, block, job.recipe.grpo.batch_size, job.policy.card.tokens, memory)


def pilot_recipe(recipe: Recipe, minutes: float, processes: int = 1) -> Recipe:
    """The recipe whose run is the pilot: the same update in parts of whole groups, without clipping, once per batch."""
    grpo = recipe.grpo
    share, sizes = grpo.batch_size // processes, []
    if share % grpo.group_size == 0:  # else there are no parts of whole groups
        sizes = [
            n for n in range(grpo.group_size, share + 1, grpo.group_size) if share % n == 0 and n < grpo.batch_size
        ]
    fitting = [n for n in sizes if n <= (grpo.micro_batch_size or share)]
    micro = max(fitting, default=grpo.micro_batch_size)
    changes = {
        "micro_batch_size": micro, "updates_per_batch": 1, "max_grad_norm": NO_CLIPPING, "warmup_steps": 0,
        "schedule": "constant", "ema_decay": 0.0, "steps": MOST_UPDATES, "time_limit_minutes": minutes,
    }  # fmt: skip
    logging = {"trackers": [], "transfer_images": 0, "keep_steps": []}
    return recipe.model_copy(
        update={
            "grpo": grpo.model_copy(update=changes),
            "logging": recipe.logging.model_copy(update=logging),
            "start": None,
        }
    )


def measure(
    records: Sequence[Record], still: Stillness, block: int, batch_size: int, tokens: int, memory: int
) -> Measured:
    """What the records of a pilot and the sum of its gradients amount to.

    |G|² is the mean product of the gradients of two blocks, now of any two of the pilot, so the error falls with the
    number of updates, not with its root. How much products of blocks scatter is seen within the updates: their
    `gradient_signal` is a mean of m (m - 1) products, that of all u updates of u m (u m - 1). That is the scatter of
    noise times noise, 2 tr(Σ²) / images² with S = tr(Σ); of noise times signal it is 4 G'ΣG / images, taken as
    4 |G|² tr(Σ²) / S / images, which makes the error's square larger by 1 + 2 images |G|² / S.

    Args:
        block: images of a block (`GradientMeter`), of which an update of `batch_size` has m.

    Raises:
        UserError: too few updates with rewards.
    """
    scored = [one for one in records if one.get("reward") is not None]
    if len(scored) < ENOUGH:
        raise UserError(
            f"--pilot: {len(scored)} updates were measured, and {ENOUGH} are the least; give it more --minutes"
        )

    def mean(key: str) -> float:
        return float(np.mean([one[key] for one in scored if one.get(key) is not None]))

    signal = error = noise = None
    parts = [(one["gradient_signal"], one["gradient_noise"]) for one in scored if one["gradient_signal"] is not None]
    if len(parts) >= ENOUGH:
        m, u = batch_size / block, still.updates
        small = float(np.mean([signal + noise / block for signal, noise in parts]))
        signal, noise = estimate(small, still.square(), block, u * batch_size)
        scatter = float(np.std([one for one, _ in parts], ddof=1))
        error = scatter * math.sqrt(m * (m - 1) / (u * m * (u * m - 1)))
        error *= math.sqrt(1 + 2 * u * batch_size * max(0.0, signal / noise)) if noise > 0 else 1
    return Measured(
        len(scored),
        len(scored) * batch_size,
        signal,
        error,
        noise,
        mean("reward"),
        mean("within_group_std"),
        1 - mean("groups_without_spread"),
        mean("advantage_std"),
        tokens,
        {stage: mean(f"seconds_{stage}") for stage in STAGES},
        memory,
    )


def propose(recipe: Recipe, found: Measured) -> tuple[dict[str, Any], list[str]]:
    """Keys of `grpo` to change, and the reasons for all three of batch size, learning rate and beta.

    The rules, which hold where most of an update is noise:

    - An update of AdamW has the length of the learning rate whatever its gradient, and its part along the true gradient
      is sqrt(B / N), N being the noise scale. So over n updates gain ~ lr n sqrt(B / N), and the KL, that of a random
      walk, ~ lr² n. For one number of images n B, with lr ~ sqrt(B), neither depends on B: what counts is that the
      images are many against N, and that B does not pass it, from where on images are wasted.
    - Batch size: towards N (or what it is at least), in whole groups, never below the recipe's, and only so far that
      the recipe's number of images still makes `LEAST_UPDATES` updates. The number of updates follows.
    - Learning rate: the recipe's times the root of the ratio of batch sizes.
    - Beta: the loss weighs a gain of sqrt(2 KL) deviations, a each (that of the advantages), against beta KL: the
      reward's ideal policy is at KL = (a / beta)² / 2 nats an image with a gain of a / beta deviations. Where
      `guards.kl` stops before, the term holds nothing back and is left out, with its reference policy; where that gain
      is below `MOST_GAIN`, beta is lowered to it.
    - Said and not proposed: too few images against N, or too few groups with spread.
    """
    grpo, changes, reasons = recipe.grpo, {}, []
    scale, least = found.noise_scale, found.noise_scale_least
    images, unit = grpo.steps * grpo.batch_size, math.lcm(grpo.group_size, grpo.micro_batch_size or 1)
    size = grpo.batch_size
    if least is not None:
        aim = min(scale or least, images / LEAST_UPDATES)
        size = max(size, round(aim / unit) * unit)
    reasons.append(f"batch_size {size}: the noise scale is {found.noise_words}, and the run has {images:,} images")
    if size != grpo.batch_size:
        steps = max(1, round(images / size / grpo.updates_per_batch)) * grpo.updates_per_batch
        rate = float(f"{grpo.learning_rate * math.sqrt(size / grpo.batch_size):.2g}")
        changes |= {"batch_size": size, "steps": steps, "learning_rate": rate}
        changes |= {"warmup_steps": min(grpo.warmup_steps, steps)} if grpo.warmup_steps > steps else {}
        reasons.append(f"steps {steps}: the same number of images")
        reasons.append(
            f"learning_rate {rate:g}: {grpo.learning_rate:g} times the root of {size}/{grpo.batch_size}, which for one "
            "number of images leaves gain and KL as they are"
        )
    else:
        reasons.append(f"learning_rate {grpo.learning_rate:g}: as it is, since the batch is")
    beta, reason = _beta(recipe, found)
    changes |= {"beta": beta} if beta != grpo.beta else {}
    reasons.append(f"beta {beta:g}: {reason}")
    if images < FEW * (scale or least or 0):
        reasons.append(
            f"not proposed, to be thought of: {images:,} images are few against the noise scale; more steps, or a "
            "reward with less noise"
        )
    if found.effective < SATURATED:
        reasons.append(
            f"not proposed, to be thought of: {found.effective:.0%} of the groups have spread; larger groups, other "
            "conditions or a finer reward would teach more"
        )
    return changes, reasons


def _beta(recipe: Recipe, found: Measured) -> tuple[float, str]:
    """Beta, and why; see `propose`."""
    beta = recipe.grpo.beta
    if not beta:
        return beta, "as it is; guards.kl looks at the KL to the start every logging.grid_every updates"
    gain = found.advantages / beta
    held, limit = gain**2 / 2, recipe.guards.kl.limit * found.tokens
    ends = f"{beta:g} ends at {held:.3g} nats an image and a gain of {gain:.2g} deviations"
    if recipe.guards.kl.action == "stop" and held > limit:
        return 0.0, f"{ends}, and guards.kl stops at {limit:.3g} nats: it holds nothing and costs a reference policy"
    if gain < MOST_GAIN:
        return float(f"{found.advantages / MOST_GAIN:.1g}"), f"{ends}; this leaves room for {MOST_GAIN:g}"
    return beta, f"as it is; {ends}"


def write_proposal(
    folder: Path, parent: Path, given: Recipe, changes: Mapping[str, Any], reasons: Sequence[str], found: Measured
) -> Path:
    """pilot.yaml: what it extends, the keys that `given` has otherwise than that (by --set), and the proposal.

    Returns:
        Its path. It is written atomically, in the place of an earlier pilot's.
    """
    base = load_recipe(parent, tell=lambda line: None)  # which the start of the pilot has told
    tree: dict[str, Any] = _differences(base.model_dump(mode="json"), given.model_dump(mode="json"))
    for key in ("name", "description", "out", "published"):
        tree.pop(key, None)
    tree = {"extends": str(parent.resolve()), "name": f"{given.name}-pilot", **tree}
    tree["grpo"] = tree.get("grpo", {}) | dict(changes)
    if not tree["grpo"]:
        del tree["grpo"]
    head = [
        f"Proposed by a pilot of {found.updates} updates, {found.images} images, of which no weight was changed.",
        *reasons,
    ]
    text = "".join(f"# {line}\n" for line in head) + "\n" + write_yaml(tree)
    write_text(folder / PILOT_FILE, text)
    return folder / PILOT_FILE


def _differences(base: Any, other: Any) -> Any:
    """The keys that `other` has otherwise."""
    return {
        key: _differences(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in other.items()
        if base.get(key) != value
    }


def show(recipe: Recipe, found: Measured, reasons: Sequence[str], console: Console) -> None:
    """Print what was found, and what is proposed and why."""
    from rich.table import Table

    def speed(stage: str) -> str:
        taken = found.seconds[stage]
        return f"{taken:.2f} s an update, {recipe.grpo.batch_size / taken:.1f} images/s"

    whole = sum(found.seconds.values())
    rows = [
        ("measured", f"{found.updates} updates of {recipe.grpo.batch_size} images"),
        ("gradient noise scale", found.noise_words),
        ("reward, mean", f"{found.reward:.4g}"),
        ("its deviation within groups", f"{found.spread:.4g}"),
        ("groups with spread", f"{found.effective:.0%}"),
        *((stage, speed(stage)) for stage in STAGES if found.seconds[stage] > 1e-3),
        ("memory", f"{found.memory / 1e9:.2f} GB"),
        (f"{recipe.grpo.steps} updates as given", f"about {duration(recipe.grpo.steps * whole)}"),
    ]
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for reason in reasons:
        console.print(reason, soft_wrap=True, highlight=False)
