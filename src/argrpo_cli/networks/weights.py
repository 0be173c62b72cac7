"""Reward networks on disk: a folder with config.json and float16 weights in model.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import atomic_path, read_json, write_json

INPUT_SIZE = 64  # pixels, of the nano networks


def save_network(folder: str | Path, network: nn.Module, config: dict[str, Any]) -> None:
    """Write `config` and the float16 weights of `network` into `folder`."""
    folder = Path(folder)
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).detach().contiguous()
        for name, tensor in network.state_dict().items()
    }
    write_json(folder / "config.json", config)
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a network folder; UserError names a file that is missing or broken."""
    return read_json(Path(folder) / "config.json")


def load_weights(network: nn.Module, folder: str | Path, device: str = "cpu") -> nn.Module:
    """Fill `network` with the weights of `folder`: float32, evaluation mode, no gradients, on `device`."""
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise UserError(f"weights not found: {path}; install the package again or rebuild them with `make nano`")
    try:
        state = load_file(path)
        network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"weights do not fit: {path} ({str(error).splitlines()[0]})") from error
    return network.to(device=device, dtype=torch.float32).eval().requires_grad_(False)


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, H, W] to float32 [B, 3, 64, 64] in [-1, 1], the input of every nano network.

    Pictures of another size are resized (means of areas), without regard to their proportions.
    """
    images = images.float()
    if images.shape[-2:] != (INPUT_SIZE, INPUT_SIZE):
        images = F.interpolate(images, (INPUT_SIZE, INPUT_SIZE), mode="area")
    return images.div(127.5).sub(1)
