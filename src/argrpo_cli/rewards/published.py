"""Weights that others published: reading their files without running pickled code, fitting them strictly."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from argrpo_cli.system.errors import UserError
from argrpo_cli.system.hub import fetch


def published_file(
    repo: str, files: str | Sequence[str], weights: str | Path | None = None, option: str = "weights"
) -> Path:
    """The local file `weights` when it is given, else the first of `files` that a hub repository has, fetched once.

    Raises:
        UserError: the local file is absent, or the hub's cannot be fetched.
    """
    names = [files] if isinstance(files, str) else list(files)
    if weights is not None:
        if not Path(weights).is_file():
            raise UserError(f"weights not found: {weights}; give the file {names[0]} of https://huggingface.co/{repo}")
        return Path(weights)
    first: UserError | None = None
    for name in names:
        try:
            return fetch(repo, name)
        except UserError as error:
            first = first or UserError(str(error).replace("give the file instead", f"give it as the option {option}"))
    raise first or ValueError("no file asked for")


def read_state(path: str | Path, wrappers: Sequence[str] = ()) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` file or a torch file (`weights_only`: no pickled code is run).

    Args:
        wrappers: keys under which a torch file may hold it; the first that is there is opened.

    Raises:
        UserError: the file is absent, damaged or something else.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError as error:
        raise UserError(f"weights not found: {path}") from error
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        raise UserError(
            f"{path} is not a readable file of weights: it is cut off, damaged or something else"
        ) from error
    for key in wrappers:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no state dict of tensors")
    return content


def fit_state(network: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Give `network` all of `state`, in float32 where it is floating point; nothing may be missing or left over.

    The network may live on the meta device: it takes the tensors as they are.

    Raises:
        UserError: `source`, and the keys that are missing, unexpected or of another shape.
    """
    own = network.state_dict()
    shapes = [
        f"{key} is {list(state[key].shape)}, expected {list(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    found = {"missing": own.keys() - state.keys(), "unexpected": state.keys() - own.keys(), "wrong shape": shapes}
    if problems := [f"{what} {_some(sorted(keys))}" for what, keys in found.items() if keys]:
        raise UserError(f"weights do not fit: {source} ({'; '.join(problems)})")
    values = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    network.load_state_dict(values, assign=True)


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
