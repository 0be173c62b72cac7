"""Drawing image tokens: the cached decoding loop with guidance, filters, log-probabilities of the draws.

Read from `sample_tokens` at the top down to how a step is made fast: a static key-value cache, CUDA graphs on a GPU,
weights laid out for the processor on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from argrpo_cli.policy.llamagen.geometry import Geometry
from argrpo_cli.policy.llamagen.model import Encoded, KeyValue, LlamaGenNetwork, caption_attention_mask, computed_dtype
from argrpo_cli.policy.protocol import Drawn
from argrpo_cli.policy.tokens import Draws, guide
from argrpo_cli.shapes import Sampling

BUCKET = 64  # a graph's attention reads the filled cache up to the next multiple of this
KEPT_SHARE = 8  # a cache that takes more than this part of a GPU's memory is not kept for the next batch

# Chooses the next tokens int64 [B] from (guided) logits float32 [B, V], hidden states [B, D] of the
# conditional half, and the position of the token within the image.
Choose = Callable[[Tensor, Tensor, int | Tensor], Tensor]


@torch.inference_mode()
def sample_tokens(
    model: nn.Module,
    encoded: Encoded,
    sampling: Sampling,
    seeds: Sequence[int],
    logp: str | None = None,
) -> Drawn:
    """Sample images as token ids, with the log-probability of every token if asked.

    Each image has its own noise, see `tokens.Draws`.

    Args:
        model: a LlamaGenNetwork on the device of `encoded`, or what PEFT made of one.
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
    _check(model.config, encoded)
    device = encoded.condition.device
    draws = Draws(len(encoded), model.config.block_size, sampling, seeds, logp, device)

    def choose(logits: Tensor, conditional: Tensor, index: int | Tensor) -> Tensor:
        plain = (lambda: model.lm_head(conditional).float()) if sampling.cfg_scale > 1 else lambda: logits
        return draws.choose(logits, plain, index)

    with casts_remembered(model):
        tokens = draw_tokens(model, encoded, choose, sampling.cfg_scale, sampling.cfg_interval, recordable=True)
    return draws.drawn(tokens)


@contextmanager
def casts_remembered(model: nn.Module) -> Iterator[None]:
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


def _check(config: Geometry, encoded: Encoded) -> None:
    condition, null = encoded.condition, config.num_classes
    if config.condition == "class" and ((condition < 0) | (condition > null)).any():
        raise ValueError(f"class ids must lie in 0 .. {null} ({null} is the null class)")
    if config.condition == "caption" and condition.shape[1:] != (config.cls_token_num, config.caption_dim):
        raise ValueError(
            f"caption features have shape {list(condition.shape)}; expected "
            f"[B, {config.cls_token_num}, {config.caption_dim}]"
        )


@torch.inference_mode()
def draw_tokens(
    model: LlamaGenNetwork,
    encoded: Encoded,
    choose: Choose,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    recordable: bool = False,
) -> Tensor:
    """One image's worth of tokens int64 [B, T], each chosen by `choose`, through a static key-value cache.

    Args:
        cfg_scale: s in h_u + s (h_c - h_u); s <= 1 is no guidance, and then nothing runs twice.
        cfg_interval: -1 guides every token. k >= 0 guides tokens 0 .. k + 1 (LlamaGen's counting: the
            first token and the decoding steps 0 .. k); later ones follow the conditional logits alone.
        recordable: `choose` does nothing but launch kernels, and takes its position as a tensor int64 [1], too; then
            it becomes a graph where steps are graphs, and is called once.
    """
    batch, length = len(encoded), model.config.block_size
    guided = cfg_scale > 1
    tokens = torch.empty(batch, length, dtype=torch.int64, device=encoded.condition.device)
    decoder = Decoder(model, batch, cfg_scale)
    with packed_linears(model, decoder.rows):
        decoder.start(encoded)
        for index in range(length):
            decoder.choose(choose, tokens, index, recordable)
            if index + 1 < length:
                guided = guided and not 0 <= cfg_interval < index  # dropped once the last guided token is drawn
                decoder.step(index, guided)
    return tokens


def new_cache(model: LlamaGenNetwork, batch: int, length: int | None = None) -> list[KeyValue]:
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


@dataclass
class Room:
    """What the steps of a batch write to, always at the same addresses, and the graphs that were recorded over it.

    Attributes:
        past: the cache.
        valid: bool [rows, 1, 1, length], not the padding of a caption; None for classes.
        logits, conditional: of the latest step, float32 [B, V] and [B, D].
        tokens, position: what the next step reads, int64 [B] and [1].
        graphs: of steps, by the positions that they attend to and whether they are guided.
    """

    past: list[KeyValue]
    valid: Tensor | None
    logits: Tensor
    conditional: Tensor
    tokens: Tensor
    position: Tensor
    graphs: dict[Hashable, torch.cuda.CUDAGraph] = field(default_factory=dict)


# The latest room of a model, and what it was made for.
rooms: WeakKeyDictionary[nn.Module, tuple[Hashable, Room]] = WeakKeyDictionary()


def room_for(model: LlamaGenNetwork, batch: int, cfg_scale: float, length: int) -> Room:
    """The room of the batch before, with its graphs, where that one was alike and `keeps_rooms`; else a new one."""
    config, weight = model.config, model.model.embed_tokens.weight
    # A graph holds the addresses of the weights, and all numbers of Python's that went into it.
    key = (batch, cfg_scale, length, weight.dtype, tuple(one.data_ptr() for one in model.parameters()))
    kept, room = rooms.pop(model, (None, None))
    if kept != key or not keeps_rooms(model):
        rows, device = batch if cfg_scale <= 1 else 2 * batch, weight.device
        valid = torch.ones(rows, 1, 1, length, dtype=torch.bool, device=device)
        room = None  # before there is another one
        room = Room(
            past=new_cache(model, rows, length),
            valid=valid if config.condition == "caption" else None,
            logits=torch.empty(batch, config.vocab_size, device=device),
            conditional=torch.empty(batch, config.hidden_size, dtype=computed_dtype(weight), device=device),
            tokens=torch.zeros(batch, dtype=torch.int64, device=device),
            position=torch.zeros(1, dtype=torch.int64, device=device),
        )
    else:
        for part in (one for pair in room.past for one in pair):
            part.zero_()  # what a mask hides is multiplied by 0, which makes no 0 of what is no number
    size = sum(part.nbytes for pair in room.past for part in pair)
    if keeps_rooms(model) and size * KEPT_SHARE <= torch.cuda.get_device_properties(weight.device).total_memory:
        rooms[model] = key, room
    return room


def keeps_rooms(model: nn.Module) -> bool:
    """Whether graphs may serve later batches: on a GPU; not while a model is trained, whose update wants the memory;
    not under autocast, whose casts of the weights go when it ends; not with layers of others (PEFT's, which can be
    switched off), where a graph would go on with what they were."""
    weight = next(model.parameters())
    if weight.device.type != "cuda" or model.training or torch.is_autocast_enabled("cuda"):
        return False
    return all(type(module).__module__.startswith(("torch.nn.", "argrpo_cli.")) for module in model.modules())  # CUDA


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where all graphs of a device are recorded: those that share memory must, and libraries keep a workspace for each
    stream that they have seen."""
    return torch.cuda.Stream(device)  # CUDA


class Decoder:
    """Logits of a batch of images, token by token.

    Condition and null condition are the two halves of one batch; guidance is applied to their hidden states, so the LM
    head runs once. `start` reads the conditions, `choose` decides on a token for each image, `step` reads it.

    With `bucketed` the shapes of a step depend on nothing but its bucket: it attends to the filled cache rounded up to
    a multiple of `BUCKET`, under a mask, and takes its position from a tensor. This is what can be recorded as a CUDA
    graph, and on a GPU it is; so is what chooses. Otherwise a step attends to exactly the filled part.

    Attributes:
        logits: the (guided) ones that the next token is chosen by, float32 [B, V]; valid until the next step.
        conditional: hidden states of the conditional half that belong to them, [B, D].
    """

    def __init__(self, model: LlamaGenNetwork, batch: int, cfg_scale: float, bucketed: bool | None = None) -> None:
        config, device = model.config, model.model.embed_tokens.weight.device
        bucketed = device.type == "cuda" if bucketed is None else bucketed
        self.model = model
        self.batch, self.cfg_scale, self.bucketed = batch, cfg_scale, bucketed
        self.prefix = config.cls_token_num
        length = self.prefix + config.block_size
        if bucketed:
            length = -(-length // BUCKET) * BUCKET
        self.rows = batch if cfg_scale <= 1 else 2 * batch
        self.room = room_for(model, batch, cfg_scale, length)
        self.logits, self.conditional, self.tokens = self.room.logits, self.room.conditional, self.room.tokens
        self.positions = torch.arange(length, device=device)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.stream = side_stream(device) if device.type == "cuda" else None
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}  # of this batch: what chooses

    def start(self, encoded: Encoded) -> None:
        """Read the conditions."""
        backbone, guided, valid = self.model.model, self.cfg_scale > 1, self.room.valid
        x = backbone.embed_condition(encoded.condition)
        if guided:
            x = torch.cat([x, backbone.embed_null(self.batch)])  # conditional half first
        mask = None
        if valid is not None:
            valid.fill_(True)
        if encoded.mask is not None:
            mask = caption_attention_mask(encoded.mask, self.prefix)
            seen = encoded.mask.bool()[:, None, None]
            if guided:  # the null caption keeps the padding of the caption it replaces
                mask, seen = mask.repeat(2, 1, 1, 1), seen.repeat(2, 1, 1, 1)
            valid[..., : self.prefix] = seen
        x = x.to(backbone.embed_tokens.weight.dtype)
        hidden = backbone.run(x, mask, self.room.past, filled=self.prefix)
        self._leave(hidden[:, -1], guided)

    def choose(self, choose: Choose, tokens: Tensor, index: int, recordable: bool) -> None:
        """Choose the images' tokens number `index`, for the next step and into `tokens` [B, T]."""

        def job() -> None:
            chosen = choose(self.logits, self.conditional, self.index)
            tokens.index_copy_(1, self.index, chosen[:, None])
            self.tokens.copy_(chosen)

        if self.bucketed and recordable:
            self.index.fill_(index)
            self._repeat(self.graphs, "choose", job)
        else:
            chosen = choose(self.logits, self.conditional, index)
            tokens[:, index] = chosen
            self.tokens.copy_(chosen)

    def step(self, index: int, guided: bool) -> None:
        """Read the tokens that were chosen last.

        Args:
            index: their number.
            guided: False leaves the null half out.
        """
        position = self.prefix + index
        if not self.bucketed:
            return self._advance(None, position + 1, guided)
        filled = -(-(position + 1) // BUCKET) * BUCKET
        self.room.position.fill_(position)
        key = filled, guided
        self._repeat(self.room.graphs, key, lambda: self._advance(self.room.position, filled, guided))

    def _advance(self, position: Tensor | None, filled: int, guided: bool) -> None:
        rows, past = 2 * self.batch if guided else self.batch, self.room.past
        seen = None if self.room.valid is None else self.room.valid[:rows, ..., :filled]
        if position is not None:
            reached = (self.positions[:filled] <= position)[None, None, None]
            seen = reached if seen is None else seen & reached
        mask = None
        if seen is not None:  # what is added to the scores, which every layer would otherwise make of it again
            mask = torch.zeros(seen.shape, dtype=past[0][0].dtype, device=seen.device)
            mask = mask.masked_fill(~seen, float("-inf"))
        past = [(keys[:rows], values[:rows]) for keys, values in past]
        backbone = self.model.model
        x = backbone.embed_tokens(self.tokens.repeat(2) if guided else self.tokens)[:, None]
        self._leave(backbone.run(x, mask, past, position, filled)[:, 0], guided)

    def _leave(self, hidden: Tensor, guided: bool) -> None:
        """Put the logits of hidden states [rows, D] where `choose` looks for them."""
        conditional = hidden[: self.batch]
        steered = guide(conditional, hidden[self.batch :], self.cfg_scale) if guided else conditional
        self.logits.copy_(self.model.lm_head(steered))
        self.conditional.copy_(conditional)

    def _repeat(self, graphs: dict[Hashable, torch.cuda.CUDAGraph], key: Hashable, job: Callable[[], None]) -> None:
        """Do what launches the same kernels over the same memory every time: by a graph, recorded the first time."""
        if self.stream is None:
            return job()
        with torch.cuda.device(self.index.device):  # streams and graphs are those of the current device  # CUDA
            if key not in graphs:  # CUDA
                graphs[key] = self._record(job, next(iter(graphs.values()), None))  # CUDA
            graphs[key].replay()  # CUDA

    def _record(self, job: Callable[[], None], other: torch.cuda.CUDAGraph | None) -> torch.cuda.CUDAGraph:
        """A job as a graph, in the memory of another that runs in turn with it. The job is done once on the way."""
        self.stream.wait_stream(torch.cuda.current_stream())  # CUDA
        with torch.cuda.stream(self.stream):  # libraries set themselves up on the first call, which is not recorded
            job()  # CUDA
        torch.cuda.current_stream().wait_stream(self.stream)  # CUDA
        graph = torch.cuda.CUDAGraph()  # CUDA
        with torch.cuda.graph(graph, pool=None if other is None else other.pool(), stream=self.stream):  # CUDA
            job()  # CUDA
        return graph  # CUDA


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
