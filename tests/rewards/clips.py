"""Small CLIP networks for the tests of the rewards: a model that open_clip knows, and one network in two layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor, nn

from argrpo_cli.networks import clip as clip_model
from argrpo_cli.networks import weights
from argrpo_cli.networks.clip import build_open_clip

DATA = Path(__file__).parents[1] / "data" / "hpsv2"
WORDS = 49408  # of CLIP's tokenizer

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": WORDS, "width": 16, "heads": 2, "layers": 2},
}
PIXELS = {
    "hf_hub": "someone/tiny/",
    "mean": open_clip.OPENAI_DATASET_MEAN,
    "std": open_clip.OPENAI_DATASET_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def register(
    monkeypatch, name: str = "tiny", config: dict[str, Any] = CONFIG, tags: dict[str, dict] | None = None
) -> None:
    """Make open_clip know a model and the tags of its weights."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, tags or {"openai": PIXELS})


def random_clip(config: dict[str, Any] = CONFIG, seed: int = 0) -> nn.Module:
    """A network whose layers all matter: weights of fan-in size, biases and norms off their defaults."""
    network = build_open_clip(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, value in network.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator)
        if value.ndim >= 2:
            value.copy_(drawn / value[0].numel() ** 0.5)
        elif value.ndim == 1:
            value.copy_(0.1 * drawn + (1 if key.endswith("weight") else 0))
    return network


def transformers_config(config: dict[str, Any], activation: str) -> dict[str, Any]:
    """The config.json of transformers for an open_clip configuration."""
    vision, text = config["vision_cfg"], config["text_cfg"]

    def tower(width: int, heads: int, layers: int) -> dict[str, Any]:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
        return {**sizes, "num_hidden_layers": layers, "hidden_act": activation, "projection_dim": config["embed_dim"]}

    return {
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "vision_config": {
            **tower(vision["width"], vision["width"] // vision["head_width"], vision["layers"]),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        "text_config": {
            **tower(text["width"], text["heads"], text["layers"]),
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "eos_token_id": 2,  # as published; it means the highest id
        },
    }


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's state dict under the names of transformers' published checkpoints."""
    out = {
        "logit_scale": state["logit_scale"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_projection.weight": state["text_projection"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "visual_projection.weight": state["visual.proj"].T,
    }
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    inner = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if module in norms:
            out[f"{norms[module]}.{kind}"] = value
        if "resblocks." not in key:
            continue
        tower = "vision_model" if key.startswith("visual.") else "text_model"
        number, _, rest = key.split("resblocks.")[1].partition(".")
        layer = f"{tower}.encoder.layers.{number}"
        if rest.startswith("attn.in_proj_"):
            for name, part in zip("qkv", value.chunk(3), strict=True):
                out[f"{layer}.self_attn.{name}_proj.{rest.removeprefix('attn.in_proj_')}"] = part
        else:
            module, _, kind = rest.rpartition(".")
            out[f"{layer}.{inner[module]}.{kind}"] = value
    return {key: value.contiguous().clone() for key, value in out.items()}


def golden_clip() -> tuple[dict[str, Any], list[str], dict[str, Tensor], dict[str, Tensor]]:
    """HPSv2's published code at a small size: configuration, prompts, weights and what came out.

    Only the words that the prompts use have embeddings; the others are NaN.
    """
    known = json.loads((DATA / "tiny.json").read_text(encoding="utf-8"))
    arrays = {key: torch.from_numpy(value) for key, value in np.load(DATA / "tiny.npz").items()}
    weights = {key.removeprefix("weights/"): v.float() for key, v in arrays.items() if key.startswith("weights/")}
    words = torch.full((WORDS, arrays["token_embedding"].shape[1]), torch.nan)
    words[arrays["rows"].long()] = arrays["token_embedding"].float()
    weights["token_embedding.weight"] = words
    results = {key.removeprefix("out/"): value for key, value in arrays.items() if key.startswith("out/")}
    return known["config"], known["prompts"], weights, results


def patch_fetch(monkeypatch, fetch) -> None:
    """Let rewards fetch published files by `fetch(repo, file)`."""
    for module in (clip_model, weights):
        monkeypatch.setattr(module, "fetch", fetch)
