"""One image token after another: a static key-value cache, guidance on hidden states, CUDA graphs on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from argrpo_cli.policy.llamagen.modeling import (
    Encoded,
    KeyValue,
    LlamaGenForImageGeneration,
    caption_attention_mask,
    guide,
)

BUCKET = 64  # a graph's attention reads the filled cache up to the next multiple of this


def new_cache(model: LlamaGenForImageGeneration, batch: int, length: int | None = None) -> list[KeyValue]:
    """Keys and values [batch, kv_heads, length, head_dim] of every layer, zero, in the dtype they are computed in.

    That is the weights', or autocast's where it is on: a wider cache would hold the same numbers, and be cast for every
    token. `length` is by default what one image needs, P + T.
    """
    config, weight = model.config, model.model.embed_tokens.weight
    length = length or config.cls_token_num + config.block_size
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype

    def empty() -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=weight.device)

    return [(empty(), empty()) for _ in range(config.num_hidden_layers)]


class Decoder:
    """Logits of a batch of images, token by token.

    Condition and null condition are the two halves of one batch; guidance is applied to their hidden states, so the LM
    head runs once. `start` reads the conditions, `step` a token for each image.

    With `bucketed` the shapes of a step depend on nothing but its bucket: it attends to the filled cache rounded up to
    a multiple of `BUCKET`, under a mask, and takes its position from a tensor. This is what can be recorded as a CUDA
    graph, and on a GPU it is. Otherwise a step attends to exactly the filled part. Graphs live as long as their
    decoder, which is one batch: they hold the addresses of the weights, and under autocast those of casts of them.
    """

    def __init__(
        self, model: LlamaGenForImageGeneration, batch: int, cfg_scale: float, bucketed: bool | None = None
    ) -> None:
        config, device = model.config, model.model.embed_tokens.weight.device
        bucketed = device.type == "cuda" if bucketed is None else bucketed
        self.model = model
        self.batch, self.cfg_scale, self.bucketed = batch, cfg_scale, bucketed
        self.prefix = config.cls_token_num
        length = self.prefix + config.block_size
        if bucketed:
            length = -(-length // BUCKET) * BUCKET
        self.rows = rows = batch if cfg_scale <= 1 else 2 * batch
        self.past = new_cache(model, rows, length)
        self.positions = torch.arange(length, device=device)
        self.valid: Tensor | None = None  # bool [rows, 1, 1, length]: not the padding of a caption
        if config.condition == "caption":
            self.valid = torch.ones(rows, 1, 1, length, dtype=torch.bool, device=device)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)  # what a graph reads
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]] = {}

    def start(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Read the conditions; logits of the first token and what they come from, as `step` returns them."""
        backbone, guided = self.model.model, self.cfg_scale > 1
        x = backbone.embed_condition(encoded.condition)
        if guided:
            x = torch.cat([x, backbone.embed_null(self.batch)])  # conditional half first
        mask = None
        if self.valid is not None:
            self.valid.fill_(True)
        if encoded.mask is not None:
            mask = caption_attention_mask(encoded.mask, self.prefix)
            seen = encoded.mask.bool()[:, None, None]
            if guided:  # the null caption keeps the padding of the caption it replaces
                mask, seen = mask.repeat(2, 1, 1, 1), seen.repeat(2, 1, 1, 1)
            self.valid[..., : self.prefix] = seen
        x = x.to(backbone.embed_tokens.weight.dtype)
        hidden = backbone.run(x, mask, self.past, filled=self.prefix)
        return self._logits(hidden[:, -1], guided)

    def step(self, tokens: Tensor, index: int, guided: bool) -> tuple[Tensor, Tensor]:
        """Logits for the token after `tokens`.

        Args:
            tokens: int64 [B], the images' tokens number `index`.
            guided: False leaves the null half out.

        Returns:
            (guided) logits float32 [B, V] and hidden states of the conditional half [B, D]; valid until the next step.
        """
        position = self.prefix + index
        if not self.bucketed:
            return self._advance(tokens, None, position + 1, guided)
        filled = -(-(position + 1) // BUCKET) * BUCKET
        if not self.tokens.is_cuda:
            return self._advance(tokens, self.positions[position : position + 1], filled, guided)
        self.tokens.copy_(tokens)
        self.position.fill_(position)
        with torch.cuda.device(self.tokens.device):  # streams and graphs are those of the current device
            if (filled, guided) not in self.graphs:
                self.graphs[filled, guided] = self._record(filled, guided)
            graph, result = self.graphs[filled, guided]
            graph.replay()
        return result

    def _advance(self, tokens: Tensor, position: Tensor | None, filled: int, guided: bool) -> tuple[Tensor, Tensor]:
        rows = 2 * self.batch if guided else self.batch
        mask = None if self.valid is None else self.valid[:rows, ..., :filled]
        if position is not None:
            reached = self.positions[:filled] <= position
            mask = reached[None, None, None] if mask is None else mask & reached
        past = [(keys[:rows], values[:rows]) for keys, values in self.past]
        backbone = self.model.model
        x = backbone.embed_tokens(tokens.repeat(2) if guided else tokens)[:, None]
        return self._logits(backbone.run(x, mask, past, position, filled)[:, 0], guided)

    def _logits(self, hidden: Tensor, guided: bool) -> tuple[Tensor, Tensor]:
        conditional = hidden[: self.batch]
        steered = guide(conditional, hidden[self.batch :], self.cfg_scale) if guided else conditional
        return self.model.lm_head(steered).float(), conditional

    def _record(self, filled: int, guided: bool) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
        """The step of one bucket as a graph. It runs once on the way, which writes the same keys and values."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # libraries set themselves up on the first call, which is not recorded
            self._advance(self.tokens, self.position, filled, guided)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        shared = next((other.pool() for other, _ in self.graphs.values()), None)  # one memory: they run in turn
        with torch.cuda.graph(graph, pool=shared, stream=self.stream):
            result = self._advance(self.tokens, self.position, filled, guided)
        return graph, result
