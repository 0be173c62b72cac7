"""A policy without its weights: what it draws and how large it is, for a plan. Nothing is fetched.

Published names have their geometry in `published.py`; of a folder config.json and policy.json are read, of a `.pt` file
the shapes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from argrpo_cli.policy.folder import (
    ADAPTER_OF,
    CARD,
    POLICIES,
    TEXT_ENCODER,
    TOKENIZERS,
    base_of,
    class_names,
    find_policy,
    is_published,
    part_of,
    read_card,
)
from argrpo_cli.policy.llamagen.checkpoints import read_checkpoint
from argrpo_cli.policy.llamagen.config import LlamaGenConfig, published_config
from argrpo_cli.policy.llamagen.modeling import LlamaGenForImageGeneration
from argrpo_cli.policy.llamagen.policy import Policy
from argrpo_cli.policy.llamagen.published import config_of, image_size_in, read_argrpo
from argrpo_cli.policy.llamagen.text import load_text_encoder
from argrpo_cli.policy.llamagen.vq import VQConfig, VQModel
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_json
from argrpo_cli.system.hub import HubFile

TEXT_PARAMETERS = 1_223_527_424  # of the encoder of FLAN-T5 XL
TEXT_FILES = (  # the library takes the whole model and uses its encoder
    HubFile(TEXT_ENCODER, "model-00001-of-00002.safetensors", 9_450_000_000),
    HubFile(TEXT_ENCODER, "model-00002-of-00002.safetensors", 1_950_000_000),
    HubFile(TEXT_ENCODER, "tokenizer.json", 2_420_000),
)
LEVELS = {"vq-ds8": (1, 2, 2, 4), "vq-ds16": (1, 1, 2, 2, 4)}  # multipliers of the published tokenizers' channels


@dataclass(frozen=True)
class Outline:
    """What is known of a policy before it is loaded.

    Attributes:
        policy: its model and image tokenizer are on the meta device, with shapes and without numbers. A text encoder
            that lies in a folder or is bundled is there in full, the published one is not.
        text_bytes: of the text encoder in memory, 0 where there is none.
        files: of the hub, what `load_policy` needs.
    """

    policy: Policy
    text_bytes: int
    files: tuple[HubFile, ...]

    @property
    def config(self) -> LlamaGenConfig:
        """The geometry of the model."""
        return self.policy.model.config

    @property
    def draws(self) -> str:
        """ "classes" or "captions", as `conditions.source` has them."""
        return "captions" if self.config.condition == "caption" else "classes"


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def outline_policy(name_or_path: str | Path) -> Outline:
    """What `load_policy` would open.

    Raises:
        UserError: nothing is there, or its files are not those of a policy.
    """
    if str(name_or_path) in POLICIES:
        return _of_name(str(name_or_path))
    if is_published(name_or_path):
        return _of_file(Path(name_or_path))
    return _of_folder(find_policy(name_or_path))


def _of_name(name: str) -> Outline:
    entry = POLICIES[name]
    size = re.search(r"_(B|L|XL|XXL|3B)_", entry.file).group(1)
    config = published_config(size, entry.image_size, condition="caption" if name.startswith("t2i") else "class")
    model = _model(config)
    files = (HubFile(entry.repo, entry.file, 4 * count(model)),)
    return _published(model, entry.tokenizer, entry.image_size, name, files)


def _of_file(path: Path) -> Outline:
    """Of a checkpoint, or of an AR-GRPO folder, which brings its tokenizer along."""
    state = read_argrpo(path)[0] if path.is_dir() else read_checkpoint(path)
    pixels = image_size_in(path)
    tokenizer = "vq-ds16-t2i" if "cls_embedding.uncond_embedding" in state else "vq-ds16-c2i"
    model = _model(config_of(state, (pixels // 16) ** 2, str(path)))
    brought = path.is_dir() or path.with_name(TOKENIZERS[tokenizer][1]).is_file()
    return _published(model, tokenizer, pixels, str(path), (), brought)


def _published(
    model: LlamaGenForImageGeneration,
    tokenizer: str,
    image_size: int,
    base: str,
    files: tuple[HubFile, ...],
    brought: bool = False,
) -> Outline:
    """With a published tokenizer, a file more unless it is `brought` along, and FLAN-T5 XL to read captions."""
    captions = model.config.condition == "caption"
    vq, vq_files = _published_tokenizer(tokenizer)
    names = [] if captions else class_names(model.config.num_classes)
    policy = Policy(model, vq, tokenizer, names, image_size, base)
    files += (() if brought else vq_files) + (TEXT_FILES if captions else ())
    return Outline(policy, 2 * TEXT_PARAMETERS if captions else 0, files)


def _of_folder(folder: Path) -> Outline:
    if ADAPTER_OF in (plain := read_json(folder / CARD)):
        return outline_policy(base_of(folder, plain))
    card = read_card(folder)
    try:
        model = _model(LlamaGenConfig(**read_json(folder / "config.json")))
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    if card["tokenizer"] in TOKENIZERS:
        vq, files = _published_tokenizer(card["tokenizer"])
    else:
        keys = read_json(part_of(folder, "image tokenizer", card["tokenizer"]) / "config.json")
        with torch.device("meta"):
            vq, files = VQModel(VQConfig(**keys)), ()
    policy = Policy(model, vq, card["tokenizer"], card.get("classes", []), card["image_size"], str(folder))
    if model.config.condition == "class":
        return Outline(policy, 0, files)
    if card.get("text_encoder") == TEXT_ENCODER:
        return Outline(policy, 2 * TEXT_PARAMETERS, files + TEXT_FILES)
    policy.text_encoder = load_text_encoder(part_of(folder, "text encoder", card.get("text_encoder")), torch.float32)
    return Outline(policy, 4 * count(policy.text_encoder.model), files)


def _model(config: LlamaGenConfig) -> LlamaGenForImageGeneration:
    with torch.device("meta"):
        return LlamaGenForImageGeneration(config)


def _published_tokenizer(name: str) -> tuple[VQModel, tuple[HubFile, ...]]:
    levels = LEVELS[name.rpartition("-")[0]]
    with torch.device("meta"):
        vq = VQModel(VQConfig(encoder_ch_mult=levels, decoder_ch_mult=levels))
    return vq, (HubFile(*TOKENIZERS[name], 4 * count(vq)),)
