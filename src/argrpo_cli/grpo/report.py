"""report.html: a whole run on one page that needs no network and no other file.

Made from what lies in the run directory alone, so it can be made again: `python -m argrpo_cli.grpo.report RUN_DIR`.
What an earlier version did not write is left out.
"""

from __future__ import annotations

import base64
import io
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from argrpo_cli.errors import UserError
from argrpo_cli.files import cannot_write, read_text, write_text
from argrpo_cli.grpo.callbacks.display import duration
from argrpo_cli.grpo.callbacks.metrics import NO_STAGE, STAGES
from argrpo_cli.grpo.first_last import LEAST, SHARE, Change, change
from argrpo_cli.grpo.panels import COLOURS, Panel, Roles, panels
from argrpo_cli.grpo.provenance import now
from argrpo_cli.grpo.report_svg import LEFT, RIGHT, WIDTH, draw_panel
from argrpo_cli.rewards import REWARDS

if TYPE_CHECKING:
    from argrpo_cli.grpo.run import RunDirectory
    from argrpo_cli.recipe import Recipe

REPORT = "report.html"
MOST_GRIDS = 12  # of a run, evenly spread over its steps; the first and the last are among them
MOST_PIXELS = 1100  # width of a picture in the page
PNG_BYTES = 200_000  # a larger picture goes in as JPEG
Record = Mapping[str, Any]


def write_report(run: RunDirectory, recipe: Recipe, *, training: bool = False) -> Path:
    """Write the page of a run, atomically, and return its path.

    Args:
        training: the run is going on, so that what is there now is not the end.

    Raises:
        UserError: it cannot be written.
    """
    records, notes = run.metrics(), run.notes()
    roles = reward_roles(recipe, notes)
    shown = panels(records, roles)
    steps = [record["step"] for record in records]
    drawn = [draw_panel(panel, steps) for panel in shown]
    body = [
        _head(recipe, records, notes, training),
        _warnings(notes.get("warnings") or []),
        _pictures(_grids(run.root / "grids")),
        _curves(shown, [svg for svg, _ in drawn]),
        _table(shown),
        _stages(records, recipe.grpo.batch_size),
        _published(recipe),
        _versions(notes),
        f"<section><h2>Recipe</h2><pre>{escape(read_text(run.recipe_file))}</pre></section>",
    ]
    page = Template(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{recipe.name}: argrpo run"),
        body="\n".join(part for part in body if part),
        # Inside a script element nothing is unescaped but its end.
        numbers=json.dumps([numbers for _, numbers in drawn]).replace("<", "\\u003c"),
        left=LEFT,
        span=WIDTH - LEFT - RIGHT,
        width=WIDTH,
    )
    path = run.root / REPORT
    write_text(path, page)
    return path


def refresh_report(run: RunDirectory, recipe: Recipe, note: Callable[[str], None], *, training: bool) -> None:
    """Write the page of a run that has more important things to do: if that fails it is said, and no more."""
    try:
        write_report(run, recipe, training=training)
    except UserError as error:
        note(f"warning: {error}; the run itself is not touched by that")
    except OSError as error:
        note(f"warning: {cannot_write(run.root / REPORT, error)}; the run itself is not touched by that")


def reward_roles(recipe: Recipe, notes: Mapping[str, Any]) -> Roles:
    """Family and weight of each reward: as noted when training started, or as far as the recipe tells."""
    if notes.get("rewards"):
        return notes["rewards"]
    return {
        term.name: {
            "family": REWARDS[term.name].family if term.name in REWARDS else None,
            "weight": term.weight if term.factor is None else term.weight * term.factor,
        }
        for term in recipe.rewards.terms
    }


def _head(recipe: Recipe, records: Sequence[Record], notes: Mapping[str, Any], training: bool) -> str:
    done = records[-1]["step"] if records else 0
    finished = notes.get("finished")
    if training:
        state = f"training: {done} of {recipe.grpo.steps} updates so far"
    elif finished and finished.get("out_of_time"):
        state = f"finished at the time limit, after {done} of {recipe.grpo.steps} updates"
    elif finished:
        state = f"finished: {done} updates"
    else:
        state = f"stopped after {done} of {recipe.grpo.steps} updates"
    seconds = records[-1].get("seconds_total") if records else None
    drawn = sum(record.get("images_per_second") is not None for record in records) * recipe.grpo.batch_size
    facts = {
        "training time": duration(seconds) if seconds is not None else None,
        "images drawn": f"{drawn:,}" if drawn else None,
        "images per update": f"{recipe.grpo.batch_size}, in groups of {recipe.grpo.group_size}",
        "policy": recipe.policy.checkpoint,
        "device": notes.get("device"),
        "started": notes.get("started"),
        "page written": now(),
    }
    listed = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items() if value
    )
    description = f"<p>{escape(recipe.description)}</p>" if recipe.description else ""
    return (
        f'<header><h1>{escape(recipe.name)}</h1>{description}<p class="state">{escape(state)}</p>'
        f'<dl class="facts">{listed}</dl></header>'
    )


def _warnings(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return ""
    items = "".join(
        f"<li>step {escape(str(one.get('step', '?')))}, {escape(str(one.get('guard', '')))}: "
        f"{escape(str(one.get('text', '')))}</li>"
        for one in found
    )
    return f'<section><h2>Warnings</h2><ul class="warnings">{items}</ul></section>'


def _grids(folder: Path) -> list[tuple[int, Path]]:
    """Step and file of the grids that are shown."""
    found = sorted((int(path.stem.rpartition("_")[2]), path) for path in folder.glob("step_*.png"))
    if len(found) <= MOST_GRIDS:
        return found
    return [found[round(index * (len(found) - 1) / (MOST_GRIDS - 1))] for index in range(MOST_GRIDS)]


def _pictures(grids: Sequence[tuple[int, Path]]) -> str:
    """First and last grid side by side, and what lies between as a row, or under a slider where scripts run."""
    if not grids:
        return ""

    def shot(step: int, path: Path, caption: str) -> str:
        return (
            f"<figure><figcaption>{caption}</figcaption>"
            f'<img data-step="{step}" alt="images after {step} updates" src="{_data_uri(path)}"></figure>'
        )

    names = {0: "before"}
    ends = [grids[0], *grids[-1:]] if len(grids) > 1 else [grids[0]]
    pair = [
        shot(step, path, f"{names.get(step, 'after')} (step {step})")
        for step, path in ends
    ]
    text = (
        "The same conditions and the same noise at every step. One token that comes out differently changes all that "
        "follow, so colours and places differ, too."
    )
    page = f'<section><h2>Before and after</h2><p class="note">{text}</p><div class="pair">{"".join(pair)}</div>'
    if len(grids) > 2:
        between = "".join(shot(step, path, f"step {step}") for step, path in grids[1:-1])
        page += (
            '<h3>On the way</h3><figure id="viewer"><input type="range" min="0" value="0" aria-label="step">'
            f'<figcaption></figcaption><img alt=""></figure><div class="strip">{between}</div>'
        )
    return page + "</section>"


def _data_uri(path: Path) -> str:
    """A picture inside the page: as it is when small, else no wider than the page needs and as JPEG."""
    from PIL import Image

    content, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(content)) as image:
        if len(content) > PNG_BYTES or image.width > MOST_PIXELS:
            small = image.convert("RGB")
            if small.width > MOST_PIXELS:
                height = round(small.height * MOST_PIXELS / small.width)
                small = small.resize((MOST_PIXELS, height), Image.Resampling.LANCZOS)
            packed = io.BytesIO()
            small.save(packed, format="JPEG", quality=88, subsampling=0)
            content, kind = packed.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _curves(shown: Sequence[Panel], pictures: Sequence[str]) -> str:
    if not shown:
        return ""

    def block(chosen: Callable[[Panel], bool], kind: str = "") -> str:
        figures = [
            f'<figure data-panel="{number}"><figcaption>{escape(panel.title)}{_key(panel)}<output></output></figcaption>'
            f"{pictures[number]}</figure>"
            for number, panel in enumerate(shown)
            if chosen(panel)
        ]
        return f'<div class="curves{kind}">{"".join(figures)}</div>' if figures else ""

    held_out = block(lambda panel: panel.held_out, " held")
    if held_out:
        held_out = (
            '<h3>Held-out rewards</h3><p class="note">Measured on the same images and not optimised (weight 0). When '
            f"these fall while the total rises, the policy games its rewards.</p>{held_out}"
        )
    return (
        '<section><h2>Curves</h2><p class="note">Over the updates. Thin: each update; thick: a line fitted to a tenth '
        f"of the run around it.</p>{block(lambda panel: panel.reward)}{held_out}<h3>The update</h3>"
        f"{block(lambda panel: not panel.reward and not panel.held_out)}</section>"
    )


def _key(panel: Panel) -> str:
    return "".join(
        f'<span class="key"><i style="background:{COLOURS[line.colour]}"></i>{escape(line.label)}</span>'
        for line in panel.lines
        if line.label
    )


def _table(shown: Sequence[Panel]) -> str:
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
        "± standard error of the mean over those updates, from the scatter about the trend of the run and the correlation "
        "of neighbours. Another training run differs by more."
        if with_errors
        else f"No errors: with fewer than {LEAST} measured updates they could not be trusted."
    )
    return (
        f'<section><h2>First against last</h2><p class="note">Means of the first and the last {SHARE:.0%} of the updates. '
        f'{text}</p><div class="wide"><table><thead><tr><th>measure</th><th>first</th><th>last</th><th>difference</th>'
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


def _stages(records: Sequence[Record], batch_size: int) -> str:
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


def _published(recipe: Recipe) -> str:
    if not recipe.published:
        return ""
    parts = []
    for one in recipe.published:
        rows = "".join(
            f"<tr><td>{escape(measure)}</td><td>{base:g}</td><td>{trained:g}</td><td>{trained - base:+.4g}</td></tr>"
            for measure, base, trained in zip(one.measures, one.base, one.trained, strict=True)
        )
        parts.append(
            f'<h3>{escape(one.table)}, after {one.step} updates</h3><div class="wide"><table><thead><tr><th>measure</th>'
            f"<th>base</th><th>trained</th><th>difference</th></tr></thead><tbody>{rows}</tbody></table></div>"
        )
    return (
        "<section><h2>Published numbers</h2>"
        f'<p class="note">Reported by the paper, not measured here.</p>{"".join(parts)}</section>'
    )


def _versions(notes: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{escape(str(name))} {escape(str(one))}" for name, one in (notes.get("versions") or {}).items())
    return f"<section><h2>Made with</h2><p>{listed}</p></section>" if listed else ""


if __name__ == "__main__":
    from argrpo_cli.grpo.run import RunDirectory
    from argrpo_cli.recipe import load_recipe

    root = Path(sys.argv[1])
    print(write_report(RunDirectory(root), load_recipe(root / "recipe.yaml")))
