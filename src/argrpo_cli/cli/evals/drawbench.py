"""`argrpo eval drawbench`: what seven reward models say of pictures of DrawBench's prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from argrpo_cli.cli.options import (
    BaselineOption,
    BatchSizeOption,
    CfgScaleOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    SeedOption,
    TemperatureOption,
)

IMAGES = 5
COLUMNS = "clip,hpsv2,aesthetic,deqa,imagereward,pickscore,unified-reward"
HUB = "sayakpaul/drawbench"


def drawbench(
    policy: Annotated[
        str, typer.Option("--policy", help="A policy of captions: a name, a run directory, a checkpoint folder.")
    ] = "t2i-xl-256",
    baseline: BaselineOption = None,
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts",
            metavar="FILE|NAME",
            help="A .txt, .jsonl, .csv, .tsv or .json file, a data set of the hub, or bundled captions such as nano.",
        ),
    ] = HUB,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only so many prompts, for a trial.")] = None,
    columns: Annotated[str, typer.Option("--columns", help="Names of rewards with commas between them.")] = COLUMNS,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="REWARD.KEY=VALUE", help="An option of a reward, such as deqa.url=http://...; repeatable."
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", "--per-prompt", help="Images per prompt.")] = IMAGES,
    cfg_scale: CfgScaleOption = 2.0,
    temperature: TemperatureOption = 1.0,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = 32,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float32,
    out: Annotated[Path, typer.Option("--out", help="Folder for images, scores and numbers.")] = Path("drawbench"),
) -> None:
    """DrawBench: reward models over 200 prompts with five images each, beside table 4 of the paper.

    Interrupted, the same command goes on where it stopped; other --columns of the same images go to the same --out.
    """
    from rich.console import Console

    from argrpo_cli.cli.score import reward_options
    from argrpo_cli.evals.drawbench import run_drawbench, table
    from argrpo_cli.evals.drawbench_images import Drawing
    from argrpo_cli.evals.drawbench_prompts import read_prompts

    names = [name.strip() for name in columns.split(",") if name.strip()]
    result = run_drawbench(
        [policy, *([baseline] if baseline else [])],
        read_prompts(prompts, limit),
        out,
        names,
        Drawing(n, cfg_scale, temperature, seed, dtype.value),
        reward_options(settings or [], names, "--columns"),
        batch_size,
        device,
    )
    if result is None:  # the first of several processes tells
        return
    Console().print(table(result))
    for warning in result["warnings"]:
        print(f"WARNING: {warning}")
    print(f"images, scores and summary.json in {out}")
