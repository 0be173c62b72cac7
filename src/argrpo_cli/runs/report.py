"""report.html: a whole run on one page that needs no network and no other file.

Made from what lies in the run directory alone, so it can be made again: `python -m argrpo_cli.runs.report RUN_DIR`.
What an earlier version did not write is left out.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from argrpo_cli.rewards import REWARDS
from argrpo_cli.runs.panels import COLOURS, Panel, Record, Roles, panels
from argrpo_cli.runs.plots import draw_curves
from argrpo_cli.runs.provenance import now
from argrpo_cli.runs.report_svg import LEFT, RIGHT, WIDTH, draw_panel
from argrpo_cli.runs.report_tables import changes_table, published_numbers, stage_times
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import cannot_write, read_text, write_text
from argrpo_cli.training.callbacks.display import duration

if TYPE_CHECKING:
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.runs.run import RunDirectory

REPORT = "report.html"
MOST_GRIDS = 12  # of a run, evenly spread over its steps; the first and the last are among them
MOST_PIXELS = 1100  # width of a picture in the page
PNG_BYTES = 200_000  # a larger picture goes in as JPEG


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
        changes_table(shown),
        stage_times(records, recipe.grpo.batch_size),
        published_numbers(recipe),
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


def refresh_report(
    run: RunDirectory, recipe: Recipe, note: Callable[[str], None], *, training: bool = False, curves: bool = False
) -> None:
    """Write the page, and curves.png if asked; if that fails it is said, and no more: a run has better things to do."""
    try:
        write_report(run, recipe, training=training)
        if curves:
            draw_curves(run.metrics(), run.root / "curves.png", recipe.name, reward_roles(recipe, run.notes()))
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
    pair = [shot(step, path, f"{names.get(step, 'after')} (step {step})") for step, path in ends]
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
            f'<figure data-panel="{number}"><figcaption>{escape(panel.title)}{_key(panel)}<output></output>'
            f"</figcaption>{pictures[number]}</figure>"
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


def _versions(notes: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{escape(str(name))} {escape(str(one))}" for name, one in (notes.get("versions") or {}).items())
    return f"<section><h2>Made with</h2><p>{listed}</p></section>" if listed else ""


if __name__ == "__main__":
    from argrpo_cli.recipe import load_recipe
    from argrpo_cli.runs.run import RunDirectory

    root = Path(sys.argv[1])
    print(write_report(RunDirectory(root), load_recipe(root / "recipe.yaml")))
