"""What the benchmarks' commands share: policies, finished pictures, a judge, and the table at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from argrpo_cli.cli.options import OF_A_POLICY, Drawing, present, read_settings, set_options, tell, warn
from argrpo_cli.shapes import Result, Sampling
from argrpo_cli.system.errors import UserError


def show_result(result: Result | None, words: str) -> None:
    """A result as a table, and what it left on disk; of several processes only the first has one to tell of."""
    if result is None:
        return
    from argrpo_cli.evals.tables import table

    present(result.plain, lambda width: table(result, width))
    if words:
        tell(words)


def run_options(drawing: Drawing, baseline_cfg_scale: float | None) -> dict[str, Any]:
    """What `benchmark.run` takes of every benchmark."""
    return {**vars(drawing), "baseline_cfg_scale": baseline_cfg_scale, "warn": warn}


def judge_options(name: str, judge: str | None, url: str | None, settings: list[str] | None) -> dict[str, Any]:
    """What --judge, --url and --set say of the judge of a benchmark."""
    options = read_settings(settings, [name], "the judge's options,").get(name, {})
    return options | {key: value for key, value in (("model", judge), ("url", url)) if value is not None}


def networks_of(names: str | None) -> list[str]:
    """The networks of `--diversity`; UserError for one that there is not."""
    if names is None:
        return []
    from argrpo_cli.evals.diversity_networks import check_networks

    networks = [name.strip() for name in names.split(",") if name.strip()]
    check_networks(networks)
    return networks


def both_policies(policy: str, baseline: str | None, cfg_scale: float | None) -> list[str]:
    """The policies; UserError for guidance of a baseline that is none, or out of range."""
    if cfg_scale is not None:
        if baseline is None:
            raise UserError(f"--baseline-cfg-scale {cfg_scale:g}: there is no --baseline")
        Sampling(cfg_scale=cfg_scale).check("--baseline-")
    return [policy] if baseline is None else [policy, baseline]


def check_images(context: typer.Context, images: Path | None, kind: str = "folder or .npz file") -> None:
    """UserError where finished pictures, if any, are not there, or an option says how a policy draws some."""
    if images is None:
        return
    for name in set_options(context, OF_A_POLICY):
        raise UserError(f"--images measures finished pictures; leave out --{name.replace('_', '-')}")
    if not images.exists():
        raise UserError(f"no {kind} {images}")


def check_file(path: Path | None) -> None:
    """UserError where a file that a command is to write, if any, cannot be written."""
    if path is None:
        return
    from argrpo_cli.system.files import check_writable

    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; give the name of a file")
    check_writable(path.parent)
