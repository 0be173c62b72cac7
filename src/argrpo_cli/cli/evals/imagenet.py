"""`argrpo eval imagenet`: IS, FID, sFID, precision and recall against ADM's reference batch."""

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
    TemperatureOption,
    TopKOption,
    TopPOption,
)
from argrpo_cli.system.errors import UserError

DRAWING = (  # what finished pictures have no use for
    "policy", "baseline", "n", "cfg_scale", "temperature", "top_k", "top_p", "seed", "dtype", "resize", "keep_images",
)  # fmt: skip


def imagenet(
    context: typer.Context,
    policy: Annotated[
        str | None, typer.Option("--policy", help="A policy of classes: a name, a run directory, a checkpoint folder.")
    ] = None,
    baseline: BaselineOption = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Measure these pictures instead of a policy: a folder, or an .npz with arr_0."),
    ] = None,
    reference: Annotated[
        str,
        typer.Option(
            "--reference",
            metavar="adm-256|PATH",
            help="ADM's batch (fetched, 2 GB), a folder of pictures, an .npz of images or of statistics, or both.",
        ),
    ] = "adm-256",
    n: Annotated[int, typer.Option("--n", "--total", help="Images per policy.")] = 50_000,
    cfg_scale: CfgScaleOption = 2.0,
    temperature: TemperatureOption = 1.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the noise; another, other images.")] = 0,
    dtype: DtypeOption = Dtype.float32,
    resize: Annotated[
        int | None,
        typer.Option(
            "--resize", help="Pixels a side of a policy's images before Inception.  [default: 256 for larger ones]"
        ),
    ] = None,
    inception: Annotated[
        Path | None, typer.Option("--inception", help="Inception's weights as a file.  [default: fetched]")
    ] = None,
    keep_images: Annotated[bool, typer.Option("--keep-images", help="Keep the pictures that a policy draws.")] = False,
    keep_features: Annotated[bool, typer.Option("--keep-features", help="Keep Inception's features.")] = False,
    statistics: Annotated[
        Path | None,
        typer.Option("--save-statistics", help="A file for the reference's statistics, as ADM's files have them."),
    ] = None,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    out: Annotated[Path, typer.Option("--out", help="Folder for the numbers, and what is kept.")] = Path("imagenet"),
) -> None:
    """ImageNet's measures: IS, FID, sFID, precision and recall as ADM's evaluator computes them.

    Of a policy, alone or against a baseline with the same seeds, or of finished pictures. Interrupted, the same command
    goes on where it stopped; `torchrun --nproc_per_node=2 -m argrpo_cli eval imagenet ...` splits the work.
    """
    drawing = [name for name in DRAWING if context.get_parameter_source(name).name != "DEFAULT"]
    if images is not None and drawing:
        raise UserError(f"--images measures finished pictures; leave out --{drawing[0].replace('_', '-')}")
    if policy is None and images is None and (statistics is None or drawing):
        raise UserError("nothing to measure; give --policy, such as c2i-b-256, or --images")
    from rich.console import Console

    from argrpo_cli.system.files import check_writable

    if statistics is not None and statistics.is_dir():
        raise UserError(f"cannot write {statistics}: it is a folder; give the name of a file")
    if statistics is not None:
        check_writable(statistics.parent)
    if policy is None and images is None:
        from argrpo_cli.evals.imagenet import save_reference_statistics

        if save_reference_statistics(reference, statistics, inception, batch_size, device):
            print(f"the statistics of {reference} are in {statistics}")
        return
    from argrpo_cli.evals.imagenet import ImagenetSettings, run_imagenet
    from argrpo_cli.evals.imagenet_table import table

    complaints = Console(stderr=True)
    result = run_imagenet(
        [policy, *([baseline] if baseline else [])] if policy is not None else [],
        images,
        out,
        ImagenetSettings(n, cfg_scale, temperature, top_k, top_p, seed, dtype.value, resize),
        reference=reference,
        inception=inception,
        batch_size=batch_size,
        device=device,
        keep_images=keep_images,
        keep_features=keep_features,
        statistics=statistics,
        warn=lambda text: complaints.print(
            f"WARNING: {text}", style="bold yellow", markup=False, highlight=False, soft_wrap=True
        ),
    )
    if result is None:
        return
    Console().print(table(result))
    print(f"figures, warnings and protocol are in {out / 'summary.json'}")
