"""LlamaGen and AR-GRPO as they are published: names on the hub, files of every wrapping, our policy folders.

A published policy is opened by a name of `POLICIES` (fetched into Hugging Face's cache), as a `.pt` file, as an
AR-GRPO folder, whose weights hold the policy under `gpt_model.` and the tokenizer under `vq_model.`, or as a folder in
the layout of transformers' Llama (jadohu/LlamaGen-T2I). The geometry is read off the shapes; the image size stands in
the name (`c2i_L_384.pt`), of the last kind of folder in `block_size` of its config.json.

    python -m argrpo_cli.policy.llamagen.published c2i_L_384.pt OUT [--tokenizer vq_ds16_c2i.pt] [--image-size 384]
    python -m argrpo_cli.policy.llamagen.published OUT back.pt --back

The first makes a policy folder of it, the second the published layout again, bit for bit.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from argrpo_cli.networks.weights import blank, load_plain, outline, outline_plain
from argrpo_cli.policy.classes import class_names
from argrpo_cli.policy.folder import TEXT_ENCODER, find_policy, is_published, part_of, read_card
from argrpo_cli.policy.llamagen.checkpoints import (
    config_of,
    from_published,
    open_tokenizer,
    read_checkpoint,
    read_folder,
    to_published,
    tokenizer_from,
)
from argrpo_cli.policy.llamagen.geometry import Geometry, VQGeometry, published_geometry
from argrpo_cli.policy.llamagen.model import Encoded, LlamaGenNetwork
from argrpo_cli.policy.llamagen.policy import LlamaGen, check_fit
from argrpo_cli.policy.llamagen.sample import BUCKET
from argrpo_cli.policy.llamagen.text import load_text_encoder, open_text_encoder
from argrpo_cli.policy.llamagen.vq import VQNetwork
from argrpo_cli.policy.outline import Outline
from argrpo_cli.policy.published import TOKENIZERS, file_sampling, published_entry
from argrpo_cli.system.errors import UserError, exit_code
from argrpo_cli.system.files import HubFile, atomic_path, fetch, fetch_folder, read_json

if TYPE_CHECKING:
    from argrpo_cli.policy.llamagen.pretrained import LlamaGenForImageGeneration

IMAGE_SIZES = (256, 384, 512)
FILES = ("*.json", "*.safetensors", "*.bin")  # of a repository that is fetched whole
TEXT_PARAMETERS = 1_223_527_424  # of the encoder of FLAN-T5 XL
TEXT_FILES = (  # the library takes the whole model and uses its encoder
    HubFile(TEXT_ENCODER, "model-00001-of-00002.safetensors", 9_450_000_000),
    HubFile(TEXT_ENCODER, "model-00002-of-00002.safetensors", 1_950_000_000),
    HubFile(TEXT_ENCODER, "tokenizer.json", 2_420_000),
)
LEVELS = {"vq-ds8": (1, 2, 2, 4), "vq-ds16": (1, 1, 2, 2, 4)}  # multipliers of the published tokenizers' channels


def open_published(
    source: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    text_device: str = "same",
    tokenizer: str | Path | None = None,
    image_size: int | None = None,
) -> LlamaGen:
    """A published policy with its tokenizer and, where it reads captions, FLAN-T5 XL.

    Args:
        source: a name of `POLICIES`, a checkpoint file, or an AR-GRPO folder.
        device, dtype, text_device: as of `load_policy`.
        tokenizer: a name of `TOKENIZERS` or a file; by default the one it was trained on.
        image_size: pixels a side; by default what its name says.

    Raises:
        UserError: not there, not fetched, or keys and shapes that fit no published size.
    """
    entry = published_entry(source)
    if entry is None:
        path = Path(source)
    else:
        path = fetch(entry.repo, entry.file) if entry.file else fetch_folder(entry.repo, FILES, entry.revision)
    state, vq_state = read_folder(path) if path.is_dir() else (read_checkpoint(path), None)
    pixels = image_size if image_size is not None else (entry.image_size if entry else image_size_in(path))
    if pixels < 1:
        raise UserError(f"--image-size {pixels}: must be 1 or more")
    reads_captions = "cls_embedding.uncond_embedding" in state
    default = entry.tokenizer if entry else "vq-ds16-t2i" if reads_captions else "vq-ds16-c2i"
    if vq_state is not None and tokenizer is None:
        name, vq = None, tokenizer_from(vq_state, str(path))
    else:
        name, vq = open_tokenizer(tokenizer or default, path)
    if pixels % vq.config.downsample:
        raise UserError(f"{pixels} pixels are no multiple of the tokenizer's {vq.config.downsample}; give another size")
    config = config_of(state, (pixels // vq.config.downsample) ** 2, str(path))
    if config.vocab_size != vq.config.codebook_size:
        codes = f"{vq.config.codebook_size} codes, and the policy draws {config.vocab_size}"
        raise UserError(f"the tokenizer {tokenizer or default} has {codes}; give the one it was trained on")
    model = from_published(state, config, str(path), getattr(torch, dtype))
    text = {}
    if reads_captions:
        encoder = open_text_encoder(TEXT_ENCODER, right_padded=vq_state is not None)
        encoder.place(device, text_device)
        text = {"text_encoder": encoder, "text_encoder_name": TEXT_ENCODER}
    return LlamaGen(
        network=model.to(device),
        tokenizer=vq.to(device),
        tokenizer_name=name,
        class_names=[] if reads_captions else class_names(config.num_classes),
        image_size=pixels,
        base=str(source),
        name=str(source),
        sampling=file_sampling(path),
        **text,
    )


def image_size_in(path: Path) -> int:
    """The image size in a name such as c2i_L_384.pt or ar-grpo-l-256, or in a folder's config.json."""
    for number in reversed(re.findall(r"\d+", path.stem if path.is_file() else path.name)):
        if int(number) in IMAGE_SIZES:
            return int(number)
    tokens = read_json(path / "config.json").get("block_size") if path.is_dir() else None
    if isinstance(tokens, int) and 16 * math.isqrt(tokens) in IMAGE_SIZES:
        return 16 * math.isqrt(tokens)
    raise UserError(
        f"{path}: the name does not say whether it draws {', '.join(map(str, IMAGE_SIZES))} pixels; rename it, or make "
        f"a policy folder of it with `python -m argrpo_cli.policy.llamagen.published {path} OUT --image-size 256`"
    )


def export(folder: str | Path, file: Path) -> None:
    """A policy's weights in the published layout, {"model": state dict}."""
    if is_published(folder):
        model = open_published(folder).network
    else:
        model = load_plain(LlamaGenNetwork, find_policy(folder), torch.float32)
    with atomic_path(file) as temporary:
        torch.save({"model": to_published(model)}, temporary)


@dataclass(frozen=True)
class LlamaGenOutline(Outline):
    """A text encoder that lies in a folder or is bundled is there in full, the published one is not."""

    @property
    def reads(self) -> bool:
        return self.config.condition == "class" or self.policy.text_encoder is not None

    def blank(self, images: int) -> tuple[Encoded, Tensor]:
        config = self.config
        tokens = torch.zeros(images, config.block_size, dtype=torch.long)
        if config.condition == "class":
            return Encoded(tokens[:, 0]), tokens
        features = torch.zeros(images, config.cls_token_num, config.caption_dim)
        return Encoded(features, torch.ones(images, config.cls_token_num, dtype=torch.long)), tokens

    def drawing_bytes(self, images: int, *, guided: bool, recorded: bool, number: int) -> int:
        config = self.config
        length = config.cls_token_num + config.block_size
        if recorded:
            length = -(-length // BUCKET) * BUCKET
        rows = 2 * images if guided else images
        return 2 * config.num_hidden_layers * rows * config.num_key_value_heads * config.head_dim * length * number


def outline_published(name_or_path: str | Path) -> LlamaGenOutline:
    """What `open_published` would open, without its weights; nothing is fetched.

    Of a published name the geometry is known, of a file the shapes are read.

    Raises:
        UserError: the files are not those of a policy.
    """
    entry, path = published_entry(name_or_path), Path(name_or_path)
    if entry is not None:
        size = re.search(r"_(B|L|XL|XXL|3B)_", entry.file)
        size = "XL" if size is None else size.group(1)  # captions are drawn by that one alone
        tokenizer, pixels, brought = entry.tokenizer, entry.image_size, False
        model = _outline_model(published_geometry(size, pixels, condition="caption" if "t2i" in tokenizer else "class"))
        files = (HubFile(entry.repo, entry.file or "model.safetensors", 4 * model.num_parameters()),)
    else:  # an AR-GRPO folder brings its tokenizer along, and beside a file it may lie
        state, vq_state = read_folder(path) if path.is_dir() else (read_checkpoint(path), None)
        pixels, files = image_size_in(path), ()
        tokenizer = "vq-ds16-t2i" if "cls_embedding.uncond_embedding" in state else "vq-ds16-c2i"
        beside = path / TOKENIZERS[tokenizer][1] if path.is_dir() else path.with_name(TOKENIZERS[tokenizer][1])
        brought = vq_state is not None or beside.is_file()
        model = _outline_model(config_of(state, (pixels // 16) ** 2, str(path)))
    captions = model.config.condition == "caption"
    vq, vq_files = _outline_tokenizer(tokenizer)
    names = [] if captions else class_names(model.config.num_classes)
    policy = LlamaGen(model, vq, tokenizer, names, pixels, str(name_or_path))
    files += (() if brought else vq_files) + (TEXT_FILES if captions else ())
    return LlamaGenOutline(policy, 2 * TEXT_PARAMETERS if captions else 0, files)


def outline_folder(folder: Path) -> LlamaGenOutline:
    """The same of a policy folder: its config.json and policy.json are read."""
    card = read_card(folder, tokenizer=str)
    from argrpo_cli.policy.llamagen.pretrained import LlamaGenForImageGeneration

    model = outline(LlamaGenForImageGeneration, folder)
    if card["tokenizer"] in TOKENIZERS:
        vq, files = _outline_tokenizer(card["tokenizer"])
    else:
        vq, files = outline_plain(VQNetwork, part_of(folder, "image tokenizer", card["tokenizer"])), ()
    policy = LlamaGen(model, vq, card["tokenizer"], card.get("classes", []), card["image_size"], str(folder))
    if model.config.condition == "class":
        check_fit(folder, model, vq, None, card)
        return LlamaGenOutline(policy, 0, files)
    if card.get("text_encoder") == TEXT_ENCODER:
        return LlamaGenOutline(policy, 2 * TEXT_PARAMETERS, files + TEXT_FILES)
    policy.text_encoder = load_text_encoder(part_of(folder, "text encoder", card.get("text_encoder")), torch.float32)
    check_fit(folder, model, vq, policy.text_encoder, card)
    return LlamaGenOutline(policy, 4 * policy.text_encoder.model.num_parameters(), files)


def _outline_model(config: Geometry) -> LlamaGenForImageGeneration:
    from argrpo_cli.policy.llamagen.config import LlamaGenConfig
    from argrpo_cli.policy.llamagen.pretrained import LlamaGenForImageGeneration

    with torch.device("meta"):
        return LlamaGenForImageGeneration(LlamaGenConfig.of(config))


def _outline_tokenizer(name: str) -> tuple[VQNetwork, tuple[HubFile, ...]]:
    levels = LEVELS[name.rpartition("-")[0]]
    with blank():
        vq = VQNetwork(VQGeometry(encoder_ch_mult=levels, decoder_ch_mult=levels))
    return vq, (HubFile(*TOKENIZERS[name], 4 * sum(one.numel() for one in vq.parameters())),)


def main() -> None:
    parser = argparse.ArgumentParser(description="Published LlamaGen checkpoints to policy folders, and back.")
    parser.add_argument("given", help="a published name, file or AR-GRPO folder; with --back a policy")
    parser.add_argument("out", type=Path, help="the policy folder to write; with --back the file")
    parser.add_argument("--tokenizer", help="a published name or a file (default: the one it was trained on)")
    parser.add_argument("--image-size", type=int, help="pixels a side (default: what the name says)")
    parser.add_argument("--back", action="store_true", help="from a policy to the published layout")
    args = parser.parse_args()
    with exit_code("published"):
        if args.back:
            export(args.given, args.out)
        else:
            open_published(args.given, tokenizer=args.tokenizer, image_size=args.image_size).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
