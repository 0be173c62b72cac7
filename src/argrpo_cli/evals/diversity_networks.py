"""Networks by whose features two images are alike or differ, by name: what `--diversity` takes.

Nothing heavy is imported before one is loaded, so that a command line can refuse a name at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from argrpo_cli.rewards.clip import OPENAI_FILES
from argrpo_cli.system.errors import UserError, did_you_mean, first_line
from argrpo_cli.system.files import HubFile, check_fetched, expanded, in_cache, user_cache

if TYPE_CHECKING:
    from torch import Tensor, nn

DREAMSIM_SIZE = 224  # pixels
CLIP = OPENAI_FILES["ViT-B-32"][0]
DINOV2 = HubFile("facebook/dinov2-large", "model.safetensors")  # as evaluations take it (Stein et al. 2023)


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


def check_networks(given: Sequence[str], option: str = "--diversity") -> None:
    """UserError for a name that is none of `NETWORKS`, one given twice, files that are not there or that it has no use
    for, or a package that is not installed.

    Args:
        given: names, or `dinov2=FOLDER` and `clip=FILE` for local weights.
    """
    names = [name_of(one) for one in given]
    for name, one in zip(names, given, strict=True):
        if name not in NETWORKS:
            there = f"there are {', '.join(NETWORKS)}"
            raise UserError(f"{option} {name!r} is unknown; {there}{did_you_mean(name, list(NETWORKS))}")
        if names.count(name) > 1:
            raise UserError(f"{option} names {name!r} twice")
        if (path := _path_of(one)) and not (NETWORKS[name].file and path.exists()):
            why = "no such file or folder" if NETWORKS[name].file else f"{name} takes no files"
            raise UserError(f"{option} {one}: {why}")
    if not names:
        raise UserError(f"{option} is empty; name at least one of {', '.join(NETWORKS)}")
    if "dreamsim" in names and find_spec("dreamsim") is None:
        raise UserError(f"{option} dreamsim needs its package; install it (pip install dreamsim), or leave it out")


def check_at_hand(given: Sequence[str]) -> None:
    """UserError, before torch is loaded, for published weights that are neither on this machine nor can be fetched."""
    for one in given:
        file = NETWORKS[name_of(one)].file
        if file and not _path_of(one) and not in_cache(file.repo):
            try:
                check_fetched(file.repo, file.file)
            except UserError as error:
                mend = f"give it: --diversity {one}=PATH (for dinov2 the folder, with its config.json)"
                raise UserError(str(error).replace("give the file instead", mend)) from error


def name_of(given: str) -> str:
    """The network of `dinov2` or of `dinov2=FOLDER`."""
    return given.partition("=")[0]


def _path_of(given: str) -> Path | None:
    return expanded(given.partition("=")[2]) if "=" in given else None


def load_features(given: str, device: str = "cpu") -> FeatureNetwork:
    """One of `NETWORKS`, with local weights or without; UserError for weights that cannot be fetched, are damaged or of
    another network."""
    from argrpo_cli.networks.weights import fingerprint

    one, path = NETWORKS[name_of(given)], _path_of(given)
    network, features = one.load(device, path) if one.file else one.load(device)
    return FeatureNetwork(name_of(given), one.source, features, fingerprint([network]))


Loaded = tuple["nn.Module", Callable[["Tensor"], "Tensor"]]


def _of_rewards(kind: str, device: str, path: Path | None = None) -> Loaded:
    from argrpo_cli.rewards.features import Features

    features = Features(kind, device, path)
    return features.module, features


def _dinov2(device: str, path: Path | None) -> Loaded:
    from argrpo_cli.networks.dinov2 import load_dinov2

    dino = load_dinov2(str(path or DINOV2.repo), device)
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


class Network(NamedTuple):
    """What is known of a network before it is loaded, and how it is; `file` of the hub, None for what needs none."""

    source: str
    load: Callable[..., Loaded]
    file: HubFile | None = None


NETWORKS = {
    "clip": Network("CLIP ViT-B/32 (OpenAI), unit image features", partial(_of_rewards, "clip"), CLIP),
    "dinov2": Network("DINOv2 ViT-L/14, class token", _dinov2, DINOV2),
    "dreamsim": Network("DreamSim, the ensemble of its package", _dreamsim),
    "nano-clip": Network("nano-clip, unit image features", _nano_clip),
    "nano-judge": Network("the nano judge's classifier, 128 features", partial(_of_rewards, "nano")),
}
