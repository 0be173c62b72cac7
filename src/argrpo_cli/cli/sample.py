"""`argrpo sample`: draw images from a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from argrpo_cli.cli.options import (
    BatchSizeOption,
    CfgScaleOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)


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
            help="Captions of a set (nano, geneval-nano, geneval-nano-extra, geneval) or of a .txt or .jsonl file.",
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", "--per-class", min=1, help="Images per class or prompt.")] = 8,
    seed: Annotated[
        int,
        typer.Option("--seed", min=0, help="Seed of the first image of each; the next take seed + 1, ..."),
    ] = 0,
    cfg_scale: CfgScaleOption = 2.0,
    temperature: TemperatureOption = 1.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    cfg_interval: Annotated[
        int,
        typer.Option("--cfg-interval", min=-1, help="Guide decoding steps 0 to this one only, as LlamaGen; -1: all."),
    ] = -1,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float32,
    text_device: Annotated[
        str,
        typer.Option(
            "--text-device",
            metavar="same|offload|DEVICE",
            help="Of the text encoder: beside the policy, there only while it reads captions, or elsewhere.",
        ),
    ] = "same",
    npz: Annotated[
        bool, typer.Option("--npz", help="Also write samples.npz (arr_0, uint8 [N, H, W, 3]) for FID tools.")
    ] = False,
    resize: Annotated[
        int | None,
        typer.Option("--resize", min=1, help="Pixels a side to scale images to, as 384 to 256 for ImageNet's metrics."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the samples in --out.")] = False,
) -> None:
    """Draw images from a policy: PNGs, a grid and metadata.jsonl.

    The same command on an unfinished folder draws what is missing there. `torchrun --nproc_per_node=2 -m argrpo_cli
    sample --per-class 50 ...` splits the work over processes, `accelerate launch -m argrpo_cli sample ...` too.
    """
    from argrpo_cli.sample import Order, draw_samples
    from argrpo_cli.shapes import Sampling

    captions = list(prompt or ())
    if prompts is not None:
        from argrpo_cli.captions import read_captions

        captions += read_captions(prompts)
    order = Order(
        policy=policy if policy is not None else "nano-t2i" if captions else "nano-c2i",
        classes=tuple(class_ or ()),
        prompts=tuple(captions),
        n=n,
        seed=seed,
        sampling=Sampling(cfg_scale, temperature, top_k, top_p, cfg_interval, dtype.value),
        resize=resize,
    )
    samples = draw_samples(
        order, out, batch_size=batch_size, device=device, text_device=text_device, npz=npz, overwrite=overwrite
    )
    if samples.first:
        kept = f" ({samples.kept} were there already)" if samples.kept else ""
        print(f"{samples.count} images{kept} in {out}, overview in {samples.grid}")
