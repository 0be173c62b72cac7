"""Drawing image tokens: filters, the cached decoding loop with guidance, log-probabilities of the draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from argrpo_cli.policy.llamagen.config import LlamaGenConfig
from argrpo_cli.policy.llamagen.decoding import Decoder
from argrpo_cli.policy.llamagen.modeling import MIN_TEMPERATURE, Encoded, LlamaGenForImageGeneration
from argrpo_cli.policy.llamagen.packing import packed_linears
from argrpo_cli.policy.protocol import Drawn
from argrpo_cli.shapes import Sampling
from argrpo_cli.system.errors import UserError

# Chooses the next tokens int64 [B] from (guided) logits float32 [B, V], hidden states [B, D] of the
# conditional half, and the position of the token within the image.
Choose = Callable[[Tensor, Tensor, int], Tensor]


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


@torch.inference_mode()
def sample_tokens(
    model: nn.Module,
    encoded: Encoded,
    sampling: Sampling,
    *,
    seeds: Sequence[int] | None = None,
    greedy: bool = False,
    logp: str | None = None,
) -> Drawn:
    """Sample images as token ids, with the log-probability of every token if asked.

    Each image has its own noise: `seeds[i]` seeds a CPU generator that draws one uniform number per token,
    and the token is where the cumulative distribution passes it. So a condition and a seed give the same
    image whatever else is in the batch (up to the rounding of matrix products of another shape).

    Args:
        model: a LlamaGenForImageGeneration on the device of `encoded`, or what PEFT made of one.
        seeds: one integer per image; None draws them from torch's global generator. Torch's CPU generator
            uses the low 32 bits.
        greedy: take the most likely token and use no noise.
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
    if seeds is None:
        seeds = torch.randint(2**32, (batch,)).tolist()
    uniforms = None if greedy else image_uniforms(seeds, length, device)
    logprobs = torch.empty(batch, length, dtype=torch.float32, device=device) if logp else None
    broken = torch.zeros((), dtype=torch.bool, device=device)

    def choose(logits: Tensor, conditional: Tensor, index: int) -> Tensor:
        filtered = filter_logits(logits, temperature, sampling.top_k, sampling.top_p)
        broken.logical_or_(~logits.isfinite().all())
        tokens = logits.argmax(dim=-1) if uniforms is None else inverse_cdf(filtered, uniforms[:, index])
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


def _check(config: LlamaGenConfig, encoded: Encoded, seeds: Sequence[int] | None, logp: str | None) -> None:
    condition, null = encoded.condition, config.num_classes
    if config.condition == "class" and ((condition < 0) | (condition > null)).any():
        raise ValueError(f"class ids must lie in 0 .. {null} ({null} is the null class)")
    if config.condition == "caption" and condition.shape[1:] != (config.cls_token_num, config.caption_dim):
        raise ValueError(
            f"caption features have shape {list(condition.shape)}; expected "
            f"[B, {config.cls_token_num}, {config.caption_dim}]"
        )
    if seeds is not None and len(seeds) != len(encoded):
        raise ValueError(f"{len(seeds)} seeds for {len(encoded)} conditions; give one each")
    if logp not in (None, "conditional", "guided"):
        raise ValueError(f"logp is {logp!r}; expected 'conditional', 'guided' or None")
