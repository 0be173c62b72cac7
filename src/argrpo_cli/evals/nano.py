"""`argrpo eval nano`: how good are a policy's samples in the nano world, alone or against a baseline with paired seeds.

A policy of captions is asked for "a photo of a dog" where one of classes is asked for the class dog. Of finished
pictures, whoever drew them, what needs no class is always measured; what asks whether a picture shows its class only
for a folder whose metadata.jsonl gives each picture's `class_id`, as `argrpo sample` writes it.

    match         dB of the best rendering of the class, per object pixel (`nano/matching.py`); the judge's first word
    match_at_size match less what real scenes of that class and size reach: larger objects match better by themselves
    size          side of that rendering in pixels
    mirrored      share of samples that this rendering mirrors
    recognised    share of samples whose class the judge's classifier names
    inception_score, fid, sfid
                  of all samples together, on the judge's features against its reference scenes: the classifier's
                  features [N, 128] stand for Inception's pool, its class probabilities for Inception's, and a map of
                  its middle layer [N, 112] for ADM's spatial features
    precision     share of samples inside the reference scenes' manifold, k = 3 (as ADM, on the judge's features)
    recall        share of reference scenes inside the samples' manifold
    coverage      share of reference scenes with a sample nearer than their fifth neighbour among them
    diversity     mean feature distance between two samples of one class
    vendi         how many different samples a class has, effectively: the Vendi score of its features
    entropy       nats per token of the policy over its own samples, conditional and as guided
    the rewards   raw, and their total as the recipe weights it

IS, FID, sFID, recall and coverage are one number for a set. Their errors are those of a jackknife over twenty groups of
samples, each with all classes in their shares; two policies with paired seeds have the same groups, so the error of
their difference is paired. It is the error of drawing the samples: the reference scenes, the judge and the training run
are given. With few images it errs on the safe side: against the spread of fresh samples that of FID and sFID was near
twice too large at 192 images, a fifth at 480 and at 2,016. Diversity and Vendi score are means of classes, and their
errors those of other classes, too.

FID and sFID are biased upwards, the more the fewer the images, because a covariance of few rows is not the true one.
The errors leave it out: compare equal numbers of images only. Even then it is larger for a policy of more variety, so
both go along without the jackknife's estimate of it, as `fid_corrected` and `sfid_corrected`. IS is taken over all
samples as one split.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from argrpo_cli import seeds
from argrpo_cli.draw import draw_batch, score_tokens
from argrpo_cli.evals.benchmark import Benchmark, Subject, run
from argrpo_cli.evals.diversity import COVERING, vendi_within
from argrpo_cli.evals.fidelity import (
    FID,
    INCEPTION_SCORE,
    NEIGHBOURS,
    PRECISION,
    RECALL,
    SFID,
    Gaussian,
    covered,
    frechet_measure,
    inception_score_measure,
    precision_recall,
)
from argrpo_cli.evals.statistics import Measure, class_groups, jackknife, mean_of
from argrpo_cli.images import ImageSet, open_images, read_metadata, recorded_sampling
from argrpo_cli.kept import Tensors, in_batches, kept
from argrpo_cli.listing import METADATA
from argrpo_cli.nano import scenes
from argrpo_cli.nano.judge import FITTED, Judge, diversity, load_judge
from argrpo_cli.nano.tokens import encode, psnr
from argrpo_cli.policy.llamagen.pretrained import VQModel
from argrpo_cli.rewards import RewardSet, check_reward, load_rewards, reward_weights
from argrpo_cli.shapes import Column, Condition, Result, Sampling, Shot, class_prompt
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.processes import ALONE, Team, join_team, say

if TYPE_CHECKING:
    from argrpo_cli.policy.protocol import Card, Policy

UNSEEN_SCENES = 480
MATCH, MATCH_AT_SIZE, SIZE, MIRRORED = "match", "match_at_size", "size", "mirrored"
RECOGNISED, DIVERSITY, COVERAGE, VENDI = "recognised", "diversity", "coverage", "vendi"
CORRECTED = "_corrected"
ENTROPY, GUIDED_ENTROPY, TOTAL = "entropy", "entropy_guided", "total_reward"
COLUMNS = {
    MATCH: Column("rendering match", "dB", "higher"),
    MATCH_AT_SIZE: Column("match given class and size", "dB", "higher"),
    SIZE: Column("object size", "pixels"),
    MIRRORED: Column("mirrored", digits=1, percent=True),
    RECOGNISED: Column("recognised", "", "higher", 1, True),
    INCEPTION_SCORE: Column("inception score", "", "higher"),
    FID: Column("FID", "", "lower"),
    FID + CORRECTED: Column("FID less its bias", "", "lower"),
    SFID: Column("sFID", "", "lower"),
    SFID + CORRECTED: Column("sFID less its bias", "", "lower"),
    PRECISION: Column("precision", "", "higher", 1, True),
    RECALL: Column("recall", "", "higher", 1, True),
    COVERAGE: Column("coverage", "", "higher", 1, True),
    DIVERSITY: Column("feature diversity"),
    VENDI: Column("Vendi score of a class"),
    ENTROPY: Column("entropy", "nats/token"),
    GUIDED_ENTROPY: Column("entropy as guided", "nats/token"),
}
REAL = "real scenes"
IMAGES = "images"  # in the store, beside the two entropies

Measures = dict[str, Measure]


class Nano(Benchmark):
    """The bundled judge and rewards.

    Args:
        weights: name of a reward to its weight in the total; None takes those of the recipe nano/c2i.
    """

    name, title, n, counted, final = "nano", "the nano benchmark", 2016, "images", True

    def __init__(self, weights: Mapping[str, float] | None = None):
        self.weights = dict(weights or recipe_weights())
        self.device, self.batch_size, self.seed = "cpu", 64, 0
        self.images: ImageSet | None = None
        self.measured: dict[str, Measures] = {}

    @cached_property
    def judge(self) -> Judge:
        return load_judge()

    @cached_property
    def rewards(self) -> RewardSet:
        return load_rewards(list(self.weights), self.device)

    def check(self, card: Card) -> None:
        if not scenes.draws_nano_world(card):
            raise UserError(
                f"policy {card.name} does not draw the nano world's objects, so its judges cannot measure it"
            )

    def open(self, cards: Sequence[Card], team: Team) -> None:
        self.device = team.device

    def shots(self, policy: Policy, n: int, seed: int) -> list[Shot]:
        """Classes in turn, each image with noise of its own."""
        self.seed = seed
        seeds.check(self.name, seed, n)
        classes = range(len(scenes.CLASS_NAMES))
        captions = [class_prompt(name) for name in scenes.CLASS_NAMES]
        conditions = policy.conditions(classes if policy.card.reads == "classes" else captions)
        conditions = [replace(condition, class_id=i) for i, condition in enumerate(conditions)]
        return [
            Shot(conditions[i % len(classes)], seeds.of(self.name, seed, i), f"{i:06d}")  # a name in the store
            for i in range(n)
        ]

    def finished(self, images: Path) -> list[Shot]:
        self.images = open_images(images)
        class_ids = _recorded_classes(self.images)
        if self.images.size != (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE):
            height, width = self.images.size
            side = f"{scenes.IMAGE_SIZE}x{scenes.IMAGE_SIZE}"
            raise UserError(f"{self.images.name(0)} is {width}x{height}; nano pictures are {side}")
        least, count = NEIGHBOURS + 2, self.images.count  # and one less for the jackknife
        if count < least:
            raise UserError(f"{images}: too few images: recall and its error need {least}, there are {count}")
        conditions = [Condition("")] * count if class_ids is None else [_condition(one) for one in class_ids]
        return [Shot(condition, -1, item.file) for condition, item in zip(conditions, self.images.items, strict=True)]

    def about(self, images: Path, shots: Sequence[Shot]) -> dict[str, Any]:
        return {"count": len(shots), "classes_known": shots[0].condition.class_id is not None}

    def identity(self) -> dict[str, Any]:
        return {"reward_weights": self.weights}

    def gather(self, policy: Policy, subject: Subject, batch_size: int, team: Team) -> None:
        """Pictures and the entropies of their tokens, of each batch."""
        sampling = subject.sampling

        def draw(batch: Sequence[Shot]) -> dict[str, Tensor]:
            tokens, images = draw_batch(policy, batch, sampling)
            conditions = [shot.condition for shot in batch]
            entropy = {
                scale: score_tokens(policy, conditions, tokens, replace(sampling, cfg_scale=scale)).entropy.mean(1)
                for scale in {1.0, sampling.cfg_scale}  # of an unguided policy once
            }
            made = {ENTROPY: entropy[1.0].cpu(), GUIDED_ENTROPY: entropy[sampling.cfg_scale].cpu().clone()}
            return {IMAGES: images.cpu(), **made}

        label = f"sampling {subject.name}"
        kept(subject.shots, draw, _store(subject), batch_size=batch_size, label=label, team=team)

    def warnings(self, subjects: Sequence[Subject]) -> list[str]:
        return list(self.images.remarks) if self.images else []

    def measure(self, subject: Subject, batch_size: int, team: Team) -> Measures:
        """In the first process; what is slow is drawing."""
        self.batch_size = batch_size
        return team.lead(lambda: self._measure(subject)) or {}

    def _measure(self, subject: Subject) -> Measures:
        class_ids = _class_ids(subject)
        batches = in_batches(subject.shots, self.batch_size)
        if subject.card is None:
            measured = self.of_pictures(self.images.read(self.images.items), class_ids)
        else:
            store = _store(subject)
            measured = self.of_pictures(store.column(batches, IMAGES), class_ids)
            measured |= {key: mean_of(store.column(batches, key)) for key in (ENTROPY, GUIDED_ENTROPY)}
        self.measured[subject.name] = measured
        return measured

    def of_pictures(self, images: Tensor, class_ids: Tensor | None) -> Measures:
        """Every measure of uint8 images [B, 3, 64, 64]; without their classes, int64 [B], what needs none."""
        say(f"measuring {len(images):,} images: fidelity and diversity")
        features = self.judge.features(images.cpu())
        groups = class_groups(len(images), class_ids)
        measures = set_measures(images, features, self.judge, groups) | manifold_measures(features, self.judge, groups)
        if class_ids is None:
            return measures
        measures |= self._of_classes(images, features, class_ids)
        several = (class_ids.bincount() > 1)[class_ids]  # a class needs two pictures to differ
        if several.any():
            units = diversity(features[several], class_ids[several]).double()
            measures[DIVERSITY] = Measure(units.mean().item(), (units,), len(images))
            measures[VENDI] = vendi_within(features, class_ids)
        return measures

    def references(self) -> dict[str, Measures]:
        """What real scenes score, as if they were samples; those that the judge's expectation is not fitted to."""
        judge, chosen = self.judge, slice(FITTED, FITTED + UNSEEN_SCENES)
        measures = real_measures(judge, chosen)
        if any(MATCH in one for one in self.measured.values()):
            parts = (judge.reference_images, judge.reference_features, judge.reference_classes)
            measures |= self._of_classes(*(part[chosen] for part in parts))
        return {REAL: measures}

    def _of_classes(self, images: Tensor, features: Tensor, class_ids: Tensor) -> Measures:
        """What can be said of each picture whose class is known."""
        conditions = [_condition(one) for one in class_ids.tolist()]
        say(f"measuring {len(images):,} images: rewards and the match with a rendering")
        raw = {name: scores.cpu() for name, scores in self.rewards.score(images, conditions, self.batch_size).items()}
        match = self.judge.match(images, class_ids)
        values = {
            MATCH: match.db,
            MATCH_AT_SIZE: match.db - self.judge.expected_db(class_ids, match.size),
            SIZE: match.size,
            MIRRORED: match.mirror,
            RECOGNISED: self.judge.probabilities(features).argmax(1) == class_ids,
            **raw,
            TOTAL: sum(scores * self.weights[name] for name, scores in raw.items()),
        }
        return {key: mean_of(one.double()) for key, one in values.items()}

    def columns(self) -> dict[str, Column]:
        rewards = {name: Column(name, "", "higher") for name in self.weights}
        every = {**COLUMNS, **rewards, TOTAL: Column("total reward", "", "higher")}
        return {key: one for key, one in every.items() if any(key in row for row in self.measured.values())}

    def protocol(self, subjects: Sequence[Subject]) -> dict[str, Any]:
        """What was measured with; of policies the tokenizer and the spread of the rewards within a class too."""
        lines = [
            "FID, sFID: biased upwards, the more the fewer images;",
            "jackknife errors; real scenes: some against the others",
        ]
        errors = "errors: of drawing the samples, given the reference scenes"
        if subjects[0].card is None:
            known = subjects[0].identity["classes_known"]
            lines += [errors] if known else [errors, f"classes unknown (no class_id in a {METADATA})"]
            return ({"reward_weights": self.weights} if known else {}) | {"about": "\n".join(lines)}
        tokenizer = measure_tokenizer(self.judge.tokenizer, self.judge.reference_tokens, self.seed)
        quality = f"{tokenizer['psnr']:.2f} dB on unseen scenes" if tokenizer["psnr"] is not None else tokenizer["note"]
        used = f"{tokenizer['codebook_used']:.0%} of the codebook in use"
        lines.insert(0, f"nano-vq, through which it judges: PSNR {quality}; {used}")
        lines.append(f"{errors} and the training run")
        first, last = self.measured[subjects[0].name], self.measured[subjects[-1].name]
        class_ids = _class_ids(subjects[-1])
        spread = {key: within_class_std(last[key].values, class_ids) for key in (*self.weights, TOTAL)}
        lines.append(f"within-class sd: {', '.join(f'{key} {one:.3f}' for key, one in spread.items())}")
        if len(subjects) > 1:
            change = (first[TOTAL].value - last[TOTAL].value) / spread[TOTAL]
            lines.append(f"the total reward changed by {change:+.2f} within-class standard deviations of the baseline")
        return {
            "reward_weights": self.weights,
            "within_class_std": spread,
            "tokenizer": tokenizer,
            "about": "\n".join(lines),
        }


def run_nano(
    policies: Sequence[str],
    images: Path | None = None,
    file: Path | None = None,
    *,
    n: int = Nano.n,
    device: str = "auto",
    weights: Mapping[str, float] | None = None,
    **options: Any,
) -> Result | None:
    """Measure one policy, or two with the same classes and seeds, or finished `images`; options as of `benchmark.run`.

    Args:
        file: for the result. What is drawn lies in a folder beside it until it is written, so that the same call goes
            on where an interrupted one stopped.
        weights: name of a reward to its weight in the total; by default those of the recipe nano/c2i.

    Raises:
        UserError: no such policy, a policy of another world, too few images, a seed out of range.
    """
    team = join_team(device)
    keeps = file is not None and images is None
    out = file.with_name(f"{file.name}.parts") if keeps else Path(team.from_lead(tempfile.mkdtemp)) / "out"
    benchmark = Nano(weights)
    try:
        result = run(benchmark, policies, out, images=images, n=n, device=device, **options)
    finally:
        if team.first and not keeps:
            shutil.rmtree(out.parent, ignore_errors=True)
    if result is not None and file is not None:
        result.save(file)
    if team.first and keeps:
        shutil.rmtree(out, ignore_errors=True)
    return result


def measure_policy(
    policy: Policy, n: int, sampling: Sampling, seed: int, folder: Path, batch_size: int = 64
) -> Measures:
    """Every measure of a policy by itself; what is drawn is kept in `folder`."""
    benchmark, card = Nano(), policy.card
    benchmark.check(card)
    shots = benchmark.shots(policy, n, seed)
    subject = Subject(folder.name, card.name, folder, folder, shots, card, {}, sampling)
    benchmark.gather(policy, subject, batch_size, ALONE)
    return benchmark.measure(subject, batch_size, ALONE)


def set_measures(
    images: Tensor, features: Tensor, judge: Judge, groups: Tensor, reference: Tensor | slice = slice(None)
) -> Measures:
    """IS, FID and sFID of uint8 images [N, 3, 64, 64] with the judge's features of them, and the last two less their
    bias.

    `groups` int64 [N] from `class_groups`; `reference` picks the reference scenes to compare with.
    """
    probabilities = judge.probabilities(features)
    measures = {INCEPTION_SCORE: inception_score_measure(probabilities, groups, len(groups))[0]}
    spatial = judge.spatial_features(images.cpu())
    for key, rows, real in ((FID, features, judge.reference_features), (SFID, spatial, judge.reference_spatial)):
        against = Gaussian.of(real[reference], "reference")
        measures[key], measures[f"{key}{CORRECTED}"] = frechet_measure([rows], groups, against)
    return measures


def manifold_measures(features: Tensor, judge: Judge, groups: Tensor) -> Measures:
    """Precision, of samples, and by a jackknife recall and coverage, of the reference scenes. Coverage needs more
    samples than `COVERING` in all parts of the jackknife, and is left out where they are fewer."""
    precise, recalled = precision_recall(features, judge.reference_features)

    def jackknifed(whole: Tensor, share: Callable[[Tensor], Tensor]) -> Measure:
        left = [share(features[groups != group]).double().mean() for group in range(int(groups.max()) + 1)]
        return jackknife(whole.double().mean().item(), left, len(groups))[0]

    measures = {
        PRECISION: mean_of(precise.double()),
        RECALL: jackknifed(recalled, lambda rows: precision_recall(rows, judge.reference_features)[1]),
    }
    if len(features) > COVERING + 1:
        reached = partial(covered, reference=judge.reference_features, k=COVERING)
        measures[COVERAGE] = jackknifed(reached(features), reached)
    return measures


def real_measures(judge: Judge, held_out: slice) -> Measures:
    """What real scenes reach: the reference scenes `held_out` as the set, the others as its reference."""
    others = torch.ones(len(judge.reference_classes), dtype=torch.bool)
    others[held_out] = False
    ids, features = judge.reference_classes[held_out], judge.reference_features[held_out]
    return set_measures(judge.reference_images[held_out], features, judge, class_groups(len(ids), ids), others)


def recipe_weights() -> dict[str, float]:
    """The weights that the recipe nano/c2i gives the nano rewards."""
    from argrpo_cli.recipe import load_recipe

    section = load_recipe("nano/c2i", []).rewards
    return reward_weights(section, {term.name: check_reward(term.name).family for term in section.terms})


def within_class_std(reward: Tensor, class_ids: Tensor) -> float:
    """Standard deviation of a reward among samples of one class, averaged over the classes: what GRPO normalises by
    (equation 3), with groups as large as the sample allows."""
    return torch.stack([reward[class_ids == one].std() for one in class_ids.unique()]).mean().item()


def measure_tokenizer(vq: VQModel, reference_tokens: Tensor, seed: int) -> dict[str, Any]:
    """PSNR in dB of reconstructions of fresh scenes (None without the emoji font) and share of the codes in use."""
    used = len(reference_tokens.unique()) / vq.config.codebook_size
    try:
        scenes.find_font()
    except UserError as error:
        return {"psnr": None, "codebook_used": used, "note": str(error)}
    rng = np.random.default_rng(seed + 70_000)
    originals = torch.from_numpy(scenes.class_batch(rng, UNSEEN_SCENES, balanced=True)[0])
    return {"psnr": psnr(vq, encode(vq, originals), originals).mean().item(), "codebook_used": used, "note": ""}


def _class_ids(subject: Subject) -> Tensor | None:
    """int64 [N], the class that each picture is of; None where nothing tells."""
    class_ids = [shot.condition.class_id for shot in subject.shots]
    return None if None in class_ids else torch.tensor(class_ids)


def _condition(class_id: int) -> Condition:
    return Condition(class_prompt(scenes.CLASS_NAMES[class_id]), class_id)


def _store(subject: Subject) -> Tensors:
    return Tensors(subject.folder / "drawn", None, lambda shot: shot.file)


def _recorded_classes(images: ImageSet) -> list[int] | None:
    """The class of each picture by its folder's metadata.jsonl, or by class folders; None when nothing tells."""
    metadata = images.path / METADATA
    if not metadata.is_file():
        if not images.is_array:
            recorded_sampling(images.path)  # refuses an unfinished folder
        folders = [item.file.rpartition("/")[0].replace("_", " ") for item in images.items]
        return list(map(scenes.CLASS_NAMES.index, folders)) if set(folders) <= set(scenes.CLASS_NAMES) else None
    files, rows = [item.file for item in images.items], read_metadata(images.path)
    for file in files:
        if file not in rows:
            raise UserError(f"{images.path / file} is not in {metadata}")
    class_ids = [rows[file]["class_id"] for file in files]
    for file, one in zip(files, class_ids, strict=True):
        if one is not None and not 0 <= one < len(scenes.CLASS_NAMES):
            allowed = f"0 to {len(scenes.CLASS_NAMES) - 1}"
            raise UserError(f"{metadata}, {file}: class_id = {one}: nano classes are {allowed}")
    if None not in class_ids:
        return class_ids
    if any(one is not None for one in class_ids):
        without = files[class_ids.index(None)]
        raise UserError(f"{metadata} gives no class_id for {without}; give one for every picture, or for none")
    return None
