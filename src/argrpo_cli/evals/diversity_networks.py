"""Networks by whose features two images are alike or differ, by name: what `--diversity` takes.

Nothing heavy is imported before one is loaded, so that a command line can refuse a name at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from argrpo_cli.system.errors import UserError, did_you_mean, first_line
from argrpo_cli.system.files import WEIGHTS, read_json, user_cache

if TYPE_CHECKING:
    from torch import Tensor, nn

DREAMSIM_SIZE = 224  # pixels


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that is loaded.

    Attributes:
        name: of `NETWORKS`; `source` says what it is.
        features: uint8 [B, 3, H, W] to float32 [B, D].
        fingerprint: hash of its weights.
    """

    name: str
    source: str
    features: Callable[[Tensor], Tensor]
    fingerprint: str


def check_networks(names: Sequence[str], option: str = "--diversity") -> None:
    """UserError for a name that is none of `NETWORKS`, one given twice, or a package that is not installed."""
    for name in names:
        if name not in NETWORKS:
            there = f"there are {', '.join(NETWORKS)}"
            raise UserError(f"{option} {name!r} is unknown; {there}{did_you_mean(name, list(NETWORKS))}")
        if names.count(name) > 1:
            raise UserError(f"{option} names {name!r} twice")
    if not names:
        raise UserError(f"{option} is empty; name at least one of {', '.join(NETWORKS)}")
    if "dreamsim" in names and find_spec("dreamsim") is None:
        raise UserError(f"{option} dreamsim needs its package; install it (pip install dreamsim), or leave it out")


def load_features(name: str, device: str = "cpu") -> FeatureNetwork:
    """One of `NETWORKS`; UserError for weights that cannot be fetched, are damaged or of another network."""
    from argrpo_cli.networks.weights import fingerprint

    source, load = NETWORKS[name]
    network, features = load(device)
    return FeatureNetwork(name, source, features, fingerprint([network]))


Loaded = tuple["nn.Module", Callable[["Tensor"], "Tensor"]]


def _clip(device: str) -> Loaded:
    from argrpo_cli.networks.clip import load_open_clip

    clip = load_open_clip("ViT-B-32-quickgelu", "openai", device=device)
    return clip.network, clip.image_features


def _dinov2(device: str) -> Loaded:
    from argrpo_cli.networks.dinov2 import load_dinov2

    dino = load_dinov2(device=device)
    return dino.network, dino.features


def _dreamsim(device: str) -> Loaded:
    """By the authors' package: one less the cosine of two embeddings is DreamSim's distance (Fu et al. 2023)."""
    import torch
    from dreamsim import dreamsim

    from argrpo_cli.networks.pixels import resize

    try:
        network, _ = dreamsim(pretrained=True, device=device, cache_dir=str(user_cache() / "dreamsim"))
    except Exception as error:  # of the network, a zip file, another version of a package it needs: it cannot be had
        raise UserError(f"--diversity dreamsim: its package cannot load it: {first_line(error)}") from error

    @torch.inference_mode()
    def features(images: Tensor) -> Tensor:
        pixels = resize(images.to(device), DREAMSIM_SIZE, DREAMSIM_SIZE) / 255  # as its preprocess, on a batch
        return network.embed(pixels).reshape(len(images), -1).float()  # of one image it drops the dimension

    return network, features


def _nano_clip(device: str) -> Loaded:
    from argrpo_cli.rewards.nano import NanoClip

    clip = NanoClip(device).clip
    return clip.network, clip.image_features


def _nano_judge(device: str) -> Loaded:
    import torch

    from argrpo_cli.nano.judge import RecognitionNet
    from argrpo_cli.networks.pixels import to_unit
    from argrpo_cli.networks.weights import load_weights

    folder = WEIGHTS / "nano-judge"
    network = load_weights(RecognitionNet(**read_json(folder / "config.json")["recogniser"]), folder, device)
    return network, torch.inference_mode()(lambda images: network.features(to_unit(images.to(device))))


NETWORKS: dict[str, tuple[str, Callable[[str], Loaded]]] = {
    "clip": ("CLIP ViT-B/32 (OpenAI), unit image features", _clip),
    "dinov2": ("DINOv2 ViT-L/14 (facebook/dinov2-large), class token", _dinov2),
    "dreamsim": ("DreamSim, the ensemble of its package", _dreamsim),
    "nano-clip": ("nano-clip, unit image features", _nano_clip),
    "nano-judge": ("the nano judge's classifier, 128 features", _nano_judge),
}
