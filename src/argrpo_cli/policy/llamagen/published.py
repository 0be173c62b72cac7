"""LlamaGen and AR-GRPO as they are published: names on the hub, files of every wrapping, our policy folders.

A published policy is opened by a name of `POLICIES` (fetched into Hugging Face's cache), as a `.pt` file, or as an
AR-GRPO folder, whose weights hold the policy under `gpt_model.` and the tokenizer under `vq_model.`. The geometry is
read off the shapes; the image size stands in the name (`c2i_L_384.pt`).

    python -m argrpo_cli.policy.llamagen.published c2i_L_384.pt OUT [--tokenizer vq_ds16_c2i.pt] [--image-size 384]
    python -m argrpo_cli.policy.llamagen.published OUT back.pt --back

The first makes a policy folder of it, the second the published layout again, bit for bit.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from argrpo_cli.policy.folder import (
    POLICIES,
    TEXT_ENCODER,
    TOKENIZERS,
    class_names,
    find_policy,
    is_published,
    weight_files,
)
from argrpo_cli.policy.llamagen.checkpoints import (
    fit_state,
    from_published,
    read_checkpoint,
    to_published,
)
from argrpo_cli.policy.llamagen.config import SIZES, LlamaGenConfig, swiglu_size
from argrpo_cli.policy.llamagen.vq import VQConfig, VQModel
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import atomic_path
from argrpo_cli.system.hub import fetch

if TYPE_CHECKING:
    from argrpo_cli.policy.llamagen.policy import Policy

IMAGE_SIZES = (256, 384, 512)
ARGRPO_POLICY, ARGRPO_TOKENIZER = "gpt_model.", "vq_model."


def open_published(
    given: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    text_device: str = "same",
    tokenizer: str | Path | None = None,
    image_size: int | None = None,
) -> Policy:
    """A published policy with its tokenizer and, where it reads captions, FLAN-T5 XL.

    Args:
        given: a name of `POLICIES`, a checkpoint file, or an AR-GRPO folder.
        device, dtype, text_device: as of `load_policy`.
        tokenizer: a name of `TOKENIZERS` or a file; by default the one it was trained on.
        image_size: pixels a side; by default what its name says.

    Raises:
        UserError: not there, not fetched, or keys and shapes that fit no published size.
    """
    from argrpo_cli.policy.llamagen.policy import Policy

    entry = POLICIES.get(str(given))
    path = fetch(entry.repo, entry.file) if entry else Path(given)
    state, vq_state = read_argrpo(path) if path.is_dir() else (read_checkpoint(path), None)
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
        from argrpo_cli.policy.llamagen.text import open_text_encoder

        encoder = open_text_encoder(TEXT_ENCODER, right_padded=vq_state is not None)
        encoder.place(device, text_device)
        text = {"text_encoder": encoder, "text_encoder_name": TEXT_ENCODER}
    return Policy(
        model=model.to(device),
        tokenizer=vq.to(device),
        tokenizer_name=name,
        class_names=[] if reads_captions else class_names(config.num_classes),
        image_size=pixels,
        base=str(given),
        **text,
    )


def open_tokenizer(given: str | Path, beside: Path | None = None) -> tuple[str | None, VQModel]:
    """A published tokenizer, float32, and its name where it was opened by that.

    Args:
        given: a name of `TOKENIZERS`, or a file.
        beside: a checkpoint; a tokenizer that lies beside it under its published file name is taken as a file: a policy
            saved with it brings it along and needs no network.
    """
    if str(given) not in TOKENIZERS:
        return None, tokenizer_from(read_checkpoint(given), str(given))
    repo, file = TOKENIZERS[str(given)]
    near = beside.with_name(file) if beside is not None else None
    if near is not None and near.is_file():
        path, name = near, None
    else:
        try:
            path, name = fetch(repo, file), str(given)
        except UserError as error:
            place = "into the cache" if beside is None else f"beside {beside}"
            raise UserError(str(error).replace("give the file instead", f"put it {place}")) from error
    return name, tokenizer_from(read_checkpoint(path), str(path))


def config_of(state: Mapping[str, Tensor], tokens: int, source: str) -> LlamaGenConfig:
    """The geometry of a published state dict that draws `tokens` image tokens.

    Raises:
        UserError: keys that a LlamaGen has are missing, or its width is of no size in `SIZES`.
    """
    captions = "cls_embedding.uncond_embedding" in state
    condition = "cls_embedding.cap_proj.fc1.weight" if captions else "cls_embedding.embedding_table.weight"
    needed = ("tok_embeddings.weight", "output.weight", "layers.0.feed_forward.w1.weight", condition)
    missing = [key for key in needed if key not in state]
    if missing:
        raise UserError(f"{source} is no LlamaGen checkpoint: it has no {missing[0]}")
    for key in needed:
        if state[key].ndim != 2:
            shape = list(state[key].shape)
            raise UserError(f"{source} is no LlamaGen checkpoint: {key} is {shape}, expected two sides")
    codes, width = state["tok_embeddings.weight"].shape
    layers = len({key.split(".")[1] for key in state if key.startswith("layers.")})
    size = next((one for one in SIZES.values() if one["hidden_size"] == width), None)
    if size is None:
        known = ", ".join(f"{name} {one['hidden_size']}" for name, one in SIZES.items())
        raise UserError(f"{source} is {width} wide, like no published size ({known})")
    feed_forward = state["layers.0.feed_forward.w1.weight"].shape[0]
    asked: dict[str, Any] = {"num_classes": state[condition].shape[0] - 1}
    if not captions and asked["num_classes"] < 1:
        raise UserError(f"{source} is no LlamaGen checkpoint: {condition} has one row, that of the null class")
    if captions:
        tokens_of_caption, features = state["cls_embedding.uncond_embedding"].shape
        asked = {"condition": "caption", "cls_token_num": tokens_of_caption, "caption_dim": features}
    return LlamaGenConfig(
        vocab_size=codes,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=size["num_attention_heads"],
        intermediate_size=None if feed_forward == swiglu_size(width) else feed_forward,
        block_size=tokens,
        class_dropout_prob=0.1,
        **asked,
    )


def tokenizer_from(state: Mapping[str, Tensor], source: str = "the state dict") -> VQModel:
    """A published image tokenizer in float32, its levels read off the keys.

    Raises:
        UserError: keys or shapes that do not fit.
    """
    for key in ("quantize.embedding.weight", "encoder.conv_in.weight", "encoder.conv_out.weight"):
        if key not in state:
            raise UserError(f"{source} is no LlamaGen tokenizer: it has no {key}")
    try:
        codes, width = state["quantize.embedding.weight"].shape
        channels = state["encoder.conv_in.weight"].shape[0]
        blocks = {key.split(".")[4] for key in state if key.startswith("encoder.conv_blocks.0.res.")}
        config = VQConfig(
            codebook_size=codes,
            codebook_embed_dim=width,
            ch=channels,
            encoder_ch_mult=_multipliers(state, "encoder", channels),
            decoder_ch_mult=_multipliers(state, "decoder", channels),
            z_channels=state["encoder.conv_out.weight"].shape[0],
            num_res_blocks=len(blocks),
        )
        with torch.device("meta"):
            model = VQModel(config)
    except (ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{source} is no LlamaGen tokenizer: its keys or shapes are those of none ({error})") from error
    names = {key: key for key in (*state, *model.state_dict())}
    fit_state(model, state, names, f"{source} does not fit a tokenizer of {codes} codes", torch.float32)
    return model.eval()


def read_argrpo(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state dicts of policy and tokenizer in an AR-GRPO folder.

    Raises:
        UserError: files missing or damaged, or other weights in them.
    """
    whole: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            whole |= load_file(file) if file.suffix == ".safetensors" else read_checkpoint(file)
        except SafetensorError as error:
            raise UserError(f"cannot read {file}: {error}") from error
    parts = tuple(
        {key.removeprefix(prefix): value for key, value in whole.items() if key.startswith(prefix)}
        for prefix in (ARGRPO_POLICY, ARGRPO_TOKENIZER)
    )
    for part, prefix in zip(parts, (ARGRPO_POLICY, ARGRPO_TOKENIZER), strict=True):
        if not part:
            raise UserError(f"{folder} is no policy folder, and no whole AR-GRPO folder: no weights under {prefix}")
    return parts


def image_size_in(path: Path) -> int:
    """The image size in a name such as c2i_L_384.pt or ar-grpo-l-256."""
    for number in reversed(re.findall(r"\d+", path.stem if path.is_file() else path.name)):
        if int(number) in IMAGE_SIZES:
            return int(number)
    raise UserError(
        f"{path}: the name does not say whether it draws {', '.join(map(str, IMAGE_SIZES))} pixels; rename it, or make "
        f"a policy folder of it with `python -m argrpo_cli.policy.llamagen.published {path} OUT --image-size 256`"
    )


def _multipliers(state: Mapping[str, Tensor], half: str, channels: int) -> list[int]:
    """Channels of each level over the base's, the finest level first."""
    levels = len({key.split(".")[2] for key in state if key.startswith(f"{half}.conv_blocks.")})
    widths = [state[f"{half}.conv_blocks.{level}.res.0.conv1.weight"].shape[0] // channels for level in range(levels)]
    return widths if half == "encoder" else widths[::-1]


def export(folder: str | Path, file: Path) -> None:
    """A policy's weights in the published layout, {"model": state dict}."""
    from argrpo_cli.networks.weights import load_pretrained
    from argrpo_cli.policy import load_policy
    from argrpo_cli.policy.llamagen.modeling import LlamaGenForImageGeneration

    if is_published(folder):
        model = load_policy(folder).model
    else:
        model = load_pretrained(LlamaGenForImageGeneration, find_policy(folder), torch.float32)
    with atomic_path(file) as temporary:
        torch.save({"model": to_published(model)}, temporary)


def main() -> None:
    parser = argparse.ArgumentParser(description="Published LlamaGen checkpoints to policy folders, and back.")
    parser.add_argument("given", help="a published name, file or AR-GRPO folder; with --back a policy")
    parser.add_argument("out", type=Path, help="the policy folder to write; with --back the file")
    parser.add_argument("--tokenizer", help="a published name or a file (default: the one it was trained on)")
    parser.add_argument("--image-size", type=int, help="pixels a side (default: what the name says)")
    parser.add_argument("--back", action="store_true", help="from a policy to the published layout")
    args = parser.parse_args()
    try:
        if args.back:
            export(args.given, args.out)
        else:
            open_published(args.given, tokenizer=args.tokenizer, image_size=args.image_size).save(args.out)
    except UserError as error:
        print(f"published: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(args.out)


if __name__ == "__main__":
    main()
