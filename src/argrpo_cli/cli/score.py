"""`argrpo score`: reward models over a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from argrpo_cli.cli.options import BatchSizeOption, DeviceOption


def score(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images.", show_default=False)],
    rewards: Annotated[
        str, typer.Option("--rewards", help="Names of rewards, with commas between them.")
    ] = "nano-clip,nano-quality,nano-critic",
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="What every image should show, when there is no metadata.jsonl."),
    ] = None,
    class_: Annotated[
        str | None,
        typer.Option("--class", metavar="NAME", help="The same, as a class name: 'a photo of a NAME'."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where to write the scores.  [default: DIR]")] = None,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
) -> None:
    """Score a folder of images: a table, scores.jsonl and summary.json.

    Prompts come from the folder's metadata.jsonl, else from --prompt or --class, else from the file names.
    """
    from argrpo_cli.scoring import score_folder

    names = [name.strip() for name in rewards.split(",") if name.strip()]
    result = score_folder(
        folder,
        names,
        prompt=prompt,
        class_name=class_,
        out=out,
        batch_size=batch_size,
        device=device,
        show_progress=True,
    )
    _print_table(result.summary)
    if result.note:
        print(result.note)
    print(f"scores of each image in {result.scores_path}, summary in {result.summary_path}")


def _print_table(summary: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{summary['images']} images, raw scores")
    table.add_column("reward")
    table.add_column("family")
    for heading in ("mean", "std. error", "min", "max"):
        table.add_column(heading, justify="right")
    for name, row in summary["rewards"].items():
        error = "–" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
        table.add_row(name, row["family"], f"{row['mean']:.4f}", error, f"{row['min']:.4f}", f"{row['max']:.4f}")
    Console().print(table)
