"""transformers' own loading and saving with two promises: all weights or one clear line; no half-written file."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import cannot_write, open_to_all, read_json

Model = TypeVar("Model", bound=PreTrainedModel)


def load_pretrained(kind: type[Model], folder: Path, dtype: torch.dtype, optional: tuple[str, ...] = ()) -> Model:
    """`from_pretrained` from a local folder that accepts nothing less than the complete weights of this kind.

    Args:
        optional: ends of keys that may be missing or unexpected.

    Raises:
        UserError: files missing or damaged, another kind of model, keys or shapes that do not fit.
    """
    config = read_json(folder / "config.json")
    expected = kind.config_class.model_type
    if config.get("model_type") != expected:
        raise UserError(f"{folder} holds a {config.get('model_type')!r} model; expected {expected!r}")
    try:
        with quiet_transformers():
            model, info = kind.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported below, in one line
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        why = lines[0] if lines else type(error).__name__
        damaged = "; the file is damaged" if "deserializing" in why else ""
        raise UserError(f"cannot load {folder}: {why}{damaged}") from error
    for what in ("missing_keys", "unexpected_keys"):
        if keys := sorted(key for key in info[what] if not key.endswith(optional)):
            raise UserError(f"cannot load {folder}: {len(keys)} {what.replace('_', ' ')} such as {keys[0]}")
    for key, saved, ours in sorted(info["mismatched_keys"]):
        raise UserError(f"cannot load {folder}: {key} is {list(saved)}, config.json says {list(ours)}")
    return model


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained` beside and then into a folder, so that no file in it is ever half written."""
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as fresh, quiet_transformers():
            model.save_pretrained(fresh)
            for file in sorted(Path(fresh).iterdir()):
                open_to_all(file)
                with open(file, "rb") as written:
                    os.fsync(written.fileno())  # or a power cut may leave the name without the contents
                os.replace(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error if isinstance(error, OSError) else OSError(str(error))) from error


def fingerprint(modules: Iterable[nn.Module], settings: Mapping[str, Any] | None = None) -> str:
    """A hash over a thousand numbers of every weight, and over plain `settings`: sixteen hexadecimal digits."""
    digest = hashlib.sha256()
    if settings:
        digest.update(json.dumps(settings, sort_keys=True).encode())
    for module in modules:
        for name, tensor in module.state_dict().items():
            flat = tensor.detach().flatten()
            some = flat[:: max(1, flat.numel() // 1000)].float().cpu().numpy()
            digest.update(name.encode() + np.ascontiguousarray(some).tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no load reports: loading either works or raises one line."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
