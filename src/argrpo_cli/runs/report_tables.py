"""The tables of report.html: first against last updates, where the time went, what the paper reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from argrpo_cli.runs.first_last import LEAST, SHARE, Change, change
from argrpo_cli.runs.panels import COLOURS, STAGES, Panel, Record
from argrpo_cli.training.callbacks.display import duration
from argrpo_cli.training.callbacks.metrics import NO_STAGE

if TYPE_CHECKING:
    from argrpo_cli.recipe import Recipe


def changes_table(shown: Sequence[Panel]) -> str:
    """First against last tenth of the updates."""
    rows, with_errors = [], False
    for panel in shown:
        for line in panel.lines:
            moved = change(line.values) if not panel.exact else None
            if moved is not None:
                with_errors |= moved.error is not None
                label = f"{panel.title}: {line.label}" if line.label else panel.title
                rows.append(f"<tr><td>{escape(label)}</td>{_cells(moved)}</tr>")
    if not rows:
        return ""
    text = (
        "± standard error of the mean over those updates, from the scatter about the trend of the run and the "
        "correlation of neighbours. Another training run differs by more."
        if with_errors
        else f"No errors: with fewer than {LEAST} measured updates they could not be trusted."
    )
    return (
        '<section><h2>First against last</h2><p class="note">Means of the first and the last '
        f'{SHARE:.0%} of the updates. {text}</p><div class="wide"><table><thead><tr>'
        f"<th>measure</th><th>first</th><th>last</th><th>difference</th>"
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _cells(moved: Change) -> str:
    return (
        f"<td>{with_error(moved.first, moved.first_error)}</td><td>{with_error(moved.last, moved.last_error)}</td>"
        f"<td>{with_error(moved.difference, moved.error, '+')}</td>"
    )


def with_error(value: float, error: float | None, sign: str = "") -> str:
    """A number with its error, both to two digits of the error; to four significant digits where there is none."""
    if not error or not math.isfinite(error):
        return f"{value:{sign if value else ''}.4g}"
    power = math.floor(math.log10(max(abs(value), error)))
    if -4 <= power <= 5:
        power = 0
    decimals = max(0, 1 - math.floor(math.log10(error)) + power)
    text = f"{value / 10.0**power:{sign}.{decimals}f} ± {error / 10.0**power:.{decimals}f}"
    return f"({text})e{power}" if power else text


def stage_times(records: Sequence[Record], batch_size: int) -> str:
    """Where the time went, as a bar and a table."""
    if not records or records[-1].get("seconds_total") is None:
        return ""
    total = records[-1]["seconds_total"]
    seconds = {stage: sum(record.get(f"seconds_{stage}") or 0.0 for record in records) for stage in STAGES}
    rest = max(0.0, total - sum(seconds.values()))
    if total <= 0:
        return ""
    images = {
        stage: batch_size * sum((record.get(f"seconds_{stage}") or 0.0) > NO_STAGE for record in records)
        for stage in STAGES
    }
    parts = [(stage, taken, COLOURS[stage]) for stage, taken in seconds.items() if taken / total > 0.0005]
    parts.append(("grids, checkpoints, the rest", rest, "var(--rule)"))
    bar = "".join(
        f'<span style="width:{100 * taken / total:.2f}%;background:{colour}" title="{name}"></span>'
        for name, taken, colour in parts
    )
    rows = "".join(
        f'<tr><td class="bar-key"><i style="background:{colour}"></i>{name}</td><td>{duration(taken)}</td>'
        f"<td>{taken / total:.0%}</td><td>{_speed(images.get(name, 0), taken)}</td></tr>"
        for name, taken, colour in parts
    )
    return (
        f'<section><h2>Where the time went</h2><div class="bar">{bar}</div><div class="wide"><table><thead><tr>'
        f"<th>stage</th><th>time</th><th>share</th><th>images/s</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _speed(images: int, seconds: float) -> str:
    return f"{images / seconds:.1f}" if images and seconds > 0 else ""


def published_numbers(recipe: Recipe) -> str:
    if not recipe.published:
        return ""
    parts = []
    for one in recipe.published:
        rows = "".join(
            f"<tr><td>{escape(measure)}</td><td>{base:g}</td><td>{trained:g}</td><td>{trained - base:+.4g}</td></tr>"
            for measure, base, trained in zip(one.measures, one.base, one.trained, strict=True)
        )
        parts.append(
            f'<h3>{escape(one.table)}, after {one.step} updates</h3><div class="wide"><table><thead><tr>'
            f"<th>measure</th><th>base</th><th>trained</th><th>difference</th></tr></thead><tbody>{rows}</tbody></table></div>"
        )
    return (
        "<section><h2>Published numbers</h2>"
        f'<p class="note">Reported by the paper, not measured here.</p>{"".join(parts)}</section>'
    )
