"""`argrpo eval imagenet`: IS, FID, sFID, precision and recall as ADM's evaluator and the AR-GRPO paper report them.

A policy's images are drawn, scaled and shown to Inception batch by batch and kept only if asked; a folder of pictures
or an .npz is read the same way. Beside what every benchmark writes (`benchmark.py`):

    NAME/features/   features of each batch, removed at the end; NAME/diversity/ likewise
    NAME/images/     the pictures, where they are kept

What was computed of the reference stays in the user's cache.

    inception_score   splits of 5,000 as ADM takes them, in the order given; jackknife over groups of images
    fid, sfid         against the reference's statistics; jackknife over groups of images
    precision         share of generated images inside the reference's manifold (k = 3); units: the generated images
    recall            share of reference images inside the generated ones' manifold; units: the reference images

The errors are those of drawing the images, given the reference; that of recall is of drawing the reference images
instead, given the generated ones. The upward bias of FID and sFID in few images is no part of them: compare equal
numbers. Two policies drawn with the same seeds share their units, so the error of their difference is paired.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from argrpo_cli import paper_numbers, seeds
from argrpo_cli.draw import draw_batch
from argrpo_cli.evals.benchmark import Benchmark, Subject
from argrpo_cli.evals.fidelity import (
    FID,
    INCEPTION_SCORE,
    NEIGHBOURS,
    PRECISION,
    RECALL,
    SFID,
    SPLIT_SIZE,
    frechet_measure,
    inception_score,
    inception_score_measure,
    precision_recall,
    save_statistics,
    shuffled,
)
from argrpo_cli.evals.imagenet_reference import (
    ADM_NAME,
    ADM_SIZE,
    HASHES,
    POOL,
    PROBABILITIES,
    SPATIAL,
    Features,
    Reference,
    ReferenceFile,
    content_hash,
    fetch_adm,
    open_reference,
    prepare_reference,
)
from argrpo_cli.evals.statistics import Measure, class_groups, mean_of
from argrpo_cli.images import ImageSet, open_images, recorded_sampling
from argrpo_cli.kept import Pictures, Tensors
from argrpo_cli.networks.inception import load_inception
from argrpo_cli.sample import NPZ, check_resize, file_name
from argrpo_cli.shapes import Column, Condition, Sampling, Shot
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.processes import Team, join_team

if TYPE_CHECKING:
    from argrpo_cli.policy.protocol import Card, Policy

COLUMNS = {  # in the order of the paper's tables
    INCEPTION_SCORE: Column("IS", better="higher", digits=2),
    FID: Column("FID", better="lower", digits=2),
    SFID: Column("sFID", better="lower", digits=2),
    PRECISION: Column("precision", better="higher"),
    RECALL: Column("recall", better="higher"),
}
IMAGES, CLASSES = 50_000, 1000  # of the published protocol
EVAL_SIZE = 256  # pixels a side, to which larger images of a policy are scaled, as LlamaGen does
LEAST = seeds.SPACES["imagenet"].least  # images: precision and recall need one less, the jackknife leaves some out
SORTED_LOSS = 0.05  # of the IS, from which on images count as sorted by class
ERRORS = (
    "of drawing the images, given the reference: a jackknife over 20 groups (IS, FID, sFID), the spread over generated "
    "images (precision); recall: the spread over reference images, given the generated ones; FID's and sFID's upward "
    "bias in few images is not part of them"
)


class ImageNet(Benchmark):
    """Inception's features against a reference.

    Args:
        reference: a path, or "adm-256", see `imagenet_reference.py`.
        inception: a file of weights; None fetches torch-fidelity's.
        resize: pixels a side of a policy's images before Inception; None: 256 for larger images, others as drawn.
        keep_images, keep_features: leave what a policy draws, and what Inception finds in any images, in the folder.

    Raises:
        UserError: `resize` is out of range.
    """

    name, title, reads = "imagenet", "ImageNet", "classes"
    n, counted, final, packages = IMAGES, "images", True, ("torch-fidelity",)
    of_paper = transient = True

    def __init__(
        self,
        *,
        reference: str = ADM_NAME,
        inception: str | Path | None = None,
        resize: int | None = None,
        keep_images: bool = False,
        keep_features: bool = False,
    ):
        check_resize(resize)
        self.reference_name, self.weights, self.resize = reference, inception, resize
        self.keep_images, self.keep_features = keep_images, keep_features
        self.images: ImageSet | None = None
        self.reference: Reference | None = None
        self.features: dict[str, Features] = {}

    def open(self, cards: Sequence[Card], team: Team) -> None:
        if self.reference_name == ADM_NAME:
            team.lead(fetch_adm)
        self.file = open_reference(self.reference_name)
        self.inception = load_inception(self.weights, team.device)

    def shots(self, policy: Policy, n: int, seed: int) -> list[Shot]:
        """Classes in turn, each image with noise of its own."""
        seeds.check(self.name, seed, n)
        names = policy.card.names
        conditions = policy.conditions(range(len(names)))
        shots = []
        for index in range(n):
            class_id, noise = index % len(names), seeds.of(self.name, seed, index)
            shots.append(Shot(conditions[class_id], noise, file_name(class_id, names[class_id], noise)))
        return shots

    def finished(self, images: Path) -> list[Shot]:
        self.images = open_images(images)
        if self.images.count < LEAST:
            raise UserError(f"{images} holds {self.images.count} images; the measures and their errors need {LEAST}")
        return [Shot(Condition(""), -1, item.file) for item in self.images.items]

    def about(self, images: Path, shots: Sequence[Shot]) -> dict[str, Any]:
        return {"count": len(shots), "sha256": content_hash(images, self.images), **_recorded(self.images)}

    def identity(self) -> dict[str, Any]:
        drawing = {} if self.images else {"resize": self.resize, "keep_images": self.keep_images}
        if self.diversity:  # there are no pictures to look at later
            drawing["diversity"] = self.diversity.names
        return {**drawing, "reference": {**self.file.protocol(), "name": None}, "inception": self.inception.fingerprint}

    def gather(self, policy: Policy, subject: Subject, batch_size: int, team: Team) -> None:
        """Features of images that are gone when they have been seen; pictures that are kept are written before."""

        def drawn(batch: Sequence[Shot]) -> Tensor:
            images = draw_batch(policy, batch, subject.sampling, self._size(subject)[0])[1]
            if self.keep_images:
                Pictures(subject.pictures).write(batch, images)
            if self.diversity:
                self.diversity.write(subject, batch, images)
            return images

        features = self._features(subject, batch_size)
        features.extract(drawn, f"drawing {subject.name}", team, ahead=False)

    def measure_all(self, subjects: Sequence[Subject], batch_size: int, team: Team) -> dict[str, dict[str, Measure]]:
        folder = subjects[0].folder.parent / "reference"
        self.reference = prepare_reference(self.file, self.inception, folder, batch_size, team)
        return super().measure_all(subjects, batch_size, team)

    def measure(self, subject: Subject, batch_size: int, team: Team) -> dict[str, Measure]:
        """In the first process; the others have features only."""
        features = self._features(subject, batch_size)
        if self.images:
            features.extract(self.images.read, f"Inception on {subject.name}", team, ahead=True)
        class_ids = torch.tensor([shot.condition.class_id for shot in subject.shots]) if subject.card else None
        groups = class_groups(len(subject.shots), class_ids)
        return team.lead(lambda: measure_set(features, groups, self.reference, self._keeps_order, team.device)) or {}

    def columns(self) -> dict[str, Column]:
        return COLUMNS if self.reference.pool_features is not None else {k: COLUMNS[k] for k in list(COLUMNS)[:3]}

    def paper(self, subjects: Sequence[Subject]) -> dict[str, dict[str, float]]:
        card = subjects[0].card
        return paper_numbers.before_and_after(2, card.base) if card else {}

    def protocol(self, subjects: Sequence[Subject]) -> dict[str, Any]:
        sets = {}
        for one in subjects:
            hashes = self.features[one.name].all(HASHES)
            sets[one.name] = {
                "path": one.path,
                **one.identity,
                "count": len(one.shots),
                "image_size": list(self._size(one)),
                "images_sha256": hashlib.sha256(hashes.numpy().tobytes()).hexdigest(),
                "inception_score_order": ("as they come" if self._keeps_order else "shuffled by a fixed seed")
                + f", splits of {SPLIT_SIZE}",
            }
            if one.card:
                sets[one.name]["seeds"] = [one.shots[0].seed, one.shots[-1].seed]
        return {
            "measured": sets,
            "reference": self.file.protocol(),
            "inception": {
                "weights": self.inception.fingerprint,
                "package": self.inception.package,
                "resize": "TensorFlow 1, to 299",
            },
            "neighbours": NEIGHBOURS,
            "errors": ERRORS,
        }

    def warnings(self, subjects: Sequence[Subject]) -> list[str]:
        """What is left out of the sets, and where the evaluation departs from the published protocol; each once."""
        texts = [text for images in (self.images, self.file.images) if images for text in images.remarks]
        for one in subjects:
            classes = len(one.card.names) if one.card else None
            sampling = asdict(one.sampling) if one.sampling else one.identity.get("sampling", {})
            texts += protocol_warnings(len(one.shots), classes, self._size(one), sampling, self.file)
            if one.identity.get("sha256") == self.file.sha256:
                texts.append("the reference is the very set that is measured")
        return list(dict.fromkeys(texts))

    def late_warnings(self, subjects: Sequence[Subject]) -> list[str]:
        texts: list[str] = []
        for one in subjects:
            features = self.features[one.name]
            in_order = self._keeps_order and sorted_by_class(features.all(PROBABILITIES))
            texts += set_warnings(one.name, features.all(HASHES), self.reference.hashes, in_order)
        return texts

    def clean(self, subjects: Sequence[Subject]) -> None:
        if self.keep_features:
            return
        Tensors(subjects[0].folder.parent / "reference", None, str).remove()
        for one in subjects:
            Tensors(one.folder / "features", None, str).remove()
            if self.diversity:
                self.diversity.remove(one)
            if one.folder.is_dir() and not any(one.folder.iterdir()):
                one.folder.rmdir()

    @property
    def _keeps_order(self) -> bool:
        """An .npz is measured as it comes, as by ADM's evaluator."""
        return self.images is not None and self.images.is_array

    def _size(self, subject: Subject) -> tuple[int, int]:
        """Height and width in which images reach Inception."""
        return self.images.size if subject.card is None else (eval_size(subject.card.image_size, self.resize),) * 2

    def _features(self, subject: Subject, batch_size: int) -> Features:
        items = self.images.items if self.images else subject.shots
        batch_size = self.images.at_once(batch_size) if self.images else batch_size
        features = Features(subject.folder / "features", items, self.inception, batch_size)
        self.features[subject.name] = features
        return features


def save_reference_statistics(
    reference: str, file: Path, inception: str | Path | None = None, batch_size: int = 64, device: str = "auto"
) -> None:
    """Compute a reference's statistics, save them as ADM's files have them, and say so.

    Interrupted, it goes on where it was: features lie in a folder beside the file, until it is written.
    """
    benchmark, team = ImageNet(reference=reference, inception=inception), join_team(device)
    team.together(lambda: benchmark.open([], team))
    source, network = benchmark.file, benchmark.inception
    # Features of another network, or another division into batches, are none to go on with.
    folder = file.with_name(f"{file.name}-features-{source.sha256[:12]}-{network.fingerprint[:8]}-{batch_size}")
    ready = None if source.stored else prepare_reference(source, network, folder, batch_size, team)

    def finish() -> None:
        save_statistics(file, *(source.stored or (ready.pool, ready.spatial)))
        Tensors(folder, None, str).remove()
        print(f"the statistics of {reference} are in {file}")

    team.lead(finish)


def eval_size(image_size: int, resize: int | None) -> int:
    """Pixels a side in which a policy's images reach Inception."""
    return resize or min(EVAL_SIZE, image_size)


def measure_set(
    features: Features, groups: Tensor, reference: Reference, keep_order: bool, device: str = "cpu"
) -> dict[str, Measure]:
    """All measures of features against a reference; precision and recall where it has images.

    Args:
        groups: int64 [N], the jackknife's group of each image.
        keep_order: take IS's splits of the images as they come, not shuffled by a fixed seed.
        device: of precision and recall.
    """
    rows = features.all(PROBABILITIES), groups
    measures = {INCEPTION_SCORE: inception_score_measure(*(rows if keep_order else map(shuffled, rows)), SPLIT_SIZE)[0]}
    for key, kind, gaussian in ((FID, POOL, reference.pool), (SFID, SPATIAL, reference.spatial)):
        measures[key] = frechet_measure(features.each(kind), groups, gaussian)[0]
    if reference.pool_features is not None:
        generated = features.all(POOL).to(device)
        covered = precision_recall(generated, reference.pool_features.to(device))
        precise, recalled = (inside.cpu().double() for inside in covered)
        measures[PRECISION] = mean_of(precise)
        measures[RECALL] = Measure(recalled.mean().item(), (recalled,), len(groups))  # of so many generated images
    return measures


def sorted_by_class(probabilities: Tensor) -> bool:
    """Whether IS in the order of the images is well below that of the same images shuffled."""
    if len(probabilities) <= SPLIT_SIZE:
        return False
    mixed = inception_score(shuffled(probabilities), SPLIT_SIZE)
    return inception_score(probabilities, SPLIT_SIZE) < (1 - SORTED_LOSS) * mixed


def _recorded(images: ImageSet) -> dict[str, Any]:
    """How `argrpo sample` drew a folder, or the .npz in it, and the policy's hash; nothing of other images."""
    if images.is_array and images.path.name != NPZ:
        return {}
    recorded = recorded_sampling(images.path.parent if images.is_array else images.path) or {}
    sampling = {key: recorded[key] for key in (*asdict(Sampling()), "seed") if key in recorded}
    return {key: one for key, one in (("sampling", sampling), ("weights", recorded.get("weights"))) if one}


def protocol_warnings(
    count: int, classes: int | None, size: tuple[int, int], sampling: Mapping[str, Any], reference: ReferenceFile
) -> list[str]:
    """Where an evaluation departs from the published protocol, the usual cause of figures that cannot be compared.

    ADM's, LlamaGen's and AR-GRPO's: 50,000 images, 50 of each of 1,000 classes, 256 x 256 pixels before Inception,
    against ADM's reference batch; guidance 2.0, temperature 1, no top-k or top-p (AR-GRPO's table 2).

    Args:
        classes: of a policy, None where they are not known.
        size: height and width in which images reach Inception.
        sampling: as much as is known of it.
    """
    texts, own, images = [], f"{size[1]}x{size[0]}", reference.images
    if count != IMAGES:
        texts.append(f"{count:,} images; published figures are of {IMAGES:,}, and FID is larger the fewer there are")
    if classes is not None and classes != CLASSES:
        texts.append(f"the policy draws {classes} classes, ImageNet has {CLASSES:,}")
    if classes is not None and count % classes:
        texts.append(f"{count:,} images of {classes:,} classes: not the same number of each")
    for key, value in asdict(Benchmark.sampling).items():
        if key != "dtype" and sampling.get(key, value) != value:
            texts.append(f"--{key.replace('_', '-')} {sampling[key]:g}; the paper's table 2 has {value:g}")
    if size != ADM_SIZE:
        texts.append(f"images of {own} pixels reach Inception; published figures are of 256x256")
    if images is not None and images.size != size:
        texts.append(f"images of {own} pixels are compared with a reference of {images.size[1]}x{images.size[0]}")
    if not reference.is_adm:
        texts.append(
            f"the reference {reference.name} is not ADM's batch for 256 pixels (10,000 images and the training set's "
            "statistics): FID, sFID, precision and recall cannot be compared with published ones"
        )
    if images is None:
        texts.append("the reference holds statistics only: precision and recall are not measured")
    elif images.count == IMAGES:
        texts.append(f"the reference has {IMAGES:,} images: the validation set, or generated ones, instead of ADM's?")
    return texts


def set_warnings(name: str, hashes: Tensor, reference: Tensor | None, sorted_by_class: bool) -> list[str]:
    """Of the images themselves, by their hashes int64 [N] and the reference's [R]."""
    texts = []
    if copies := len(hashes) - len(hashes.unique()):
        texts.append(f"{name}: {copies:,} of {len(hashes):,} images are copies of others")
    if reference is not None and (shared := int(torch.isin(hashes, reference).sum())):
        texts.append(f"{name}: {shared:,} of {len(hashes):,} images are in the reference")
    if sorted_by_class:
        texts.append(f"{name}: the images seem to be sorted by class, which lowers the inception score; shuffle them")
    return texts
