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
    Dtype,
    DtypeOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)
from argrpo_cli.system.errors import UserError

IMAGES = 4
DRAWING = (  # what finished pictures have no use for
    "policy", "baseline", "n", "cfg_scale", "temperature", "top_k", "top_p", "seed", "dtype", "text_device",
)  # fmt: skip


def geneval(
    context: typer.Context,
    policy: Annotated[
        str, typer.Option("--policy", help="A policy of captions: a name, a run directory, a checkpoint folder.")
    ] = "nano-t2i",
    baseline: BaselineOption = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Measure these pictures instead: a folder as the benchmark's scripts write it."),
    ] = None,
    n: Annotated[int, typer.Option("--n", "--per-prompt", help="Images per prompt.")] = IMAGES,
    cfg_scale: CfgScaleOption = 2.0,
    temperature: TemperatureOption = 1.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    detector: Annotated[
        str | None,
        typer.Option(
            "--detector",
            metavar="nano|mask2former|FILE|FOLDER",
            help="Who judges: by name, the benchmark's own .pth file, or a folder of transformers' Mask2Former.  "
            "[default: nano for a policy of the nano world, else mask2former]",
        ),
    ] = None,
    colors: Annotated[
        Path | None,
        typer.Option("--colors", help="A local file of OpenAI's CLIP ViT-L/14 in open_clip's layout, for colours."),
    ] = None,
    batch_size: BatchSizeOption = 64,
    detector_batch_size: Annotated[
        int, typer.Option("--detector-batch-size", min=1, help="Images in Mask2Former at a time.")
    ] = 8,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float32,
    text_device: Annotated[
        str, typer.Option("--text-device", metavar="same|offload|DEVICE", help="Of the text encoder, as in sample.")
    ] = "same",
    out: Annotated[Path, typer.Option("--out", help="Folder for images, verdicts and numbers.")] = Path("geneval"),
) -> None:
    """GenEval: objects, counts, colours and positions that a caption names.

    The nano prompts for a policy of the nano world, else the benchmark's 553. Interrupted, the same command goes on
    where it stopped.
    """
    for name in DRAWING if images is not None else ():
        if context.get_parameter_source(name).name != "DEFAULT":
            raise UserError(f"--images measures finished pictures; leave out --{name.replace('_', '-')}")
    from rich.console import Console

    from argrpo_cli.evals.geneval import MASK2FORMER, GenEvalSettings, judge_folder, run_geneval
    from argrpo_cli.evals.geneval_table import table

    judge = {"colors": colors, "detector_batch_size": detector_batch_size}
    if images is not None:
        result = judge_folder(images, out, batch_size, device, detector=detector or MASK2FORMER, **judge)
    else:
        settings = GenEvalSettings(n, cfg_scale, temperature, seed, None, top_k, top_p, dtype.value)
        policies = [policy, *([baseline] if baseline else [])]
        result = run_geneval(
            policies, out, settings, batch_size, device, detector=detector, text_device=text_device, **judge
        )
    if result is None:  # the first of several processes tells
        return
    Console().print(table(result))
    failed = " and the failures as a picture (failures.png)" if (out / "failures.png").is_file() else ""
    print(f"images, verdicts, prompts.jsonl, summary.json{failed} in {out}")
