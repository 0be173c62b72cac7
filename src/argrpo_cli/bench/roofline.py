"""The least time a decoding step can take, on paper: `python -m argrpo_cli.bench roofline`.

A step reads every weight of the layers and of the LM head once, and the filled part of the cache of every row; it
multiplies every row by those weights. The larger of bytes by bandwidth and operations by rate is the floor. The logits
of a batch, 64 KiB an image in float32, are left out. Cards are vendors' data sheets, dense bfloat16 with float32 sums;
`--card NAME=GB/s,TFLOP/s` gives others.
"""

from __future__ import annotations

import argparse

from argrpo_cli.policy.llamagen.config import LlamaGenConfig, published_config
from argrpo_cli.system.errors import UserError

CARDS = {"H200": (4800.0, 989.0), "A100-80": (2039.0, 312.0), "RTX 4090": (1008.0, 165.0)}  # GB/s, TFLOP/s
MODELS = (("B", 256), ("L", 384), ("XL", 384))
BATCHES = (8, 64, 256)


def main(arguments: list[str] | None = None) -> None:
    """Print the table: what a step moves, and milliseconds of an average step on each card."""
    parser = argparse.ArgumentParser(prog="python -m argrpo_cli.bench roofline", description=__doc__)
    parser.add_argument("--card", action="append", metavar="NAME=GB/s,TFLOP/s", help="instead of those of data sheets")
    parser.add_argument("--cfg-scale", type=float, default=2.0)
    options = parser.parse_args(arguments)
    cards = dict(map(_card, options.card)) if options.card else CARDS
    print(f"bfloat16, cfg {options.cfg_scale:g}; an average step, ms (m: bound by memory, c: by arithmetic)")
    print(f"{'':8}{'images':>7}{'weights':>10}{'cache':>10}{'GFLOP':>8}" + "".join(f"{name:>14}" for name in cards))
    for size, pixels in MODELS:
        config = published_config(size, pixels)
        for batch in BATCHES:
            rows = rows_of(batch, options.cfg_scale)
            weights, cache, flops = step_cost(config, batch, rows, 2)
            cells = ""
            for bandwidth, rate in cards.values():
                times = {"m": (weights + cache) / bandwidth / 1e6, "c": flops / rate / 1e9}
                bound = max(times, key=times.__getitem__)
                cells += f"{times[bound]:12.3f} {bound}"
            print(
                f"{size}-{pixels:<6}{batch:>6}{weights / 1e9:>7.2f} GB{cache / 1e9:>7.2f} GB{flops / 1e9:>8.0f}{cells}"
            )


def _card(text: str) -> tuple[str, tuple[float, float]]:
    name, _, numbers = text.partition("=")
    try:
        bandwidth, rate = (float(one) for one in numbers.split(","))
    except ValueError as error:
        raise UserError(f"--card {text}: give NAME=GB/s,TFLOP/s, for instance H100=3350,989") from error
    if not (bandwidth > 0 and rate > 0):
        raise UserError(f"--card {text}: a bandwidth and a rate are above 0")
    return name, (bandwidth, rate)


def rows_of(batch: int, cfg_scale: float) -> int:
    """Rows of a decoding step: under guidance each image has two."""
    return 2 * batch if cfg_scale > 1 else batch


def layer_parameters(config: LlamaGenConfig) -> int:
    """Numbers in the matrices of all transformer layers (their norms are not worth counting)."""
    width, head = config.hidden_size, config.head_dim
    attention = width * head * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    return config.num_hidden_layers * (attention + 3 * width * config.intermediate_size)


def step_cost(config: LlamaGenConfig, batch: int, rows: int, size: int) -> tuple[float, float, float]:
    """Bytes of weights, bytes of cache and floating-point operations of a step, the mean over an image's tokens.

    Args:
        rows: as `rows_of`.
        size: bytes of a number.
    """
    layers, head = layer_parameters(config), config.hidden_size * config.vocab_size
    filled = config.cls_token_num + (config.block_size - 1) / 2  # attended to by an average token
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * rows * filled
    # A key is multiplied by a query, a value by a weight: 4 operations for each pair of numbers and head of the query.
    attended = 2 * kept * config.num_attention_heads / config.num_key_value_heads
    return (layers + head) * size, kept * size, 2 * (rows * layers + batch * head) + attended
