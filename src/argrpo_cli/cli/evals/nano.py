"""`argrpo eval nano`: rendering match, fidelity, diversity and rewards of single objects."""

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
from argrpo_cli.system.errors import UserError

SAMPLING = ("policy", "baseline", "n", "cfg_scale", "temperature", "seed")  # what finished pictures have no use for
IMAGES = 2016


def nano(
    context: typer.Context,
    policy: Annotated[
        str | None,
        typer.Option("--policy", help="A policy: a name, a run directory, a checkpoint folder.  [default: nano-c2i]"),
    ] = None,
    baseline: BaselineOption = None,
    n: Annotated[int | None, typer.Option("--n", help=f"Images per policy.  [default: {IMAGES}]")] = None,
    cfg_scale: CfgScaleOption = 2.0,
    temperature: TemperatureOption = 1.0,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Measure these pictures instead of a policy: a folder, or an .npz with arr_0."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="A file for the numbers, as JSON.")] = None,
) -> None:
    """Single objects of the nano world: rendering match, fidelity, diversity and rewards.

    Of a policy, alone or against a baseline with the same seeds, or of a set of finished pictures.
    """
    for name in SAMPLING if images is not None else ():
        if context.get_parameter_source(name).name != "DEFAULT":
            raise UserError(f"--images measures finished pictures; leave out --{name.replace('_', '-')}")
    from argrpo_cli.system.files import check_writable, write_json

    if out is not None and out.is_dir():
        raise UserError(f"cannot write {out}: it is a folder; give the name of a file")
    if out is not None:
        check_writable(out.parent)
    from rich.console import Console

    from argrpo_cli.evals.nano_table import table

    if images is not None:
        from argrpo_cli.evals.nano_images import evaluate_images

        result = evaluate_images(images, batch_size=batch_size, device=device)
    else:
        from argrpo_cli.evals.nano import Sampling, evaluate

        policies = [policy or "nano-c2i", *([baseline] if baseline else [])]
        drawn = Sampling(IMAGES if n is None else n, cfg_scale=cfg_scale, temperature=temperature, seed=seed)
        result = evaluate(policies, drawn, batch_size=batch_size, device=device)
    Console().print(table(result))
    if out is not None:
        write_json(out, result)
        print(f"the numbers are in {out}")
