"""What is measured of a run beyond TRL's log: noise of the gradient, distance from where training started, and at its
end what is left of the gain under other samplings. What the numbers mean stands in `runs/learning.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from argrpo_cli.draw import draw_batch, score_tokens
from argrpo_cli.networks.weights import load_pretrained
from argrpo_cli.runs.learning import estimate
from argrpo_cli.seeds import of_training
from argrpo_cli.shapes import Shot
from argrpo_cli.system.processes import ALONE, Team
from argrpo_cli.training.launch import CHUNK
from argrpo_cli.training.saving import in_place, trained_weights

if TYPE_CHECKING:
    from argrpo_cli.policy import Policy
    from argrpo_cli.rewards import RewardSet
    from argrpo_cli.shapes import Condition, Sampling

TRANSFER_STEP = -2  # stands for "no step" in the seeds, as `saving.GRID_STEP`
SCALES = (1.0, 2.0, 4.0)  # of guidance, and
TEMPERATURES = (0.8, 1.2)  # under which the gain is looked for once more


@dataclass
class RatioMeter:
    """pi_theta / pi_sampler over the tokens of an update: 1 up to rounding when the update is on-policy.

    TRL itself takes the sampler's log-probabilities to equal the trained ones when there is one update per batch, so
    this is the only place where a sampler that draws from another distribution would show.
    """

    total: float = 0.0
    deviation: float = 0.0
    tokens: int = 0
    largest_deviation: float = 0.0

    def add(self, logp: Tensor, sampled_logp: Tensor) -> None:
        """Count the tokens of logp and sampled_logp [B, T]; NaN marks those drawn from another distribution."""
        r = torch.exp(logp - sampled_logp)
        r = r[~r.isnan()]
        if r.numel():
            self.total += r.sum().item()
            self.deviation += (r - 1).abs().sum().item()
            self.tokens += r.numel()
            self.largest_deviation = max(self.largest_deviation, (r - 1).abs().max().item())

    def take(self, team: Team = ALONE) -> tuple[float, float, float] | None:
        """Mean ratio, mean and largest |ratio - 1| since the last call, over all processes of the team.

        None when nothing was counted.
        """
        own = [self.total, self.deviation, self.tokens, self.largest_deviation]
        self.total, self.deviation, self.tokens, self.largest_deviation = 0.0, 0.0, 0, 0.0
        sums = team.gather(torch.tensor([own], dtype=torch.float64))
        total, deviation, tokens, _ = sums.sum(dim=0).tolist()
        return (total / tokens, deviation / tokens, sums[:, 3].max().item()) if tokens else None


class GradientMeter(TrainerCallback):
    """Squared norms of the gradients of whole groups, as they come, beside that of the whole update.

    A hook on each parameter sees the gradient of a micro-batch before it is added to those before it, and in several
    processes before it is averaged over them: nothing is kept but sums of squares. (Clipping comes later.)

    A block is the fewest micro-batches that hold whole groups. Where a micro-batch is one, all blocks count; else the
    first of each update alone, whose sum is at hand. Nothing is measured where one process draws all in one block,
    where a group lies on several processes, and where parameters are sharded (FSDP, DeepSpeed), whose gradients are
    nowhere whole.

    Args:
        micro, share: images of a micro-batch, and of this process in an update.
        group_size: images of a group, which lie side by side in the micro-batches (`ImageGRPOTrainer`).
        batch_size: images of an update, of all processes.
    """

    def __init__(self, micro: int, share: int, group_size: int, batch_size: int) -> None:
        block = math.lcm(micro, group_size)
        self.block, self.batch_size = block, batch_size
        self.usable = share % group_size == 0 and block <= share and block < batch_size
        self._micro_batches = share // micro  # of an update
        self._length = block // micro  # of a block, in micro-batches
        self._index = 0  # of the micro-batch in the update
        self._square: Tensor | float = 0.0
        self._handles: list[Any] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.usable:
            self.watch([one for one in kwargs["model"].parameters() if one.requires_grad])

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.unwatch()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._index, self._square = 0, 0.0

    def on_substep_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._index += 1

    def watch(self, parameters: Sequence[nn.Parameter]) -> None:
        """Look at the gradients of these from now on."""
        self._handles = [one.register_hook(lambda gradient, one=one: self._see(gradient, one)) for one in parameters]

    def unwatch(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _see(self, gradient: Tensor, parameter: nn.Parameter) -> None:
        if self._length > 1:
            if self._index != self._length - 1:
                return
            gradient = gradient + parameter.grad  # those of the block's earlier micro-batches
        self._square = self._square + torch.linalg.vector_norm(gradient.detach().float()) ** 2

    def take(self, norm: float | None, team: Team = ALONE) -> tuple[float, float] | None:
        """`learning.estimate` of the latest update, whose gradient has this norm before clipping; all must call it."""
        if not self.usable:
            return None
        blocks = self._micro_batches if self._length == 1 else 1
        # The trainer divides each micro-batch's mean by their number: what was seen is the mean over the block's images
        # in parts of the update's.
        scale = (self._micro_batches / self._length) ** 2 / blocks
        small = team.gather(torch.tensor([float(self._square) * scale], dtype=torch.float64)).mean().item()
        if norm is None or not math.isfinite(norm) or not math.isfinite(small) or not small:
            return None
        return estimate(small, norm**2, self.block, self.batch_size)


# --- where training started


def group_of(name: str) -> str:
    """The part of a model that a parameter belongs to: `layers.4` of a block's, else the module that holds it."""
    *path, _ = name.split(".")
    number = next((place for place, part in enumerate(path) if part.isdigit()), None)
    path = path if number is None else path[: number + 1]
    return ".".join(part for part in path if part not in ("model", "base_model")) or name


@dataclass
class Start:
    """The policy that training started from, beside the one in training.

    Its trained weights lie on the CPU, one copy, in the first process: as large as what is trained, so of adapters next
    to nothing (with B at zero they are the start). They take their place in the model while something is measured.

    Attributes:
        weights: as training begins, before a checkpoint is loaded.
        base: those of the policy before that, where the start is the result of a run of its own.
    """

    policy: Policy
    model: nn.Module
    weights: dict[str, Tensor]
    base: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, policy: Policy, model: nn.Module, before: Path | None = None) -> Start:
        """The start of a training of `model`, which is the policy's, with adapters or without.

        Args:
            before: a folder with the model that `base` is of.
        """
        weights = {name: one.detach().to("cpu", copy=True) for name, one in trained_weights(model).items()}
        if before is None:
            return cls(policy, model, weights)
        base = dict(load_pretrained(type(policy.model), before, torch.float32).named_parameters())
        return cls(policy, model, weights, {name: base[name].detach() for name in weights})

    @torch.no_grad()
    def kl(self, conditions: Sequence[Condition], tokens: Tensor, sampling: Sampling) -> dict[str, float]:
        """`kl_start` and, with a base, `kl_base`: KL of the policy to those, nats per token.

        By the estimator of eq. 6, r - 1 - log r with r = pi_start / pi, on images that the policy has just drawn.

        Args:
            tokens: int64 [B, T], of these conditions.
            sampling: the distribution that is trained.
        """
        now = score_tokens(self.policy, conditions, tokens, sampling).logp
        result = {}
        for name, weights in (("kl_start", self.weights), ("kl_base", self.base)):
            if weights:
                with in_place(self.model, weights):
                    log_ratio = score_tokens(self.policy, conditions, tokens, sampling).logp - now
                result[name] = (torch.expm1(log_ratio) - log_ratio).mean().item()
        return result

    @torch.no_grad()
    def drift(self) -> dict[str, float]:
        """How far each part of the model has moved, ‖θ - θ0‖ / ‖θ0‖; of adapters by what they add, ‖ΔW‖ / ‖W‖."""
        moved: dict[str, float] = {}
        size: dict[str, float] = {}

        def count(name: str, change: Tensor, start: Tensor) -> None:
            group = group_of(name)
            moved[group] = moved.get(group, 0.0) + change.float().square().sum().item()
            size[group] = size.get(group, 0.0) + start.float().square().sum().item()

        adapted = False
        for name, module in self.model.named_modules():
            if hasattr(module, "get_delta_weight"):  # a layer of PEFT
                adapted = True
                for adapter in module.active_adapters:
                    count(f"{name}.weight", module.get_delta_weight(adapter), module.get_base_layer().weight)
        if not adapted:
            for name, weight in trained_weights(self.model).items():
                start = self.weights[name].to(weight.device)
                count(name, weight.detach() - start, start)
        return {group: math.sqrt(moved[group] / size[group]) for group in moved if size[group]}


# --- what is left of the gain


def samplings(trained: Sampling) -> dict[str, Sampling]:
    """Names and settings under which start and result are compared: first as in training, then others."""
    every = {"as trained": trained}
    every |= {
        "unguided" if scale == 1 else f"guided at {scale:g}": replace(trained, cfg_scale=scale) for scale in SCALES
    }
    every |= {"greedy": replace(trained, top_k=1)}
    every |= {f"temperature {value:g}": replace(trained, temperature=value) for value in TEMPERATURES}
    distinct = dict.fromkeys(every.values())
    return {next(name for name, one in every.items() if one == sampling): sampling for sampling in distinct}


def transfer_shots(conditions: Sequence[Condition], seed: int) -> list[Shot]:
    """An image of each of these conditions."""
    return [Shot(one, of_training(seed, TRANSFER_STEP, index)) for index, one in enumerate(conditions)]


def transfer(
    start: Start,
    shots: Sequence[Shot],
    sampling: Sampling,
    rewards: RewardSet,
    weights: Mapping[str, float],
    spread: float,
) -> list[dict[str, Any]]:
    """Start and result under several samplings, on the same conditions and seeds, scored by the run's rewards.

    Args:
        sampling: that of the rollouts.
        weights: what each raw reward counts.
        spread: standard deviation of the reward within a condition as the run began, the unit of `gain` and `error`.

    Returns:
        For each sampling its name, mean total reward of both, gain with the standard error of pairs, and how many pairs
        there are. A greedy image depends on its condition alone, so there is one of each.
    """
    rows = []
    for name, chosen in samplings(sampling).items():
        drawn = list({shot.condition: shot for shot in shots}.values()) if chosen.top_k == 1 else list(shots)
        scores = []
        for context in (in_place(start.model, start.weights), nullcontext()):
            with context:
                scores.append(total_rewards(start.policy, drawn, chosen, rewards, weights))
        before, after = (one[~(scores[0] + scores[1]).isnan()] for one in scores)
        if len(before) < 2:
            continue
        difference = (after - before) / spread
        rows.append(
            {
                "name": name,
                "start": before.mean().item(),
                "trained": after.mean().item(),
                "gain": difference.mean().item(),
                "error": (difference.std() / math.sqrt(len(difference))).item(),
                "images": len(difference),
            }
        )
    return rows


@torch.inference_mode()
def total_rewards(
    policy: Policy, shots: Sequence[Shot], sampling: Sampling, rewards: RewardSet, weights: Mapping[str, float]
) -> Tensor:
    """Total reward float64 [N] of each image; NaN where a reward that counts is missing.

    Rewards that compare images are left out: what they give is relative to images of one sampling.
    """
    totals = []
    for first in range(0, len(shots), CHUNK):
        part = shots[first : first + CHUNK]
        scores, _ = rewards.look(draw_batch(policy, part, sampling)[1], [shot.condition for shot in part])
        counted = [
            weight * scores[name].double().cpu() for name, weight in weights.items() if weight and name in scores
        ]
        totals.append(sum(counted) if counted else torch.full((len(part),), torch.nan, dtype=torch.float64))
    return torch.cat(totals)
