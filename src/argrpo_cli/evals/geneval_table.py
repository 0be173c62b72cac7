"""GenEval's figures as a table: baseline, policy, paired difference, and the paper's own where the prompts are its."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from argrpo_cli import paper_numbers
from argrpo_cli.evals.geneval_folders import OFFICIAL_SET

if TYPE_CHECKING:
    from rich.table import Table


def table(result: dict[str, Any]) -> Table:
    """What `run_geneval` or `judge_folder` gives, as a Rich table; a section for each set of prompts."""
    from rich.table import Table

    scores = result["scores"]
    names = list(scores)[::-1]  # the baseline first
    beside = {f"paper, {name}": row for name, row in paper_numbers.before_and_after(3).items()}
    if list(scores[names[0]]) != [OFFICIAL_SET]:
        beside = {}
    out = Table(title=_title(result["settings"]), caption=_caption(result, bool(beside)))
    out.add_column("category")
    out.add_column("prompts", justify="right")
    for name in [*names, *(["difference"] if "difference" in result else []), *beside]:
        out.add_column(name, justify="right")
    for part in scores[names[0]]:
        out.add_row(f"[bold]{part}[/bold]")
        for category, score in scores[names[0]][part].items():
            cells = [_cell(scores[name][part][category]) for name in names]
            if "difference" in result:
                cells.append(_cell(result["difference"][part][category], signed=True))
            cells += [f"{100 * column[category]:.1f} %" for column in beside.values()]
            out.add_row(f"  {category}", str(score["prompts"]), *cells)
        out.add_section()
    return out


def detector_line(label: dict[str, Any]) -> str:
    """The detector in words."""
    if "source" not in label:
        return f"detector: {label['name']}"
    own = "the benchmark's own weights" if label["benchmarks_own"] else "not the benchmark's own weights"
    return f"detector: {label['name']}, {label['source']} ({own}); colours: {label['colors']['name']}"


def _title(settings: dict[str, Any]) -> str:
    if "images" in settings:
        return f"GenEval of {settings['images']['count']} finished images; share correct ± standard error"
    world = "GenEval" if settings["sets"] == [OFFICIAL_SET] else "GenEval in the nano world"
    kept = "".join(
        f", {name.replace('_', '-')} {settings[name]:g}"
        for name, off in (("top_k", 0), ("top_p", 1.0))
        if settings[name] != off
    )
    return (
        f"{world}, {settings['per_prompt']} images per prompt, cfg {settings['cfg_scale']:g}{kept}, "
        f"seed {settings['seed']}; share correct ± standard error"
    )


def _caption(result: dict[str, Any], beside: bool) -> str:
    settings = result["settings"]
    lines = [
        f"{detector_line(settings['detector'])}; overall is the plain mean of the categories, as published; "
        "errors are clustered by prompt (none where a category has one)"
    ]
    if beside:
        lines.append("paper: AR-GRPO's table 3, LlamaGen-XL at 256 pixels, cfg 2, by the benchmark's own detector")
    if result.get("differs_from_paper"):
        lines.append(f"not as in the paper: {', '.join(result['differs_from_paper'])}")
    if result.get("prompts_absent"):
        lines.append(f"{result['prompts_absent']} of the 553 official prompts have no image")
    return "; ".join(lines)


def _cell(score: dict[str, Any], signed: bool = False) -> str:
    certain = not score["error"]  # nothing, or everything, was right: an error of zero would claim too much
    error = "" if certain else f" ± {100 * score['error']:.1f}"
    return f"{100 * score['mean']:{'+' if signed else ''}.1f}{error} %"
