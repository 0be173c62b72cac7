"""Drawing image tokens with Janus: the decoding loop over a static cache, with guidance on logits.

transformers' own `generate(generation_mode="image")` takes no seed per image and no filters, and gives no
log-probabilities; tests/policy/test_janus.py holds the two against each other step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, StaticLayer

from argrpo_cli.policy.janus.model import Encoded, JanusForImageGeneration, positions
from argrpo_cli.policy.llamagen.model import caption_attention_mask
from argrpo_cli.policy.llamagen.sample import casts_remembered, packed_linears
from argrpo_cli.policy.protocol import Drawn
from argrpo_cli.policy.tokens import Draws
from argrpo_cli.shapes import Sampling

# Chooses the next tokens int64 [B] from (guided) logits float32 [B, V], what gives the conditional ones, and the
# position of the token within the image.
Choose = Callable[[Tensor, Callable[[], Tensor], int], Tensor]


@torch.inference_mode()
def sample_tokens(
    model: nn.Module, encoded: Encoded, sampling: Sampling, seeds: Sequence[int], logp: str | None = None
) -> Drawn:
    """See `protocol.Policy.sample`; each image has its own noise, see `tokens.Draws`.

    Args:
        model: a JanusForImageGeneration on the device of `encoded`, or what PEFT made of one.

    Raises:
        ValueError: another number of seeds than of conditions.
        UserError: a setting out of range, or logits that are not finite numbers.
    """
    if hasattr(model, "get_base_model"):  # of PEFT; its adapters are within the layers
        model = model.get_base_model()
    draws = Draws(len(encoded), model.length, sampling, seeds, logp, encoded.ids.device)
    with casts_remembered(model):
        return draws.drawn(draw_tokens(model, encoded, draws.choose, sampling.cfg_scale, sampling.cfg_interval))


@torch.inference_mode()
def draw_tokens(
    model: JanusForImageGeneration, encoded: Encoded, choose: Choose, cfg_scale: float = 1.0, cfg_interval: int = -1
) -> Tensor:
    """One image's worth of tokens int64 [B, T], each chosen by `choose`.

    Args:
        cfg_scale: s in l_u + s (l_c - l_u); s <= 1 is no guidance, and then nothing runs twice.
        cfg_interval: as of LlamaGen: -1 guides every token, k >= 0 tokens 0 .. k + 1.
    """
    batch, guided = len(encoded), cfg_scale > 1
    ids, mask = encoded.halves(guided)
    prefix, length = ids.shape[1], model.length
    cache = new_cache(model, prefix + length)
    places = positions(mask, prefix + length)
    seen = F.pad(mask, (0, length), value=1).bool()[:, None, None]  # which keys are no padding
    tokens = torch.empty(batch, length, dtype=torch.int64, device=ids.device)
    at_work = nn.ModuleList([model.model.language_model, model.model.generation_aligner, model.model.generation_head])
    with packed_linears(at_work, len(ids)):
        x = model.get_input_embeddings()(ids)
        hidden = model.run(x, caption_attention_mask(mask, prefix), places[:, :prefix], cache)[:, -1]
        for index in range(length):
            states = torch.stack(hidden.split(batch), dim=1)
            logits = model.guided_logits(states, cfg_scale)
            plain = (lambda logits=logits: logits) if len(hidden) == batch else partial(_conditional, model, states)
            tokens[:, index] = chosen = choose(logits, plain, index)
            if index + 1 == length:
                return tokens
            if 0 <= cfg_interval < index and len(hidden) > batch:  # the last guided token is drawn
                places, seen = places[:batch], seen[:batch]
                for layer in cache.layers:
                    layer.keep(batch)
            at = prefix + index
            read = model.prepare_embeddings_for_image_generation(chosen).to(x.dtype)
            x = read[:, None].repeat(len(places) // batch, 1, 1)
            hidden = model.run(x, seen[..., : at + 1], places[:, at : at + 1], cache)[:, 0]
    return tokens


def _conditional(model: JanusForImageGeneration, states: Tensor) -> Tensor:
    """Unguided logits float32 [B, V] of states [B, 2, D]."""
    return model.guided_logits(states[:, :1], 1.0)


def new_cache(model: JanusForImageGeneration, length: int) -> Cache:
    """For `length` positions, empty."""
    return Cache(layers=[FilledLayer(length) for _ in range(model.config.text_config.num_hidden_layers)])


class FilledLayer(StaticLayer):
    """Keys and values of a layer: room for all is made once, and what is filled of it is attended to."""

    filled: int = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for what is about to be written, in the type of the values: under autocast the keys come wider."""
        room = (*key_states.shape[:2], self.max_cache_len)
        self.keys = value_states.new_zeros(*room, key_states.shape[-1])
        self.values = value_states.new_zeros(*room, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **more: object) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, heads, S, head_dim] after the others; all of them, [B, heads, filled, head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, self.filled = self.filled, self.filled + key_states.shape[2]
        self.keys[:, :, first : self.filled] = key_states
        self.values[:, :, first : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def keep(self, rows: int) -> None:
        """Forget all but the first rows of the batch."""
        self.keys, self.values = self.keys[:rows], self.values[:rows]
