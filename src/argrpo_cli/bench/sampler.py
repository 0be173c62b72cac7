"""The sampler at a published size against LlamaGen's own algorithm: `python -m argrpo_cli.bench sampler`.

(`python -m argrpo_cli.bench nano` is the second benchmark of this file: the nano policy with and without the cache.)

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

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from argrpo_cli.bench import measure, parse
from argrpo_cli.bench.roofline import rows_of, step_cost
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.llamagen.config import LlamaGenConfig, published_config
from argrpo_cli.policy.llamagen.geometry import SIZES
from argrpo_cli.policy.llamagen.model import Attention, Encoded, KeyValue, RMSNorm, apply_rope, rope_table
from argrpo_cli.policy.llamagen.pretrained import LlamaGenForImageGeneration
from argrpo_cli.policy.llamagen.sample import packed_linears, sample_tokens
from argrpo_cli.policy.tokens import image_uniforms, inverse_cdf
from argrpo_cli.shapes import Sampling
from argrpo_cli.system.processes import peak_memory


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a table for every precision."""
    more = [
        ("--size", {"default": "B", "choices": list(SIZES)}),
        ("--dtypes", {"nargs": "*", "default": ["float32", "bfloat16"]}),
        ("--bandwidth", {"type": float, "help": "of the device's memory in GB/s, for the roofline"}),
    ]
    options = parse("sampler", __doc__, arguments, more, image_size=256, batch_size=8, cfg_scale=2.0, repeats=1)
    device = options.device
    config = published_config(options.size, options.image_size)
    tokens = options.batch_size * config.block_size
    print(
        f"LlamaGen-{options.size}, {options.image_size} px ({config.block_size} tokens), {options.batch_size} images, "
        f"cfg {options.cfg_scale:g}, median of {options.repeats}"
    )
    print(f"{'':10}{'reference':>22}{'argrpo':>22}{'ratio':>8}{'floor':>17}{'packed':>17}")
    first: tuple[str, float] | None = None  # precision, and what the reference took in it
    for dtype in options.dtypes:
        model = random_policy(config, getattr(torch, dtype), device)
        classes, scale = torch.arange(options.batch_size, device=device), options.cfg_scale
        jobs: dict[str, Callable[[], object]] = {
            "reference": partial(sample_as_published, model, classes, scale),
            "argrpo": partial(sample_tokens, model, Encoded(classes), Sampling(scale), seeds=range(len(classes))),
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
        floors = [times[name] for name in ("floor", "packed") if name in times]
        cells += f"{times['reference'] / times['argrpo']:7.2f}x"
        cells += "".join(f"{seconds:8.2f} s ({seconds / times['argrpo']:4.0%})" for seconds in floors)
        print(f"{dtype:10}{cells}")
        first = first or (dtype, times["reference"])
        if dtype != first[0]:
            print(f"{'':10}{first[1] / times['argrpo']:.2f}x the {first[0]} reference")
        explain_memory(model, len(classes), scale, device)
        del model


def random_policy(config: LlamaGenConfig, dtype: torch.dtype, device: str) -> LlamaGenForImageGeneration:
    """A geometry with random weights (a fresh LM head is zero: it would draw evenly), made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaGenForImageGeneration(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    return model.to(dtype=dtype).eval()


@torch.inference_mode()
def sample_as_published(
    model: LlamaGenForImageGeneration, classes: Tensor, cfg_scale: float, count: int | None = None
) -> Tensor:
    """LlamaGen's algorithm for class ids int64 [B]; tokens int64 [B, T], or the first `count` of them.

    Step by step what the published sampler computes, needless parts included: the cache has its whole length from the
    start, a multiple of 8, and all of it is attended to under a mask of every row; keys and values are repeated for
    grouped queries, which copies them even where there are no groups; attention is the plain matrix products; the norm
    is spelt out; both halves go through the LM head; the probabilities of every step are kept.
    """
    backbone, config = model.model, model.config
    batch, length, prefix = len(classes), config.block_size, config.cls_token_num
    whole = -(-(prefix + length) // 8) * 8
    weight, rows = backbone.embed_tokens.weight, rows_of(batch, cfg_scale)
    shape = (rows, config.num_attention_heads, whole, config.head_dim)
    caches = [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in backbone.layers]
    causal = torch.ones(whole, whole, dtype=torch.bool, device=weight.device).tril().repeat(rows, 1, 1)
    table = rope_table(config.grid_size, config.head_dim, prefix, config.rope_theta, weight.device)
    x = torch.cat([backbone.embed_condition(classes), backbone.embed_null(rows - batch)]).to(weight.dtype)
    tokens, kept = [], []
    for index in range(length if count is None else count):
        position = torch.tensor([index], device=weight.device)
        mask, rotation = causal[:, None, position], table[position]
        for layer, cache in zip(backbone.layers, caches, strict=True):
            seen = _attend_as_published(
                layer.attention, _norm(layer.attention_norm, x), cache, position, rotation, mask
            )
            x = x + layer.attention.wo(seen)
            x = x + layer.feed_forward(_norm(layer.ffn_norm, x))
        conditional, null = model.lm_head(_norm(backbone.norm, x)).float()[:, -1].split([batch, rows - batch])
        guided = null + (conditional - null) * cfg_scale if len(null) else conditional
        probabilities = guided.softmax(-1)
        tokens.append(torch.multinomial(probabilities, 1))
        kept.append(probabilities.clone())
        x = backbone.embed_tokens(tokens[-1].repeat(rows // batch, 1))
    return torch.cat(tokens, dim=1)


def _attend_as_published(
    attention: Attention, x: Tensor, cache: KeyValue, position: Tensor, rotation: Tensor, mask: Tensor
) -> Tensor:
    heads, kv_heads = attention.heads, attention.kv_heads
    qkv = attention.wqkv(x).unflatten(-1, (-1, attention.head_dim))
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
    q, k = apply_rope(q, rotation).to(x.dtype), apply_rope(k, rotation).to(x.dtype)
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
    rows = rows_of(batch, cfg_scale)
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
    size = model.lm_head.weight.element_size()
    weights, cache, _ = step_cost(model.config, batch, rows_of(batch, cfg_scale), size)
    return model.config.block_size * (weights + cache) / (bandwidth * 1e9)


def explain_memory(model: LlamaGenForImageGeneration, batch: int, cfg_scale: float, device: str) -> None:
    """Print the peak, and what it is made of."""
    mib = 2**20
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / mib
    linear = sum(m.weight.nbytes for m in model.modules() if isinstance(m, torch.nn.Linear)) / mib
    config, rows = model.config, rows_of(batch, cfg_scale)
    positions = config.num_hidden_layers * rows * (config.cls_token_num + config.block_size)
    cache = 2 * positions * config.num_key_value_heads * config.head_dim * model.lm_head.weight.element_size() / mib
    packed, what = "", "allocated, the reference included"
    if device == "cpu":
        packed = f" (and a packed copy of {linear:,.0f} MiB)"
        what = "of the process so far, the reference and torch itself included"
    peak = f"peak {peak_memory(device) / mib:,.0f} MiB {what}"
    print(f"{'':10}weights {weights:,.0f} MiB{packed}, cache {cache:,.0f} MiB, {peak}")


def nano(arguments: list[str] | None = None) -> None:
    """The nano policy with and without its key-value cache, and where the time of a sampled image goes."""
    options = parse("nano", nano.__doc__, arguments, policy="nano-c2i", batch_size=48, cfg_scale=2.0, repeats=5)
    batch, policy = options.batch_size, load_policy(options.policy, options.device)
    encoded = policy.encode(policy.conditions(index % len(policy.card.names) for index in range(batch)))
    jobs = {
        "cached": lambda: policy.sample(encoded, Sampling(options.cfg_scale), range(batch)).tokens,
        "uncached": lambda: sample_without_cache(policy.model, encoded, options.cfg_scale, range(batch)),
    }
    # The first calls are the warm-up; they also show that both draw the same images.
    tokens, others = (job() for job in jobs.values())
    times = measure(jobs | {"decode": lambda: policy.decode(tokens)}, options.repeats)
    whole = times["cached"] + times["decode"]
    print(f"{options.policy}, batch {batch}, cfg {options.cfg_scale:g}, median of {options.repeats}")
    print(f"tokens with the cache       {batch / times['cached']:8.1f} images/s")
    print(f"tokens without the cache    {batch / times['uncached']:8.1f} images/s")
    print(f"ratio                       {times['uncached'] / times['cached']:8.1f} x")
    print(f"same tokens                 {(tokens == others).float().mean().item():8.1%}")
    print(f"tokens and pixels           {batch / whole:8.1f} images/s")
    print(f"time in tokens              {times['cached'] / whole:8.1%}")
    print(f"time in pixels              {times['decode'] / whole:8.1%}")


@torch.inference_mode()
def sample_without_cache(
    model: LlamaGenForImageGeneration, encoded: Encoded, cfg_scale: float, seeds: Sequence[int]
) -> Tensor:
    """The same tokens int64 [B, T] as `sample_tokens` draws, with the whole prefix run again for every token."""
    length = model.config.block_size
    uniforms = image_uniforms(seeds, length, encoded.condition.device)
    tokens = torch.empty(len(encoded), 0, dtype=torch.int64, device=encoded.condition.device)
    for index in range(length):
        hidden = model.model(encoded, F.pad(tokens, (0, 1)), cfg_scale)[:, -1]
        chosen = inverse_cdf(model.lm_head(hidden).float(), uniforms[:, index])
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
    return tokens
