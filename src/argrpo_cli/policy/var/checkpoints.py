"""Published weights of VAR and of its tokenizer in our models; all keys and shapes checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from argrpo_cli.networks.weights import fit_state
from argrpo_cli.policy.llamagen import checkpoints as llamagen
from argrpo_cli.policy.var.config import HEAD_DIM, SCALES, VARConfig
from argrpo_cli.policy.var.model import VARForImageGeneration
from argrpo_cli.policy.var.vq import MultiScaleVQ, MultiScaleVQConfig
from argrpo_cli.system.errors import UserError

QUANTIZER = "quantizer."  # of our model; the published files of policies leave it to the tokenizer's
LEVELS, MASK = "lvl_1L", "attn_bias_for_masking"  # of T tokens: their scales, and who may see whom
NO_BIAS = re.compile(r"blocks\.\d+\.attn\.zero_k_bias")
COUNTS = "quantize.ema_vocab_hit_SV"  # of the tokenizer: how often codes were used while it was trained
MIDDLE = ("block_1", "attn_1", "block_2")


def config_of(state: Mapping[str, Tensor], source: str) -> VARConfig:
    """The geometry of a published state dict.

    Raises:
        UserError: keys that a VAR has are missing or of no such shape, or it has another number of tokens.
    """
    sides = {
        "word_embed.weight": 2, "class_emb.weight": 2, "pos_1LC": 3, "head.weight": 2, "blocks.0.ffn.fc1.weight": 2,
    }  # fmt: skip
    for key, count in sides.items():
        if key not in state:
            raise UserError(f"{source} is no VAR checkpoint: it has no {key}")
        if state[key].ndim != count:
            raise UserError(f"{source} is no VAR checkpoint: {key} is {list(state[key].shape)}, expected {count} sides")
    tokens, sharpness = state["pos_1LC"].shape[1], state.get("blocks.0.attn.scale_mul_1H11")
    scales = next((one for one in SCALES.values() if sum(side**2 for side in one) == tokens), None)
    if LEVELS in state:  # the file itself says how many tokens each scale has
        scales = [round(count**0.5) for count in state[LEVELS].flatten().long().bincount().tolist()]
    if scales is None or sum(side**2 for side in scales) != tokens:
        raise UserError(f"{source} has {tokens} tokens an image, like no published VAR (680 or 2240)")
    codes, width = state["head.weight"].shape
    try:
        return VARConfig(
            vocab_size=codes,
            code_dim=state["word_embed.weight"].shape[1],
            hidden_size=width,
            num_hidden_layers=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
            num_attention_heads=max(1, width // HEAD_DIM) if sharpness is None else sharpness.shape[1],
            intermediate_size=state["blocks.0.ffn.fc1.weight"].shape[0],
            num_classes=state["class_emb.weight"].shape[0] - 1,
            scales=scales,
            shared_modulation="shared_ada_lin.1.weight" in state,
            cosine_attention=sharpness is not None,
        )
    except (ValueError, IndexError) as error:
        raise UserError(f"{source} is no VAR checkpoint: {error}") from error


def from_published(
    state: Mapping[str, Tensor],
    config: VARConfig,
    tokenizer: MultiScaleVQ,
    source: str = "the state dict",
    dtype: torch.dtype = torch.float32,
) -> VARForImageGeneration:
    """A model with the weights of a published state dict and the quantisation of its tokenizer.

    Raises:
        UserError: naming missing, unexpected and wrongly shaped keys (`source` says of what), or weights that the
            published code never trains and that are not what it computes.
    """
    for key in state:
        if NO_BIAS.fullmatch(key) and state[key].any():
            raise UserError(f"{source}: {key} is not zero, and VAR's keys have no bias")
    if LEVELS in state and state[LEVELS].numel() != config.block_size:
        raise UserError(f"{source}: {LEVELS} is of {state[LEVELS].numel()} tokens, expected {config.block_size}")
    weights = {key: value for key, value in state.items() if key not in (LEVELS, MASK) and not NO_BIAS.fullmatch(key)}
    with torch.device("meta"):
        model = VARForImageGeneration(config)
    quantizer = model.quantizer  # is the tokenizer's, and in float32 whatever the rest is in
    del model.quantizer
    what = f"a VAR of {config.num_hidden_layers} layers, width {config.hidden_size}, {config.vocab_size} codes"
    fit_state(model, weights, f"{source} as {what}", dtype=dtype)
    quantizer.load_state_dict(tokenizer.quantize.state_dict(), assign=True)
    model.quantizer = quantizer.requires_grad_(False)
    return model.eval()


def open_tokenizer(
    name_or_file: str | Path, scales: Sequence[int], beside: Path | None = None
) -> tuple[str | None, MultiScaleVQ]:
    """The published tokenizer for these scales, float32; see `llamagen.checkpoints.open_tokenizer`."""
    return llamagen.open_tokenizer(name_or_file, beside, partial(tokenizer_from, scales=scales))


def tokenizer_from(state: Mapping[str, Tensor], source: str, scales: Sequence[int]) -> MultiScaleVQ:
    """A published tokenizer for images of these scales: one file serves all sizes.

    Raises:
        UserError: keys or shapes that do not fit.
    """
    state = dict(state)
    for key in ("quantize.embedding.weight", "encoder.conv_in.weight", "quant_conv.weight"):
        if key not in state:
            raise UserError(f"{source} is no VAR tokenizer: it has no {key}")
    uses = state.pop(COUNTS, None)
    codes, width = state["quantize.embedding.weight"].shape
    if uses is not None and (uses.ndim != 2 or uses.shape[1] != codes):
        raise UserError(f"{source} is no VAR tokenizer: {COUNTS} is {list(uses.shape)}, expected one column a code")
    for key in [key for key in state if ".qkv." in key]:
        for name, part in zip("qkv", state.pop(key).chunk(3), strict=True):
            state[key.replace(".qkv.", f".{name}.")] = part
    config = MultiScaleVQConfig(
        codebook_size=codes,
        codebook_embed_dim=width,
        ch=state["encoder.conv_in.weight"].shape[0],
        z_channels=state["quant_conv.weight"].shape[1],
        quant_kernel=state["quant_conv.weight"].shape[-1],
        scales=scales,
    )
    with torch.device("meta"):
        model = MultiScaleVQ(config)
    names = {published_name(key, len(config.decoder_ch_mult)): key for key in model.state_dict()}
    fit_state(model, state, f"{source} as a tokenizer of {codes} codes", names=names)
    return model.eval()


def published_name(key: str, levels: int) -> str:
    """The published name of a key of `MultiScaleVQ` with so many levels of resolution.

    The decoder's levels are numbered from the finest there, and in the order in which they are run here. Queries, keys
    and values are one convolution there, `qkv`.
    """
    key = re.sub(r"^encoder\.conv_blocks\.(\d+)", r"encoder.down.\1", key)
    key = re.sub(r"^decoder\.conv_blocks\.(\d+)", lambda at: f"decoder.up.{levels - 1 - int(at[1])}", key)
    key = re.sub(r"\.mid\.(\d)", lambda at: f".mid.{MIDDLE[int(at[1])]}", key)
    key = re.sub(r"((?:down|up)\.\d+)\.res\.", r"\1.block.", key)
    return key.replace("quantize.phis.", "quantize.quant_resi.qresi_ls.")
