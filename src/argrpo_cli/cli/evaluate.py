"""`argrpo eval`: the tables."""

from __future__ import annotations

from typing import Annotated

import typer

from argrpo_cli.cli.options import CfgScaleOption, PolicyOption, SeedOption
from argrpo_cli.errors import UserError, did_you_mean

HERE, LATER = ("nano",), ("imagenet", "geneval", "drawbench")


def evaluate(
    benchmark: Annotated[str, typer.Argument(help="nano (imagenet, geneval and drawbench are not in this version).")],
    policy: PolicyOption = "nano-c2i",
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="A second policy, drawn with the same seeds, to compare with."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=2, help="Images per policy.")] = 2016,
    cfg_scale: CfgScaleOption = 2.0,
    seed: SeedOption = 0,
) -> None:
    """Measure a policy, alone or against a baseline."""
    if benchmark in LATER:
        raise UserError(f"eval {benchmark} is not in this version; eval nano is")
    if benchmark not in HERE:
        raise UserError(f"no benchmark {benchmark!r}; there is nano{did_you_mean(benchmark, HERE + LATER)}")
    from argrpo_cli.evals.nano import evaluate as evaluate_nano

    evaluate_nano(policy=policy, baseline=baseline, n=n, cfg_scale=cfg_scale, seed=seed)
