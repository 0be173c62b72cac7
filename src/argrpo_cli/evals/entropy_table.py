"""The results of `argrpo entropy`: a table for the terminal, numbers for other tools, and the curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from argrpo_cli.errors import UserError
from argrpo_cli.evals.entropy import MODES, NORMAL_95, Question
from argrpo_cli.files import atomic_path, check_writable, make_dir, read_jsonl, write_jsonl

NUMBERS, CURVE = "entropy.jsonl", "curve.png"


def claim(out: Path, question: Question) -> None:
    """Refuse a folder that cannot be written, has other things in it, or holds the entropy on other images.

    Raises:
        UserError: what is in the way.
    """
    check_writable(out)
    if not out.is_dir():
        return
    others = [path.name for path in out.iterdir() if path.name not in (NUMBERS, CURVE) and path.name[0] != "."]
    if others:
        raise UserError(f"{out} is not empty (there is {min(others)}); choose another --out")
    rows = read_jsonl(out / NUMBERS) if (out / NUMBERS).is_file() else []
    if rows and (rows[0].get("split"), rows[0].get("asked")) != (question.split, question.prompts):
        raise UserError(f"{out} holds the entropy on other images; choose another --out")


def write_results(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """entropy.jsonl and curve.png in the folder `out`."""
    write_jsonl(make_dir(out) / NUMBERS, rows)
    draw(rows, out / CURVE)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Two panels: mean entropy against step (or by policy) with 95 % intervals, and entropy by position."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["policy"] for row in rows))
    steps = {row["policy"]: row["step"] for row in rows}
    along_run = len(names) > 1 and all(step is not None for step in steps.values())
    for mode, color in zip(MODES, ("tab:blue", "tab:orange"), strict=True):
        own = [row for row in rows if row["mode"] == mode]
        x = [steps[row["policy"]] if along_run else names.index(row["policy"]) for row in own]
        error = [NORMAL_95 * row["standard_error"] for row in own]
        left.errorbar(x, [row["mean"] for row in own], error, color=color, marker="o", capsize=3, label=mode,
                      linestyle="-" if along_run else "none")  # fmt: skip
    left.set_ylabel("entropy, nats per token")
    left.set_xlabel("step" if along_run else "")
    if not along_run:
        left.set_xticks(range(len(names)), names)
        left.set_xlim(-0.5, len(names) - 0.5)
    left.legend()
    left.grid(alpha=0.3)
    shown = [name for name in names if name in (names[0], names[-1])]
    for name, style in zip(shown, ("-", "--"), strict=False):
        for mode, color in zip(MODES, ("tab:blue", "tab:orange"), strict=True):
            row = next(row for row in rows if row["policy"] == name and row["mode"] == mode)
            right.plot(row["by_position"], style, color=color, label=f"{name}, {mode}", linewidth=1.3)
    right.set_xlabel("position of the token")
    right.set_ylabel("entropy, nats")
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def table(rows: Sequence[dict[str, Any]]) -> Any:
    """A Rich table, one line per policy."""
    from rich.table import Table

    first = rows[0]
    what = f"split {first['split']}" if first["split"] else f"samples of the prompts {first['prompts']}"
    out = Table(title=f"entropy in nats per token, {first['images']} images, {what}; ± 95 % interval")
    out.add_column("policy")
    changes = any("change" in row for row in rows)
    for mode in MODES:
        out.add_column(mode if mode == "conditional" else f"guided, cfg {first['cfg_scale']:g}", justify="right")
        if changes:
            out.add_column("change", justify="right")
    for name in dict.fromkeys(row["policy"] for row in rows):
        cells = []
        for row in (row for row in rows if row["policy"] == name):
            cells.append(f"{row['mean']:.4f} ± {NORMAL_95 * row['standard_error']:.4f}")
            if changes:
                has = "change" in row
                cells.append(f"{row['change']:+.4f} ± {NORMAL_95 * row['change_error']:.4f}" if has else "")
        out.add_row(name, *cells)
    return out
