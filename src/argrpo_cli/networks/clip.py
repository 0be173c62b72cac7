"""CLIP networks in open_clip's and in transformers' layout: weights from files, features of images and of prompts.

from argrpo_cli.networks.clip import load_open_clip
clip = load_open_clip("ViT-B-32-quickgelu", "openai")
clip.cosine(images, ["a photo of a dog"] * len(images))                  # float32 [B]
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn

from argrpo_cli.networks.pixels import Preprocess
from argrpo_cli.networks.weights import check_depth, describing, fit_state, published_file, read_state
from argrpo_cli.system.errors import UserError, did_you_mean, first_line
from argrpo_cli.system.files import fetch, read_json

REMEMBERED = 10_000  # prompts; 40 MB of features of width 1024

OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TRANSFORMERS_FILES = ("model.safetensors", "pytorch_model.bin")
HUB_PREFIX = "hf-hub:"  # open_clip's own notation for a hub repository in its layout

Tokenizer = Callable[[list[str]], Tensor]  # texts to int64 [B, context length]


class ClipModel:
    """A CLIP network with its tokenizer and preprocessing: unit features of images and of prompts.

    Prompts repeat (one per class, or one per group of samples), so the features of the last 10,000 different ones are
    remembered. A prompt longer than the context is cut by the tokenizer.

    Args:
        network: a module with `encode_image` and `encode_text`, as open_clip's; moved to `device` and `dtype`.
        prepare: uint8 [B, 3, H, W] to float32 [B, 3, h, w].
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Tokenizer,
        prepare: Callable[[Tensor], Tensor],
        device: str = "cpu",
        dtype: str = "float32",
    ):
        self.tokenizer, self.prepare, self.device, self.dtype = tokenizer, prepare, device, getattr(torch, dtype)
        self.network = network.to(device=device, dtype=self.dtype).eval().requires_grad_(False)
        self._texts: dict[str, Tensor] = {}  # the one used last is at the end

    @torch.inference_mode()
    def image_features(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to unit vectors, float32 [B, D]."""
        pixels = self.prepare(images.to(self.device)).to(self.dtype)
        return F.normalize(self.network.encode_image(pixels).float(), dim=-1)

    @torch.inference_mode()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors, float32 [B, D]."""
        texts = list(dict.fromkeys(prompts))
        if fresh := [prompt for prompt in texts if prompt not in self._texts]:
            features = self.network.encode_text(self.tokenizer(fresh).to(self.device)).float()
            self._texts.update(zip(fresh, F.normalize(features, dim=-1), strict=True))
        rows = torch.stack([self._texts[prompt] for prompt in prompts])
        for prompt in texts:
            self._texts[prompt] = self._texts.pop(prompt)
        for prompt in list(self._texts)[: max(0, len(self._texts) - REMEMBERED)]:
            del self._texts[prompt]
        return rows

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine similarity of image i and prompt i in [-1, 1], float32 [B]."""
        if not len(images):
            return torch.zeros(0, device=self.device)
        return (self.image_features(images) * self.text_features(prompts)).sum(-1)


# open_clip


def load_open_clip(
    model: str, pretrained: str, weights: str | Path | None = None, device: str = "cpu", dtype: str = "float32"
) -> ClipModel:
    """A model of open_clip with its published weights.

    Args:
        model: a name of `open_clip.list_models()`, or `hf-hub:owner/name` for a repository in open_clip's layout.
        pretrained: a tag of `open_clip.list_pretrained()`; it decides on weights, preprocessing and activation. Not
            used with `hf-hub:`.
        weights: a local file in the place of the published one.

    Raises:
        UserError: an unknown name or tag, weights that are missing, damaged or of another network.
    """
    if model.startswith(HUB_PREFIX):
        repo, files = model.removeprefix(HUB_PREFIX), OPEN_CLIP_FILES
        whole = read_json(fetch(repo, "open_clip_config.json"))
        config, pixels = whole.get("model_cfg", {}), whole.get("preprocess_cfg", {})
    else:
        config, pixels = open_clip_config(model, pretrained)
        repo, _, file = pixels["hf_hub"].rpartition("/")
        files = (file,) if file else OPEN_CLIP_FILES
    path = published_file(repo, files, weights)
    return open_clip_from(config, path, preprocess_of(config, pixels, model), device, dtype)


def open_clip_from(
    config: Mapping[str, Any], path: Path, prepare: Callable[[Tensor], Tensor], device: str, dtype: str
) -> ClipModel:
    """A network of an open_clip configuration with the weights of a file; UserError where they do not fit."""
    check_depth(config, 0, f"the configuration of {path}")
    # Parameters alone: tables that are computed stay.
    with describing(f"the configuration of {path}"), init_empty_weights():
        network, tokenizer = build_open_clip(config), tokenizer_of(config["text_cfg"])
    load_state(network, path)
    return ClipModel(network, tokenizer, prepare, device, dtype)


def open_clip_config(model: str, pretrained: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's configuration of a model and of its weights, with the activation that the weights were trained with.

    open_clip itself builds `ViT-B-32` with plain GELU for OpenAI's weights, which want QuickGELU, and only warns.

    Raises:
        UserError: an unknown model or tag.
    """
    names = open_clip.list_models()
    if model not in names:
        hint = did_you_mean(model, names) or "; see open_clip.list_models()"
        raise UserError(f"open_clip has no model {model!r}{hint}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    pixels = open_clip.get_pretrained_cfg(model, pretrained)
    if not pixels:
        there = f"there are {', '.join(tags)}" if tags else "there are none"
        raise UserError(f"open_clip has no weights {pretrained!r} of {model}; {there}{did_you_mean(pretrained, tags)}")
    config = open_clip.get_model_config(model)
    config["quick_gelu"] = bool(config.get("quick_gelu") or pixels.get("quick_gelu"))
    return config, pixels


def build_open_clip(config: Mapping[str, Any]) -> nn.Module:
    """The network of an open_clip configuration, at random."""
    config = {**config, "vision_cfg": dict(config["vision_cfg"]), "text_cfg": dict(config["text_cfg"])}
    custom = config.pop("custom_text", False)
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
        custom = True
    if "multimodal_cfg" in config:
        return open_clip.CoCa(**config)
    return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)


def tokenizer_of(text: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of an open_clip `text_cfg`; UserError for one of the hub that cannot be fetched."""
    length, more = text.get("context_length", 77), text.get("tokenizer_kwargs", {})
    if not (name := text.get("hf_tokenizer_name")):
        return open_clip.SimpleTokenizer(context_length=length, **more)
    try:
        mode = text.get("tokenizer_mode")
        return open_clip.tokenizer.HFTokenizer(name, context_length=length, tokenizer_mode=mode, **more)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot fetch the tokenizer {name}: {first_line(error)}") from error


def preprocess_of(config: Mapping[str, Any], pixels: Mapping[str, Any], model: str) -> Preprocess:
    """The preprocessing that open_clip's two configurations ask for; UserError for one that there is not."""
    size = config["vision_cfg"].get("image_size", 224)
    known = {key: pixels[key] for key in ("mean", "std", "interpolation", "resize_mode") if pixels.get(key)}
    prepare = Preprocess(size, **known)
    if not isinstance(size, int) or prepare.resize_mode not in ("shortest", "squash"):
        raise UserError(f"{model} wants images of {size}, resize_mode {prepare.resize_mode!r}; not supported")
    return prepare


class AestheticHead(nn.Module):
    """Unit image features [B, width] to ratings [B]: linear layers without activations, as LAION published them.

    The dropout between them is inert when scoring; it only keeps the published numbering of the layers.
    """

    def __init__(self, width: int = 768):
        super().__init__()
        first = [nn.Linear(width, 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout(), nn.Linear(128, 64)]
        self.layers = nn.Sequential(*first, nn.Dropout(), nn.Linear(64, 16), nn.Linear(16, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)[:, 0]


# transformers


class TransformersClip(nn.Module):
    """transformers' CLIPModel with open_clip's two methods, at random.

    Args:
        config: as in the config.json of a model.
    """

    def __init__(self, config: Mapping[str, Any]):
        from transformers import CLIPConfig, CLIPModel

        super().__init__()
        self.clip = CLIPModel(CLIPConfig.from_dict(dict(config)))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, 3, size, size] to [B, D]."""
        return self.clip.get_image_features(pixel_values=pixels).pooler_output

    def encode_text(self, tokens: Tensor) -> Tensor:
        """int64 [B, T] to [B, D]. What comes after a text's end does not reach it: attention is causal."""
        return self.clip.get_text_features(input_ids=tokens).pooler_output


def load_transformers_clip(
    model: str, weights: str | Path | None = None, device: str = "cpu", dtype: str = "float32"
) -> ClipModel:
    """A CLIP in transformers' layout.

    Args:
        model: a repository of the hub such as `openai/clip-vit-large-patch14`, or a local folder like one.
        weights: a local file in the place of the model's own.

    Raises:
        UserError: no such model, another kind of model, weights that are missing, damaged or of another network.
    """
    folder = Path(model)
    config = read_json(folder / "config.json" if folder.is_dir() else fetch(model, "config.json"))
    if (kind := config.get("model_type")) != "clip":
        raise UserError(f"{model} is a {kind!r} model; expected 'clip'")
    if weights is None and folder.is_dir():
        weights = next((folder / name for name in TRANSFORMERS_FILES if (folder / name).is_file()), None)
        if weights is None:
            raise UserError(f"{model} has neither {' nor '.join(TRANSFORMERS_FILES)}")
    return transformers_clip(config, published_file(model, TRANSFORMERS_FILES, weights), device, dtype)


def transformers_clip(config: Mapping[str, Any], path: Path, device: str, dtype: str) -> ClipModel:
    """A CLIP of a transformers configuration with the weights of a file; UserError where they do not fit."""
    check_depth(config, 0, f"the config.json of {path}")
    with describing(f"the config.json of {path}"), init_empty_weights():
        network = TransformersClip(config)
    load_state(network.clip, path)
    known = network.clip.config
    tokenizer = transformers_tokenizer(known.text_config.max_position_embeddings)
    if known.text_config.vocab_size != tokenizer.vocab_size:
        raise UserError(f"{path} has {known.text_config.vocab_size} words; CLIP's tokenizer has {tokenizer.vocab_size}")
    return ClipModel(network, tokenizer, Preprocess(known.vision_config.image_size), device, dtype)


def transformers_tokenizer(length: int) -> open_clip.SimpleTokenizer:
    """CLIP's tokenizer with transformers' cleaning of the text: other than open_clip's, it mends no encodings (ftfy)
    and no HTML, so that typographic quotes and `&amp;` have tokens of their own."""
    tokenizer = open_clip.SimpleTokenizer(context_length=length)
    tokenizer.clean_fn = lambda text: re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).lower()
    return tokenizer


# weights


def load_state(network: nn.Module, path: Path) -> None:
    """Fill a network with the weights of a file, strictly, in float32.

    Tables of positions 0, 1, 2, ... that older transformers saved are left out, and a single number may be stored
    with or without a dimension.

    Raises:
        UserError: what is missing, unexpected or of another shape.
    """
    own, read = network.state_dict(), read_state(path, ("state_dict",))
    state = {key.removeprefix("module."): value for key, value in read.items()}
    state = {key: value for key, value in state.items() if key in own or not key.endswith(".position_ids")}
    if isinstance(network, open_clip.CustomTextCLIP) and "positional_embedding" in state:
        state = open_clip.model.convert_to_custom_text_state_dict(state)
    for key, value in state.items():
        if key in own and value.numel() == own[key].numel() == 1:
            state[key] = value.reshape(own[key].shape)
    fit_state(network, state, path)
