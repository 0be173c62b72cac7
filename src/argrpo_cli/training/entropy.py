"""What moves the weight lambda of the entropy bonus, loss - lambda H, from update to update: published controllers.

H is the mean entropy of the trained distribution over the tokens of an update, in nats. A controller sees it once the
update is done, over all processes, and says the weight of the next. TRL's own, Skywork's, is TRL's (`grpo_config`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from annotated_types import Ge, Interval
from transformers import TrainerCallback, TrainerControl, TrainerState
from typing_extensions import TypedDict

from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_json, write_json

if TYPE_CHECKING:
    from argrpo_cli.recipe.grpo import GrpoSection
    from argrpo_cli.training.grpo import ImageGRPOTrainer

STATE = "entropy.json"  # of a checkpoint

# LOO-FID (Baran et al. 2026, arXiv:2603.23086), relative to ln V:
TARGET, BAND, GAIN = 0.78, 0.015, 3.0
LEAST = 7e-5  # the weight goes no lower
WARM_UP, DECAY = 0.05, 0.85  # shares of the updates at which the weight has risen, and begins to fall

# ReasonGen-R1 (Zhang et al. 2025, arXiv:2505.24875):
REASONGEN_TARGET = 7.0 / math.log(16384)  # 7 nats of Janus's codes, relative to ln V
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of its Adam


class Controller(Protocol):
    """Moves the weight."""

    def weight(self, step: int) -> float:
        """Of the update after so many."""
        ...

    def observe(self, entropy: float) -> None:
        """H of the latest update."""
        ...

    def state(self) -> dict[str, float]:
        """What a checkpoint holds, to be given back by `restore`."""
        ...

    def restore(self, state: dict[str, float]) -> None: ...


@dataclass
class LooFid:
    """lambda = clip(base s(x) exp(k e), least, largest), e = target - H / ln V, and exp(k e) = 1 while |e| is at most
    the dead band. s(x) rises over the first 5% of the updates and falls, a half cosine, over the last 15%.

    The published code takes H of the very images that are trained on, on each device its own; here it is that of the
    update before, of all devices.

    Args:
        target: relative to ln V.
        codes: V.
        steps: updates in all.
    """

    base: float
    target: float
    largest: float
    codes: int
    steps: int
    entropy: float | None = None

    def weight(self, step: int) -> float:
        done = step / self.steps
        scale = min(1.0, done / WARM_UP)
        if done > DECAY:
            scale = (1 + math.cos(math.pi * (done - DECAY) / (1 - DECAY))) / 2
        error = 0.0 if self.entropy is None else self.target - self.entropy / math.log(self.codes)
        if abs(error) > BAND:
            scale *= math.exp(GAIN * error)
        return min(max(self.base * scale, LEAST), self.largest)

    def observe(self, entropy: float) -> None:
        self.entropy = entropy

    def state(self) -> dict[str, float]:
        return {} if self.entropy is None else {"entropy": self.entropy}

    def restore(self, state: dict[str, float]) -> None:
        self.entropy = state.get("entropy")


@dataclass
class ReasonGen:
    """lambda = sinh(psi), of either sign: psi goes down the gradient of lambda (H - target) by Adam, and lambda is then
    clipped to [-largest, largest]. So it rises while H is below the target, and above it entropy is taken away.

    Args:
        psi: at the beginning, asinh of the first weight.
        target: nats per token.
        rate: of Adam.
    """

    psi: float
    target: float
    rate: float
    largest: float
    mean: float = 0.0  # Adam's running mean of the gradient,
    square: float = 0.0  # and of its square
    count: float = 0.0

    def weight(self, step: int) -> float:
        return math.sinh(self.psi)

    def observe(self, entropy: float) -> None:
        gradient = math.cosh(self.psi) * (entropy - self.target)
        self.count += 1
        self.mean = BETAS[0] * self.mean + (1 - BETAS[0]) * gradient
        self.square = BETAS[1] * self.square + (1 - BETAS[1]) * gradient**2
        mean, square = self.mean / (1 - BETAS[0] ** self.count), self.square / (1 - BETAS[1] ** self.count)
        self.psi -= self.rate * mean / (math.sqrt(square) + EPSILON)
        largest = math.asinh(self.largest)
        self.psi = min(max(self.psi, -largest), largest)

    def state(self) -> dict[str, float]:
        return {"psi": self.psi, "mean": self.mean, "square": self.square, "count": self.count}

    def restore(self, state: dict[str, float]) -> None:
        keys = {"psi": self.psi, "mean": self.mean, "square": self.square, "count": self.count}
        self.psi, self.mean, self.square, self.count = (state.get(key, value) for key, value in keys.items())


class State(TypedDict, total=False):
    """Of either controller."""

    entropy: Annotated[float, Ge(0)]
    psi: Annotated[float, Interval(ge=-99, le=99)]  # more would overflow its sinh
    mean: float
    square: Annotated[float, Ge(0)]
    count: Annotated[float, Ge(0)]


def controller(grpo: GrpoSection, codes: int) -> Controller | None:
    """What the recipe asks for; None where the weight stays, or TRL moves it. V = `codes`."""
    largest, target = grpo.entropy_weight_max, grpo.entropy_target
    if grpo.entropy_controller == "loo_fid":
        relative = TARGET if target is None else target / math.log(codes)
        return LooFid(grpo.entropy_weight, relative, largest, codes, grpo.steps)
    if grpo.entropy_controller == "reasongen":
        target = REASONGEN_TARGET * math.log(codes) if target is None else target
        return ReasonGen(math.asinh(grpo.entropy_weight), target, grpo.entropy_step, largest)
    return None


class EntropyCallback(TrainerCallback):
    """Lets a controller move the trainer's weight; its state is in every checkpoint."""

    def __init__(self, controller: Controller, trainer: ImageGRPOTrainer) -> None:
        self.controller, self.trainer = controller, trainer

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.entropy_coef = self.controller.weight(state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        entropy = (logs or {}).get("entropy")
        if entropy is not None and math.isfinite(entropy):
            self.controller.observe(entropy)

    def save(self, folder: Path) -> None:
        """Add the state to a checkpoint."""
        write_json(folder / STATE, self.controller.state())

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: it has no such state.
        """
        if not (folder / STATE).is_file():
            raise UserError(f"{folder} has no {STATE}: the run was started without grpo.entropy_controller")
        self.controller.restore(read_json(folder / STATE, State))
