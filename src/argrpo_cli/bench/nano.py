"""Speed of the nano policy on this machine: `python -m argrpo_cli.bench nano`.

Prints images per second of sampling with and without the key-value cache, measured in turns in one process so
that their ratio means something on a busy machine, and where the time of a sampled image goes.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F

from argrpo_cli.bench import machine, measure
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.llamagen.model import Encoded, LlamaGenForImageGeneration
from argrpo_cli.policy.llamagen.sample import image_uniforms, inverse_cdf
from argrpo_cli.shapes import Sampling
from argrpo_cli.system.processes import resolve_device


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m argrpo_cli.bench nano", description=__doc__)
    parser.add_argument("--policy", default="nano-c2i")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--cfg-scale", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)

    device = resolve_device(options.device)
    policy = load_policy(options.policy, device=device)
    sampling = Sampling(cfg_scale=options.cfg_scale)
    encoded = policy.encode(policy.conditions(index % len(policy.card.names) for index in range(options.batch_size)))
    seeds = list(range(options.batch_size))

    def cached() -> torch.Tensor:
        return policy.sample(encoded, sampling, seeds).tokens

    def uncached() -> torch.Tensor:
        return sample_without_cache(policy.model, encoded, options.cfg_scale, seeds)

    # The first calls are the warm-up; they also show that both draw the same images.
    tokens = cached()
    same = (tokens == uncached()).float().mean().item()
    times = measure({"cached": cached, "uncached": uncached, "decode": lambda: policy.decode(tokens)}, options.repeats)

    batch, whole = options.batch_size, times["cached"] + times["decode"]
    print(machine(device))
    print(f"{options.policy}, batch {batch}, cfg {options.cfg_scale:g}, median of {options.repeats}")
    print(f"tokens with the cache       {batch / times['cached']:8.1f} images/s")
    print(f"tokens without the cache    {batch / times['uncached']:8.1f} images/s")
    print(f"ratio                       {times['uncached'] / times['cached']:8.1f} x")
    print(f"same tokens                 {same:8.1%}")
    print(f"tokens and pixels           {batch / whole:8.1f} images/s")
    print(f"time in tokens              {times['cached'] / whole:8.1%}")
    print(f"time in pixels              {times['decode'] / whole:8.1%}")


@torch.inference_mode()
def sample_without_cache(
    model: LlamaGenForImageGeneration, encoded: Encoded, cfg_scale: float, seeds: list[int]
) -> torch.Tensor:
    """The same tokens int64 [B, T] as `sample_tokens` draws, with the whole prefix run again for every token."""
    length = model.config.block_size
    uniforms = image_uniforms(seeds, length, encoded.condition.device)
    tokens = torch.empty(len(encoded), 0, dtype=torch.int64, device=encoded.condition.device)
    for index in range(length):
        hidden = model.model(encoded, F.pad(tokens, (0, 1)), cfg_scale)[:, -1]
        chosen = inverse_cdf(model.lm_head(hidden).float(), uniforms[:, index])
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
    return tokens
