"""LlamaGen: a Llama-style decoder over image tokens after a class or a caption.

These are plain modules, which is all that drawing takes; `pretrained.py` makes models of transformers of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from argrpo_cli.policy.llamagen.geometry import Geometry
from argrpo_cli.policy.protocol import Compare, Scored
from argrpo_cli.policy.tokens import guide, log_probs, score_states
from argrpo_cli.shapes import Sampling

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Encoded:
    """What a LlamaGen takes for B conditions.

    Attributes:
        condition: class ids int64 [B], or caption features [B, P, caption_dim].
        mask: of captions, int64 [B, P], 1 on valid rows; None for classes.
    """

    condition: Tensor
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.condition)

    def __getitem__(self, rows: slice | Tensor) -> Encoded:
        return Encoded(self.condition[rows], None if self.mask is None else self.mask[rows])


@lru_cache(maxsize=16)
def rope_table(
    grid_size: int,
    head_dim: int,
    cls_token_num: int,
    theta: float = 10000.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The turns cos + i sin of a rotary embedding in two dimensions, for condition and then image tokens, row by row.

    Pair j of the first half turns by row * theta^(-2j / (head_dim / 2)), pair j of the second half by the
    column. The rows of the condition tokens are zero, cosine and sine alike: this is what LlamaGen was
    trained with, and it makes their queries and keys vanish (cos = 1 there changes logits by more than 2).

    Returns:
        complex64 [cls_token_num + grid_size^2, head_dim / 2]: FSDP2 rounds what layers are given in float32 to the
        type of their weights, and complex numbers not. Cached: leave it be.
    """
    # The table outlives the call: made inside a sampler's inference mode, it could not be trained with later; nor could
    # one be used that was made without numbers, when the memory of a pass was measured.
    with torch.inference_mode(False), _disable_current_modes():
        half = head_dim // 2
        frequencies = 1.0 / theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
        angles = torch.outer(torch.arange(grid_size, dtype=torch.float32), frequencies)
        by_row = angles[:, None, :].expand(grid_size, grid_size, -1)
        by_column = angles[None, :, :].expand(grid_size, grid_size, -1)
        angles = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
        table = torch.stack([angles.cos(), angles.sin()], dim=-1)
        return torch.view_as_complex(torch.cat([torch.zeros(cls_token_num, *table.shape[1:]), table])).to(device)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate neighbouring pairs (0, 1), (2, 3), ... of the last axis; the result is float32.

    Args:
        x: [B, S, heads, head_dim].
        table: complex64 [S, head_dim / 2], the rows of `rope_table` at x's positions.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[:, None]).flatten(-2)


def caption_attention_mask(condition_mask: Tensor, length: int) -> Tensor:
    """Which position may attend to which, for left-padded captions followed by image tokens.

    Causal, without the padding columns, and with the diagonal always open (a padding row attends to itself).

    Args:
        condition_mask: [B, P], non-zero on valid rows.
        length: positions in all, P or more.

    Returns:
        bool [B, 1, length, length], rows attend to columns.
    """
    keys = F.pad(condition_mask.bool(), (0, length - condition_mask.shape[1]), value=True)
    causal = torch.ones(length, length, dtype=torch.bool, device=keys.device).tril()
    diagonal = torch.eye(length, dtype=torch.bool, device=keys.device)
    return ((causal & keys[:, None, :]) | diagonal)[:, None]


def left_pad(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the valid rows of right-padded text features to the right end and zero the padding.

    Args:
        features: [B, P, caption_dim] as a text encoder gives them.
        mask: [B, P], 1 on valid rows, right padded.

    Returns:
        features [B, P, caption_dim] and mask [B, P], left padded, ready to be a condition.
    """
    length = features.shape[1]
    shift = length - mask.long().sum(dim=1, keepdim=True)
    source = (torch.arange(length, device=features.device)[None] - shift) % length
    moved = features.gather(1, source[..., None].expand_as(features))
    flipped = mask.flip(1)
    return moved * flipped[..., None].to(moved.dtype), flipped


def computed_dtype(x: Tensor) -> torch.dtype:
    """The type that matrix products with x are computed in: autocast's where it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None = None) -> Tensor:
    """Attention in the type of v, [B, heads, S, head_dim]; consecutive heads of q share a head of k and v.

    The scores are multiplied by `scale`, None for 1 / sqrt(head_dim).

    Of a whole image on a CPU it is computed in float32: torch's backward pass of it takes eight times as long in
    bfloat16.
    """
    kind = q.device.type
    dtype = torch.float32 if kind == "cpu" and q.shape[2] > 1 else computed_dtype(v)
    q, k, wide = (one.to(dtype) for one in (q, k, v))
    with torch.autocast(kind, enabled=False):
        out = F.scaled_dot_product_attention(
            q, k, wide, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.to(v.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) in float32, as torch computes it of any type, cast back before it is scaled by the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[-1],)
        if x.dtype == self.weight.dtype == torch.float32:  # nothing to cast: one kernel, which keeps less for backward
            normed = F.rms_norm(x, shape, self.weight, self.eps)
        else:
            normed = F.rms_norm(x, shape, eps=self.eps).to(x.dtype) * self.weight
        return normed.to(computed_dtype(normed))  # once, for all the matrix products that follow


class Attention(nn.Module):
    """Grouped-query attention with one fused projection for queries, keys and values."""

    def __init__(self, config: Geometry) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.wqkv = nn.Linear(config.hidden_size, width, bias=False)
        self.wo = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        mask: Tensor | None = None,
        past: KeyValue | None = None,
        positions: Tensor | None = None,
        filled: int = 0,
    ) -> Tensor:
        """x [B, S, D]; with `past`, this layer's cache, which is written in place, see `Backbone.run`."""
        qkv = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        turned, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        one, turned = x.shape[1] == 1, apply_rope(turned, table)
        if one:  # queries and keys at once, as `attend` and the cache would each
            turned = turned.to(v.dtype)
        q, k = turned.transpose(1, 2).split([self.heads, self.kv_heads], dim=1)
        v = v.transpose(1, 2)
        if past is not None:
            for cache, new in zip(past, (k, v), strict=True):
                if positions is None:
                    cache[:, :, filled - x.shape[1] : filled] = new
                else:
                    cache.index_copy_(2, positions, new.to(cache.dtype))
            k, v = (cache[:, :, :filled] for cache in past)
        out = attend(q, k, v, mask, causal=mask is None and not one)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: Geometry) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: Geometry) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, *where: Any) -> Tensor:
        """x [B, S, D]; `where` is what `Attention.forward` takes beside it."""
        x = x + self.attention(self.attention_norm(x), *where)
        return x + self.feed_forward(self.ffn_norm(x))


class CaptionMLP(nn.Module):
    """Projects text features to the width of the transformer."""

    def __init__(self, config: Geometry) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.caption_dim, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        # FSDP2 gathers parameters in bfloat16 and leaves buffers, such as the null caption, as they are.
        return self.fc2(F.gelu(self.fc1(features.to(self.fc1.weight.dtype)), approximate="tanh"))


class Backbone(nn.Module):
    """Condition and image tokens in, hidden states after the final norm out.

    There is no dropout, so training and evaluation mode compute the same function.
    """

    layer: ClassVar[type[nn.Module]] = Layer

    def __init__(self, config: Geometry) -> None:
        super().__init__()
        self.config = config
        self.build(config)

    def build(self, config: Geometry) -> None:
        """Make the parts; a model of transformers calls it once its own beginning is made."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.condition == "class":
            self.class_embedding = nn.Embedding(config.num_classes + 1, config.hidden_size)
        else:
            self.caption_mlp = CaptionMLP(config)
            # As published: saved with the weights, never trained.
            self.register_buffer("null_caption", torch.zeros(config.cls_token_num, config.caption_dim))
        self.layers = nn.ModuleList(self.layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def embed_condition(self, condition: Tensor) -> Tensor:
        """Class ids int64 [B], or left-padded features [B, P, caption_dim], to embeddings [B, P, D]."""
        if self.config.condition == "class":
            return self.class_embedding(condition)[:, None]
        return self.caption_mlp(condition)

    def embed_null(self, batch: int) -> Tensor:
        """Embeddings of the null condition, [batch, P, D]."""
        if self.config.condition == "class":
            null = self.class_embedding.weight[self.config.num_classes][None, None]
        else:
            null = self.caption_mlp(self.null_caption)[None]
        return null.expand(batch, -1, -1)

    def run(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        past: list[KeyValue] | None = None,
        positions: Tensor | None = None,
        filled: int = 0,
    ) -> Tensor:
        """The transformer on embeddings x [B, S, D].

        Without `past` these are the first S positions of an image. With it the keys and values before them are in the
        cache, and theirs are written into it: at positions filled - S .. filled - 1, or at `positions` if given.

        Args:
            mask: bool, broadcast over [B, heads, S, keys]; None is causal attention (or one query).
            past: caches of all layers, see `sample.new_cache`.
            positions: int64 [S], where the operations must not depend on them (CUDA graphs).
            filled: how many positions of the cache are attended to.
        """
        c = self.config
        table = rope_table(c.grid_size, c.head_dim, c.cls_token_num, c.rope_theta, x.device)
        end = x.shape[1] if past is None else filled
        table = table[end - x.shape[1] : end] if positions is None else table[positions]
        for index, layer in enumerate(self.layers):
            x = layer(x, table, mask, None if past is None else past[index], positions, filled)
        return self.norm(x)

    def forward(self, encoded: Encoded, tokens: Tensor, guidance: float = 1.0) -> Tensor:
        """Teacher-forced pass along images, or along their beginnings.

        Args:
            tokens: int64 [B, t], t <= block_size; the last one is predicted and not read.
            guidance: with s > 1 the hidden states are the guided ones, h_u + s (h_c - h_u), where h_u belongs to the
                null condition. The LM head is linear and has no bias, so what it makes of them are the guided logits,
                and log-probabilities taken from those are the ones of the distribution that guided sampling draws
                from. As there, s <= 1 is no guidance.

        Returns:
            [B, t, D], what each of the tokens is predicted from.
        """
        batch, length = tokens.shape
        if len(encoded) != batch or length > self.config.block_size:
            raise ValueError(
                f"tokens are {list(tokens.shape)}, for {len(encoded)} conditions and images of {self.config.block_size}"
            )
        if (self.config.condition == "caption") != (encoded.condition.ndim == 3):
            shape = list(encoded.condition.shape)
            raise ValueError(f"a policy conditioned on a {self.config.condition}: conditions {shape} do not fit")
        read = self.embed_tokens(tokens[:, :-1])
        x = torch.cat([self.embed_condition(encoded.condition).to(read.dtype), read], dim=1)
        mask = None if encoded.mask is None else caption_attention_mask(encoded.mask, x.shape[1])
        if guidance > 1:
            x = torch.cat([x, torch.cat([self.embed_null(batch).to(read.dtype), read], dim=1)])
            if mask is not None:
                mask = mask.repeat(2, 1, 1, 1)  # the null caption keeps the padding of the caption it replaces
        hidden = self.run(x, mask)[:, self.config.cls_token_num - 1 :]
        return guide(*hidden.chunk(2), guidance) if guidance > 1 else hidden


class LlamaGenNetwork(nn.Module):
    """LlamaGen with its LM head over image tokens; `sample.sample_tokens` draws from it."""

    config_class: ClassVar[type] = Geometry
    origin: str = ""  # the folder that holds the very weights, where there is one
    backbone: ClassVar[type[Backbone]] = Backbone

    def __init__(self, config: Geometry) -> None:
        super().__init__()
        self.config = config
        self.build(config)

    def build(self, config: Geometry) -> None:
        """Make the parts; a model of transformers calls it once its own beginning is made."""
        self.model = self.backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def forward(
        self,
        encoded: Encoded,
        tokens: Tensor,
        sampling: Sampling | None = None,
        entropy: bool = False,
        compare: Compare | None = None,
    ) -> Scored:
        """Log-probabilities of images' tokens int64 [B, T] by one teacher-forced pass; see `protocol.Policy.model`.

        The logits of large shapes are never held whole. Without `sampling` this is the conditional distribution, and
        the mean of -logp is the loss of pre-training (eq. 2).
        """
        sampling = sampling or Sampling(cfg_scale=1.0)
        hidden = self.model(encoded, tokens, sampling.cfg_scale).flatten(0, 1)
        distribution = partial(self._log_probs, temperature=sampling.temperature)
        return score_states(hidden, tokens, self.config.vocab_size, distribution, entropy, compare)

    def _log_probs(self, hidden: Tensor, temperature: float) -> Tensor:
        """Float32 [N, V] from hidden states [N, D]."""
        return log_probs(self.lm_head(hidden), temperature)

    def distribution(self, encoded: Encoded, tokens: Tensor, sampling: Sampling) -> Callable[[slice], Tensor]:
        """See `protocol.Policy.model`: what is held are hidden states."""
        hidden = self.model(encoded, tokens, sampling.cfg_scale).flatten(0, 1)
        return lambda at: self._log_probs(hidden[at], sampling.temperature)

    def logits(self, encoded: Encoded, tokens: Tensor, guidance: float = 1.0) -> Tensor:
        """Logits float32 [B, t, V] that each of the tokens [B, t] is drawn by, whole; see `Backbone.forward`."""
        return self.lm_head(self.model(encoded, tokens, guidance)).float()
