"""report.html: a whole run on one page that needs no network and no other file.

Made from what lies in the run directory alone, so it can be made again: `python -m argrpo_cli.runs.report RUN_DIR`.
What an earlier version did not write is left out. This file says what is on the page, `report.html.j2` how it looks.
"""

from __future__ import annotations

import base64
import io
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from argrpo_cli.pictures import opened_image
from argrpo_cli.rewards import REWARDS, check_reward
from argrpo_cli.runs import curves
from argrpo_cli.runs.curves import COLOURS, NO_STAGE, STAGES, Panel, Record, Roles
from argrpo_cli.runs.learning import conclusions, last
from argrpo_cli.runs.run import duration, now
from argrpo_cli.system.errors import BadPicture, exit_code
from argrpo_cli.system.files import fill_template, read_text, write_text

if TYPE_CHECKING:
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.runs.run import RunDirectory

REPORT, CURVES = "report.html", "curves.png"
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
    shown = curves.panels(records, reward_roles(recipe, notes))
    plots = [curves.panel_svg(panel, [record["step"] for record in records]) for panel in shown]
    changes = list(_changes(shown))
    page = fill_template(
        Path(__file__).with_name(f"{REPORT}.j2"),
        recipe=recipe,
        recipe_text=read_text(run.recipe_file),
        state=_state(recipe, records, notes, training),
        facts=_facts(recipe, records, notes),
        conclusions=[] if training else conclusions(records, recipe.optim.batch_size, notes),
        transfer=[_transfer_row(row) for row in notes.get("transfer") or []],
        drift=[(part, f"{100 * moved:.2g} %") for part, moved in (last(records, "drift") or {}).items()],
        warnings=notes.get("warnings") or [],
        grids=list(_grids(run.root / "grids")),
        panels=[(number, panel, plots[number][0]) for number, panel in enumerate(shown)],
        numbers=[numbers for _, numbers in plots],
        colours=COLOURS,
        axis={"left": curves.LEFT, "span": curves.WIDTH - curves.LEFT - curves.RIGHT, "width": curves.WIDTH},
        changes=changes,
        share=f"{curves.SHARE:.0%}",
        errors_from=None if any("±" in cell for _, *cells in changes for cell in cells) else curves.LEAST,
        stages=_stages(records, recipe.optim.batch_size),
        versions=notes.get("versions") or {},
    )
    path = run.root / REPORT
    write_text(path, page)
    return path


def refresh_report(run: RunDirectory, recipe: Recipe, *, training: bool = False, pictures: bool = False) -> None:
    """Write the page, and curves.png if asked; if that fails it is said, and no more: a run has better things to do."""

    def draw() -> None:
        roles = reward_roles(recipe, run.notes())
        curves.draw_curves(run.metrics(), run.root / CURVES, recipe.name, roles)

    run.spare(REPORT, lambda: write_report(run, recipe, training=training))
    if pictures:
        run.spare(CURVES, draw)


def reward_roles(recipe: Recipe, notes: Mapping[str, Any]) -> Roles:
    """Family and weight of each reward: as noted when training started, or as far as the recipe tells."""
    if notes.get("rewards"):
        return notes["rewards"]
    return {
        term.name: {
            "family": check_reward(term.name).family if term.name in REWARDS else None,
            "weight": term.weight * term.factor,
        }
        for term in recipe.rewards.terms
    }


def _state(recipe: Recipe, records: Sequence[Record], notes: Mapping[str, Any], training: bool) -> str:
    done = records[-1]["step"] if records else 0
    finished = notes.get("finished")
    if training:
        return f"training: {done} of {recipe.optim.steps} updates so far"
    if finished and finished.get("out_of_time"):
        return f"finished at the time limit, after {done} of {recipe.optim.steps} updates"
    if finished:
        return f"finished: {done} update{'s' * (done != 1)}"
    return f"stopped after {done} of {recipe.optim.steps} updates"


def _facts(recipe: Recipe, records: Sequence[Record], notes: Mapping[str, Any]) -> dict[str, str]:
    seconds = records[-1].get("seconds_total") if records else None
    images = sum(record.get("images_per_second") is not None for record in records) * recipe.optim.batch_size
    facts = {
        "training time": duration(seconds) if seconds is not None else None,
        "images drawn": f"{images:,}" if images else None,
        "images per update": f"{recipe.optim.batch_size}"
        + (f", in groups of {recipe.grpo.group_size}" if recipe.method == "grpo" else ""),
        "policy": recipe.policy.checkpoint + (f", after {recipe.start.name} (start/{REPORT})" if recipe.start else ""),
        "device": notes.get("device"),
        "started": notes.get("started"),
        "page written": now(),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _grids(folder: Path) -> Iterator[tuple[int, str]]:
    """Step and content of the grids that are shown, without damaged ones."""
    numbers = {path: path.stem.rpartition("_")[2] for path in folder.glob("step_*.png")}
    grids = sorted((int(number), path) for path, number in numbers.items() if number.isdecimal())
    if len(grids) > MOST_GRIDS:
        grids = [grids[round(index * (len(grids) - 1) / (MOST_GRIDS - 1))] for index in range(MOST_GRIDS)]
    for step, path in grids:
        with suppress(BadPicture):
            yield step, _data_uri(path)


def _data_uri(path: Path) -> str:
    """A picture inside the page: as it is when small, else no wider than the page needs and as JPEG."""
    from PIL import Image

    with opened_image(path) as image:
        image.load()
        content, kind = path.read_bytes(), "png"
        if len(content) > PNG_BYTES or image.width > MOST_PIXELS:
            small = image.convert("RGB")
            if small.width > MOST_PIXELS:
                height = round(small.height * MOST_PIXELS / small.width)
                small = small.resize((MOST_PIXELS, height), Image.Resampling.LANCZOS)
            packed = io.BytesIO()
            small.save(packed, format="JPEG", quality=88, subsampling=0)
            content, kind = packed.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _changes(shown: Sequence[Panel]) -> Iterator[tuple[str, str, str, str]]:
    """Measure, first and last tenth of the updates, and their difference."""
    for panel in shown:
        for line in panel.lines:
            moved = None if panel.exact else curves.change(line.values)
            if moved is not None:
                yield (
                    f"{panel.title}: {line.label}" if line.label else panel.title,
                    with_error(moved.first, moved.first_error),
                    with_error(moved.last, moved.last_error),
                    with_error(moved.difference, moved.error, "+"),
                )


def _transfer_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    gained = with_error(row["gain"], row["error"], "+")
    return row["name"], f"{row['start']:.3f}", f"{row['trained']:.3f}", gained, str(row["images"])


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


def _stages(records: Sequence[Record], batch_size: int) -> list[dict[str, str]]:
    """Where the time went: name, colour, time, width of the bar, share and speed of each stage."""
    total = records[-1].get("seconds_total") if records else None
    if not total:
        return []
    seconds = {stage: [record.get(f"seconds_{stage}") or 0.0 for record in records] for stage in STAGES}
    parts = [
        (stage, sum(each), COLOURS[stage])
        for stage, each in seconds.items()
        if sum(each) / total > 0.0005 and max(each) > NO_STAGE
    ]
    rest = max(0.0, total - sum(map(sum, seconds.values())))
    rows = []
    for name, time, colour in [*parts, ("grids, checkpoints, the rest", rest, "var(--rule)")]:
        images = batch_size * sum(each > NO_STAGE for each in seconds.get(name, []))
        rows.append(
            {
                "name": name,
                "colour": colour,
                "time": duration(time),
                "width": f"{100 * time / total:.2f}%",
                "share": f"{time / total:.0%}",
                "speed": f"{images / time:.1f}" if images and time > 0 else "",
            }
        )
    return rows


if __name__ == "__main__":
    from argrpo_cli.recipe import load_recipe
    from argrpo_cli.runs.run import RunDirectory

    root = Path(sys.argv[1])
    with exit_code("report"):
        print(write_report(RunDirectory(root), load_recipe(root / "recipe.yaml")))
