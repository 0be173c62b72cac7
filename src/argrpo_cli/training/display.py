"""What a run shows while it trains: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from argrpo_cli.runs.curves import STAGES
from argrpo_cli.runs.run import duration
from argrpo_cli.system.errors import printable
from argrpo_cli.system.references import title

RECENT = 10  # steps over which speed is averaged


MEASURES = (  # of a record, below its rewards: what the table calls it, its key and how it is written
    ("divergence to the guided teacher", "divergence", ".4f"),
    ("loss of the contrast", "contrast", ".4f"),
    ("images told apart by their condition", "told_apart", ".1%"),
    ("std within groups", "within_group_std", ".4f"),
    ("groups without spread", "groups_without_spread", ".0%"),
    ("KL to the base policy", "kl", ".5f"),
    ("entropy (nats)", "entropy", ".4f"),
    ("clipped tokens", "clip", ".2%"),
    ("ratio to the sampler", "ratio", ".6f"),
    ("gradient norm", "grad_norm", ".4f"),
    ("noise scale (images)", "noise_scale", ".0f"),
    ("updates that changed nothing", "updates_left_out", ".0f"),
)


def number(value: float | None, pattern: str = ".4f") -> str:
    """A number for people, a dash when there is none."""
    return "-" if value is None else format(value, pattern)


def silent_console() -> Console:
    """For the processes that do not report."""
    return Console(quiet=True, force_terminal=False)


class RunDisplay:
    """Shows the records of the updates as they come.

    Args:
        steps: of the whole run.
        log_every: steps between plain lines; the live table shows every step.
        time_limit: seconds of training after which the run stops, or None.
        held_out: rewards that are measured and not optimised.
        console: where to write; by default standard output.
    """

    def __init__(
        self,
        name: str,
        steps: int,
        log_every: int,
        time_limit: float | None = None,
        held_out: Collection[str] = (),
        console: Console | None = None,
    ) -> None:
        self.name, self.steps, self.log_every, self.time_limit = name, steps, log_every, time_limit
        self.held_out = held_out
        self.console = console or Console(highlight=False)
        self.live: Live | None = None
        self.first: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None
        self.ending = ""  # what is said of a run that was asked to stop
        self._ends: deque[tuple[int, float]] = deque(maxlen=RECENT + 1)

    def note(self, line: str | Text) -> None:
        """One line of text, above the table where there is one."""
        line = printable(line, but="\n") if isinstance(line, str) else line
        self.console.print(line, markup=False, soft_wrap=True)

    def start(self, step: int) -> None:
        """Training starts after `step` updates."""
        self._ends.append((step, time.monotonic()))
        if self.console.is_terminal:
            self.live = Live(get_renderable=self._picture, console=self.console, refresh_per_second=4)
            self.live.start()

    def step(self, record: dict[str, Any]) -> None:
        """Show the record of one update (a line of metrics.jsonl)."""
        self.first = self.first or record
        self.last = record
        self._ends.append((record["step"], time.monotonic()))
        if self.live is not None:
            self.live.refresh()
        elif record["step"] % self.log_every == 0 or record["step"] in (1, self.steps):
            self.note(self._line(record))

    def stopping(self, updates_per_batch: int = 1) -> None:
        """Say that the run ends with the update, or the batch of updates, in progress. Called within the handler of a
        signal, where a console may be in the middle of a line: a live table shows it with its next refresh."""
        last = self._ends[-1][0] // updates_per_batch * updates_per_batch + updates_per_batch
        self.ending = f"finishing update {last}; again to stop now"
        if self.live is None and not self.console.quiet:
            os.write(2, f"{self.ending}\n".encode())

    def stop(self) -> None:
        """Training is over, for whatever reason; the last table stays on the screen."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def seconds_left(self) -> float | None:
        """Time to the last step or to the time limit, by the speed of the last steps; None before the first."""
        (first_step, first_time), (last_step, last_time) = self._ends[0], self._ends[-1]
        if last_step == first_step or self.last is None:
            return None
        seconds = (self.steps - last_step) * (last_time - first_time) / (last_step - first_step)
        if self.time_limit is not None:
            seconds = min(seconds, max(0.0, self.time_limit - self.last["seconds_total"]))
        return seconds

    def _left(self) -> str:
        seconds = self.seconds_left()
        return "-" if seconds is None else duration(seconds)

    def _line(self, record: dict[str, Any]) -> str:
        ends = f"  {number(record['images_per_second'], '.1f')} images/s  left {self._left()}"
        if record.get("updates_left_out"):
            ends = f"  {record['updates_left_out']:.0f} changed nothing{ends}"
        if "rewards" not in record:
            name = "contrast" if "contrast" in record else "divergence"
            apart = f"  told apart {number(record['told_apart'], '.1%')}" if "told_apart" in record else ""
            return (
                f"step {record['step']}/{self.steps}  {name} {number(record[name])}{apart}"
                f"  entropy {number(record['entropy'], '.3f')}  gradient {number(record['grad_norm'])}{ends}"
            )
        means = {title(name): number(value["mean"], ".3f") for name, value in record["rewards"].items()}
        rewards = ", ".join(f"{name} {mean}" for name, mean in means.items())
        return (
            f"step {record['step']}/{self.steps}  reward {number(record['reward'])} ({rewards})"
            f"  std {number(record['within_group_std'], '.3f')}  kl {number(record['kl'])}"
            f"  entropy {number(record['entropy'], '.3f')}  clip {number(_clip(record), '.2%')}"
            f"  ratio {number(record['ratio'])}{ends}"
        )

    def _picture(self) -> Group:
        """The table of the last step beside the first, under a bar."""
        step = self.last["step"] if self.last else self._ends[-1][0]
        speed = number(self.last["images_per_second"], ".1f") if self.last else "-"
        head = Text.assemble(
            (self.name, "bold"), f"  step {step}/{self.steps}  {speed} images/s  ",
            f"{self._left()} left",
        )  # fmt: skip
        parts: list[Any] = [head, ProgressBar(total=self.steps, completed=step, width=60)]
        if self.first is not None and self.last is not None:
            parts.append(self._table(self.first, self.last))
            if stages := _stages(self.last):
                parts.append(Text(f"time: {stages}", style="dim"))
        if self.ending:
            parts.append(Text(self.ending, style="yellow"))
        return Group(*parts)

    def _table(self, first: dict[str, Any], last: dict[str, Any]) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column("")
        table.add_column(f"step {first['step']}", justify="right", style="dim")
        table.add_column(f"step {last['step']}", justify="right")
        if "reward" in last:
            table.add_row("reward, weighted total", number(first["reward"]), number(last["reward"]))
        for name, value in last.get("rewards", {}).items():
            before = first["rewards"].get(name, {}).get("mean")
            label = f"  {title(name)}, held out" if name in self.held_out else f"  {title(name)}"
            table.add_row(label, number(before), number(value["mean"]))
        first, last = ({**record, "clip": _clip(record)} if "reward" in record else record for record in (first, last))
        for label, key, pattern in MEASURES:
            if key in last:
                table.add_row(label, number(first.get(key), pattern), number(last[key], pattern))
        return table


def _clip(record: Mapping[str, Any]) -> float | None:
    """Share of tokens whose ratio is clipped, low and high together."""
    known = [share for share in (record["clip_low"], record["clip_high"]) if share is not None]
    return sum(known) if known else None


def _stages(record: Mapping[str, Any]) -> str:
    """Where the time of an update went, such as `rollout 42%, reward 7%, update 51%`."""
    seconds = {stage: record.get(f"seconds_{stage}") or 0.0 for stage in STAGES}
    total = sum(seconds.values())
    return ", ".join(
        f"{stage} {taken / total:.0%}" for stage, taken in seconds.items() if total and taken > 0.005 * total
    )
