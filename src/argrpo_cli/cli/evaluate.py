"""`argrpo eval`: the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from argrpo_cli.cli.options import (
    BatchSizeOption,
    CfgScaleOption,
    DeviceOption,
    PolicyOption,
    SeedOption,
    TemperatureOption,
)
from argrpo_cli.errors import UserError, did_you_mean

HERE, LATER = ("nano",), ("imagenet", "geneval", "drawbench")


SAMPLING = ("policy", "baseline", "n", "cfg_scale", "temperature", "seed")  # what finished pictures have no use for


def evaluate(
    context: typer.Context,
    benchmark: Annotated[str, typer.Argument(help="nano (imagenet, geneval and drawbench are not in this version).")],
    policy: PolicyOption = "nano-c2i",
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="A second policy, drawn with the same seeds, to compare with."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=2, help="Images per policy.")] = 2016,
    cfg_scale: CfgScaleOption = 2.0,
    temperature: TemperatureOption = 1.0,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Measure these pictures instead of a policy: a folder, or an .npz with arr_0."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the numbers here, as JSON.")] = None,
) -> None:
    """Measure a policy, alone or against a baseline with the same classes and seeds, or a set of finished pictures."""
    if benchmark in LATER:
        raise UserError(f"eval {benchmark} is not in this version; eval nano is")
    if benchmark not in HERE:
        raise UserError(f"no benchmark {benchmark!r}; there is nano{did_you_mean(benchmark, HERE + LATER)}")
    for name in SAMPLING if images is not None else ():
        if context.get_parameter_source(name).name != "DEFAULT":
            raise UserError(f"--images measures finished pictures; leave out --{name.replace('_', '-')}")
    if out is not None and out.is_dir():
        raise UserError(f"cannot write {out}: it is a folder; give the name of a file")
    from rich.console import Console

    from argrpo_cli.evals.nano_table import table
    from argrpo_cli.files import write_json

    if images is not None:
        from argrpo_cli.evals.nano_images import evaluate_images

        result = evaluate_images(images, batch_size=batch_size, device=device)
    else:
        from argrpo_cli.evals.nano import evaluate as measure

        result = measure(
            [policy] if baseline is None else [policy, baseline],
            n=n,
            cfg_scale=cfg_scale,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            device=device,
        )
    Console().print(table(result))
    if out is not None:
        write_json(out, result)
