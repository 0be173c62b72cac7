"""VAR as it is published: names on the hub and files, opened and outlined.

A published policy is opened by a name of `POLICIES` (fetched into Hugging Face's cache) or as a `.pth` file; beside the
file may lie the tokenizer's. The geometry is read off the keys and shapes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from argrpo_cli.networks.weights import outline
from argrpo_cli.policy.classes import class_names
from argrpo_cli.policy.folder import part_of, read_card
from argrpo_cli.policy.llamagen.checkpoints import read_checkpoint
from argrpo_cli.policy.llamagen.model import Encoded
from argrpo_cli.policy.outline import Outline
from argrpo_cli.policy.published import POLICIES, TOKENIZERS, file_sampling
from argrpo_cli.policy.var.checkpoints import config_of, from_published, open_tokenizer
from argrpo_cli.policy.var.config import VARConfig, published_config
from argrpo_cli.policy.var.model import VARForImageGeneration
from argrpo_cli.policy.var.policy import VAR, check_fit
from argrpo_cli.policy.var.vq import MultiScaleVQ, MultiScaleVQConfig
from argrpo_cli.system.files import HubFile, fetch

TOKENIZER = "vq-var"


def open_published(source: str | Path, device: str = "cpu", dtype: str = "float32", text_device: str = "same") -> VAR:
    """A published policy with its tokenizer.

    Args:
        source: a name of `POLICIES` or a checkpoint file.
        device, dtype, text_device: as of `load_policy`.

    Raises:
        UserError: not there, not fetched, or keys and shapes that fit no VAR.
    """
    entry = POLICIES.get(str(source))
    path = fetch(entry.repo, entry.file) if entry else Path(source)
    state = read_checkpoint(path)
    config = config_of(state, str(path))
    name, vq = open_tokenizer(TOKENIZER, config.scales, path)
    pixels, names = config.scales[-1] * vq.config.downsample, class_names(config.num_classes)
    check_fit(str(path), config, vq, names, pixels)
    model = from_published(state, config, vq, str(path), getattr(torch, dtype))
    return VAR(
        model=model.to(device),
        tokenizer=vq.to(device),
        tokenizer_name=name,
        class_names=names,
        image_size=pixels,
        base=str(source),
        name=str(source),
        sampling=file_sampling(path),
    )


@dataclass(frozen=True)
class VAROutline(Outline):
    """Its model is drawn without CUDA graphs: a pass a scale has work enough."""

    def blank(self, images: int) -> tuple[Encoded, Tensor]:
        tokens = torch.zeros(images, self.config.block_size, dtype=torch.long)
        return Encoded(tokens[:, 0]), tokens

    def drawing_bytes(self, images: int, *, guided: bool, recorded: bool, number: int) -> int:
        config = self.config
        rows = 2 * images if guided else images
        return 2 * config.num_hidden_layers * rows * config.hidden_size * config.block_size * number


def outline_published(name_or_path: str | Path) -> VAROutline:
    """What `open_published` would open, without its weights; nothing is fetched.

    Raises:
        UserError: the file is not that of a policy.
    """
    entry, path = POLICIES.get(str(name_or_path)), Path(name_or_path)
    if entry is not None:
        config = published_config(int(re.search(r"_d(\d+)", entry.file).group(1)), entry.image_size)
        files = (HubFile(entry.repo, entry.file, 4 * _blank_model(config).num_parameters()),)
    else:
        config, files = config_of(read_checkpoint(path), str(path)), ()
    vq = _blank_tokenizer(MultiScaleVQConfig(scales=config.scales))
    if entry is not None or not path.with_name(TOKENIZERS[TOKENIZER][1]).is_file():
        files += (HubFile(*TOKENIZERS[TOKENIZER], 4 * vq.num_parameters()),)
    pixels, names = config.scales[-1] * vq.config.downsample, class_names(config.num_classes)
    return VAROutline(VAR(_blank_model(config), vq, TOKENIZER, names, pixels, str(name_or_path)), 0, files)


def outline_folder(folder: Path) -> VAROutline:
    """The same of a policy folder: its config.json and policy.json are read."""
    card = read_card(folder, tokenizer=str)
    model = outline(VARForImageGeneration, folder)
    files = ()
    if card["tokenizer"] in TOKENIZERS:
        vq = _blank_tokenizer(MultiScaleVQConfig(scales=model.config.scales))
        files = (HubFile(*TOKENIZERS[TOKENIZER], 4 * vq.num_parameters()),)
    else:
        part = part_of(folder, "image tokenizer", card["tokenizer"])
        vq = outline(MultiScaleVQ, part)
    check_fit(str(folder), model.config, vq, card["classes"], card["image_size"])
    policy = VAR(model, vq, card["tokenizer"], card["classes"], card["image_size"], str(folder))
    return VAROutline(policy, 0, files)


def _blank_model(config: VARConfig) -> VARForImageGeneration:
    with torch.device("meta"):
        return VARForImageGeneration(config)


def _blank_tokenizer(config: MultiScaleVQConfig) -> MultiScaleVQ:
    with torch.device("meta"):
        return MultiScaleVQ(config)
