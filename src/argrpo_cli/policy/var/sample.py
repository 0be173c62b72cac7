"""Drawing images scale by scale: all tokens of a scale at once, with a cache of the keys and values before them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from argrpo_cli.policy.llamagen.model import Encoded, KeyValue, computed_dtype
from argrpo_cli.policy.protocol import Drawn
from argrpo_cli.policy.tokens import Draws, guide
from argrpo_cli.policy.var.model import VARForImageGeneration
from argrpo_cli.shapes import Sampling


@torch.inference_mode()
def sample_tokens(
    model: nn.Module,
    encoded: Encoded,
    sampling: Sampling,
    seeds: Sequence[int],
    logp: str | None = None,
) -> Drawn:
    """Sample images as token ids, with the log-probability of every token if asked.

    Each image has its own noise, see `tokens.Draws`. Guidance and filters are those of `Sampling`, guidance as
    `model.guidance_of_scales` has it.

    Args:
        model: a VARForImageGeneration on the device of `encoded`, or what PEFT made of one.
        seeds, logp: as of `protocol.Policy.sample`.

    Returns:
        No gradients.

    Raises:
        ValueError: class ids that there are not, or another number of seeds.
        UserError: a setting out of range, or logits that are not finite numbers.
    """
    if hasattr(model, "get_base_model"):  # of PEFT; its adapters are within the layers
        model = model.get_base_model()
    config, classes = model.config, encoded.condition
    if ((classes < 0) | (classes > config.num_classes)).any():
        raise ValueError(f"class ids must lie in 0 .. {config.num_classes} ({config.num_classes} is the null class)")
    batch, device = len(encoded), classes.device
    draws = Draws(batch, config.block_size, sampling, seeds, logp, device)
    guidance = model.guidance(sampling)
    condition = model.class_emb(classes)
    if guidance is not None:
        condition = torch.cat([condition, model.embed_null(batch)])  # conditional half first
    past = new_cache(model, len(condition))
    tokens = torch.empty(batch, config.block_size, dtype=torch.int64, device=device)
    latent, x = None, model.first(condition)
    for k, span in enumerate(config.spans):
        hidden = model.run(x, condition, past=past, filled=span.stop)
        conditional = hidden[:batch]
        steered = conditional if guidance is None else guide(conditional, hidden[batch:], guidance[k])
        tokens[:, span] = draws.choose(model.logits(steered), partial(model.logits, conditional), span)
        if k + 1 < len(config.spans):
            latent = model.quantizer.add(latent, tokens[:, span], k)
            x = model.later(model.quantizer.shrink(latent, k + 1), config.spans[k + 1])
            x = x if guidance is None else x.repeat(2, 1, 1)
    return draws.drawn(tokens)


def new_cache(model: VARForImageGeneration, rows: int) -> list[KeyValue]:
    """Keys and values [rows, heads, T, head_dim] of every layer, zero, in the dtype they are computed in."""
    config, weight = model.config, model.word_embed.weight
    shape = (rows, config.num_attention_heads, config.block_size, config.head_dim)

    def empty() -> Tensor:
        return torch.zeros(shape, dtype=computed_dtype(weight), device=weight.device)

    return [(empty(), empty()) for _ in range(config.num_hidden_layers)]
