"""Inception's features of images, and what generated ones are compared with: ADM's reference batch, pictures, an .npz
of images, or saved statistics.

ADM's file for ImageNet at 256 pixels holds 10,000 images and, beside them, the statistics of the whole training set.
As in ADM's evaluator FID and sFID take the statistics, precision and recall the images. A file of statistics alone
leaves precision and recall out; of images alone the statistics are computed. What has been computed is kept in a file
named by the contents of the reference and Inception's weights.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from argrpo_cli.evals.fidelity import NEIGHBOURS, Gaussian, load_statistics
from argrpo_cli.images import ARRAY, ImageSet, Item, open_images
from argrpo_cli.kept import Tensors, in_batches, kept
from argrpo_cli.networks.inception import POOL_WIDTH, SPATIAL_WIDTH, Inception
from argrpo_cli.rewards.features import ADM_NAME, ADM_URL
from argrpo_cli.shapes import Shot
from argrpo_cli.system.download import fetch_url
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import load_tensors, open_regular, readable, save_tensors, user_cache
from argrpo_cli.system.npz import Npz
from argrpo_cli.system.processes import Team

ADM_IMAGES, ADM_SIZE = 10_000, (256, 256)
POOL, SPATIAL, PROBABILITIES, HASHES = "pool", "spatial", "probabilities", "hashes"  # what is kept of an image
CACHED = ("pool_mean", "pool_root", "spatial_mean", "spatial_root")


class Features:
    """Inception's features of images in a folder, a file for each batch, so that they need not be in memory.

    Args:
        items: the images, known by `file`: their contents are the folder's matter.
    """

    def __init__(self, folder: Path, items: Sequence[Item | Shot], inception: Inception, batch_size: int):
        self.store = Tensors(folder, inception.fingerprint, lambda item: item.file)
        self.items, self.inception, self.batch_size = items, inception, batch_size
        self.batches = in_batches(items, batch_size)

    def extract(self, read: Callable[[Sequence[Any]], Tensor], label: str, team: Team, ahead: bool) -> None:
        """Compute what is missing of the team's batches.

        Args:
            read: gives a batch's images, uint8 [B, 3, H, W].
            ahead: in a thread, while Inception looks at the last batch. Not for a policy: on a GPU it records CUDA
                graphs, during which no other thread may ask for memory.
        """

        def look(batch: Sequence[Any], images: Tensor | None = None) -> dict[str, Tensor]:
            images = read(batch) if images is None else images
            values = zip((POOL, SPATIAL, PROBABILITIES), self.inception.features(images), strict=True)
            return {key: value.cpu() for key, value in values} | {HASHES: image_hashes(images)}

        prepare = read if ahead else None
        kept(self.items, look, self.store, batch_size=self.batch_size, label=label, team=team, prepare=prepare)

    def each(self, key: str) -> Iterator[Tensor]:
        """One kind of features batch by batch: float32 [B, D], or the images' hashes, int64 [B]."""
        return self.store.each(self.batches, key)

    def all(self, key: str) -> Tensor:
        """One kind of features of all images, [N, D] or [N]."""
        return self.store.column(self.batches, key)


def image_hashes(images: Tensor) -> Tensor:
    """A number for the bytes of each image: equal images, equal numbers. int64 [B]."""
    rows = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return torch.from_numpy(np.frombuffer(b"".join(digests), np.int64).copy())


@dataclass(frozen=True)
class ReferenceFile:
    """A reference before Inception has seen it.

    Attributes:
        name: as the user gave it.
        images: its images, None for saved statistics.
        stored: statistics of the pool and the spatial features that it holds, None where they must be computed.
        sha256: of its contents.
    """

    name: str
    images: ImageSet | None
    stored: tuple[Gaussian, Gaussian] | None
    sha256: str

    @property
    def is_adm(self) -> bool:
        """Whether it has the shape of ADM's reference batch for 256 pixels."""
        images = self.images
        return bool(self.stored and images and images.count == ADM_IMAGES and images.size == ADM_SIZE)

    def protocol(self) -> dict[str, Any]:
        """What a result should say about it."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "images": self.images.count if self.images else 0,
            "image_size": list(self.images.size) if self.images else None,
            "statistics": "stored in the file" if self.stored else "of its images",
            "adm": "of its shape" if self.is_adm else "no",  # the published file has no hash to hold it against
        }


@dataclass(frozen=True)
class Reference:
    """A reference as features; `pool_features` [R, 2048] and `hashes` int64 [R] are None where it has no images."""

    pool: Gaussian
    spatial: Gaussian
    pool_features: Tensor | None
    hashes: Tensor | None


def open_reference(given: str) -> ReferenceFile:
    """A reference by path, or ADM's by name, which is fetched once.

    Raises:
        UserError: nothing there, no connection, too few images, statistics of something else than Inception's features.
    """
    path = fetch_adm() if given == ADM_NAME else Path(given)
    stored = load_statistics(path) if path.is_file() else None
    for one, width, names in zip(stored or (), (POOL_WIDTH, SPATIAL_WIDTH), ("mu", "mu_s"), strict=False):
        if len(one.mean) != width:
            raise UserError(f"{path}: {names} has {len(one.mean)} numbers; Inception's features have {width}")
    images = open_images(path) if stored is None or ARRAY in Npz(path).keys else None
    if images is not None and images.count <= NEIGHBOURS:
        raise UserError(f"{path} holds {images.count} images; a reference needs at least {NEIGHBOURS + 1}")
    return ReferenceFile(given, images, stored, content_hash(path, images))


def content_hash(path: Path, images: ImageSet | None) -> str:
    """SHA-256 of a file, or of the names and bytes of a folder's pictures."""
    digest = hashlib.sha256()
    for file in [path / item.file for item in images.items] if images is not None and not images.is_array else [path]:
        if file != path:
            digest.update(os.fsencode(file.name) + b"\0")
        with readable(file), open_regular(file) as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def prepare_reference(
    file: ReferenceFile, inception: Inception, folder: Path, batch_size: int, team: Team
) -> Reference | None:
    """Have a team compute what a reference's images need, or take it from the user's cache; None but in its first.

    Args:
        folder: where the features of its images go.
    """
    cache = user_cache() / "references" / f"{file.sha256[:24]}-{inception.fingerprint}.safetensors"

    def read() -> Reference | None:
        """None where there is none, or a damaged one."""
        held = load_tensors(cache)
        if held is None or not held.keys() >= set(CACHED):
            return None
        pool_mean, pool_root, spatial_mean, spatial_root = (held[key] for key in CACHED)
        parts = Gaussian(pool_mean, root=pool_root), Gaussian(spatial_mean, root=spatial_root)
        return Reference(*parts, held.get("features"), held.get("hashes"))

    if team.from_lead(lambda: read() is not None):
        return team.lead(read)
    features = None
    if file.images is not None:
        features = Features(folder, file.images.items, inception, file.images.at_once(batch_size))
        features.extract(file.images.read, "Inception on the reference", team, ahead=True)

    def finish() -> Reference:
        pool, spatial = file.stored or (
            Gaussian.of_batches(features.each(k), len(features.items)) for k in (POOL, SPATIAL)
        )
        content = dict(zip(CACHED, (pool.mean, pool.root, spatial.mean, spatial.root), strict=True))
        if features is not None:
            content |= {"features": features.all(POOL), "hashes": features.all(HASHES)}
        try:
            save_tensors(cache, content)
        except UserError:  # a home that cannot be written to: the next evaluation computes it again
            return Reference(pool, spatial, content.get("features"), content.get("hashes"))
        return read()  # as every later call does: sums may round by how numbers lie in memory

    return team.lead(finish)


def fetch_adm(url: str = ADM_URL) -> Path:
    """ADM's reference batch (2 GB) in the user's cache, fetched if it is not there.

    Raises:
        UserError: no connection, or fewer bytes than announced.
    """
    return fetch_url(url, "--reference")
