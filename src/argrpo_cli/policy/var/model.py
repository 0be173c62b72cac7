"""VAR as a transformers model: a transformer that predicts all tokens of a scale from the scales before (section 3.1).

What stands at the places of a scale is the image so far, shrunk to that scale's grid; at those of the first, the class.
Places see all of their own scale and of those before. The class also modulates every layer norm (adaptive layer norm,
as in DiT). The module tree carries the published names, but for the residual quantisation: the published transformer
borrows it from the tokenizer, and here it lies with the weights, frozen, so that tokens are all that a pass needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from argrpo_cli.policy.llamagen.model import Encoded, KeyValue, attend, computed_dtype
from argrpo_cli.policy.protocol import Compare, Scored
from argrpo_cli.policy.tokens import guide, log_probs, score_states
from argrpo_cli.policy.var.config import MAX_SCALE, VARConfig
from argrpo_cli.policy.var.vq import ResidualQuantizer
from argrpo_cli.shapes import Sampling


def guidance_of_scales(sampling: Sampling, scales: int) -> list[float]:
    """s_k of l_u + s_k (l_c - l_u) at each of K scales, 1 for no guidance.

    VAR's guidance rises from scale to scale: t_k = cfg k / (K - 1) in (1 + t_k) l_c - t_k l_u. So that 1 is no guidance
    as everywhere here, `cfg_scale` is 1 + cfg: s_k = 1 + (cfg_scale - 1) k / (K - 1), and the last scale has cfg_scale
    itself. The published protocol's cfg 1.5 is a cfg_scale of 2.5. Scales after `cfg_interval` have none.
    """
    last = sampling.cfg_interval if sampling.cfg_interval >= 0 else scales
    return [1 + (sampling.cfg_scale - 1) * k / (scales - 1) if k <= last else 1.0 for k in range(scales)]


class Attention(nn.Module):
    """Self-attention with biases on queries and values; keys have none (it would change nothing)."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        # The published attention divides by 4 more than the root of the width, or, between unit vectors, by nothing.
        self.scale = 1.0 if config.cosine_attention else 0.25 / config.head_dim**0.5
        self.scale_mul_1H11 = None
        if config.cosine_attention:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, self.heads, 1, 1), math.log(4)))

    def forward(self, x: Tensor, mask: Tensor | None, past: KeyValue | None, filled: int) -> Tensor:
        """x [B, S, D]; with `past`, this layer's cache, it is written in place, see `VARForImageGeneration.run`."""
        qkv = self.mat_qkv(x)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(qkv.dtype)
        q, k, v = (qkv + bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.scale_mul_1H11 is not None:
            sharpness = self.scale_mul_1H11.float().clamp_max(MAX_SCALE).exp()
            q, k = F.normalize(q.float(), dim=-1) * sharpness, F.normalize(k.float(), dim=-1)
        if past is not None:
            for cache, new in zip(past, (k, v), strict=True):
                cache[:, :, filled - x.shape[1] : filled] = new
            k, v = (cache[:, :, :filled] for cache in past)
        out = attend(q, k, v, mask, causal=False, scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two layers with GELU between (its tanh approximation)."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Adaptive layer norm: (x - mean) / deviation (1 + scale) + shift, normed in float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale.float()) + shift.float()


class Block(GradientCheckpointingLayer):
    """One transformer block, its norms modulated and its two halves gated by the condition."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn, self.ffn, self.eps = Attention(config), FeedForward(config), config.norm_eps
        if config.shared_modulation:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None, past: KeyValue | None, filled: int) -> Tensor:
        """x [B, S, D]; condition [B, D], or [B, 1, 6, D] where one layer modulates all blocks."""
        six = self.ada_gss + condition if condition.ndim == 4 else self.ada_lin(condition).unflatten(-1, (1, 6, -1))
        gate1, gate2, scale1, scale2, shift1, shift2 = six.unbind(2)
        dtype = computed_dtype(x)
        x = x + self.attn(modulated(x, scale1, shift1, self.eps).to(dtype), mask, past, filled) * gate1
        return x + self.ffn(modulated(x, scale2, shift2, self.eps).to(dtype)) * gate2


class Head(nn.Module):
    """The last norm, modulated by its own layer."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width, self.eps = config.hidden_size, config.norm_eps
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Float32 [B, S, D] of x [B, S, D] and the condition [B, D]."""
        scale, shift = self.ada_lin(condition).unflatten(-1, (1, 2, -1)).unbind(2)
        return modulated(x, scale, shift, self.eps)


class VARForImageGeneration(PreTrainedModel):
    """VAR with its head over codes; `sample.sample_tokens` draws from it.

    There is no dropout, so training and evaluation mode compute the same function (the published training drops whole
    blocks).
    """

    config_class = VARConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers' own convention)
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["quantizer"]  # noqa: RUF012 (what tokens stand for does not depend on the dtype)

    def __init__(self, config: VARConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.word_embed = nn.Linear(config.code_dim, width)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.zeros(1, config.counts[0], width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, config.block_size, width))
        self.lvl_embed = nn.Embedding(len(config.scales), width)
        if config.shared_modulation:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.head_nm = Head(config)
        self.head = nn.Linear(width, config.vocab_size)
        self.quantizer = ResidualQuantizer(
            config.vocab_size, config.code_dim, config.scales, config.phis, config.phi_ratio
        ).requires_grad_(False)
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """As published, with the gates of VAR-d16 (times 1e-3)."""
        config = self.config
        std = (1 / config.hidden_size / 3) ** 0.5
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.trunc_normal_(module.weight, std=std)
        elif isinstance(module, Attention):
            init.zeros_(module.q_bias)
            init.zeros_(module.v_bias)
            if module.scale_mul_1H11 is not None:
                init.constant_(module.scale_mul_1H11, math.log(4))
        elif isinstance(module, Block):  # after its parts
            narrow = std / (2 * config.num_hidden_layers) ** 0.5
            init.trunc_normal_(module.attn.proj.weight, std=narrow)
            init.trunc_normal_(module.ffn.fc2.weight, std=narrow)
            if config.shared_modulation:
                init.normal_(module.ada_gss, std=config.hidden_size**-0.5)
            gates = torch.tensor([1e-3, 1e-3, 0.5, 0.5, 0.5, 0.5])  # the first two are those of the halves
            table = module.ada_gss if config.shared_modulation else module.ada_lin[1].weight
            factors = gates.repeat_interleave(config.hidden_size).to(table.device)
            init.copy_(table, table * (factors.view(1, 1, 6, -1) if config.shared_modulation else factors[:, None]))
        elif module is self:
            init.trunc_normal_(self.pos_start, std=std)
            init.trunc_normal_(self.pos_1LC, std=std)
            init.trunc_normal_(self.head.weight, std=0.02 * std)
            init.trunc_normal_(self.head_nm.ada_lin[1].weight, std=0.5 * std)

    def get_input_embeddings(self) -> nn.Module:
        """What reads the image so far; transformers asks, and accelerate shards it by itself."""
        return self.word_embed

    def levels(self) -> Tensor:
        """The scale of each of an image's tokens, int64 [T]."""
        levels = [k for k, count in enumerate(self.config.counts) for _ in range(count)]
        return torch.tensor(levels, device=self.pos_1LC.device)

    def positions(self, span: slice) -> Tensor:
        """Embeddings of the places of an image's tokens, [1, n, D]: of the scale, and of the place in it."""
        return self.lvl_embed(self.levels()[span])[None] + self.pos_1LC[:, span]

    def first(self, condition: Tensor) -> Tensor:
        """What stands at the places of the first scale, [B, n_1, D], for embedded classes [B, D]."""
        return condition[:, None] + self.pos_start + self.positions(self.config.spans[0])

    def later(self, seen: Tensor, span: slice) -> Tensor:
        """What stands at later places, [B, n, D]: the image so far as they see it, float32 [B, n, C]."""
        return self.word_embed(seen.to(self.word_embed.weight.dtype)) + self.positions(span)

    def run(
        self,
        x: Tensor,
        condition: Tensor,
        mask: Tensor | None = None,
        past: list[KeyValue] | None = None,
        filled: int = 0,
    ) -> Tensor:
        """What the head reads, float32 [B, S, D], of embeddings x [B, S, D] for embedded classes [B, D].

        Args:
            mask: bool [S, S], rows attend to columns; None for all.
            past: keys and values [B, heads, length, head_dim] of all layers; those of x are written into it, up to
                position `filled`, and x attends to all up to there.
        """
        modulation = condition
        if self.config.shared_modulation:
            modulation = self.shared_ada_lin(condition).unflatten(-1, (1, 6, -1))
        for index, block in enumerate(self.blocks):
            x = block(x, modulation, mask, None if past is None else past[index], filled)
        return self.head_nm(x, condition)

    def hidden(self, encoded: Encoded, tokens: Tensor, guidance: list[float] | None = None) -> Tensor:
        """What the head reads of each of the tokens int64 [B, T], float32 [B, T, D], by one pass over all scales.

        Guidance is given to this and not to the logits: the head is linear, and the two factors sum to 1.

        Args:
            guidance: of every scale, see `guidance_of_scales`; None is none.
        """
        config, batch = self.config, len(tokens)
        if len(encoded) != batch or tokens.shape[1] != config.block_size:
            raise ValueError(
                f"tokens are {list(tokens.shape)}, for {len(encoded)} conditions and images of {config.block_size}"
            )
        levels = self.levels()
        later = self.later(self.quantizer.inputs(tokens), slice(config.counts[0], None))
        condition = self.class_emb(encoded.condition)
        if guidance is not None:
            condition = torch.cat([condition, self.embed_null(batch)])
            later = later.repeat(2, 1, 1)
        x = torch.cat([self.first(condition).to(later.dtype), later], dim=1)
        hidden = self.run(x, condition, levels[:, None] >= levels)
        if guidance is None:
            return hidden
        strength = torch.tensor(guidance, device=tokens.device)[levels]
        return guide(*hidden.chunk(2), strength[:, None])

    def embed_null(self, batch: int) -> Tensor:
        """Embeddings of no class, [batch, D]."""
        return self.class_emb.weight[self.config.num_classes].expand(batch, -1)

    def guidance(self, sampling: Sampling) -> list[float] | None:
        """Of every scale; None where there is none at all, and nothing runs twice."""
        return guidance_of_scales(sampling, len(self.config.scales)) if sampling.cfg_scale > 1 else None

    def forward(
        self,
        encoded: Encoded,
        tokens: Tensor,
        sampling: Sampling | None = None,
        entropy: bool = False,
        compare: Compare | None = None,
    ) -> Scored:
        """Log-probabilities of images' tokens int64 [B, T] by one teacher-forced pass; see `protocol.Policy.model`.

        Without `sampling` this is the conditional distribution, and the mean of -logp is the loss of pre-training.
        """
        sampling = sampling or Sampling(cfg_scale=1.0)
        hidden = self.hidden(encoded, tokens, self.guidance(sampling)).flatten(0, 1)
        distribution = partial(self._log_probs, temperature=sampling.temperature)
        return score_states(hidden, tokens, self.config.vocab_size, distribution, entropy, compare)

    def _log_probs(self, hidden: Tensor, temperature: float) -> Tensor:
        """Float32 [N, V] from what the head reads, [N, D]."""
        return log_probs(self.logits(hidden), temperature)

    def distribution(self, encoded: Encoded, tokens: Tensor, sampling: Sampling) -> Callable[[slice], Tensor]:
        """See `protocol.Policy.model`: what is held is what the head reads."""
        hidden = self.hidden(encoded, tokens, self.guidance(sampling)).flatten(0, 1)
        return lambda at: self._log_probs(hidden[at], sampling.temperature)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [..., V] of what the head reads, [..., D]."""
        return self.head(hidden.to(computed_dtype(self.head.weight))).float()


AutoConfig.register("var", VARConfig, exist_ok=True)
AutoModelForCausalLM.register(VARConfig, VARForImageGeneration, exist_ok=True)
