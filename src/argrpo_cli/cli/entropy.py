"""`argrpo entropy`: how undecided a policy is, per token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from argrpo_cli.cli.options import Drawing, check_policies, draws
from argrpo_cli.system.errors import UserError


@draws(without=("top_k", "top_p", "cfg_interval", "dtype", "text_device"))
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
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Real pictures for the split: ImageNet's validation set in class folders or flat with its labels, or "
            "pictures with a metadata.jsonl.  [default: scenes of the nano world]",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="DIR", help="Where tokens of pictures are kept.  [default: the user's cache]"),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option("--n", help="At most so many images; with --data of every class equally many.  [default: all]"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for entropy.jsonl and the pictures.")] = Path("entropy"),
    *,
    drawing: Drawing,
) -> None:
    """Measure the entropy of policies in nats per token, conditional and guided, and by position."""
    from argrpo_cli.captions import read_captions

    if split is not None and prompts is not None:
        raise UserError("give --split or --prompts, not both")
    if data is not None and prompts is not None:
        raise UserError("give --data or --prompts, not both")
    if cache is not None and data is None:
        raise UserError("--cache keeps tokens of pictures; give --data with it")
    if run is not None and policy:
        raise UserError("give --policy or --run, not both")
    if split not in (None, "val"):
        raise UserError(f"no split {split!r}; there is val")
    default = "nano-t2i" if prompts is not None else "nano-c2i"
    policies = policy or [default]
    if run is None:
        check_policies(policies)
    if prompts is not None:
        read_captions(prompts)
    from rich.console import Console

    from argrpo_cli.evals.entropy import Question, Subject, measure, subjects_of_run
    from argrpo_cli.evals.entropy_table import JOURNAL, NUMBERS, claim, table, write_results
    from argrpo_cli.system.processes import join_team

    chosen = subjects_of_run(run) if run is not None else [Subject(one, one) for one in policies]
    names = [one.name for one in chosen]
    if len(set(names)) < len(names):
        raise UserError(f"--policy names {next(name for name in names if names.count(name) > 1)} twice")
    folder = None if data is None else str(data)
    question = Question(None if prompts is not None else split or "val", prompts, n, drawing.seed, folder)
    team = join_team(drawing.device)
    team.lead(lambda: claim(out, question))
    rows = measure(
        chosen,
        question,
        drawing.sampling.cfg_scale,
        drawing.sampling.temperature,
        drawing.batch_size,
        team,
        out / JOURNAL,
        cache,
    )

    def report() -> None:
        pictures = write_results(rows, out)
        Console().print(table(rows))
        shown = " and ".join(str(path) for path in pictures)
        print(f"numbers, also by position, in {out / NUMBERS}, picture{'s' * (len(pictures) > 1)} in {shown}")

    team.lead(report)
