"""Low-rank adapters (LoRA) on disk: a small folder that says which policy it belongs to, opened as a whole policy.

Such a folder holds what PEFT writes (adapter_config.json, adapter_model.safetensors) and a `policy.json` that says

    {"adapter_of": "/runs/base/policy"}

where the value is whatever `load_policy` opens: a name, or a path (a relative one counts from the folder).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from torch import nn

from argrpo_cli.policy.folder import ADAPTER_OF
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import write_json

if TYPE_CHECKING:
    from argrpo_cli.policy.llamagen.modeling import LlamaGenForImageGeneration


def require_peft() -> None:
    """Raises UserError with the pip command where PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError("LoRA needs the package peft: pip install peft") from error


def mark_adapter(folder: Path, card_file: str, base: str) -> None:
    """Make a folder with PEFT's files a policy folder: adapters of the policy `base`."""
    write_json(folder / card_file, {ADAPTER_OF: base})


def merge_adapter(model: LlamaGenForImageGeneration, folder: Path) -> LlamaGenForImageGeneration:
    """The model with the adapters of a folder added to its weights (W + alpha / r B A), in place.

    Raises:
        UserError: PEFT is missing, the files are damaged, or the adapters fit another model.
    """
    require_peft()
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an older name
            tuned = PeftModel.from_pretrained(model, str(folder), local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"cannot load the adapters in {folder}: {why}") from error
    merged = tuned.merge_and_unload()
    merged.config._name_or_path = ""  # no folder holds these weights
    return merged


def check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """UserError when one of the `policy.lora.targets` is no linear layer that an adapter can be put on."""
    known = linear_names(model)
    for target in targets:
        if target not in known:
            raise UserError(f"policy.lora.targets: no linear layer {target!r}; there are {', '.join(known)}")


def linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of the linear layers an adapter can be put on, in the order of the model."""
    names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names if name != "lm_head"))
