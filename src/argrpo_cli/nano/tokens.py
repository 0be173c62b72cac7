"""Scenes as tokens: the image tokenizer of the nano world, and held-out scenes, so that measuring needs no font."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from argrpo_cli.geneval.prompts import NANO_OBJECTS
from argrpo_cli.networks.weights import load_pretrained
from argrpo_cli.policy.llamagen.pretrained import VQModel
from argrpo_cli.policy.llamagen.vq import from_uint8, to_uint8
from argrpo_cli.shapes import Condition, class_prompt
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import WEIGHTS, read_jsonl

CHUNK = 128
TOKENS_FILE, CAPTIONS_FILE = "tokens.safetensors", "captions.jsonl"


def load_tokenizer(folder: str | Path = WEIGHTS / "nano-vq") -> VQModel:
    """nano-vq in float32, evaluation mode."""
    return load_pretrained(VQModel, Path(folder), torch.float32).eval().requires_grad_(False)


@torch.inference_mode()
def decode(vq: VQModel, tokens: Tensor) -> Tensor:
    """Tokens [B, T] to uint8 [B, 3, H, W], in chunks."""
    return torch.cat([to_uint8(vq.decode_tokens(chunk)) for chunk in tokens.split(CHUNK)])


@torch.inference_mode()
def encode(vq: VQModel, images: Tensor) -> Tensor:
    """uint8 images to tokens int64 [B, T], in chunks."""
    return torch.cat([vq.encode(from_uint8(chunk)) for chunk in images.split(CHUNK)])


@torch.inference_mode()
def psnr(vq: VQModel, tokens: Tensor, images: Tensor) -> Tensor:
    """PSNR in dB, float32 [B], of what tokens [B, T] are decoded to against the 8-bit pictures they are of."""
    error = (decode(vq, tokens).float() - images.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error)


def load_held_out(task: str, folder: Path = WEIGHTS / "nano-val") -> tuple[Tensor, list[Condition]]:
    """Tokens int64 [N, T] and conditions of the scenes of a task, "classes" or "captions", in random order.

    Raises:
        UserError: the files are missing.
    """
    if not (folder / TOKENS_FILE).is_file():
        raise UserError(f"held-out scenes not found: {folder}; install the package again or run `make nano`")
    tokens = load_file(folder / TOKENS_FILE)
    if task == "classes":
        ids = tokens["class_ids"].tolist()
        return tokens["classes"].long(), [Condition(class_prompt(NANO_OBJECTS[i]), i) for i in ids]
    return tokens["captions"].long(), [Condition(row["prompt"]) for row in read_jsonl(folder / CAPTIONS_FILE)]
