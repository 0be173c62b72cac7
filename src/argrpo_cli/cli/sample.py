"""`argrpo sample`: draw images from a policy."""

from __future__ import annotations

from pathlib import Path

from argrpo_cli.cli.options import Drawing, command, present, tell


@command(least={"n": 1, "resize": 1})
def sample(
    out: Path,
    policy: str | None = None,
    class_: list[str] | None = None,
    prompt: list[str] | None = None,
    prompts: str | None = None,
    n: int = 8,
    npz: bool = False,
    resize: int | None = None,
    overwrite: bool = False,
    *,
    drawing: Drawing,
) -> None:
    """Draw images from a policy: PNGs, a grid and metadata.jsonl.

    The same command on an unfinished folder draws what is missing there. `torchrun --nproc_per_node=2 -m argrpo_cli
    sample --per-class 50 ...` splits the work over processes, `accelerate launch -m argrpo_cli sample ...` too.

    Options:
        --out: Output folder, new or empty.
        --policy: A policy: a name, a run directory, a checkpoint folder.  [default: nano-c2i; with prompts nano-t2i]
        --class NAME|ID: What to draw; repeatable.  [default: every class]
        --prompt TEXT: What to draw, for a policy of captions, e.g. 'a photo of two dogs'; repeatable.
        --prompts SET|FILE: Captions of a set (nano, geneval-nano, geneval-nano-extra, geneval), a .txt, .jsonl,
            .csv ...
        --n, --per-class: Images per class or prompt: of --seed, the next one, ...
        --npz: Also write samples.npz (arr_0, uint8 [N, H, W, 3]) for FID tools.
        --resize: Pixels a side to scale images to, as 384 to 256 for ImageNet's metrics.
        --overwrite: Replace the samples in --out.
    """
    from argrpo_cli.captions import read_captions
    from argrpo_cli.listing import METADATA
    from argrpo_cli.sample import GRID, NPZ, Order, draw_samples

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
    if samples is not None:  # the first of several processes tells
        count, before = samples
        files = {"grid": GRID, "metadata": METADATA, **({"npz": NPZ} if npz else {})}
        paths = {name: str(out / file) for name, file in files.items()}
        present(lambda: {"out": str(out), "policy": order.policy, "images": count, "drawn_before": before, **paths})
        kept = f" ({before} were there already)" if before else ""
        tell(f"{count} images{kept} in {out}, overview in {out / GRID}")
