"""What families share once they have logits: guidance, filters, draws with noise for each image, scores of tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from argrpo_cli.networks.weights import save_model
from argrpo_cli.policy.folder import choose_sampling
from argrpo_cli.policy.protocol import Card, Compare, Drawn, Encoded, Scored
from argrpo_cli.shapes import Condition, Sampling, Shot
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import make_dir
from argrpo_cli.system.processes import WARNING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from argrpo_cli.policy.generated import Generated
    from argrpo_cli.policy.llamagen.vq import VQNetwork

MIN_TEMPERATURE = 1e-5  # as in LlamaGen: temperature 0 is a very sharp distribution, not a division by zero
LOGITS_AT_ONCE = 2**24  # held of a training pass; more are computed again in its backward pass, part by part
LOGP = (None, "conditional", "guided")  # what may be asked for beside tokens, see `Policy.sample`


class TokenPolicy:
    """What `protocol.Policy` asks of every family alike that has a network and an image tokenizer.

    Attributes:
        model: of transformers; what is trained and saved.
        network: what draws: the model, or the same weights without what trains and saves them.
        tokenizer: a `VQNetwork`, always float32.
        image_size: of the tokens, in pixels.
        draw: the family's sampler, `sample_tokens(model, encoded, sampling, seeds, logp)`.
    """

    model: PreTrainedModel
    network: nn.Module
    tokenizer: VQNetwork
    image_size: int
    name: str
    sampling: dict[str, Any]
    draw: ClassVar[Callable[..., Drawn]]

    def conditions(self, requests: Iterable[str | int]) -> list[Condition]:
        """See `protocol.Policy`."""
        raise NotImplementedError

    def sample(
        self,
        encoded: Encoded,
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        model: nn.Module | None = None,
        logp: str | None = None,
    ) -> Drawn:
        """See `protocol.Policy`."""
        return type(self).draw(self.network if model is None else model, encoded, sampling, seeds, logp)

    def generate(
        self,
        requests: str | int | Sequence[str | int],
        n: int = 1,
        *,
        seed: int = 0,
        cfg_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        cfg_interval: int | None = None,
        size: int | None = None,
        batch_size: int = 64,
    ) -> Generated:
        """Draw n images of each request: class names or ids, or captions. `argrpo sample` draws the same.

        Args:
            seed: of the first image of each request; the next take seed + 1, ...
            cfg_scale, temperature, top_k, top_p, cfg_interval: as of `Sampling`; None is the policy's own, else usual.
            size: pixels a side to scale the images to; None as drawn.
            batch_size: images at a time.

        Raises:
            UserError: a class or caption that the policy cannot draw, a setting out of range, or weights that give no
                finite numbers.
        """
        from argrpo_cli.draw import draw_batch
        from argrpo_cli.policy.generated import Generated

        options = {"cfg_scale": cfg_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        options = {key: one for key, one in (options | {"cfg_interval": cfg_interval}).items() if one is not None}
        sampling = choose_sampling(self.name or "this policy", self.sampling, options, tell=_warn)
        for name, number in (("n", n), ("batch_size", batch_size)):
            if number < 1:
                raise UserError(f"{name} is {number}: must be 1 or more")
        if not 0 <= seed <= 2**32 - n:  # torch's CPU generator looks at no more bits: images would repeat
            raise UserError(f"seed {seed} with n {n}: seeds are 0 to 2**32 - 1")
        asked = [requests] if isinstance(requests, str | int) else list(requests)
        shots = [Shot(one, seed + i) for one in self.conditions(asked) for i in range(n)]
        if not shots:
            raise UserError("nothing to draw: give at least one class or caption")
        batches = [shots[start : start + batch_size] for start in range(0, len(shots), batch_size)]
        tokens, images = zip(*(draw_batch(self, batch, sampling, size) for batch in batches), strict=True)
        conditions, seeds = [one.condition for one in shots], [one.seed for one in shots]
        return Generated(torch.cat(images), torch.cat(tokens), conditions, seeds)

    @torch.no_grad()
    def tokenise(self, images: Tensor) -> Tensor:
        """Images uint8 [B, 3, image_size, image_size] to tokens int64 [B, T]."""
        return self.tokenizer.encode_images(images.to(self.network.device))

    def code_vectors(self) -> Tensor:
        """See `protocol.Policy`."""
        return F.normalize(self.tokenizer.quantize.embedding.weight.detach().float(), dim=-1)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, size: int | None = None) -> Tensor:
        """Tokens int64 [B, T] to images uint8 [B, 3, size, size] on the same device, by default of `image_size`."""
        return self.tokenizer.decode_images(tokens, self.image_size, size)

    def save(self, folder: str | Path) -> None:
        """Write a policy folder; files of the same name are replaced one by one, `policy.json` last.

        Raises:
            UserError: the folder cannot be written.
        """
        folder = make_dir(folder)
        save_model(self.model, folder)
        self.save_card(folder)

    def save_card(self, folder: str | Path) -> None:
        """Add to a folder with the model's own files what makes it a policy folder."""
        raise NotImplementedError


def _warn(text: str) -> None:
    """What a caller should know, of the lines that a terminal would be told."""
    if text.startswith(WARNING):
        warnings.warn(text.removeprefix(WARNING), stacklevel=3)


def guide(conditional: Tensor, null: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance l_u + s (l_c - l_u), computed in float32: of logits, or of what a linear head makes
    logits of."""
    conditional32, null32 = conditional.float(), null.float()
    return (null32 + scale * (conditional32 - null32)).to(conditional.dtype)


def scale_weights(card: Card, balance: float) -> Tensor:
    """Weights float32 [T] of an image's tokens in a loss, their mean 1: n_k^-a each in a scale of n_k tokens, up to a
    common factor. With a = `balance` = 0 all tokens count alike, with 1 all scales.

    Raises:
        UserError: a policy that draws token by token.
    """
    if not card.scales:
        raise UserError(f"grpo.scale_balance {balance:g}: {card.name} draws token by token and has no scales; use 0")
    weights = torch.cat([torch.full((count,), count**-balance) for count in card.scales])
    return weights / weights.mean()


# drawing


class Draws:
    """The tokens of a batch of images as they are drawn, each image with noise of its own.

    `seeds[i]` seeds a CPU generator that draws one uniform number per token, and the token is where the cumulative
    distribution passes it. So a condition and a seed give the same image whatever else is in the batch (up to the
    rounding of matrix products of another shape).

    Args:
        count: images.
        length: T, tokens of an image.
        seeds: one integer per image; torch's CPU generator uses the low 32 bits.
        logp: as of `Policy.sample`.

    Raises:
        ValueError: another number of seeds, or an unknown `logp`.
        UserError: a setting out of range.
    """

    def __init__(
        self,
        count: int,
        length: int,
        sampling: Sampling,
        seeds: Sequence[int],
        logp: str | None,
        device: torch.device,
    ) -> None:
        if len(seeds) != count:
            raise ValueError(f"{len(seeds)} seeds for {count} conditions; give one each")
        if logp not in LOGP:
            raise ValueError(f"logp is {logp!r}; expected 'conditional', 'guided' or None")
        self.sampling, self.logp = sampling.check("sampling."), logp
        self.uniforms = image_uniforms(seeds, length, device)
        self.logprobs = torch.empty(count, length, dtype=torch.float32, device=device) if logp else None
        self.broken = torch.zeros((), dtype=torch.bool, device=device)

    def choose(self, logits: Tensor, conditional: Callable[[], Tensor], index: int | slice | Tensor) -> Tensor:
        """The images' next tokens, int64 [B], or the next n of them, int64 [B, n]. The CPU never waits for the device.

        Args:
            logits: (guided) logits float32 [B, V], or [B, n, V].
            conditional: gives the unguided ones, where they are needed.
            index: of the token, or the tokens, within the image; a tensor int64 [1] where the operations must not
                depend on it (CUDA graphs).
        """
        one = self.sampling
        filtered = filter_logits(logits, one.temperature, one.top_k, one.top_p)
        self.broken.logical_or_(~logits.sum().isfinite())  # one pass; a sum keeps what is no number
        one_place = isinstance(index, Tensor)
        uniforms = self.uniforms.index_select(1, index)[:, 0] if one_place else self.uniforms[:, index]
        tokens = inverse_cdf(filtered, uniforms)
        if self.logp is None:
            return tokens
        scored = filtered if self.logp == "guided" else filter_logits(conditional(), one.temperature)
        logp = log_prob(scored, tokens)
        if one_place:
            self.logprobs.index_copy_(1, index, logp[:, None])
        else:
            self.logprobs[:, index] = logp
        return tokens

    def drawn(self, tokens: Tensor) -> Drawn:
        """All tokens int64 [B, T], with their log-probabilities if asked for.

        Raises:
            UserError: logits were not finite numbers (training has diverged, or the file is damaged).
        """
        if self.broken:
            raise UserError("the policy's logits are not finite numbers: its weights are broken")
        return Drawn(tokens, self.logprobs)


def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits after temperature, top-k and top-p, in this order; removed tokens get -inf.

    Args:
        logits: float32 [..., V], left as they are.
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
    """Log-probability float32 [...] of tokens int64 [...] under softmax of logits [..., V]."""
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(dim=-1)


def inverse_cdf(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The tokens int64 [...] at which the cumulative softmax of logits [..., V] passes uniforms float64 [...]; several
    of each, [..., n], for uniforms [..., n].

    Tokens of probability zero (logit -inf) are never returned.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=uniforms.dtype)
    # Scaled by the total, which is 1 only up to rounding; right=True steps over tokens that add nothing.
    several = uniforms.ndim == logits.ndim
    threshold = (uniforms if several else uniforms[..., None]) * cumulative[..., -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True)
    tokens = tokens if several else tokens[..., 0]
    return tokens.clamp_(max=logits.shape[-1] - 1)  # only NaN logits get here; the caller reports those


def image_uniforms(seeds: Sequence[int], length: int, device: torch.device) -> Tensor:
    """Uniforms [B, length] in [0, 1), one stream per seed, drawn on the CPU: the same on every machine."""
    streams = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    table = torch.stack([torch.rand(length, dtype=torch.float64, generator=one) for one in streams])
    return table.to(device, torch.float32 if device.type == "mps" else torch.float64)  # MPS has no float64


# scoring


def log_probs(logits: Tensor, temperature: float) -> Tensor:
    """Of logits [..., V] at a temperature, float32."""
    logits = logits.float()
    return (logits if temperature == 1 else logits / max(temperature, MIN_TEMPERATURE)).log_softmax(-1)


def score_states(
    states: Tensor,
    tokens: Tensor,
    codes: int,
    distribution: Callable[[Tensor], Tensor],
    entropy: bool,
    compare: Compare | None,
) -> Scored:
    """Scores of given tokens from the states that they are predicted from; the logits of large shapes are never whole.

    Args:
        states: [B T, ...], what `distribution` makes log-probabilities of.
        tokens: int64 [B, T].
        codes: V.
        distribution: gives log-probabilities float32 [n, V] of n states; it may be asked again in the backward pass.
        entropy, compare: as of `Policy.model`.
    """
    at_once = max(1, LOGITS_AT_ONCE // codes)
    score = partial(_score, distribution, entropy=entropy, compare=compare)
    if len(states) > at_once:
        score = partial(checkpoint, score, use_reentrant=False)
    parts = [slice(start, start + at_once) for start in range(0, len(states), at_once)]
    flat = tokens.flatten()
    columns = zip(*(score(states[at], flat[at], at) for at in parts), strict=True)
    return Scored(*(None if one[0] is None else torch.cat(one).unflatten(0, tokens.shape) for one in columns))


def entropy_of(logp: Tensor) -> Tensor:
    """H = - sum_v pi log pi, in nats (section 4.3), of log-probabilities [..., V]."""
    return -(logp.exp() * logp).sum(-1)


def _score(
    distribution: Callable[[Tensor], Tensor],
    states: Tensor,
    tokens: Tensor,
    at: slice,
    entropy: bool,
    compare: Compare | None,
) -> Scored:
    """Of tokens [N], from states [N, ...], which are those `at` of all."""
    logp = distribution(states)
    return Scored(
        logp.gather(-1, tokens[:, None])[:, 0],
        entropy_of(logp) if entropy else None,
        None if compare is None else compare(logp, at),
    )
