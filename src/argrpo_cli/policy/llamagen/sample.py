"""Drawing image tokens: the cached decoding loop with guidance, filters, log-probabilities of the draws.

Read from `sample_tokens` at the top down to how a step is made fast: a static key-value cache, CUDA graphs on a GPU,
weights laid out for the processor on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from argrpo_cli.policy.llamagen.config import LlamaGenConfig
from argrpo_cli.policy.llamagen.model import (
    MIN_TEMPERATURE,
    Encoded,
    KeyValue,
    LlamaGenForImageGeneration,
    caption_attention_mask,
    computed_dtype,
    guide,
)
from argrpo_cli.policy.protocol import Drawn
from argrpo_cli.shapes import Sampling
from argrpo_cli.system.errors import UserError

BUCKET = 64  # a graph's attention reads the filled cache up to the next multiple of this

# Chooses the next tokens int64 [B] from (guided) logits float32 [B, V], hidden states [B, D] of the
# conditional half, and the position of the token within the image.
Choose = Callable[[Tensor, Tensor, int], Tensor]


@torch.inference_mode()
def sample_tokens(
    model: nn.Module,
    encoded: Encoded,
    sampling: Sampling,
    seeds: Sequence[int],
    logp: str | None = None,
) -> Drawn:
    """Sample images as token ids, with the log-probability of every token if asked.

    Each image has its own noise: `seeds[i]` seeds a CPU generator that draws one uniform number per token,
    and the token is where the cumulative distribution passes it. So a condition and a seed give the same
    image whatever else is in the batch (up to the rounding of matrix products of another shape).

    Args:
        model: a LlamaGenForImageGeneration on the device of `encoded`, or what PEFT made of one.
        seeds: one integer per image; torch's CPU generator uses the low 32 bits.
        logp: "guided" for the log-probability under the very distribution that was sampled (guidance, temperature,
            filters); "conditional" under the conditional logits at this temperature, unguided and unfiltered.

    Returns:
        No gradients.

    Raises:
        ValueError: conditions that do not fit the model, or another number of seeds.
        UserError: a setting out of range, or logits that are not finite numbers (training has diverged, or the file is
            damaged).
    """
    if hasattr(model, "get_base_model"):  # of PEFT; its adapters are within the layers
        model = model.get_base_model()
    _check(model.config, encoded, seeds, logp)
    sampling.check("sampling.")
    temperature, guided = sampling.temperature, sampling.cfg_scale > 1
    batch, length, device = len(encoded), model.config.block_size, encoded.condition.device
    uniforms = image_uniforms(seeds, length, device)
    logprobs = torch.empty(batch, length, dtype=torch.float32, device=device) if logp else None
    broken = torch.zeros((), dtype=torch.bool, device=device)

    def choose(logits: Tensor, conditional: Tensor, index: int) -> Tensor:
        filtered = filter_logits(logits, temperature, sampling.top_k, sampling.top_p)
        broken.logical_or_(~logits.sum().isfinite())  # one pass; a sum keeps what is no number
        tokens = inverse_cdf(filtered, uniforms[:, index])
        if logp == "guided":
            logprobs[:, index] = log_prob(filtered, tokens)
        elif logp == "conditional":
            plain = model.lm_head(conditional).float() if guided else logits
            logprobs[:, index] = log_prob(filter_logits(plain, temperature), tokens)
        return tokens

    with _casts_remembered(model):
        tokens = draw_tokens(model, encoded, choose, sampling.cfg_scale, sampling.cfg_interval)
    if broken:
        raise UserError("the policy's logits are not finite numbers: its weights are broken")
    return Drawn(tokens, logprobs)


@contextmanager
def _casts_remembered(model: nn.Module) -> Iterator[None]:
    """Let autocast keep its casts of frozen weights, too: it keeps those of weights that require a gradient alone, and
    would cast the others again for every token. Nothing is recorded while images are drawn."""
    on = torch.is_autocast_enabled(next(model.parameters()).device.type)
    frozen = [weight for weight in model.parameters() if not weight.requires_grad] if on else []
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def _check(config: LlamaGenConfig, encoded: Encoded, seeds: Sequence[int], logp: str | None) -> None:
    condition, null = encoded.condition, config.num_classes
    if config.condition == "class" and ((condition < 0) | (condition > null)).any():
        raise ValueError(f"class ids must lie in 0 .. {null} ({null} is the null class)")
    if config.condition == "caption" and condition.shape[1:] != (config.cls_token_num, config.caption_dim):
        raise ValueError(
            f"caption features have shape {list(condition.shape)}; expected "
            f"[B, {config.cls_token_num}, {config.caption_dim}]"
        )
    if len(seeds) != len(encoded):
        raise ValueError(f"{len(seeds)} seeds for {len(encoded)} conditions; give one each")
    if logp not in (None, "conditional", "guided"):
        raise ValueError(f"logp is {logp!r}; expected 'conditional', 'guided' or None")


@torch.inference_mode()
def draw_tokens(
    model: LlamaGenForImageGeneration, encoded: Encoded, choose: Choose, cfg_scale: float = 1.0, cfg_interval: int = -1
) -> Tensor:
    """One image's worth of tokens int64 [B, T], each chosen by `choose`, through a static key-value cache.

    Args:
        cfg_scale: s in h_u + s (h_c - h_u); s <= 1 is no guidance, and then nothing runs twice.
        cfg_interval: -1 guides every token. k >= 0 guides tokens 0 .. k + 1 (LlamaGen's counting: the
            first token and the decoding steps 0 .. k); later ones follow the conditional logits alone.
    """
    batch, length = len(encoded), model.config.block_size
    guided = cfg_scale > 1
    tokens = torch.empty(batch, length, dtype=torch.int64, device=encoded.condition.device)
    decoder = Decoder(model, batch, cfg_scale)
    with packed_linears(model, decoder.rows):
        logits, conditional = decoder.start(encoded)
        for index in range(length):
            tokens[:, index] = chosen = choose(logits, conditional, index)
            if index + 1 < length:
                guided = guided and not 0 <= cfg_interval < index  # dropped once the last guided token is drawn
                logits, conditional = decoder.step(chosen, index, guided)
    return tokens


def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits after temperature, top-k and top-p, in this order; removed tokens get -inf.

    Args:
        logits: float32 [B, V], left as they are.
        temperature: values under 1e-5 count as 1e-5.
        top_k: keep the k largest, and all that tie with the k-th; 0 is off.
        top_p: of what top-k left, keep the most likely tokens up to and including the one that crosses
            the cumulative probability p, always at least one; 1 is off.
    """
    if temperature != 1.0:
        logits = logits / max(temperature, MIN_TEMPERATURE)
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        ranked, order = logits.sort(dim=-1, descending=True)
        cumulative = ranked.softmax(dim=-1).cumsum(dim=-1)
        outside = F.pad(cumulative[..., :-1], (1, 0)) > top_p  # by the mass of the tokens ranked above
        logits = logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return logits


def log_prob(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability float32 [B] of tokens int64 [B] under softmax of logits [B, V]."""
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)


def inverse_cdf(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The tokens int64 [B] at which the cumulative softmax of logits [B, V] passes uniforms float64 [B].

    Tokens of probability zero (logit -inf) are never returned.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=uniforms.dtype)
    # Scaled by the total, which is 1 only up to rounding; right=True steps over tokens that add nothing.
    threshold = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return tokens.clamp_(max=logits.shape[-1] - 1)  # only NaN logits get here; the caller reports those


def image_uniforms(seeds: Sequence[int], length: int, device: torch.device) -> Tensor:
    """Uniforms [B, length] in [0, 1), one stream per seed, drawn on the CPU: the same on every machine."""
    streams = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    table = torch.stack([torch.rand(length, dtype=torch.float64, generator=one) for one in streams])
    return table.to(device, torch.float32 if device.type == "mps" else torch.float64)  # MPS has no float64


def new_cache(model: LlamaGenForImageGeneration, batch: int, length: int | None = None) -> list[KeyValue]:
    """Keys and values [batch, kv_heads, length, head_dim] of every layer, zero, in the dtype they are computed in.

    That is the weights', or autocast's where it is on: a wider cache would hold the same numbers, and be cast for every
    token. `length` is by default what one image needs, P + T.
    """
    config, weight = model.config, model.model.embed_tokens.weight
    length = length or config.cls_token_num + config.block_size
    shape = (batch, config.num_key_value_heads, length, config.head_dim)

    def empty() -> Tensor:
        return torch.zeros(shape, dtype=computed_dtype(weight), device=weight.device)

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


@contextmanager
def packed_linears(model: nn.Module, rows: int) -> Iterator[bool]:
    """Within this context the linear layers of a model on a CPU use copies of their weights laid out for `rows` rows.

    Under autocast the copies are in its type, and the layers give what they would give there.

    A decoding step multiplies a few rows by every weight of the model, and with weights as they are stored half of that
    time goes into rearranging them, again for every token. oneDNN can lay them out once. torch's compiler does this
    through two operators that torch documents nowhere else; where a version lacks them, layers stay as they are.

    The copies are as large as the weights and are gone afterwards; gradients do not flow through them. Yields whether
    anything was packed: not on other devices, or where torch or the processor has no such kernel.
    """
    packed: list[nn.Module] = []
    try:
        for module in model.modules():
            if _can_pack(module):
                forward = _packed(module, rows)
                packed.append(module)
                module.forward = forward  # shadows the method of the class, in this instance
        yield bool(packed)
    finally:
        for module in packed:
            vars(module).pop("forward", None)


def _packed(layer: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    weight = layer.weight.detach()
    dtype = computed_dtype(weight)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), rows)

    def forward(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), laid_out, bias, "none", [], "")

    return forward


def _can_pack(module: nn.Module) -> bool:
    """A plain linear layer on a CPU, in a type that oneDNN has a kernel for on this processor."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or "forward" in vars(module):
        return False
    if module.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    operators, dtype = torch.ops.mkldnn, computed_dtype(module.weight)
    if not hasattr(operators, "_reorder_linear_weight") or not hasattr(operators, "_linear_pointwise"):
        return False
    kernels = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype in kernels:
        return hasattr(operators, kernels[dtype]) and getattr(operators, kernels[dtype])()
    return dtype == torch.float32
