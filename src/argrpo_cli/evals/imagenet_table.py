"""The result of `argrpo eval imagenet` as a table for the terminal, beside the paper's numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from argrpo_cli.evals.imagenet_measures import FID, INCEPTION_SCORE, MEASURES, PRECISION, RECALL, SFID

if TYPE_CHECKING:
    from rich.table import Table

LABELS = {INCEPTION_SCORE: "IS ↑", FID: "FID ↓", SFID: "sFID ↓", PRECISION: "precision ↑", RECALL: "recall ↑"}
DIGITS = {INCEPTION_SCORE: 2, FID: 2, SFID: 2, PRECISION: 3, RECALL: 3}


def table(result: dict[str, Any]) -> Table:
    """A column for each set, baseline first, the paired difference, and the paper's where it has the policy."""
    from rich.table import Table

    protocol = result["protocol"]
    counts = " and ".join(f"{one:,}" for one in dict.fromkeys(own["images"] for own in protocol["measured"].values()))
    drawn = protocol["settings"]
    how = f", cfg {drawn['cfg_scale']:g}, temperature {drawn['temperature']:g}, seed {drawn['seed']}" if drawn else ""
    names, paper = list(result["policies"])[::-1], result.get("paper")
    out = Table(
        title=f"{counts} images{how}; ± standard error",
        caption=f"reference: {protocol['reference']['name']}; the protocol in summary.json says what the errors are of",
        min_width=70,  # or the title is broken over four lines
    )
    out.add_column("measure")
    for name in [*names, *(["difference"] if "difference" in result else [])]:
        out.add_column(name, justify="right")
    if paper:
        out.add_column(f"paper: {paper['policy']}", justify="right")
        out.add_column("after AR-GRPO", justify="right")
    for key in MEASURES:
        cells = [_cell(key, result["policies"][name].get(key)) for name in names]
        if "difference" in result:
            cells.append(_cell(key, result["difference"].get(key), "+"))
        published = [f"{paper[row][key]:.2f}" for row in ("base", "trained")] if paper else []
        out.add_row(LABELS[key], *cells, *published)
    return out


def _cell(key: str, measure: dict[str, float | None] | None, sign: str = "") -> str:
    if measure is None:
        return "-"
    error = "" if measure["error"] is None else f" ± {measure['error']:.{DIGITS[key]}f}"
    return f"{measure['value']:{sign}.{DIGITS[key]}f}{error}"
