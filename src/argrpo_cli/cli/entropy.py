"""`argrpo entropy`: how undecided a policy is, per token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from argrpo_cli.cli.options import BatchSizeOption, CfgScaleOption, DeviceOption, SeedOption, TemperatureOption
from argrpo_cli.errors import UserError


def entropy(
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            help="A policy to measure; repeatable, the first is compared with.  "
            "[default: nano-c2i; with --prompts nano-t2i]",
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="RUN_DIR", help="All checkpoints of a training run, in one curve.")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Held-out images to walk along: val.  [default: val]")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="SET|FILE", help="Walk along samples of these prompts: geneval, or a file."),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="At most so many images.  [default: all]")] = None,
    cfg_scale: CfgScaleOption = 2.0,
    temperature: TemperatureOption = 1.0,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    out: Annotated[Path, typer.Option("--out", help="Folder for entropy.jsonl and curve.png.")] = Path("entropy"),
) -> None:
    """Measure the entropy of policies in nats per token, conditional and guided, and by position."""
    from rich.console import Console

    from argrpo_cli.evals.entropy import Question, Subject, measure, subjects_of_run
    from argrpo_cli.evals.entropy_table import claim, table, write_results

    if split is not None and prompts is not None:
        raise UserError("give --split or --prompts, not both")
    if run is not None and policy:
        raise UserError("give --policy or --run, not both")
    default = "nano-t2i" if prompts is not None else "nano-c2i"
    chosen = subjects_of_run(run) if run is not None else [Subject(one, one) for one in policy or [default]]
    names = [one.name for one in chosen]
    if len(set(names)) < len(names):
        raise UserError(f"--policy names {next(name for name in names if names.count(name) > 1)} twice")
    question = Question(None if prompts is not None else split or "val", prompts, n, seed)
    claim(out, question)
    rows = measure(chosen, question, cfg_scale, temperature, batch_size, device)
    write_results(rows, out)
    Console().print(table(rows))
    print(f"numbers, also by position, in {out / 'entropy.jsonl'}, picture in {out / 'curve.png'}")
