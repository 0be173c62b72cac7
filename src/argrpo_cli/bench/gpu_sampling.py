"""The parts of `bench gpu` that are about the card and the sampler.

Lines that a CPU never runs end in `# CUDA`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from argrpo_cli.bench import Bench, machine
from argrpo_cli.bench.roofline import rows_of, step_cost
from argrpo_cli.bench.sampler import random_policy, sample_as_published
from argrpo_cli.policy.llamagen import sample as sampling_loop
from argrpo_cli.policy.llamagen.config import LlamaGenConfig, published_config
from argrpo_cli.policy.llamagen.model import Encoded
from argrpo_cli.policy.llamagen.pretrained import LlamaGenForImageGeneration
from argrpo_cli.policy.llamagen.sample import sample_tokens
from argrpo_cli.shapes import Sampling

# The published sampler attends to its whole cache at every token, so that all its tokens take the same time: it is
# timed on the first ones. Ours is timed on whole images.
PUBLISHED_TOKENS = 24
TOY = LlamaGenConfig(
    vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, block_size=16, num_classes=10
)


def config_of(bench: Bench, size: str, pixels: int) -> LlamaGenConfig:
    """A published geometry, or the one that stands for all in a toy run."""
    return TOY if bench.toy else published_config(size, pixels)


def card(bench: Bench) -> None:
    """What the device can do: a copy, and matrix products of random numbers."""
    free = 0.0
    if bench.device == "cuda":
        free = torch.cuda.mem_get_info()[0] / 2**30  # CUDA
    bench.row(machine(bench.device), free_GiB=free)
    count, side = (2**16, 64) if bench.toy else (2**30, 8192)
    source = torch.empty(count, dtype=torch.bfloat16, device=bench.device).normal_()
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = bench.seconds(lambda: target.copy_(source), 9)
    bench.row("copy", GB_s=2 * source.nbytes / seconds / 1e9)
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
        a @ b
        seconds = bench.seconds(lambda a=a, b=b: a @ b, 5)
        bench.row(f"matmul {dtype}".replace("torch.", ""), TFLOP_s=2 * side**3 / seconds / 1e12)


def sampler(bench: Bench) -> None:
    """The headline: XL at 384 px, 64 images, in bfloat16."""
    rows_of_model(bench, "XL", 384, torch.bfloat16, [(64, 2.0), (64, 1.0), (64, 7.5)])


def sizes(bench: Bench) -> None:
    """The other sizes and batches in bfloat16."""
    every = (
        ("L", 384, (64, 8)), ("B", 256, (64, 8)), ("XL", 384, (8, 256)), ("L", 384, (256,)), ("B", 256, (256,)),
    )  # fmt: skip
    for size, pixels, batches in every[:1] if bench.toy else every:
        rows_of_model(bench, size, pixels, torch.bfloat16, [(batch, 2.0) for batch in batches])


def float32(bench: Bench) -> None:
    """In float32 proper: TF32 is off, as torch has it."""
    every = (("B", 256, (64, 8)), ("L", 384, (64, 8)), ("XL", 384, (8, 64)))
    for size, pixels, batches in every[:1] if bench.toy else every:
        rows_of_model(bench, size, pixels, torch.float32, [(batch, 2.0) for batch in batches])


def rows_of_model(bench: Bench, size: str, pixels: int, dtype: torch.dtype, settings: list[tuple[int, float]]) -> None:
    """A row for each number of images and guidance: ours, the published algorithm, and how far ours is from what the
    card can do (the figures of the part "card")."""
    config = config_of(bench, size, pixels)
    model = random_policy(config, dtype, bench.device)
    for images, cfg_scale in settings[:1] if bench.toy else settings:
        images = 2 if bench.toy else images
        name = f"{size}-{pixels} {dtype} {images} images cfg {cfg_scale:g}".replace("torch.", "")
        figures: dict[str, float | str] = {}
        try:
            figures |= figures_of_ours(bench, model, images, cfg_scale)
            figures |= figures_of_published(bench, model, images, cfg_scale)
            figures["times"] = figures["tok_s"] / figures["published_tok_s"]
        except torch.OutOfMemoryError:  # of the one that has no figures
            figures["note"] = "out of memory"  # CUDA
        bench.row(name, **figures)


def figures_of_ours(
    bench: Bench, model: LlamaGenForImageGeneration, images: int, cfg_scale: float
) -> dict[str, float | str]:
    """A batch, and the next one, which finds the graphs of the first."""
    sampling_loop.rooms.clear()
    bench.free()
    config, dtype = model.config, model.lm_head.weight.dtype
    classes = torch.arange(images, device=bench.device) % config.num_classes
    job = partial(sample_tokens, model, Encoded(classes), Sampling(cfg_scale), range(images))
    first, again = bench.seconds(job), bench.seconds(job)
    weights, cache, flops = step_cost(config, images, rows_of(images, cfg_scale), dtype.itemsize)
    figures: dict[str, float | str] = {
        "tok_s": images * config.block_size / again,
        "ms_step": 1e3 * again / config.block_size,
        "first_s": first,
        "next_s": again,
        "GB_s": (weights + cache) * config.block_size / again / 1e9,
        "TFLOP_s": flops * config.block_size / again / 1e12,
        "GiB": bench.memory(),
    }
    if bench.card:
        rate = bench.card[f"matmul {dtype}".replace("torch.", "")]["TFLOP_s"] * 1e12
        floor = max((weights + cache) / bench.card["copy"]["GB_s"] / 1e9, flops / rate)
        figures["of_floor"] = floor * config.block_size / again
    return figures


def figures_of_published(
    bench: Bench, model: LlamaGenForImageGeneration, images: int, cfg_scale: float
) -> dict[str, float | str]:
    """The published algorithm with the same weights."""
    sampling_loop.rooms.clear()
    bench.free()
    config = model.config
    classes = torch.arange(images, device=bench.device) % config.num_classes
    some = min(config.block_size, PUBLISHED_TOKENS)
    sample_as_published(model, classes, cfg_scale, 2)
    seconds = bench.seconds(partial(sample_as_published, model, classes, cfg_scale, some))
    return {"published_tok_s": images * some / seconds, "published_GiB": bench.memory()}


def attention(bench: Bench) -> None:
    """Ways to attend with one query a row: XL at 384 px, 64 guided images, half of the cache filled."""
    from torch.nn.attention.flex_attention import flex_attention  # which loads torch's compiler

    config = config_of(bench, "XL", 384)
    rows, filled = (4, 16) if bench.toy else (128, 320)
    heads, width, dtype = config.num_attention_heads, config.head_dim, torch.bfloat16
    q = torch.randn(rows, heads, 1, width, device=bench.device, dtype=dtype)
    k, v = (torch.randn(rows, heads, filled, width, device=bench.device, dtype=dtype) for _ in range(2))
    seen = (torch.arange(filled, device=bench.device) < filled - 3)[None, None, None]
    added = torch.zeros(1, 1, 1, filled, device=bench.device, dtype=dtype).masked_fill(~seen, float("-inf"))

    def by_products() -> Tensor:
        return ((q @ k.transpose(-1, -2)) * width**-0.5 + added).softmax(-1) @ v

    def only(backend: SDPBackend, mask: Tensor | None) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    last = torch.tensor(filled - 4, device=bench.device)
    kernel = torch.compile(flex_attention) if bench.device == "cuda" else flex_attention

    def flex() -> Tensor:
        return kernel(q, k, v, score_mod=lambda score, b, h, query, key: torch.where(key <= last, score, float("-inf")))

    ways: dict[str, Callable[[], Tensor]] = {
        "bool mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=seen),
        "added mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=added),
        "no mask": lambda: F.scaled_dot_product_attention(q, k, v),
        "flash, no mask": partial(only, SDPBackend.FLASH_ATTENTION, None),
        "cudnn, added mask": partial(only, SDPBackend.CUDNN_ATTENTION, added),
        "efficient, added mask": partial(only, SDPBackend.EFFICIENT_ATTENTION, added),
        "math, added mask": partial(only, SDPBackend.MATH, added),
        "matrix products": by_products,
        "flex": flex,
    }
    exact = (q.float() @ k.float().transpose(-1, -2) * width**-0.5).masked_fill(~seen, float("-inf")).softmax(-1)
    exact = exact @ v.float()
    count = 1 if bench.toy else 20
    for name, way in ways.items():
        try:
            off = ((way().float() - exact).norm() / exact.norm()).item()  # those without a mask see 3 keys more
            seconds = bench.seconds(lambda way=way: [way() for _ in range(count)], 5) / count
        except RuntimeError as error:  # a backend that is not there on this device
            bench.row(name, note=str(error).splitlines()[0][:80])
        else:
            bench.row(name, us=1e6 * seconds, GB_s=(k.nbytes + v.nbytes) / seconds / 1e9, off=off)


def compiled(bench: Bench) -> None:
    """B at 256 px, 64 guided images: steps as they are, as graphs, and graphs of layers that torch.compile has made."""
    config = config_of(bench, "B", 256)
    images = 2 if bench.toy else 64
    model = random_policy(config, torch.bfloat16, bench.device)
    classes = torch.arange(images, device=bench.device) % config.num_classes
    job = partial(sample_tokens, model, Encoded(classes), Sampling(2.0), range(images))

    def row(name: str) -> None:
        first, again = bench.seconds(job), bench.seconds(job)
        bench.row(name, first_s=first, next_s=again, tok_s=images * config.block_size / again)

    plain = partial(sampling_loop.Decoder, bucketed=False)
    with patch.object(sampling_loop, "Decoder", plain):
        row("no graphs")
    sampling_loop.rooms.clear()
    row("graphs" if bench.device == "cuda" else "no graphs (as on a GPU)")
    sampling_loop.rooms.clear()  # or its graphs would go on with the layers as they were
    compile_layers(model, "inductor" if bench.device == "cuda" else "eager")
    row("graphs of compiled layers")


def compile_layers(model: LlamaGenForImageGeneration, backend: str) -> None:
    """Have every layer compiled on its next call, all by one piece of code where their shapes are alike."""
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend=backend)
