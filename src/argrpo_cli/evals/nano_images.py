"""`argrpo eval nano --images`: the nano measures on finished pictures, whoever drew them.

What needs no class is always measured (IS, FID, sFID, precision, recall); what asks whether a picture shows its class
only for a folder whose metadata.jsonl gives each picture's `class_id`, as `argrpo sample` writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from argrpo_cli.evals.fidelity import NEIGHBOURS
from argrpo_cli.evals.nano import open_bench, summary
from argrpo_cli.images import METADATA, ImageSet, open_images, recorded_sampling
from argrpo_cli.nano import scenes
from argrpo_cli.system.devices import resolve_device
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_jsonl
from argrpo_cli.system.progress import progress


def evaluate_images(
    path: str | Path, batch_size: int = 64, device: str = "auto", weights: dict[str, float] | None = None
) -> dict[str, Any]:
    """Measure a folder of 64x64 pictures, or those of an .npz file.

    Returns:
        Plain numbers, ready for JSON: `images` {path: {measure: {mean, error}}}, `real` (what real scenes score),
        `reward_weights` (of the rewards measured; none where the classes are unknown) and `settings`.

    Raises:
        UserError: nothing to read, pictures of another size, too few, or a metadata.jsonl that does not fit them.
    """
    found = open_images(path)
    class_ids = _class_ids(found)
    if found.size != (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE):
        side = f"{scenes.IMAGE_SIZE}x{scenes.IMAGE_SIZE}"
        raise UserError(f"{found.name(0)} is {found.size[1]}x{found.size[0]}; nano pictures are {side}")
    least = NEIGHBOURS + 2  # and one less for the jackknife
    if found.count < least:
        raise UserError(f"{found.path}: too few images: recall and its error need {least}, there are {found.count}")
    device = resolve_device(device)
    bench, read = open_bench(weights, batch_size, device), []
    with progress("reading", found.count) as advance:
        for batch in found.batches(batch_size):
            read.append(batch)
            advance(len(batch))
    known = class_ids is not None
    return {
        "images": {str(path): summary(bench.picture_values(torch.cat(read), class_ids))},
        "real": summary(bench.real_values(with_classes=known)),
        "reward_weights": bench.weights if known else {},
        "settings": {"images": str(path), "n": found.count, "classes_known": known},
    }


def _class_ids(found: ImageSet) -> torch.Tensor | None:
    """The class of each picture by its folder's metadata.jsonl, int64 [N]; None when nothing tells."""
    metadata = found.path / METADATA
    if not metadata.is_file():
        recorded_sampling(found.path)  # refuses an unfinished folder
        return None
    files = [item.file for item in found.items]
    classes: dict[str, int | None] = {}
    for row in read_jsonl(metadata):
        class_id = row.get("class_id")
        known = isinstance(class_id, int) and not isinstance(class_id, bool) and 0 <= class_id < len(scenes.CLASS_NAMES)
        if class_id is not None and not known:
            allowed = f"0 to {len(scenes.CLASS_NAMES) - 1}"
            raise UserError(f"{metadata}, {row.get('file')}: class_id = {class_id!r}: nano classes are {allowed}")
        classes[str(row.get("file"))] = class_id
    for file in files:
        if file not in classes:
            raise UserError(f"{found.path / file} is not in {metadata}")
    for file in classes:
        if not (found.path / file).is_file():
            raise UserError(f"{metadata} lists {file}, which is not there")
    without = [file for file in files if classes[file] is None]
    if len(without) == len(files):
        return None
    if without:
        raise UserError(f"{metadata} gives no class_id for {without[0]}; give one for every picture, or for none")
    return torch.tensor([classes[file] for file in files])
