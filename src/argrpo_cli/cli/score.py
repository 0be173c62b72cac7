"""`argrpo score`: reward models over images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from argrpo_cli.cli.options import BatchSizeOption, DeviceOption, names_in, reward_options
from argrpo_cli.system.errors import UserError


def score(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGES...", help="A folder of images, an .npz, or image files.", show_default=False),
    ],
    rewards: Annotated[
        str, typer.Option("--rewards", help="Names of rewards, or module:function, with commas between them.")
    ] = "nano-clip,nano-quality,nano-critic",
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="What every image should show, when there is no metadata.jsonl."),
    ] = None,
    class_: Annotated[
        str | None,
        typer.Option("--class", metavar="NAME", help="The same, as a class name: 'a photo of a NAME'."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="A caption for each image: .txt (one a line) or .jsonl."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="REWARD.KEY=VALUE", help="An option of a reward, such as hpsv2.version=2.0; repeatable."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write the scores.  [default: beside the images]")
    ] = None,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
) -> None:
    """Score images: a table, scores.jsonl, scores.csv, summary.json and a sheet of the best and worst.

    Prompts come from the folder's metadata.jsonl, else from --prompt, --class or --prompts, else from the file names.
    The same command after an interruption keeps the scores that are there.
    """
    from argrpo_cli.images import Said
    from argrpo_cli.score import SHEET, score_images

    names = names_in(rewards)
    result = score_images(
        images,
        names,
        said=Said(prompt, class_, prompts),
        options=reward_options(settings or [], names),
        out=out,
        batch_size=batch_size,
        device=device,
        show_progress=True,
    )
    _print_table(result.summary)
    for name, row in result.summary["rewards"].items():
        if row.get("missing"):
            told = row.get("last_error", "it said no more")
            print(f"{name} has no score for {row['missing']} images (the latest: {told})")
    if result.note:
        print(result.note)
    kept = f" ({result.kept} were scored before)" if result.kept else ""
    none = [name for name, row in result.summary["rewards"].items() if row["mean"] is None]
    if none:
        why = result.summary["rewards"][none[0]].get("last_error", "it gave none")
        raise UserError(f"{none[0]} scored none of the {result.summary['images']} images: {why}")
    print(f"scores{kept} in {result.folder}, best and worst in {result.folder / SHEET}")


def _print_table(summary: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{summary['images']} images, raw scores")
    table.add_column("reward")
    table.add_column("family")
    for heading in ("mean", "std. error", "min", "max"):
        table.add_column(heading, justify="right")
    for name, row in summary["rewards"].items():
        if row["mean"] is None:
            table.add_row(name, row["family"], *["–"] * 4)
            continue
        error = "–" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
        table.add_row(name, row["family"], f"{row['mean']:.4f}", error, f"{row['min']:.4f}", f"{row['max']:.4f}")
    Console().print(table)
