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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from argrpo_cli.images import SUFFIXES, image_files
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_jsonl, read_text, reason

if TYPE_CHECKING:
    from argrpo_cli.policy import Policy

METADATA = "metadata.jsonl"
SOLUTION, WNIDS, IDS = "LOC_val_solution.csv", "val_map.txt", "val.txt"  # Kaggle's; file and wnid; file and class id
GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"  # of the devkit
LABEL_FILES = (SOLUTION, WNIDS, IDS, GROUND_TRUTH)
LEVELS_UP = 4  # Kaggle has the pictures in ILSVRC/Data/CLS-LOC/val and the labels beside ILSVRC
DEVKIT = "*devkit*/data"
WNID = re.compile(r"n\d{8}")
ORDER_SEED = 0


@dataclass(frozen=True)
class LabelledImages:
    """Pictures and what they show.

    Attributes:
        folder: where they are.
        files: their paths within it, sorted.
        labels: of each a WordNet id, a class name, or a class id (a number, also as text).
        source: the file the labels are from, or "class folders".
    """

    folder: Path
    files: tuple[str, ...]
    labels: tuple[str | int, ...]
    source: str

    def first(self, count: int | None) -> LabelledImages:
        """The first `count` in `balanced_order`, or all of them in that order.

        Raises:
            UserError: there are not so many.
        """
        if count is not None and count > len(self.files):
            raise UserError(f"--n {count}: {self.folder} holds {len(self.files)} pictures")
        order = balanced_order(self.labels)[:count]
        files, labels = tuple(self.files[i] for i in order), tuple(self.labels[i] for i in order)
        return LabelledImages(self.folder, files, labels, self.source)


def open_labelled(folder: str | Path) -> LabelledImages:
    """The pictures of a folder in one of the three layouts.

    Raises:
        UserError: no such folder, no pictures, no labels, or a picture without one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}" if not folder.exists() else f"{folder} is a file, not a folder of images")
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        subfolders = [path for path in entries if path.is_dir()]
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {reason(error)}") from error
    if any(path.suffix.lower() in SUFFIXES for path in entries):
        return _flat(folder, tuple(image_files(folder)))
    if not subfolders:
        raise UserError(f"{folder} holds neither pictures nor class folders")
    if (folder / "val").is_dir():
        raise UserError(f"{folder} holds no pictures, but a folder val; give --data {folder / 'val'}")
    found = [(path.name, f"{path.name}/{name}") for path in subfolders for name in image_files(path)]
    return LabelledImages(folder, tuple(file for _, file in found), tuple(label for label, _ in found), "class folders")


def conditions_of(images: LabelledImages, policy: Policy) -> list[Condition]:
    """What a class policy is asked for each picture.

    Raises:
        UserError: the policy reads captions, or has no class for a label.
    """
    if policy.text_encoder is not None:
        raise UserError(f"{images.folder} holds pictures of classes, and this policy reads captions; use --prompts")
    known: dict[str | int, Condition] = {}
    count = len(policy.class_names)
    for label in dict.fromkeys(images.labels):
        asked = label
        if isinstance(label, str) and WNID.fullmatch(label):
            if count != 1000:
                raise UserError(f"{images.folder} holds ImageNet's {label}, and this policy draws {count} classes")
            asked = imagenet_class(label, images.folder)
        elif isinstance(label, str) and label not in policy.class_names:
            asked = label.replace("_", " ")
        try:
            known[label] = policy.conditions([asked])[0]
        except UserError as error:
            raise UserError(f"{images.folder}, label {label!r} by {images.source}: {error}") from error
    return [known[label] for label in images.labels]


def imagenet_class(wnid: str, where: Path) -> int:
    """The class id of a WordNet id: its place among the thousand, sorted.

    Raises:
        UserError: it is none of them; the message names `where`.
    """
    from timm.data import ImageNetInfo

    if not _CLASS_IDS:
        _CLASS_IDS.update({name: index for index, name in enumerate(ImageNetInfo("imagenet-1k").label_names())})
    if wnid not in _CLASS_IDS:
        raise UserError(f"{where}: {wnid} is none of ImageNet's 1000 classes (ILSVRC 2012)")
    return _CLASS_IDS[wnid]


_CLASS_IDS: dict[str, int] = {}


def balanced_order(labels: Sequence[str | int], seed: int = ORDER_SEED) -> list[int]:
    """A random order, always the same, whose first n have every class equally often, within one.

    It goes round after round: each takes one picture of every class that has one left, at random. What is computed for
    the first thousand is thus of use for the first ten thousand.
    """
    generator = np.random.default_rng(seed)
    members: dict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[str(label)].append(index)
    queues = [[members[name][i] for i in generator.permutation(len(members[name]))] for name in sorted(members)]
    order: list[int] = []
    for place in range(max(map(len, queues))):
        present = [queue[place] for queue in queues if place < len(queue)]
        order += [present[i] for i in generator.permutation(len(present))]
    return order


def _flat(folder: Path, files: tuple[str, ...]) -> LabelledImages:
    if (folder / METADATA).is_file():
        source, of_file = folder / METADATA, _metadata(folder / METADATA)
        labels = [of_file.get(name) for name in files]
    else:
        source = _find_labels(folder)
        of_stem = _ground_truth(source) if source.name == GROUND_TRUTH else _label_list(source)
        labels = [of_stem.get(Path(name).stem) for name in files]
    if None in labels:
        raise UserError(f"{source} has no label for {files[labels.index(None)]}")
    return LabelledImages(folder, files, tuple(labels), str(source))


def _find_labels(folder: Path) -> Path:
    resolved = folder.resolve()
    for place in (folder, *resolved.parents[:LEVELS_UP]):
        for name in LABEL_FILES:
            candidates = [place / name]
            if name == GROUND_TRUTH:
                candidates += [place / "data" / name, *sorted(found / name for found in place.glob(DEVKIT))]
            for candidate in candidates:
                if candidate.is_file():
                    return candidate
    names = f"{METADATA}, {', '.join(LABEL_FILES)}"
    raise UserError(f"{folder} holds pictures without class folders or labels; put one of {names} in it")


def _metadata(path: Path) -> dict[str, int]:
    labels = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        name, class_id = row.get("file"), row.get("class_id")
        if not isinstance(name, str) or not isinstance(class_id, int) or isinstance(class_id, bool):
            raise UserError(f"{path}, row {number}: expected a `file` and a whole number `class_id`")
        labels[name] = class_id
    return labels


def _label_list(path: Path) -> dict[str, str | int]:
    """Lines of a file name and a WordNet id or class id, apart by a comma or a space; more may follow."""
    labels: dict[str, str | int] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        fields = re.split(r"[,\s]+", line.strip())
        if fields == [""] or fields[0] == "ImageId":
            continue
        if len(fields) < 2 or not (WNID.fullmatch(fields[1]) or fields[1].isdecimal()):
            raise UserError(f"{path}, line {number}: expected a file and a WordNet id or class id, got {line[:40]!r}")
        stem = Path(fields[0]).stem
        labels[stem] = int(fields[1]) if fields[1].isdecimal() else fields[1]
    return labels


def _ground_truth(path: Path) -> dict[str, str | int]:
    """The devkit's list: line k has the devkit's id of ILSVRC2012_val_k."""
    wnids = _devkit_wnids(path.with_name(META), path)
    labels: dict[str, str | int] = {}
    for number, line in enumerate(read_text(path).split(), start=1):
        if not line.isdecimal() or int(line) not in wnids:
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
    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        rows = [(int(row["ILSVRC2012_ID"]), str(row["WNID"]), int(row["num_children"])) for row in synsets]
    except (OSError, ValueError, KeyError, IndexError, TypeError, NotImplementedError) as error:
        raise UserError(f"cannot read {meta}: it is not the devkit's table of synsets, or a damaged one") from error
    return {number: wnid for number, wnid, children in rows if children == 0}
