"""A folder of real pictures of known classes, as people have ImageNet's validation set: files and their labels.

Three layouts are read:
    class folders               n01440764/ILSVRC2012_val_00000293.JPEG, or folders named by class id or class name
    flat, with a label file     ILSVRC2012_val_00000001.JPEG and one of `LABEL_FILES`, beside or above
    flat, with metadata.jsonl   rows with `file` and `class_id`, as `argrpo sample` writes them

LlamaGen numbers ImageNet's classes as torchvision's ImageFolder does: by the sorted WordNet ids. The ids 1 to 1000 of
the devkit are another order, which only its meta.mat explains.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from argrpo_cli.images import WNID, ImageSet, file_item, read_metadata
from argrpo_cli.listing import METADATA, image_files
from argrpo_cli.policy.classes import class_wnids
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_text, readable
from argrpo_cli.system.plain import lines_of

if TYPE_CHECKING:
    from argrpo_cli.policy.protocol import Policy

SOLUTION, WNIDS, IDS = "LOC_val_solution.csv", "val_map.txt", "val.txt"  # Kaggle's; file and wnid; file and class id
GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"  # of the devkit
LABEL_FILES = (SOLUTION, WNIDS, IDS, GROUND_TRUTH)
LEVELS_UP = 4  # Kaggle has the pictures in ILSVRC/Data/CLS-LOC/val and the labels beside ILSVRC
DEVKIT = "*devkit*/data"


def open_labelled(folder: str | Path) -> ImageSet:
    """The pictures of a folder in one of the three layouts, in natural order. Each has its `label` in `extra`: a
    WordNet id, a class name, or a class id (a number, also as text); `note` is the file that they are from, or "class
    folders".

    Raises:
        UserError: no such folder, no pictures, no labels, or a picture without one.
    """
    folder = Path(folder)
    files, remarks = image_files(folder)
    if not all("/" in file for file in files):
        return _flat(folder, files, remarks)
    if (folder / "val").is_dir():
        raise UserError(f"{folder} holds no pictures, but a folder val; give --data {folder / 'val'}")
    items = [file_item(folder, file, label=file.split("/")[0]) for file in files]
    return ImageSet(folder, items, "class folders", remarks)


def some_of(images: ImageSet, count: int | None) -> ImageSet:
    """The first `count` in `balanced_order`, or all of them in that order.

    Raises:
        UserError: there are not so many, or not two.
    """
    if images.count < 2:
        raise UserError(f"{images.path} holds one picture, and an interval needs 2 or more")
    if count is not None and count > images.count:
        raise UserError(f"--n {count}: {images.path} holds {images.count} pictures")
    order = balanced_order([item.extra["label"] for item in images.items])[:count]
    return replace(images, items=[images.items[i] for i in order])


def conditions_of(images: ImageSet, policy: Policy) -> list[Condition]:
    """What a class policy is asked for each picture.

    Raises:
        UserError: the policy reads captions, or has no class for a label.
    """
    card = policy.card
    if card.reads != "classes":
        raise UserError(f"{images.path} holds pictures of classes, and this policy reads captions; use --prompts")
    conditions: dict[str | int, Condition] = {}
    labels = [item.extra["label"] for item in images.items]
    for label in dict.fromkeys(labels):
        name = label
        if isinstance(label, str) and WNID.fullmatch(label):
            if len(card.names) != 1000:
                raise UserError(
                    f"{images.path} holds ImageNet's {label}, and this policy draws {len(card.names)} classes"
                )
            if label not in class_wnids():
                raise UserError(f"{images.path}: {label} is none of ImageNet's 1000 classes (ILSVRC 2012)")
            name = class_wnids().index(label)
        elif isinstance(label, str) and label not in card.names:
            name = label.replace("_", " ")
        try:
            conditions[label] = policy.conditions([name])[0]
        except UserError as error:
            raise UserError(f"{images.path}, label {label!r} by {images.note}: {error}") from error
    return [conditions[label] for label in labels]


def balanced_order(labels: Sequence[str | int]) -> list[int]:
    """A random order, always the same, whose first n have every class equally often, within one.

    It goes round after round: each takes one picture of every class that has one left, at random. What is computed for
    the first thousand is thus of use for the first ten thousand.
    """
    generator = np.random.default_rng(0)
    members: dict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[str(label)].append(index)
    queues = [[members[name][i] for i in generator.permutation(len(members[name]))] for name in sorted(members)]
    order: list[int] = []
    for indices in zip_longest(*queues):
        present = [index for index in indices if index is not None]
        order += [present[i] for i in generator.permutation(len(present))]
    return order


def _flat(folder: Path, files: Sequence[str], remarks: Sequence[str]) -> ImageSet:
    if (folder / METADATA).is_file():
        source, rows = folder / METADATA, read_metadata(folder, whole=False)
        labels = [rows.get(name, {}).get("class_id") for name in files]
    else:
        source = _find_labels(folder)
        of_stem = _ground_truth(source) if source.name == GROUND_TRUTH else _label_list(source)
        labels = [of_stem.get(Path(name).stem) for name in files]
    if None in labels:
        raise UserError(f"{source} has no label for {files[labels.index(None)]}")
    items = [file_item(folder, file, label=label) for file, label in zip(files, labels, strict=True)]
    return ImageSet(folder, items, str(source), remarks)


def _find_labels(folder: Path) -> Path:
    resolved = folder.resolve()
    for place in (folder, *resolved.parents[:LEVELS_UP]):
        for name in LABEL_FILES:
            candidates = [place / name]
            if name == GROUND_TRUTH:
                candidates += [place / "data" / name, *sorted(data / name for data in place.glob(DEVKIT))]
            for candidate in candidates:
                if candidate.is_file():
                    return candidate
    names = f"{METADATA}, {', '.join(LABEL_FILES)}"
    raise UserError(f"{folder} holds pictures without class folders or labels; put one of {names} in it")


def _label_list(path: Path) -> dict[str, str | int]:
    """Lines of a file name and a WordNet id or class id, apart by a comma or a space; more may follow."""
    labels: dict[str, str | int] = {}
    for number, line in enumerate(lines_of(read_text(path)), start=1):
        fields = re.split(r"[,\s]+", line.strip())
        if fields == [""] or fields[0] == "ImageId":
            continue
        if len(fields) < 2 or not (WNID.fullmatch(fields[1]) or re.fullmatch(r"\d{1,9}", fields[1])):
            raise UserError(f"{path}, line {number}: expected a file and a WordNet id or class id, got {line[:40]!r}")
        stem = Path(fields[0]).stem
        labels[stem] = int(fields[1]) if fields[1].isdecimal() else fields[1]
    return labels


def _ground_truth(path: Path) -> dict[str, str | int]:
    """The devkit's list: line k has the devkit's id of ILSVRC2012_val_k."""
    wnids = _devkit_wnids(path.with_name(META), path)
    labels: dict[str, str | int] = {}
    for number, line in enumerate(read_text(path).split(), start=1):
        if not re.fullmatch(r"\d{1,9}", line) or int(line) not in wnids:
            raise UserError(f"{path}, line {number}: expected the devkit's id of a class, 1 to 1000, got {line!r}")
        labels[f"ILSVRC2012_val_{number:08d}"] = wnids[int(line)]
    return labels


def _devkit_wnids(meta: Path, ground_truth: Path) -> dict[int, str]:
    """The WordNet id of each of the devkit's ids that is a class (has no children)."""
    if not meta.is_file():
        raise UserError(f"{ground_truth} has the devkit's own class ids; put the devkit's {META} beside it")
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(f"reading {meta} needs scipy: pip install scipy") from error
    faults = (OSError, ValueError, LookupError, TypeError, NotImplementedError)
    with readable(meta, faults, "it is not the devkit's table of synsets, or a damaged one"):
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        rows = [(int(row["ILSVRC2012_ID"]), str(row["WNID"]), int(row["num_children"])) for row in synsets]
    return {number: wnid for number, wnid, children in rows if children == 0}
