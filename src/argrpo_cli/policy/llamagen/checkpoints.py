"""Published weights of LlamaGen and AR-GRPO, in every wrapping, to our models and back; all keys and shapes checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argrpo_cli.networks.weights import blank, fit_state, read_state
from argrpo_cli.policy.folder import weight_files
from argrpo_cli.policy.llamagen.geometry import SIZES, Geometry, VQGeometry, swiglu_size
from argrpo_cli.policy.llamagen.model import LlamaGenNetwork
from argrpo_cli.policy.llamagen.vq import VQNetwork
from argrpo_cli.policy.published import TOKENIZERS
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import fetch

ARGRPO_POLICY, ARGRPO_TOKENIZER = "gpt_model.", "vq_model."

# Published name -> ours. The names inside a layer are the same.
RENAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "cls_embedding.embedding_table.weight": "model.class_embedding.weight",
    "cls_embedding.cap_proj.fc1.weight": "model.caption_mlp.fc1.weight",
    "cls_embedding.cap_proj.fc2.weight": "model.caption_mlp.fc2.weight",
    "cls_embedding.uncond_embedding": "model.null_caption",
}
RENAMES_BACK = {ours: published for published, ours in RENAMES.items()}

# The layout of transformers' Llama, in which LlamaGen is passed on as well (jadohu/LlamaGen-T2I and what others trained
# from it, such as GCPO) -> published name. Queries, keys and values are three matrices there; they keep LlamaGen's
# rotary embedding of neighbouring pairs, so nothing is permuted.
LLAMA_RENAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
LLAMA_LAYER = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
LLAMA_QKV = tuple(f"self_attn.{one}_proj" for one in "qkv")

# A training checkpoint holds the weights under one of these; a consolidated one is the state dict itself. Where a
# running mean of the weights lies beside them, the published samplers take the weights.
WRAPPERS = ("model", "module", "state_dict", "ema")
# What wrappers of distributed and compiled training put before every key.
WRAPPED_KEYS = re.compile(r"^(?:(?:_orig_mod|module|_fsdp_wrapped_module)\.)+")

# The rotary table: computed, never loaded. Some published files carry it.
COMPUTED = frozenset({"freqs_cis"})


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a published file, without what distributed and compiled training put before its keys.

    Raises:
        UserError: see `read_state`.
    """
    return {WRAPPED_KEYS.sub("", key): value for key, value in read_state(path, WRAPPERS).items()}


def to_published(model: LlamaGenNetwork) -> dict[str, Tensor]:
    """The model's state dict under the published names."""
    state = model.state_dict()
    return {RENAMES_BACK.get(key) or key.removeprefix("model."): value for key, value in state.items()}


def from_published(
    state: Mapping[str, Tensor],
    config: Geometry,
    source: str = "the state dict",
    dtype: torch.dtype = torch.float32,
) -> LlamaGenNetwork:
    """A model with the weights of a published state dict; weights of this dtype already are not copied.

    Raises:
        UserError: naming missing, unexpected and wrongly shaped keys (`source` says of what).
    """
    with blank():
        model = LlamaGenNetwork(config)
    state = {key: value for key, value in state.items() if key not in COMPUTED}
    names = {key: RENAMES.get(key) or f"model.{key}" for key in (*state, *to_published(model))}
    what = f"a {config.condition}-conditional LlamaGen of width {config.hidden_size}"
    source = f"{source} as {what}, {config.num_hidden_layers} layers, {config.vocab_size} codes"
    fit_state(model, state, source, names=names, dtype=dtype)
    return model.eval()


def config_of(state: Mapping[str, Tensor], tokens: int, source: str) -> Geometry:
    """The geometry of a published state dict that draws `tokens` image tokens.

    Raises:
        UserError: keys that a LlamaGen has are missing, or its width is of no size in `SIZES`.
    """
    captions = "cls_embedding.uncond_embedding" in state
    condition = "cls_embedding.cap_proj.fc1.weight" if captions else "cls_embedding.embedding_table.weight"
    needed = ("tok_embeddings.weight", "output.weight", "layers.0.feed_forward.w1.weight", condition)
    missing = [key for key in needed if key not in state]
    if missing:
        raise UserError(f"{source} is no LlamaGen checkpoint: it has no {missing[0]}")
    for key in needed:
        if state[key].ndim != 2:
            shape = list(state[key].shape)
            raise UserError(f"{source} is no LlamaGen checkpoint: {key} is {shape}, expected two sides")
    codes, width = state["tok_embeddings.weight"].shape
    layers = len({key.split(".")[1] for key in state if key.startswith("layers.")})
    size = next((one for one in SIZES.values() if one["hidden_size"] == width), None)
    if size is None:
        known = ", ".join(f"{name} {one['hidden_size']}" for name, one in SIZES.items())
        raise UserError(f"{source} is {width} wide, like no published size ({known})")
    feed_forward = state["layers.0.feed_forward.w1.weight"].shape[0]
    reads: dict[str, Any] = {"num_classes": state[condition].shape[0] - 1}
    if not captions and reads["num_classes"] < 1:
        raise UserError(f"{source} is no LlamaGen checkpoint: {condition} has one row, that of the null class")
    if captions:
        tokens_of_caption, features = state["cls_embedding.uncond_embedding"].shape
        reads = {"condition": "caption", "cls_token_num": tokens_of_caption, "caption_dim": features}
    return Geometry(
        vocab_size=codes,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=size["num_attention_heads"],
        intermediate_size=None if feed_forward == swiglu_size(width) else feed_forward,
        block_size=tokens,
        class_dropout_prob=0.1,
        **reads,
    )


def open_tokenizer(
    name_or_file: str | Path,
    beside: Path | None = None,
    build: Callable[[Mapping[str, Tensor], str], VQNetwork] | None = None,
) -> tuple[str | None, VQNetwork]:
    """A published tokenizer, float32, and its name where it was opened by that.

    Args:
        name_or_file: a name of `TOKENIZERS`, or a file.
        beside: a checkpoint; a tokenizer that lies beside it, or in its folder, under its published file name is taken
            as a file: a policy saved with it brings it along and needs no network.
        build: makes it of a state dict, and of words for where that is from; `tokenizer_from` unless given.
    """
    build = build or tokenizer_from
    if str(name_or_file) not in TOKENIZERS:
        return None, build(read_checkpoint(name_or_file), str(name_or_file))
    repo, file = TOKENIZERS[str(name_or_file)]
    near = None if beside is None else beside / file if beside.is_dir() else beside.with_name(file)
    if near is not None and near.is_file():
        path, name = near, None
    else:
        try:
            path, name = fetch(repo, file), str(name_or_file)
        except UserError as error:
            place = "into the cache" if beside is None else f"beside {beside}"
            raise UserError(str(error).replace("give the file instead", f"put it {place}")) from error
    return name, build(read_checkpoint(path), str(path))


def tokenizer_from(state: Mapping[str, Tensor], source: str = "the state dict") -> VQNetwork:
    """A published image tokenizer in float32, its levels read off the keys.

    Raises:
        UserError: keys or shapes that do not fit.
    """
    for key in ("quantize.embedding.weight", "encoder.conv_in.weight", "encoder.conv_out.weight"):
        if key not in state:
            raise UserError(f"{source} is no LlamaGen tokenizer: it has no {key}")
    try:
        codes, width = state["quantize.embedding.weight"].shape
        channels = state["encoder.conv_in.weight"].shape[0]
        blocks = {key.split(".")[4] for key in state if key.startswith("encoder.conv_blocks.0.res.")}
        config = VQGeometry(
            codebook_size=codes,
            codebook_embed_dim=width,
            ch=channels,
            encoder_ch_mult=_multipliers(state, "encoder", channels),
            decoder_ch_mult=_multipliers(state, "decoder", channels),
            z_channels=state["encoder.conv_out.weight"].shape[0],
            num_res_blocks=len(blocks),
        )
        with blank():
            model = VQNetwork(config)
    except (ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{source} is no LlamaGen tokenizer: its keys or shapes are those of none ({error})") from error
    fit_state(model, state, f"{source} as a tokenizer of {codes} codes")
    return model.eval()


def _multipliers(state: Mapping[str, Tensor], half: str, channels: int) -> list[int]:
    """Channels of each level over the base's, the finest level first."""
    levels = len({key.split(".")[2] for key in state if key.startswith(f"{half}.conv_blocks.")})
    widths = [state[f"{half}.conv_blocks.{level}.res.0.conv1.weight"].shape[0] // channels for level in range(levels)]
    return widths if half == "encoder" else widths[::-1]


def from_llama_layout(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """A state dict in the layout of transformers' Llama under the published names; what has none keeps its own.

    Raises:
        UserError: a layer without queries, keys or values.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        prefix, layers, rest = key.partition("model.layers.")
        number, _, name = rest.partition(".")
        part, _, end = name.rpartition(".")
        if prefix or not layers:
            renamed[LLAMA_RENAMES.get(key) or key.removeprefix("model.")] = value
        elif part == LLAMA_QKV[0]:
            names = [f"{layers}{number}.{one}.{end}" for one in LLAMA_QKV]
            if missing := [one for one in names if one not in state]:
                raise UserError(f"{source} is no LlamaGen in transformers' layout: it has no {missing[0]}")
            renamed[f"layers.{number}.attention.wqkv.{end}"] = torch.cat([state[one] for one in names])
        elif part not in LLAMA_QKV:
            renamed[f"layers.{number}.{LLAMA_LAYER.get(part, part)}.{end}"] = value
    return renamed


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The state dict of a policy, under its published names, in an AR-GRPO folder or one in the layout of transformers'
    Llama; and of the tokenizer, which an AR-GRPO folder holds.

    Raises:
        UserError: files missing or damaged, or other weights in them.
    """
    whole: dict[str, Tensor] = {}
    for file in weight_files(folder):
        whole |= read_checkpoint(file)
    if "model.embed_tokens.weight" in whole and any(key.startswith("model.cls_embedding.") for key in whole):
        return from_llama_layout(whole, str(folder)), None
    parts = []
    for prefix in (ARGRPO_POLICY, ARGRPO_TOKENIZER):
        parts.append({key.removeprefix(prefix): value for key, value in whole.items() if key.startswith(prefix)})
        if not parts[-1]:
            raise UserError(
                f"{folder} is no policy folder, and no whole AR-GRPO folder: no weights under {prefix}; nor is it a "
                "LlamaGen in transformers' layout, which has model.embed_tokens and model.cls_embedding"
            )
    return parts[0], parts[1]
