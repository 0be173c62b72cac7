"""Where an evaluation departs from the published protocol: the usual cause of figures that cannot be compared.

The protocol of ADM, LlamaGen and AR-GRPO: 50,000 images, 50 of each of 1,000 classes, 256 x 256 pixels before
Inception, against ADM's reference batch; guidance 2.0, temperature 1, no top-k or top-p (AR-GRPO's table 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from argrpo_cli.evals.imagenet_reference import ADM_SIZE, ReferenceFile

IMAGES, CLASSES = 50_000, 1000
SAMPLING = {"cfg_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # of the paper
RECORDED = SAMPLING | {"cfg_interval": -1}  # what a folder of `argrpo sample` tells


def count_warnings(n: int, classes: int | None) -> list[str]:
    """Of the number of images; `classes` of a policy, None where they are not known."""
    found = []
    if n != IMAGES:
        found.append(f"{n:,} images; published figures are of {IMAGES:,}, and FID is larger the fewer there are")
    if classes is not None and classes != CLASSES:
        found.append(f"the policy draws {classes} classes, ImageNet has {CLASSES:,}")
    if classes is not None and n % classes:
        found.append(f"{n:,} images of {classes:,} classes: not the same number of each")
    return found


def size_warnings(size: tuple[int, int], reference: ReferenceFile) -> list[str]:
    """Of the size, height and width, in which images reach Inception."""
    found, own = [], f"{size[1]}x{size[0]}"
    if size != ADM_SIZE:
        found.append(f"images of {own} pixels reach Inception; published figures are of 256x256")
    if reference.images is not None and reference.images.size != size:
        other = reference.images.size
        found.append(f"images of {own} pixels are compared with a reference of {other[1]}x{other[0]}")
    return found


def sampling_warnings(settings: dict[str, object]) -> list[str]:
    """Of guidance, temperature and the like, as far as `settings` tells them."""
    return [
        f"--{key.replace('_', '-')} {settings[key]:g}; the paper's table 2 has {value:g}"
        for key, value in RECORDED.items()
        if settings.get(key, value) != value
    ]


def reference_warnings(reference: ReferenceFile, same_contents: bool) -> list[str]:
    """Of the reference; `same_contents` as the generated images'."""
    found = []
    if not reference.is_adm:
        found.append(
            f"the reference {reference.name} is not ADM's batch for 256 pixels (10,000 images and the training set's "
            "statistics): FID, sFID, precision and recall cannot be compared with published ones"
        )
    images = reference.images
    if images is not None and images.count == IMAGES:
        found.append(f"the reference has {IMAGES:,} images: the validation set, or generated ones, instead of ADM's?")
    if images is None:
        found.append("the reference holds statistics only: precision and recall are not measured")
    if same_contents:
        found.append("the reference is the very set that is measured")
    return found


def set_warnings(name: str, hashes: Tensor, reference: Tensor | None, sorted_by_class: bool) -> list[str]:
    """Of the images themselves, by their hashes int64 [N] and the reference's [R]."""
    found = []
    if copies := len(hashes) - len(hashes.unique()):
        found.append(f"{name}: {copies:,} of {len(hashes):,} images are copies of others")
    if reference is not None and (shared := int(torch.isin(hashes, reference).sum())):
        found.append(f"{name}: {shared:,} of {len(hashes):,} images are in the reference")
    if sorted_by_class:
        found.append(f"{name}: the images seem to be sorted by class, which lowers the inception score; shuffle them")
    return found
