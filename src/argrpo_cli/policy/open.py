"""Opening policies: `load_policy` by name or path, whatever the family; what of a policy is trained; adapters (LoRA).

Nothing heavy is imported before a policy is opened.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from argrpo_cli.policy.folder import (
    ADAPTER_OF,
    CARD,
    PolicyCard,
    base_of,
    find_policy,
    here,
    is_published,
    own_sampling,
    published_family,
)
from argrpo_cli.shapes import DTYPES
from argrpo_cli.system.errors import UserError, did_you_mean, first_line
from argrpo_cli.system.files import read_json
from argrpo_cli.system.processes import resolve_device, tell_slow

if TYPE_CHECKING:
    from torch import nn

    from argrpo_cli.policy.outline import Outline
    from argrpo_cli.policy.protocol import Policy

# Family, as policy.json has it (none is llamagen), to the module and the class that opens its folders by `load`.
FAMILIES = {
    "llamagen": ("argrpo_cli.policy.llamagen.policy", "LlamaGen"),
    "janus": ("argrpo_cli.policy.janus.policy", "Janus"),
    "var": ("argrpo_cli.policy.var.policy", "VAR"),
}
# Family to the module that opens what others publish of it, by `open_published(name_or_path, device, dtype,
# text_device)`, and outlines it by `outline_published(name_or_path)`, and a policy folder by `outline_folder(folder)`.
PUBLISHED = {
    "llamagen": "argrpo_cli.policy.llamagen.published",
    "janus": "argrpo_cli.policy.janus.published",
    "var": "argrpo_cli.policy.var.published",
}
KEYS = {"var": "pos_1LC"}  # which only files of the family have


def load_policy(
    name_or_path: str | Path, device: str = "cpu", dtype: str = "float32", text_device: str = "same"
) -> Policy:
    """Open a policy.

    Args:
        name_or_path: a bundled name ("nano-c2i"), a published one ("c2i-l-384", "janus-pro-1b@REVISION"), a policy
            folder, a checkpoint folder of a run (adapters are merged into their base), a run directory (its newest
            checkpoint, or its final policy where there are none), a published checkpoint file, an AR-GRPO folder, or a
            folder of a Janus as transformers has it; or any of these folders on the hub, as "user/name" or
            "user/name@revision".
        device: a torch device, or "auto" for a GPU if there is one.
        dtype: "float32", "bfloat16" or "float16", for the model; the tokenizer stays in float32.
        text_device: of the text encoder; "same", "offload" or the name of a device, see `TextEncoder.place`.

    Raises:
        UserError: nothing there, or something that is not a whole policy; in one line that names the path.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    device, name, name_or_path = resolve_device(device), str(name_or_path), here(name_or_path)
    tell_slow(dtype, device)
    if is_published(name_or_path):
        return _published(name_or_path).open_published(name_or_path, device, dtype, text_device)
    folder = find_policy(name_or_path)
    card = read_json(folder / CARD, PolicyCard)
    if ADAPTER_OF in card:
        import torch

        policy = load_policy(base_of(folder, card), device, "float32", text_device)
        policy.model = merge_adapter(policy.model, folder).to(getattr(torch, dtype)).eval()
        policy.sampling = own_sampling(folder, card) or policy.sampling
    else:
        module, kind = FAMILIES[_family(folder, card, FAMILIES)]
        policy = getattr(import_module(module), kind).load(folder, device, dtype, text_device)
    policy.name = name
    return policy


def outline_policy(name_or_path: str | Path) -> Outline:
    """What `load_policy` would open, without its weights; nothing is fetched but a `user/name` of the hub.

    Raises:
        UserError: nothing is there, or its files are not those of a policy.
    """
    name_or_path = here(name_or_path)
    if is_published(name_or_path):
        return _published(name_or_path).outline_published(name_or_path)
    folder = find_policy(name_or_path)
    card = read_json(folder / CARD, PolicyCard)
    if ADAPTER_OF in card:
        return outline_policy(base_of(folder, card))
    return import_module(PUBLISHED[_family(folder, card, PUBLISHED)]).outline_folder(folder)


def _published(name_or_path: str | Path) -> ModuleType:
    """The module of `PUBLISHED` for a name; for a file or folder by its name, or by the keys in it."""
    family, path = published_family(name_or_path), Path(name_or_path)
    if family == "llamagen" and path.is_file():
        from argrpo_cli.policy.llamagen.checkpoints import read_checkpoint

        keys = read_checkpoint(path)
        family = next((one for one, key in KEYS.items() if key in keys), family)
    return import_module(PUBLISHED[family])


def _family(folder: Path, card: dict[str, Any], families: Mapping[str, Any]) -> str:
    """What policy.json says, one of `families`."""
    family = str(card.get("family", "llamagen"))
    if family not in families:
        hint = did_you_mean(family, families) or f"; there are {', '.join(families)}"
        raise UserError(f"{folder / CARD}: no family of policies {family!r}{hint}")
    return family


def choose_trainable(policy: Policy, trainable: str | Sequence[str]) -> None:
    """Freeze every parameter of a policy's model but these: "all", or one or several parts of their names.

    Raises:
        UserError: a part that no parameter's name contains.
    """
    parts = [""] if trainable == "all" else [trainable] if isinstance(trainable, str) else list(trainable)
    names = policy.parts()["trainable"]
    for part in parts:
        if not any(part in name for name in names):
            example = next((name for name in names if "layers." in name), names[0])
            raise UserError(f"policy.trainable: no parameter's name contains {part!r}; names are like {example}")
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_(name in names and any(part in name for part in parts))


def adapted_layers(policy: Policy, targets: Sequence[str] | None) -> list[str]:
    """Full names of the linear layers that adapters are put on: those that are trained and called like one of the
    `policy.lora.targets`, which where they are null are the family's own choice.

    Raises:
        UserError: a target that no such layer is called.
    """
    from torch import nn

    parts = policy.parts()
    for target in targets or ():
        if target not in parts["lora"]:
            raise UserError(f"policy.lora.targets: no linear layer {target!r}; there are {', '.join(parts['lora'])}")
    chosen, trained = parts["adapted"] if targets is None else targets, set(parts["trainable"])
    return [
        name
        for name, module in policy.model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in chosen and f"{name}.weight" in trained
    ]


def require_peft() -> None:
    """Raises UserError with the pip command where PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError("LoRA needs the package peft: pip install peft") from error


def merge_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the adapters of a folder added to its weights (W + alpha / r B A), in place.

    Raises:
        UserError: PEFT is missing, the files are damaged, or the adapters fit another model.
    """
    require_peft()
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an older name
            with_adapters = PeftModel.from_pretrained(model, str(folder), local_files_only=True)
    except Exception as error:  # of damaged files PEFT makes nearly anything
        raise UserError(f"cannot load the adapters in {folder}: {first_line(error)}") from error
    model = with_adapters.merge_and_unload()
    model.config._name_or_path = ""  # no folder holds these weights
    return model
