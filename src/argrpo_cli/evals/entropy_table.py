"""The results of `argrpo entropy`: a table for the terminal, numbers for other tools, and the figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from argrpo_cli.evals.entropy import MODES, NORMAL_95, Question
from argrpo_cli.evals.entropy_figures import draw_bars, draw_curve, has_bars
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import check_writable, make_dir, read_jsonl, write_jsonl

NUMBERS, CURVE, BARS = "entropy.jsonl", "curve.png", "bars.png"
JOURNAL = ".journal"  # what was measured, chunk by chunk


def claim(out: Path, question: Question) -> None:
    """Refuse a folder that cannot be written, has other things in it, or holds the entropy on other images.

    Raises:
        UserError: what is in the way.
    """
    check_writable(out)
    if not out.is_dir():
        return
    others = [path.name for path in out.iterdir() if path.name not in (NUMBERS, CURVE, BARS) and path.name[0] != "."]
    if others:
        raise UserError(f"{out} is not empty (there is {min(others)}); choose another --out")
    rows = read_jsonl(out / NUMBERS) if (out / NUMBERS).is_file() else []
    asked = (question.split, question.prompts, question.data)
    if rows and tuple(rows[0].get(key) for key in ("split", "asked", "data")) != asked:
        raise UserError(f"{out} holds the entropy on other images; choose another --out")
    if rows and question.limit is not None and question.limit < rows[0]["images"]:
        more = f"the entropy on {rows[0]['images']} images, more than --n {question.limit}"
        raise UserError(f"{out} holds {more}; choose another --out")


def write_results(rows: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """The numbers and the pictures in the folder `out`; the paths of the pictures."""
    write_jsonl(make_dir(out) / NUMBERS, rows)
    draw_curve(rows, out / CURVE)
    if not has_bars(rows):
        (out / BARS).unlink(missing_ok=True)  # of an earlier call with more policies
        return [out / CURVE]
    draw_bars(rows, out / BARS)
    return [out / CURVE, out / BARS]


def table(rows: Sequence[dict[str, Any]]) -> Any:
    """A Rich table, one line per policy and mode."""
    from rich.table import Table

    first = rows[0]
    what = f"split {first['split']}" if first["split"] else f"samples of the prompts {first['prompts']}"
    what += f" of {first['data']}" if first["data"] else ""
    out = Table(title=f"entropy in nats per token, {first['images']} images, {what}; ± 95 % interval")
    changes = [row for row in rows if "change" in row]
    several = len({row["against"] for row in changes}) > 1
    out.add_column("policy", overflow="fold")
    out.add_column("mode", no_wrap=True)
    out.add_column("entropy", justify="right", no_wrap=True)
    if changes:
        out.add_column("change", justify="right", no_wrap=True)
    if several:
        out.add_column("against", overflow="fold")
    for row in rows:
        mode = row["mode"] if row["mode"] == "conditional" else f"guided, cfg {row['cfg_scale']:g}"
        cells = [f"{row['mean']:.4f} ± {NORMAL_95 * row['standard_error']:.4f}"]
        if changes:
            has = "change" in row
            cells.append(f"{row['change']:+.4f} ± {NORMAL_95 * row['change_error']:.4f}" if has else "")
        if several:
            cells.append(row.get("against", "") if row["mode"] == MODES[0] else "")
        out.add_row(row["policy"] if row["mode"] == MODES[0] else "", mode, *cells)
    return out
