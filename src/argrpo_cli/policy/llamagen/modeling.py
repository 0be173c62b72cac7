"""LlamaGen as a transformers model: a Llama-style decoder over image tokens after a class or a caption."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from argrpo_cli.policy.llamagen.config import LlamaGenConfig
from argrpo_cli.policy.llamagen.rope import apply_rope, rope_table

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


def left_pad(features: Tensor, mask: Tensor) -> KeyValue:
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


def attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one query by matrix products, with k as it lies in the cache on their left.

    On a CPU this is as fast as torch's fused kernel in float32 and up to three times as fast in bfloat16.

    Args:
        q: [B, heads, 1, head_dim]; consecutive heads share a head of k and v.
        k, v: [B, kv_heads, S, head_dim].
        mask: bool, broadcast over [B, 1, 1, S]; None is all of them.

    Returns:
        [B, heads, 1, head_dim] in q's dtype; the softmax is in float32.
    """
    batch, heads, _, head_dim = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, head_dim) * head_dim**-0.5
    scores = (k @ grouped.transpose(-1, -2)).transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    return (weights @ v).view(batch, heads, 1, head_dim)


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back before it is scaled by the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Grouped-query attention with one fused projection for queries, keys and values."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
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
        """x [B, S, D]; with `past`, this layer's cache, which is written in place, see `LlamaGenModel.run`."""
        qkv = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        rotated = apply_rope(qkv[:, :, : self.heads + self.kv_heads], table).transpose(1, 2)
        q, k = rotated[:, : self.heads], rotated[:, self.heads :]
        v = qkv[:, :, self.heads + self.kv_heads :].transpose(1, 2)
        one = x.shape[1] == 1
        if past is not None:
            for cache, new in zip(past, (k, v), strict=True):
                if positions is None:
                    cache[:, :, filled - x.shape[1] : filled] = new
                else:
                    cache.index_copy_(2, positions, new.to(cache.dtype))
            k, v = (cache[:, :, :filled] for cache in past)
        if one and past is not None and x.device.type == "cpu":
            out = attend_one(q, k, v, mask)
        else:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None and not one,
                enable_gqa=self.kv_heads != self.heads,
            )
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(GradientCheckpointingLayer):
    """One pre-norm transformer block."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        mask: Tensor | None = None,
        past: KeyValue | None = None,
        positions: Tensor | None = None,
        filled: int = 0,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table, mask, past, positions, filled)
        return x + self.feed_forward(self.ffn_norm(x))


class CaptionMLP(nn.Module):
    """Projects text features to the width of the transformer."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.caption_dim, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


class LlamaGenPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about both classes below."""

    config_class = LlamaGenConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]  # noqa: RUF012 (transformers' own convention)
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LlamaGenModel) and module.config.condition == "caption":
            init.normal_(module.null_caption, std=module.config.caption_dim**-0.5)


class LlamaGenModel(LlamaGenPreTrainedModel):
    """The backbone: condition and image tokens in, hidden states after the final norm out.

    There is no dropout, so training and evaluation mode compute the same function.

    Attributes:
        guidance_scale: None for the conditional model. With s > 1 the hidden states are the guided ones,
            h_u + s (h_c - h_u), where h_u belongs to the null condition. The LM head is linear and has no
            bias, so what it makes of them are the guided logits, and log-probabilities taken from those are
            the ones of the distribution that guided sampling draws from. As there, s <= 1 is no guidance.
        condition_table: None, or the features [N, P, caption_dim] and mask [N, P] that `input_ids` count into: a pass
            that is given no features takes those of row input_ids[:, 0]. So a trainer that only knows ids can train
            captions.
    """

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.condition == "class":
            self.class_embedding = nn.Embedding(config.num_classes + 1, config.hidden_size)
        else:
            self.caption_mlp = CaptionMLP(config)
            # As published: saved with the weights, never trained.
            self.register_buffer("null_caption", torch.zeros(config.cls_token_num, config.caption_dim))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.guidance_scale: float | None = None
        self.condition_table: KeyValue | None = None
        self.gradient_checkpointing = False
        self.post_init()

    def embed_condition(self, condition: Tensor) -> Tensor:
        """Class ids int64 [B], or left-padded features [B, P, caption_dim], to embeddings [B, P, D]."""
        if self.config.condition == "class":
            return self.class_embedding(condition)[:, None]
        return self.caption_mlp(condition.to(self.null_caption.dtype))

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
            past: caches of all layers, see `decoding.new_cache`.
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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        condition_features: Tensor | None = None,
        condition_mask: Tensor | None = None,
        inputs_embeds: None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput:
        """Teacher-forced pass over P condition tokens and t <= block_size image tokens.

        Args:
            input_ids: int64 [B, P + t]. Column 0 is the class id (num_classes = null); for captions the
                first P columns are placeholders, or rows of `condition_table`. The rest are image token ids.
            attention_mask: [B, P + t]; images are always complete, so only caption padding can be masked.
            condition_features: [B, P, caption_dim], left padded (`left_pad`); captions only.
            condition_mask: [B, P]; by default the first P columns of attention_mask.
            use_cache, return_dict: accepted because trainers pass them; this pass has no cache to return.
            inputs_embeds, output_attentions, output_hidden_states: not supported, must be unset.

        Returns:
            last_hidden_state [B, P + t, D]; position P - 1 + i predicts image token i.
        """
        if inputs_embeds is not None or output_attentions or output_hidden_states:
            raise ValueError("LlamaGenModel takes input_ids and returns last_hidden_state only")
        batch, length = input_ids.shape
        condition_length = self.config.cls_token_num
        if not condition_length <= length <= condition_length + self.config.block_size:
            raise ValueError(
                f"input_ids has {length} columns; {condition_length} condition tokens and at most "
                f"{self.config.block_size} image tokens are expected"
            )
        if self.condition_table is not None and condition_features is None:
            condition_features, condition_mask = (part[input_ids[:, 0]] for part in self.condition_table)
        if (self.config.condition == "caption") != (condition_features is not None):
            raise ValueError(f"a policy conditioned on a {self.config.condition}: condition_features do not fit")
        if condition_mask is None and attention_mask is not None:
            condition_mask = attention_mask[:, :condition_length]

        condition = input_ids[:, 0] if condition_features is None else condition_features
        tokens = self.embed_tokens(input_ids[:, condition_length:])
        x = torch.cat([self.embed_condition(condition).to(tokens.dtype), tokens], dim=1)
        mask = None
        if condition_features is not None and condition_mask is not None:
            mask = caption_attention_mask(condition_mask, length)
        scale = self.guidance_scale
        if scale is None or scale <= 1:
            return BaseModelOutput(last_hidden_state=self.run(x, mask))
        null = torch.cat([self.embed_null(batch).to(tokens.dtype), tokens], dim=1)
        if mask is not None:
            mask = mask.repeat(2, 1, 1, 1)  # the null caption keeps the padding of the caption it replaces
        hidden = self.run(torch.cat([x, null]), mask)
        return BaseModelOutput(last_hidden_state=guide(*hidden.chunk(2), scale))


def teacher_forced(
    config: LlamaGenConfig, condition: Tensor, mask: Tensor | None, tokens: Tensor
) -> tuple[dict[str, Tensor], slice]:
    """Arguments of a forward pass along whole images, and the positions whose outputs predict their tokens.

    Args:
        condition: class ids int64 [B], or caption features [B, P, caption_dim]; as `Policy.embed` gives them.
        mask: of captions, int64 [B, P]; None for classes.
        tokens: int64 [B, T].
    """
    length = config.cls_token_num
    predicting = slice(length - 1, None)
    if config.condition == "class":
        return {"input_ids": torch.cat([condition[:, None], tokens[:, :-1]], dim=1)}, predicting
    columns = tokens.new_zeros(len(tokens), length)  # taken up by the caption
    features = {"condition_features": condition, "condition_mask": mask}
    return {"input_ids": torch.cat([columns, tokens[:, :-1]], dim=1), **features}, predicting


def guide(conditional: Tensor, null: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on hidden states: h_u + s (h_c - h_u), computed in float32."""
    conditional32, null32 = conditional.float(), null.float()
    return (null32 + scale * (conditional32 - null32)).to(conditional.dtype)


class LlamaGenForImageGeneration(LlamaGenPreTrainedModel, GenerationMixin):
    """LlamaGen with its LM head over image tokens.

    `GenerationMixin` is here because trainers expect a generation config; images are sampled by
    `argrpo_cli.policy.llamagen.sampling.sample_tokens`, and `generate` says so.
    """

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__(config)
        self.model = LlamaGenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.lm_head:  # as published: a fresh policy is uniform over the vocabulary
            init.zeros_(module.weight)
        else:
            super()._init_weights(module)

    @property
    def guidance_scale(self) -> float | None:
        """The backbone's guidance scale; see `LlamaGenModel`."""
        return self.model.guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float | None) -> None:
        self.model.guidance_scale = scale

    @property
    def condition_table(self) -> KeyValue | None:
        """The backbone's; see `LlamaGenModel`."""
        return self.model.condition_table

    @condition_table.setter
    def condition_table(self, table: KeyValue | None) -> None:
        self.model.condition_table = table

    def get_output_embeddings(self) -> nn.Linear:
        """The LM head, [vocab_size, D], no bias."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        condition_features: Tensor | None = None,
        condition_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutput:
        """Logits float32 [B, P + t, vocab_size]; arguments as `LlamaGenModel.forward`.

        With `labels` [B, P + t] (the input ids, -100 to leave a position out) `loss` is the mean cross
        entropy of the next token.
        """
        hidden = self.model(
            input_ids,
            attention_mask=attention_mask,
            condition_features=condition_features,
            condition_mask=condition_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        ).last_hidden_state
        logits = self.lm_head(hidden).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def generate(self, *args: object, **kwargs: object) -> Tensor:
        """Not how images are drawn; raises NotImplementedError."""
        raise NotImplementedError("images are drawn by argrpo_cli.policy.llamagen.sampling.sample_tokens")


AutoConfig.register("llamagen", LlamaGenConfig, exist_ok=True)
AutoModel.register(LlamaGenConfig, LlamaGenModel, exist_ok=True)
AutoModelForCausalLM.register(LlamaGenConfig, LlamaGenForImageGeneration, exist_ok=True)
