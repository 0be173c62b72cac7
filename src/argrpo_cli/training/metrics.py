"""Every update measured and shown, and when to stop: signals, failures, the recipe's time limit.

What TRL logs and what we measure becomes one record per update: a line of metrics.jsonl, shown on the display.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from argrpo_cli.runs.curves import NO_STAGE, STAGES
from argrpo_cli.runs.learning import NoiseScale, gain, kl_efficiency
from argrpo_cli.system.processes import ALONE, Team
from argrpo_cli.training.scorer import EXTRA, LEFT_OUT, REPLACED, WITHIN_GROUP_STD, WITHOUT_SPREAD, spread_of

if TYPE_CHECKING:
    from argrpo_cli.runs.run import RunDirectory
    from argrpo_cli.training.display import RunDisplay
    from argrpo_cli.training.grpo import RatioMeter
    from argrpo_cli.training.instruments import GradientMeter
    from argrpo_cli.training.rollout import Stopwatch

DIGITS = 6  # significant digits of a logged number
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the signal's number, as shells have it


@dataclass(eq=False)
class MetricsCallback(TrainerCallback):
    """Writes the record of each update.

    Attributes:
        names: of the rewards; None of methods that have none.
        images: drawn per batch, for images per second.
        seconds: training time of the whole run, interruptions left out.
        ratio_meter: the trainer's, which is built after its callbacks.
        gradient_meter: what the noise scale is estimated from.
        tokens: T, of an image.
        updates_per_batch: updates after the first of a batch see the same images again, and no new noise.
        measured: of the policy against its start, for the next record: `Start.kl`, and `drift`.
        watch: shown every record, in the first process.
        record: of the latest update; callbacks after this one read it.
        left_out: updates so far that have changed nothing, see `GuardCallback`.
        team: the processes of the run. The record is that of the whole batch, and the first process writes it; times
            are the first one's.
    """

    run: RunDirectory
    display: RunDisplay
    stopwatch: Stopwatch
    names: list[str] | None
    images: int
    seconds: float
    team: Team = ALONE
    ratio_meter: RatioMeter | None = None
    watch: Callable[[dict[str, Any]], None] = lambda record: None
    gradient_meter: GradientMeter | None = None
    tokens: int = 1
    updates_per_batch: int = 1
    measured: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)  # of all updates
    left_out: int = 0
    _noise_scale: NoiseScale = field(default_factory=NoiseScale)
    _last_step_end = _step_start = _step_seconds = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last_step_end = time.monotonic()
        if state.global_step:  # a resumed run; sums go on from what was written, which is rounded in every run
            for record in self.run.metrics():
                self._count(record)
                self.left_out = int(record.get("updates_left_out") or 0)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step_start = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        self._step_seconds = now - self._step_start
        self.seconds += now - self._last_step_end  # with the grid and the checkpoint after the step before
        self._last_step_end = now

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # the trainer's summary at its end
            return
        record = self.record = self._record(state.global_step, logs)
        self.team.lead(lambda: self.run.append_metrics(record))
        self.display.step(record)
        self.watch(record)

    def leave_out(self, seconds: float) -> None:
        """Do not count these seconds, just gone by between two steps, as training time."""
        self._last_step_end += seconds

    def _record(self, step: int, logs: dict[str, Any]) -> dict[str, Any]:
        times = self.stopwatch.take()
        seconds = {stage: times.get(stage, 0.0) for stage in STAGES}
        seconds["update"] = self._step_seconds - sum(seconds.values())  # what is left of the step
        grad_norm = logs.get("grad_norm")
        fresh = (step - 1) % self.updates_per_batch == 0 and (self.names is None or logs.get("reward") is not None)
        gradient = self.gradient_meter.take(grad_norm, self.team) if self.gradient_meter is not None else None
        signal, noise = gradient if gradient is not None and fresh else (None, None)
        # The trainer leaves a loss that is no number out of its sum, which would never get rid of it.
        loss = logs["loss"] if grad_norm is None or math.isfinite(grad_norm) else None
        fields = {
            **(self._of_grpo(logs) if self.names is not None else _of_others(logs, loss)),
            "loss": loss,
            "grad_norm": grad_norm,
            "gradient_signal": signal,
            "gradient_noise": noise,
            "learning_rate": logs.get("learning_rate"),
            "updates_left_out": self.left_out,
            # A step that reuses the images of the one before draws none.
            "images_per_second": self.images / self._step_seconds if seconds["rollout"] else None,
            **{
                f"images_per_second_{stage}": self.images / taken if taken > NO_STAGE else None
                for stage, taken in seconds.items()
            },
            **{f"seconds_{stage}": taken for stage, taken in seconds.items()},
            "seconds_total": self.seconds,
        }
        record = {"step": step} | _rounded(fields)
        self._count(record)
        learnt: dict[str, Any] = {"noise_scale": self._noise_scale.value, "noise_scale_least": self._noise_scale.least}
        measured, self.measured = self.measured, {}
        learnt |= measured
        if measured and self.names is not None and "cross_entropy" not in fields:
            gained = gain(self.records)
            learnt["gain"], learnt["gain_error"] = (None, None) if gained is None else gained[:2]
            learnt["kl_efficiency"] = kl_efficiency(gained, measured.get("kl_start"), self.tokens)
        record |= _rounded(learnt)
        return record

    def _of_grpo(self, logs: dict[str, Any]) -> dict[str, Any]:
        measured = self.ratio_meter.take(self.team) if self.ratio_meter is not None else None
        mean_ratio, mean_deviation, deviation = measured or (None, None, None)
        return {
            "reward": logs.get("reward"),
            "within_group_std": logs.get(WITHIN_GROUP_STD),
            "rewards": {
                name: {
                    "mean": _number(logs.get(f"rewards/{name}/mean")),
                    "std": _number(logs.get(f"rewards/{name}/std")),
                    "within_group_std": _number(logs.get(spread_of(name))),
                }
                for name in self.names
            },
            "kl": logs.get("kl"),
            "entropy": logs.get("entropy"),
            **({"cross_entropy": logs["cross_entropy"]} if "cross_entropy" in logs else {}),  # to real images' codes
            "entropy_weight": logs.get("entropy_coef"),  # with an entropy bonus only
            # Losses that clip in another way, or not at all, have neither; cispo clips above alone.
            "clip_low": logs.get("clip_ratio/low_mean"),
            "clip_high": logs.get("clip_ratio/high_mean", logs.get("cispo_clip_ratio")),
            "ratio": mean_ratio,
            "ratio_deviation_mean": mean_deviation,
            "ratio_deviation": deviation,
            "advantage_std": logs.get("advantage_std"),
            "images_left_out": logs.get(LEFT_OUT),
            "groups_without_spread": logs.get(WITHOUT_SPREAD),  # a share
            "groups_replaced": logs.get(REPLACED),  # a share, with dynamic sampling
            "images_extra": logs.get(EXTRA),  # drawn for that
        }

    def _count(self, record: dict[str, Any]) -> None:
        """Remember a record for what is said of many."""
        self.records.append(record)
        self._noise_scale.add(record.get("gradient_signal"), record.get("gradient_noise"))


def _of_others(logs: dict[str, Any], loss: float | None) -> dict[str, Any]:
    """Of a distillation the divergence in nats per token, also by who drew the batch; of a contrast its loss, the mean
    log-ratio of images to the base in nats under both conditions, and how often the own one is the larger; the entropy.
    """
    if "gain_own" in logs:
        return {"contrast": loss, **{key: logs.get(key) for key in ("told_apart", "gain_own", "gain_other", "entropy")}}
    by = {key: loss if key in logs else None for key in ("divergence_teacher", "divergence_student")}
    return {"divergence": loss, **by, "entropy": logs.get("entropy")}


def _rounded(fields: dict[str, Any]) -> dict[str, Any]:
    """Numbers as `_number` has them, in nested dictionaries too."""
    return {name: _rounded(value) if isinstance(value, dict) else _number(value) for name, value in fields.items()}


def _number(value: float | None) -> float | None:
    """A number as JSON has it: no NaN, and no more digits than mean anything."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


class StopRequest:
    """Remembers that the run is to stop, for a signal or a failure; the update in progress is finished first.

    Attributes:
        training: whether there are updates to finish. Before the first there is nothing to save: a signal ends the
            run at once.
        acknowledge: is called in the moment of a signal that waits for the end of the update.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.failure: str | None = None
        self.training = False
        self.acknowledge: Callable[[], None] = lambda: None
        self._heard = False  # a signal came to this process itself; `agree` brings those of others

    @property
    def exit_code(self) -> int:
        """What the process should exit with, 0 when nobody asked."""
        return EXIT_CODES[self.signal] if self.signal is not None else 0

    def fail(self, why: str) -> None:
        """Stop because something that training needs does not work."""
        self.failure = self.failure or why

    def agree(self, team: Team) -> None:
        """Make a request to any process one to all of them; they call this together."""
        heard = team.exchange((self.signal, self.failure))
        self.signal = self.signal or next((number for number, _ in heard if number is not None), None)
        self.failure = next((why for _, why in heard if why is not None), None)

    def end_of_training(self, team: Team) -> None:
        """What comes next may be left at once again; raises KeyboardInterrupt when a signal waited for the end."""
        self.agree(team)
        self.training = False
        if self.signal is not None:
            raise KeyboardInterrupt

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while inside. A second one of them, or one before training, raises KeyboardInterrupt."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python gives signals to the main thread only; whoever started this thread decides
            return
        before = {number: signal.signal(number, self._handle) for number in EXIT_CODES}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        at_once = self._heard or not self.training
        self._heard, self.signal = True, signal.Signals(number)
        if at_once:
            raise KeyboardInterrupt
        self.acknowledge()


@dataclass(eq=False)
class StopCallback(TrainerCallback):
    """Ends training after the step during which a signal came or something failed, or when the time is up.

    Attributes:
        updates_per_batch: a checkpoint between two updates of one batch could not be resumed exactly, so training goes
            on to the end of the batch.
        time_limit: seconds of training, or None.
        team: the processes that must stop after the same step, whichever of them is asked to.
    """

    request: StopRequest
    metrics: MetricsCallback
    updates_per_batch: int
    time_limit: float | None
    team: Team = ALONE
    out_of_time: bool = False

    def __post_init__(self) -> None:
        self._last_seconds = self.metrics.seconds

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seconds = self.metrics.seconds
        step_seconds, self._last_seconds = seconds - self._last_seconds, seconds
        if state.global_step % self.updates_per_batch:
            return
        if self.time_limit is not None:
            passed = seconds + step_seconds * self.updates_per_batch > self.time_limit  # by one more step
            self.out_of_time = any(self.team.exchange(passed))
        self.request.agree(self.team)
        if self.request.signal is not None or self.request.failure is not None or self.out_of_time:
            control.should_training_stop = True
