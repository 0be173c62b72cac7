"""Inception's features of a set of images on disk, in shards, so that an interrupted evaluation goes on where it was.

A shard holds the features of a few hundred images in a row. Its batches are always the same, whoever computes it and
whenever, so that its numbers are too; several processes share the shards. Images are in memory for a few batches only.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from argrpo_cli.images import ImageSet
from argrpo_cli.networks.inception import CLASSES, POOL_WIDTH, SPATIAL_WIDTH, Inception
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import save_tensors
from argrpo_cli.system.processes import Team
from argrpo_cli.system.progress import shared_progress

LEAST_SHARD = 256  # images
POOL, SPATIAL, PROBABILITIES, HASHES = "pool", "spatial", "probabilities", "hashes"
WIDTHS = {POOL: POOL_WIDTH, SPATIAL: SPATIAL_WIDTH, PROBABILITIES: CLASSES}
READ_AHEAD = 2  # batches

Span = tuple[int, int]  # images from the first to before the second number
Item = TypeVar("Item")


class Source(Protocol):
    """Images by number: `images.ImageSet`, or a policy that draws them."""

    count: int

    def batches(self, batch_size: int, spans: Sequence[Span]) -> Iterator[Tensor]:
        """uint8 [B, 3, H, W]; batches end where a span does."""
        ...


@dataclass(frozen=True)
class FeatureStore:
    """Features of `count` images in the folder `folder`; a shard is a whole number of batches."""

    folder: Path
    count: int
    batch_size: int

    @property
    def spans(self) -> list[Span]:
        shard = max(1, LEAST_SHARD // self.batch_size) * self.batch_size
        return [(start, min(start + shard, self.count)) for start in range(0, self.count, shard)]

    def path(self, span: Span) -> Path:
        return self.folder / f"{span[0]:07d}.safetensors"

    def missing(self) -> list[Span]:
        """The shards that are still to be computed."""
        return [span for span in self.spans if not self._whole(span)]

    def write(self, span: Span, batches: Sequence[dict[str, Tensor]]) -> None:
        """Write a shard, atomically."""
        whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        save_tensors(self.path(span), whole)

    def shards(self, key: str) -> Iterator[Tensor]:
        """One kind of features, shard by shard: float32 [n, D], or the images' hashes, int64 [n]."""
        for span in self.spans:
            with safe_open(self.path(span), "pt") as held:
                yield held.get_tensor(key)

    def read(self, key: str) -> Tensor:
        """One kind of features of all images, [N, D] or [N]."""
        shape = (self.count, WIDTHS[key]) if key in WIDTHS else (self.count,)
        whole = torch.empty(shape, dtype=torch.float32 if key in WIDTHS else torch.int64)
        for (start, end), rows in zip(self.spans, self.shards(key), strict=True):
            whole[start:end] = rows
        return whole

    def remove(self) -> None:
        """Take the shards away, and the folders that are empty then."""
        unfinished = self.folder.glob(".tmp-*.safetensors")  # of a killed process
        for path in [*map(self.path, self.spans), *unfinished]:
            path.unlink(missing_ok=True)
        for folder in (self.folder, self.folder.parent):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _whole(self, span: Span) -> bool:
        try:
            with safe_open(self.path(span), "pt") as held:
                rows = span[1] - span[0]
                return all(held.get_slice(key).get_shape() == [rows, width] for key, width in WIDTHS.items())
        except (OSError, SafetensorError):
            return False


def extract(source: Source, inception: Inception, store: FeatureStore, team: Team, label: str) -> None:
    """Compute the shards that are missing, those of this process among its team, and wait for the others.

    Raises:
        UserError: an image that cannot be read or drawn, a folder that cannot be written.
    """
    mine = team.from_lead(store.missing)[team.index :: team.count]

    def compute() -> None:
        batches = source.batches(store.batch_size, mine)
        if isinstance(source, ImageSet) or torch.device(inception.device).type != "cuda":
            # A policy on a GPU records CUDA graphs, during which no other thread may ask for memory.
            batches = ahead(batches, inception.device)
        total = sum(end - start for start, end in mine)
        with shared_progress(team, label, total) as advance, closing(batches):
            for start, end in mine:
                parts = []
                for _ in range(start, end, store.batch_size):
                    images = next(batches)
                    found = inception.features(images)
                    values = zip(WIDTHS, (found.pool, found.spatial, found.probabilities), strict=True)
                    parts.append({key: value.cpu() for key, value in values} | {HASHES: image_hashes(images)})
                    advance(len(images))
                store.write((start, end), parts)

    team.together(compute)
    team.lead(lambda: _all_there(store))


def _all_there(store: FeatureStore) -> None:
    if missing := store.missing():
        raise UserError(
            f"{store.path(missing[0])} is not there, though another process wrote it; give an --out that all share"
        )


def image_hashes(images: Tensor) -> Tensor:
    """A number for the bytes of each image: equal images, equal numbers. int64 [B]."""
    rows = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return torch.from_numpy(np.frombuffer(b"".join(digests), np.int64).copy())


def ahead(items: Iterator[Item], device: str, depth: int = READ_AHEAD) -> Iterator[Item]:
    """The same items, made in a thread of their own that is at most `depth` of them ahead.

    So pictures are read or drawn while Inception looks at the last ones. On a CUDA `device` the thread has a stream of
    its own and waits for it before it hands an item over.
    """
    made: queue.Queue[tuple[bool, Item | BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def hand_over(more: bool, item: Item | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return made.put((more, item), timeout=0.1)
            except queue.Full:
                continue

    def make() -> None:
        try:
            stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
            with torch.cuda.stream(stream):
                for item in items:
                    if stream is not None:
                        stream.synchronize()
                    hand_over(True, item)
                    if stop.is_set():
                        return
            hand_over(False, None)
        except BaseException as error:  # raised again in the thread that waits
            hand_over(False, error)

    worker = threading.Thread(target=make, daemon=True)
    worker.start()
    try:
        while True:
            more, item = made.get()
            if isinstance(item, BaseException):
                raise item
            if not more:
                return
            yield item
    finally:
        stop.set()
        worker.join(timeout=5)
