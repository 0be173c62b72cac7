"""The results of `argrpo eval nano` as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from argrpo_cli.evals.nano import (
    DIVERSITY,
    ENTROPY,
    GUIDED_ENTROPY,
    MATCH,
    MATCH_AT_SIZE,
    MIRRORED,
    RECOGNISED,
    SIZE,
    TOTAL,
)
from argrpo_cli.evals.nano_sets import FID, INCEPTION_SCORE, PRECISION, RECALL, SFID

if TYPE_CHECKING:
    from rich.table import Table

SHARES = (MIRRORED, RECOGNISED, PRECISION, RECALL)
LABELS = {
    MATCH: "rendering match, dB",
    MATCH_AT_SIZE: "match given class and size, dB",
    SIZE: "object size, pixels",
    MIRRORED: "mirrored",
    RECOGNISED: "recognised",
    INCEPTION_SCORE: "inception score",
    FID: "FID",
    SFID: "sFID",
    PRECISION: "precision",
    RECALL: "recall",
    DIVERSITY: "feature diversity",
    ENTROPY: "entropy, nats/token",
    GUIDED_ENTROPY: "entropy as guided",
    TOTAL: "total reward",
}


def table(result: dict[str, Any]) -> Table:
    """The result of `evaluate`: baseline, policy, paired difference, real scenes; or of `evaluate_images`."""
    from rich.table import Table

    columns = dict(reversed(result["policies"].items())) if "policies" in result else result["images"]
    out = Table(title=_title(result["settings"]), caption=_caption(result))
    out.add_column("measure")
    for name in [*columns, *(["difference"] if "difference" in result else []), "real scenes"]:
        out.add_column(name, justify="right")
    rewards = list(result["reward_weights"])
    for key in [*(key for key in LABELS if key != TOTAL), *rewards, TOTAL]:
        if not any(key in column for column in columns.values()):
            continue
        cells = [_cell(key, column.get(key)) for column in columns.values()]
        if "difference" in result:
            cells.append(_cell(key, result["difference"].get(key), signed=True))
        out.add_row(LABELS.get(key, key), *cells, _cell(key, result["real"].get(key)))
    if "within_class_std" in result:
        out.add_section()
        for key, spread in result["within_class_std"].items():
            out.add_row(f"within-class sd, {LABELS.get(key, key)}", f"{spread:.3f}")
    return out


def _title(settings: dict[str, Any]) -> str:
    if "images" in settings:
        return f"{settings['n']} images; ± standard error"
    return (
        f"{settings['n']} samples, cfg {settings['cfg_scale']:g}, temperature {settings['temperature']:g}, "
        f"seed {settings['seed']}; ± standard error"
    )


def _cell(key: str, value: dict[str, float] | None, signed: bool = False) -> str:
    if value is None:
        return ""
    mean, error, sign = value["mean"], value["error"], "+" if signed else ""
    if key in SHARES:
        return f"{100 * mean:{sign}.1f} ± {100 * error:.1f} %"
    return f"{mean:{sign}.3f} ± {error:.3f}"


def _caption(result: dict[str, Any]) -> str:
    lines = [
        "FID, sFID: biased upwards, the more the fewer images;",
        "jackknife errors; real scenes: some against the others",
    ]
    if "images" in result:
        lines.append("errors: of drawing the samples, given the reference scenes")
        if not result["settings"]["classes_known"]:
            lines.append("classes unknown (no class_id in a metadata.jsonl)")
        return "\n".join(lines)
    tokenizer = result["tokenizer"]
    psnr = f"{tokenizer['psnr']:.2f} dB on unseen scenes" if tokenizer["psnr"] is not None else tokenizer["note"]
    lines.insert(0, f"tokenizer: PSNR {psnr}; {tokenizer['codebook_used']:.0%} of the codebook in use")
    lines.append("errors: of drawing the samples, given the reference scenes and the training run")
    if "difference" in result:
        change = result["difference"][TOTAL]["mean"] / result["within_class_std"][TOTAL]
        lines.append(f"the total reward changed by {change:+.2f} within-class standard deviations of the baseline")
    return "\n".join(lines)
