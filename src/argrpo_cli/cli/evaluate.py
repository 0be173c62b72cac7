"""`argrpo eval`: the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from argrpo_cli.cli.options import (
    BatchSizeOption,
    CfgScaleOption,
    DeviceOption,
    SeedOption,
    TemperatureOption,
)
from argrpo_cli.errors import UserError, did_you_mean

HERE, LATER = ("nano", "geneval"), ("imagenet", "drawbench")
SAMPLING = ("policy", "baseline", "n", "cfg_scale", "temperature", "seed")  # what finished pictures have no use for
NANO_IMAGES, GENEVAL_IMAGES = 2016, 4


def evaluate(
    context: typer.Context,
    benchmark: Annotated[str, typer.Argument(help="nano or geneval (imagenet and drawbench are not in this version).")],
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            help="A policy: a name, a run directory, a checkpoint folder.  [default: nano-c2i; for geneval nano-t2i]",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="A second policy, drawn with the same seeds, to compare with."),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option("--n", help="nano: images per policy; geneval: images per prompt.  [default: 2016; 4]"),
    ] = None,
    cfg_scale: CfgScaleOption = 2.0,
    temperature: TemperatureOption = 1.0,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    images: Annotated[
        Path | None,
        typer.Option(
            "--images", help="nano: measure these pictures instead of a policy: a folder, or an .npz with arr_0."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="nano: a file for the numbers, as JSON; geneval: a folder.  [geneval: geneval]"),
    ] = None,
) -> None:
    """Measure a policy, alone or against a baseline with the same seeds, or a set of finished pictures.

    nano: rendering match, fidelity, diversity and rewards of single objects. geneval: does a picture show what its
    prompt asks for? Interrupted, the same command goes on where it stopped.
    """
    if benchmark in LATER:
        raise UserError(f"eval {benchmark} is not in this version; eval nano and eval geneval are")
    if benchmark not in HERE:
        raise UserError(
            f"no benchmark {benchmark!r}; there are {', '.join(HERE)}{did_you_mean(benchmark, HERE + LATER)}"
        )
    for name in SAMPLING if images is not None else ():
        if context.get_parameter_source(name).name != "DEFAULT":
            raise UserError(f"--images measures finished pictures; leave out --{name.replace('_', '-')}")
    sampling = {"cfg_scale": cfg_scale, "temperature": temperature, "seed": seed}
    if benchmark == "geneval":
        if images is not None:
            raise UserError("--images is for eval nano; GenEval of finished pictures is not in this version")
        policies = [policy or "nano-t2i", *([baseline] if baseline else [])]
        _geneval(policies, out or Path("geneval"), n, sampling, batch_size, device)
        return
    from argrpo_cli.files import check_writable, write_json

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
        from argrpo_cli.evals.nano import Sampling
        from argrpo_cli.evals.nano import evaluate as measure

        policies = [policy or "nano-c2i", *([baseline] if baseline else [])]
        drawn = Sampling(NANO_IMAGES if n is None else n, **sampling)
        result = measure(policies, drawn, batch_size=batch_size, device=device)
    Console().print(table(result))
    if out is not None:
        write_json(out, result)
        print(f"the numbers are in {out}")


def _geneval(
    policies: list[str], out: Path, n: int | None, sampling: dict[str, Any], batch_size: int, device: str
) -> None:
    from rich.console import Console

    from argrpo_cli.evals.geneval import GenEvalSettings, run_geneval, table

    settings = GenEvalSettings(per_prompt=GENEVAL_IMAGES if n is None else n, **sampling)
    Console().print(table(run_geneval(policies, out, settings, batch_size, device)))
    print(f"images, verdicts, prompts.jsonl, summary.json and the failures as a picture (failures.png) in {out}")
