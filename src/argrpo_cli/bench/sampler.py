"""The sampler at a published size against LlamaGen's own algorithm: `python -m argrpo_cli.bench sampler`.

Random weights of a published geometry; time and memory do not depend on the values. These are timed in turns in one
process:

- `reference`: the published algorithm with all that it does, `sample_as_published`.
- `argrpo`: `sample_tokens`.
- `floor`: the linear layers alone, with the batch of every step and nothing between them. A sampler that leaves weights
  as they are stored cannot be faster on this machine by this library.
- `packed`: the same with weights laid out for the processor, as `argrpo` does it (`packed_linears`).

On a GPU the floor is the time to read the weights and the filled cache once per token at the bandwidth given. Shares
are the floor's time by argrpo's.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from argrpo_cli.bench import machine, measure
from argrpo_cli.policy.llamagen.config import SIZES, published_config
from argrpo_cli.policy.llamagen.model import (
    Attention,
    Encoded,
    KeyValue,
    LlamaGenForImageGeneration,
    RMSNorm,
    apply_rope,
    rope_table,
)
from argrpo_cli.policy.llamagen.sample import packed_linears, sample_tokens
from argrpo_cli.shapes import Sampling
from argrpo_cli.system.processes import resolve_device


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a table for every precision."""
    parser = argparse.ArgumentParser(prog="python -m argrpo_cli.bench sampler", description=__doc__)
    parser.add_argument("--size", default="B", choices=list(SIZES))
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--cfg-scale", type=float, default=2.0)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--bandwidth", type=float, help="of the device's memory in GB/s, for the roofline")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    config = published_config(options.size, options.image_size)
    tokens = options.batch_size * config.block_size
    print(machine(device))
    print(
        f"LlamaGen-{options.size}, {options.image_size} px ({config.block_size} tokens), {options.batch_size} images, "
        f"cfg {options.cfg_scale:g}, median of {options.repeats}"
    )
    print(f"{'':10}{'reference':>22}{'argrpo':>22}{'ratio':>8}{'floor':>17}{'packed':>17}")
    first: tuple[str, float] | None = None  # precision, and what the reference took in it
    for dtype in options.dtypes:
        model = random_policy(options.size, options.image_size, getattr(torch, dtype), device)
        classes, scale = torch.arange(options.batch_size, device=device), options.cfg_scale
        seeds = list(range(options.batch_size))
        jobs: dict[str, Callable[[], object]] = {
            "reference": partial(sample_as_published, model, classes, scale),
            "argrpo": partial(sample_tokens, model, Encoded(classes), Sampling(cfg_scale=scale), seeds=seeds),
        }
        if device == "cpu":
            jobs["floor"] = partial(linear_layers_alone, model, len(classes), scale)
            jobs["packed"] = partial(linear_layers_alone, model, len(classes), scale, packed=True)
        else:  # libraries choose their kernels on the first call
            for job in jobs.values():
                job()
            torch.cuda.reset_peak_memory_stats()
        times = measure(jobs, options.repeats)
        if device != "cpu" and options.bandwidth:
            times["floor"] = roofline_seconds(model, len(classes), scale, options.bandwidth)
        cells = "".join(f"{times[name]:9.2f} s {tokens / times[name]:5.0f} tok/s" for name in ("reference", "argrpo"))
        floors = "".join(
            f"{times[name]:8.2f} s ({times[name] / times['argrpo']:4.0%})"
            for name in ("floor", "packed")
            if name in times
        )
        print(f"{dtype:10}{cells}{times['reference'] / times['argrpo']:7.2f}x{floors}")
        first = first or (dtype, times["reference"])
        if dtype != first[0]:
            print(f"{'':10}{first[1] / times['argrpo']:.2f}x the {first[0]} reference")
        explain_memory(model, len(classes), scale, device)
        del model


def random_policy(size: str, image_size: int, dtype: torch.dtype, device: str) -> LlamaGenForImageGeneration:
    """A published geometry with random weights (a fresh LM head is zero: it would draw evenly)."""
    torch.manual_seed(0)
    model = LlamaGenForImageGeneration(published_config(size, image_size))
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    return model.to(device=device, dtype=dtype).eval()


@torch.inference_mode()
def sample_as_published(model: LlamaGenForImageGeneration, classes: Tensor, cfg_scale: float) -> Tensor:
    """LlamaGen's algorithm for class ids int64 [B] under guidance; tokens int64 [B, T].

    Step by step what the published sampler computes, needless parts included: the cache has its whole length from the
    start, a multiple of 8, and all of it is attended to under a mask of every row; keys and values are repeated for
    grouped queries, which copies them even where there are no groups; attention is the plain matrix products; the norm
    is spelt out; both halves go through the LM head; the probabilities of every step are kept.
    """
    backbone, config = model.model, model.config
    batch, length, prefix = len(classes), config.block_size, config.cls_token_num
    whole = -(-(prefix + length) // 8) * 8
    weight = backbone.embed_tokens.weight
    shape = (2 * batch, config.num_attention_heads, whole, config.head_dim)
    caches = [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in backbone.layers]
    causal = torch.ones(whole, whole, dtype=torch.bool, device=weight.device).tril().repeat(2 * batch, 1, 1)
    table = rope_table(config.grid_size, config.head_dim, prefix, config.rope_theta, weight.device)
    x = torch.cat([backbone.embed_condition(classes), backbone.embed_null(batch)]).to(weight.dtype)
    tokens, kept = [], []
    for index in range(length):
        position = torch.tensor([index], device=weight.device)
        mask, rotation = causal[:, None, position], table[position]
        for layer, cache in zip(backbone.layers, caches, strict=True):
            seen = _attend_as_published(
                layer.attention, _norm(layer.attention_norm, x), cache, position, rotation, mask
            )
            x = x + layer.attention.wo(seen)
            x = x + layer.feed_forward(_norm(layer.ffn_norm, x))
        conditional, null = model.lm_head(_norm(backbone.norm, x)).float()[:, -1].chunk(2)
        probabilities = (null + (conditional - null) * cfg_scale).softmax(-1)
        tokens.append(torch.multinomial(probabilities, 1))
        kept.append(probabilities.clone())
        x = backbone.embed_tokens(tokens[-1].repeat(2, 1))
    return torch.cat(tokens, dim=1)


def _attend_as_published(
    attention: Attention, x: Tensor, cache: KeyValue, position: Tensor, rotation: Tensor, mask: Tensor
) -> Tensor:
    heads, kv_heads = attention.heads, attention.kv_heads
    qkv = attention.wqkv(x).unflatten(-1, (-1, attention.head_dim))
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
    q, k = apply_rope(q, rotation), apply_rope(k, rotation)
    keys, values = cache
    keys[:, :, position] = k.transpose(1, 2)
    values[:, :, position] = v.transpose(1, 2)
    keys, values = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (keys, values))
    with sdpa_kernel(SDPBackend.MATH):
        seen = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask)
    return seen.transpose(1, 2).flatten(2)


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + norm.eps)).type_as(x) * norm.weight


@torch.inference_mode()
def linear_layers_alone(model: LlamaGenForImageGeneration, batch: int, cfg_scale: float, packed: bool = False) -> None:
    """Every linear layer of every step, and nothing else."""
    config, weight = model.config, model.model.embed_tokens.weight
    rows = 2 * batch if cfg_scale > 1 else batch
    x = weight.new_ones(rows, 1, config.hidden_size)
    wide = weight.new_ones(rows, 1, config.intermediate_size)
    with packed_linears(model, rows) if packed else nullcontext():
        for _ in range(config.block_size):
            for layer in model.model.layers:
                layer.attention.wqkv(x)
                layer.attention.wo(x)
                layer.feed_forward.w1(x)
                layer.feed_forward.w3(x)
                layer.feed_forward.w2(wide)
            model.lm_head(x[:batch])


def roofline_seconds(model: LlamaGenForImageGeneration, batch: int, cfg_scale: float, bandwidth: float) -> float:
    """Seconds to read all weights and the filled part of the cache once per token, at `bandwidth` GB/s."""
    config = model.config
    size = model.lm_head.weight.element_size()
    layers = sum(p.numel() for p in model.model.layers.parameters()) + model.lm_head.weight.numel()
    length = config.block_size
    rows = 2 * batch if cfg_scale > 1 else batch
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * rows
    read = length * layers + per_position * length * (length + 1) / 2
    return read * size / (bandwidth * 1e9)


def explain_memory(model: LlamaGenForImageGeneration, batch: int, cfg_scale: float, device: str) -> None:
    """Print the peak, and what it is made of."""
    mib = 2**20
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / mib
    linear = sum(m.weight.nbytes for m in model.modules() if isinstance(m, torch.nn.Linear)) / mib
    config, rows = model.config, 2 * batch if cfg_scale > 1 else batch
    positions = config.num_hidden_layers * rows * (config.cls_token_num + config.block_size)
    cache = 2 * positions * config.num_key_value_heads * config.head_dim * model.lm_head.weight.element_size() / mib
    if device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform != "darwin" else mib)
        what = "of the process so far, the reference and torch itself included"
    else:
        peak, what = torch.cuda.max_memory_allocated() / mib, "allocated, the reference included"
    packed = f" (and a packed copy of {linear:,.0f} MiB)" if device == "cpu" else ""
    print(f"{'':10}weights {weights:,.0f} MiB{packed}, cache {cache:,.0f} MiB, peak {peak:,.0f} MiB {what}")
