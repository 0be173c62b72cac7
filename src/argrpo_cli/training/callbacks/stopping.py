"""Stopping in good order: Ctrl-C and SIGTERM, and the recipe's time limit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from argrpo_cli.system.processes import ALONE, Team

if TYPE_CHECKING:
    from argrpo_cli.training.callbacks.metrics import MetricsCallback

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the signal's number, as shells have it


class StopRequest:
    """Remembers that the run is to stop, for a signal or a failure; the update in progress is finished first.

    Attributes:
        training: whether there are updates to finish. Before the first there is nothing to save: a signal ends the
            run at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.failure: str | None = None
        self.training = False
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


class StopCallback(TrainerCallback):
    """Ends training after the step during which a signal came or something failed, or when the time is up.

    Args:
        updates_per_batch: a checkpoint between two updates of one batch could not be resumed exactly, so training goes
            on to the end of the batch.
        time_limit: seconds of training, or None.
        blank: whether no image of the batch has a score. Such a batch changes nothing, neither weights nor optimiser.
        team: the processes that must stop after the same step, whichever of them is asked to.
    """

    def __init__(
        self,
        request: StopRequest,
        metrics: MetricsCallback,
        updates_per_batch: int,
        time_limit: float | None,
        blank: Callable[[], bool] = lambda: False,
        team: Team = ALONE,
    ) -> None:
        self.request, self.metrics, self.updates_per_batch = request, metrics, updates_per_batch
        self.time_limit, self.blank, self.team = time_limit, blank, team
        self.out_of_time = False
        self._last_seconds = metrics.seconds

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.blank():
            for parameter in kwargs["model"].parameters():
                parameter.grad = None  # not a zero, which momentum and weight decay would still act on

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
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
