"""`argrpo sample`: draw images from a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from argrpo_cli.cli.options import Drawing, draws


@draws()
def sample(
    out: Annotated[Path, typer.Option("--out", help="Output folder, new or empty.")],
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            help="A policy: a name, a run directory, a checkpoint folder.  [default: nano-c2i; with prompts nano-t2i]",
        ),
    ] = None,
    class_: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="NAME|ID", help="What to draw; repeatable.  [default: every class]"),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="What to draw, for a policy of captions, e.g. 'a photo of two dogs'; repeatable.",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="SET|FILE",
            help="Captions of a set (nano, geneval-nano, geneval-nano-extra, geneval), a .txt, .jsonl, .csv ...",
        ),
    ] = None,
    n: Annotated[
        int,
        typer.Option("--n", "--per-class", min=1, help="Images per class or prompt: of --seed, the next one, ..."),
    ] = 8,
    npz: Annotated[
        bool, typer.Option("--npz", help="Also write samples.npz (arr_0, uint8 [N, H, W, 3]) for FID tools.")
    ] = False,
    resize: Annotated[
        int | None,
        typer.Option("--resize", min=1, help="Pixels a side to scale images to, as 384 to 256 for ImageNet's metrics."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the samples in --out.")] = False,
    *,
    drawing: Drawing,
) -> None:
    """Draw images from a policy: PNGs, a grid and metadata.jsonl.

    The same command on an unfinished folder draws what is missing there. `torchrun --nproc_per_node=2 -m argrpo_cli
    sample --per-class 50 ...` splits the work over processes, `accelerate launch -m argrpo_cli sample ...` too.
    """
    from argrpo_cli.captions import read_captions
    from argrpo_cli.sample import Order, draw_samples

    captions = [*(prompt or ()), *(read_captions(prompts) if prompts is not None else ())]
    order = Order(
        policy=policy if policy is not None else "nano-t2i" if captions else "nano-c2i",
        classes=tuple(class_ or ()),
        prompts=tuple(captions),
        n=n,
        seed=drawing.seed,
        sampling=drawing.sampling,
        resize=resize,
    )
    samples = draw_samples(
        order,
        out,
        batch_size=drawing.batch_size,
        device=drawing.device,
        text_device=drawing.text_device,
        npz=npz,
        overwrite=overwrite,
    )
    if samples.first:
        kept = f" ({samples.kept} were there already)" if samples.kept else ""
        print(f"{samples.count} images{kept} in {out}, overview in {samples.grid}")
