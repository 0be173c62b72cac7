"""`argrpo eval geneval`: does a picture show what its prompt asks for?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from argrpo_cli.cli.options import (
    BaselineOption,
    BatchSizeOption,
    CfgScaleOption,
    DeviceOption,
    SeedOption,
    TemperatureOption,
)

IMAGES = 4


def geneval(
    policy: Annotated[
        str, typer.Option("--policy", help="A policy of captions: a name, a run directory, a checkpoint folder.")
    ] = "nano-t2i",
    baseline: BaselineOption = None,
    n: Annotated[int, typer.Option("--n", help="Images per prompt.")] = IMAGES,
    cfg_scale: CfgScaleOption = 2.0,
    temperature: TemperatureOption = 1.0,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    out: Annotated[Path, typer.Option("--out", help="Folder for images, verdicts and numbers.")] = Path("geneval"),
) -> None:
    """GenEval: objects, counts, colours and positions that a caption names.

    Interrupted, the same command goes on where it stopped.
    """
    from rich.console import Console

    from argrpo_cli.evals.geneval import GenEvalSettings, run_geneval, table

    settings = GenEvalSettings(per_prompt=n, cfg_scale=cfg_scale, temperature=temperature, seed=seed)
    policies = [policy, *([baseline] if baseline else [])]
    Console().print(table(run_geneval(policies, out, settings, batch_size, device)))
    print(f"images, verdicts, prompts.jsonl, summary.json and the failures as a picture (failures.png) in {out}")
