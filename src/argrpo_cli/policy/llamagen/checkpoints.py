"""Published LlamaGen checkpoints to our model and back; every key and every shape is checked."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from argrpo_cli.policy.llamagen.config import LlamaGenConfig
from argrpo_cli.policy.llamagen.modeling import LlamaGenForImageGeneration
from argrpo_cli.system.errors import UserError

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

# A training checkpoint holds the weights under one of these; a consolidated one is the state dict itself. Where a
# running mean of the weights lies beside them, the published samplers take the weights.
WRAPPERS = ("model", "module", "state_dict", "ema")
# What wrappers of distributed and compiled training put before every key.
WRAPPED_KEYS = re.compile(r"^(?:(?:_orig_mod|module|_fsdp_wrapped_module)\.)+")

# The rotary table: computed, never loaded. Some published files carry it.
COMPUTED = frozenset({"freqs_cis"})


def to_published(model: LlamaGenForImageGeneration) -> dict[str, Tensor]:
    """The model's state dict under the published names."""
    state = model.state_dict()
    return {RENAMES_BACK.get(key) or key.removeprefix("model."): value for key, value in state.items()}


def from_published(
    state: Mapping[str, Tensor],
    config: LlamaGenConfig,
    source: str = "the state dict",
    dtype: torch.dtype = torch.float32,
) -> LlamaGenForImageGeneration:
    """A model with the weights of a published state dict; weights of this dtype already are not copied.

    Raises:
        UserError: naming missing, unexpected and wrongly shaped keys (`source` says of what).
    """
    with torch.device("meta"):
        model = LlamaGenForImageGeneration(config)
    given = {key: value for key, value in state.items() if key not in COMPUTED}
    names = {key: RENAMES.get(key) or f"model.{key}" for key in (*given, *to_published(model))}
    fit_state(model, given, names, f"{source} does not fit {_describe(config)}", dtype)
    return model.eval()


def fit_state(
    model: nn.Module, state: Mapping[str, Tensor], names: Mapping[str, str], source: str, dtype: torch.dtype
) -> None:
    """Put a published state dict into a model on the meta device.

    `names` takes published keys, those of `state` and all of the model's, to the model's own. Numbers that are not
    floating point keep their type.

    Raises:
        UserError: `source` and what is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    back = {ours: published for published, ours in names.items()}
    expected = {back.get(key, key): tuple(value.shape) for key, value in own.items()}
    problems = []
    if missing := sorted(expected.keys() - state.keys()):
        problems.append(f"missing {_some(missing)}")
    if unexpected := sorted(state.keys() - expected.keys()):
        problems.append(f"unexpected {_some(unexpected)}")
    shapes = [
        f"{key} is {_shape(state[key])}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in state and _shape(state[key]) != list(shape)
    ]
    if shapes:
        problems.append(f"wrong shape: {_some(shapes)}")
    kinds = [
        f"{key} is {value.dtype}"
        for key, value in state.items()
        if key in expected and own[names.get(key, key)].is_floating_point() != value.is_floating_point()
    ]
    if kinds:
        problems.append(f"wrong numbers: {_some(kinds)}")
    if problems:
        raise UserError(f"{source}: {'; '.join(problems)}")
    ours = {names[key]: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    model.load_state_dict(ours, strict=True, assign=True)


def read_checkpoint(path: str | Path, wrappers: Sequence[str] = WRAPPERS) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, mapped into memory; no pickled code is run (`weights_only`).

    Raises:
        UserError: the file is absent or is no torch checkpoint of weights.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint file {path}")
    try:
        # LlamaGen's trainer stored its command-line arguments beside the weights; Namespace is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        why = "it is cut off, damaged or something else; fetch it again"
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            why = "it holds more than weights, and pickled code is not run"
        raise UserError(f"{path} is not a readable torch checkpoint of weights: {why}") from error
    return unwrap_state(content, str(path), wrappers)


def unwrap_state(content: object, source: str, wrappers: Sequence[str] = WRAPPERS) -> dict[str, Tensor]:
    """The state dict in a checkpoint's content, the first of `wrappers` that is there; UserError if there is none."""
    for wrapper in wrappers:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{source} holds no state dict, neither on top nor under {', '.join(wrappers)}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            what = f"a {type(value).__name__}" if not isinstance(value, Tensor) else f"of layout {value.layout}"
            raise UserError(f"{source} holds no state dict: {key!r} is {what}, expected a dense tensor under a name")
    return {WRAPPED_KEYS.sub("", key): value for key, value in content.items()}


def _shape(value: object) -> list[int] | str:
    return list(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _describe(config: LlamaGenConfig) -> str:
    return (
        f"a {config.condition}-conditional LlamaGen of width {config.hidden_size}, "
        f"{config.num_hidden_layers} layers, {config.vocab_size} codes"
    )
