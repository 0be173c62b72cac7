"""Policy entropy: how undecided a policy is about the next image token (section 4.3 and figures 3 and 4 of the paper).

Teacher-forced: the tokens before come from real pictures, held-out scenes of the nano world, or samples of the policy
itself. Kept is the mean over the tokens of each image, and sums at each position: 50,000 images of 576 tokens are a
megabyte. Whatever was measured of a policy is kept, so that an interrupted measuring goes on and a policy that was
measured before costs nothing. So are the tokens of pictures, in the user's cache (`image_codes.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from argrpo_cli import __version__, image_codes, seeds
from argrpo_cli.captions import read_captions
from argrpo_cli.draw import draw_batch, score_tokens
from argrpo_cli.evals.entropy_results import MODES, NORMAL_95, NamedPolicy, Question
from argrpo_cli.evals.statistics import Measure, mean_of
from argrpo_cli.image_labels import conditions_of
from argrpo_cli.images import ImageSet
from argrpo_cli.kept import Tensors, in_batches, kept
from argrpo_cli.networks.weights import fingerprint
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.folder import choose_sampling
from argrpo_cli.runs.run import versions
from argrpo_cli.shapes import Condition, Sampling, Shot
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import user_cache
from argrpo_cli.system.processes import Team, say

if TYPE_CHECKING:
    from argrpo_cli.policy.protocol import Policy

Tally = dict[str, Tensor]  # see `tally`


def measure(
    subjects: Sequence[NamedPolicy],
    question: Question,
    options: Mapping[str, Any],
    batch_size: int,
    team: Team,
    folder: Path,
    cache: Path | None = None,
) -> list[dict[str, Any]]:
    """One row per policy and mode (conditional, guided), ready for JSON.

    Each row has `mean`, `standard_error` (over images; the tokens of one image are not independent), `low` and `high`
    (95 % interval), `by_position` and `by_position_error` (T numbers each, position 0 first). From the second policy on
    it has `change` and `change_error`, paired by picture, scene, or prompt and seed, against the policy in `against`:
    the first of the same `family` (parameters, pixels and kind of condition), or the first of all where it is new.

    Args:
        options: of `Sampling`: guidance of the guided mode, temperature (above 0), and how samples are drawn. Of the
            others a policy's own, where its card says some, hold for it.
        folder: for what is measured, which the team shares.
        cache: folder for the tokens of pictures; by default the user's.

    Raises:
        UserError: no such policy or prompt set; a policy that the images do not fit.
    """
    rows: list[dict[str, Any]] = []
    dtype = Sampling(**options).dtype
    measures: dict[tuple[str, str], Measure] = {}  # by policy and mode
    families: dict[str, str] = {}  # to its first policy
    shown: list[Condition] = []  # to the first policy
    told: set[str] = set()  # settings that policies brought along: of the checkpoints of a run once
    for subject in subjects:
        policy = team.together(lambda subject=subject: load_policy(subject.path, team.device, dtype))
        tell = say if str(policy.card.sampling) not in told else lambda text: None
        told.add(str(policy.card.sampling))
        sampling = choose_sampling(subject.name, policy.card.sampling, options, tell=tell)
        material = _material(policy, question, sampling, batch_size, cache, team)
        own = [] if question.data else [shot.condition for shot in material.shots]
        shown = shown or own
        if own != shown:
            raise UserError(
                f"{subjects[0].path} and {subject.path} are measured on different scenes; measure them alone"
            )
        weights, card = policy.fingerprint(), policy.card
        whole = _entropies(policy, subject.name, weights, material, sampling, batch_size, team, folder)
        parameters = sum(one.numel() for one in policy.model.parameters())
        family = f"{_short(parameters)}, {card.image_size} px, {card.reads}"
        about = {**material.about, "family": family, "parameters": parameters, "image_size": card.image_size}
        about |= {"base": card.base, "weights": weights, "versions": versions(("torch",))}
        against = families.setdefault(family, subject.name)
        against = subjects[0].name if against == subject.name else against
        for index, mode in enumerate(MODES):
            row = {"policy": subject.name, "path": subject.path, "step": subject.step, "mode": mode}
            row |= {**question.about(), "prompts": None, **asdict(sampling), **statistics(whole, index)}
            one = measures[subject.name, mode] = mean_of(whole["per_image"][index])
            if subject != subjects[0]:
                change = one.minus(measures[against, mode])
                row |= {"against": against, "change": change.value, "change_error": change.error}
            rows.append(row | about)
    return rows


def _entropies(
    policy: Policy,
    name: str,
    weights: str,
    material: Material,
    sampling: Sampling,
    batch_size: int,
    team: Team,
    folder: Path,
) -> Tally:
    """The tally of all images; what the folder lacks is measured by the team."""

    def make(batch: Sequence[Shot]) -> Tally:
        parts, modes = [], (replace(sampling, cfg_scale=1.0), sampling)
        for shots, tokens in zip(in_batches(batch, batch_size), material.tokens(batch).split(batch_size), strict=True):
            conditions = [shot.condition for shot in shots]
            pair = [score_tokens(policy, conditions, tokens, mode).entropy.cpu() for mode in modes]
            parts.append(tally(torch.stack(pair)))
        return merged(parts)

    def key(shot: Shot) -> list[Any]:
        return [shot.file, shot.seed, shot.condition.prompt, shot.condition.class_id]

    store = Tensors(folder, [__version__, weights, asdict(sampling), material.identity], key)
    kept(material.shots, make, store, batch_size=material.batch_size, label=f"entropy of {name}", team=team)
    return merged([store.read(batch) for batch in in_batches(material.shots, material.batch_size)])


def tally(entropy: Tensor) -> Tally:
    """What is kept of entropies [modes, B, T].

    Returns:
        float64 `per_image` [modes, B], the means over tokens; `sums` and `squares` [modes, T], over images.
    """
    values = entropy.double()
    return {"per_image": values.mean(2), "sums": values.sum(1), "squares": values.square().sum(1)}


def merged(parts: Sequence[Tally]) -> Tally:
    """One tally of several, the images in their order."""
    sums = {key: torch.stack([part[key] for part in parts]).sum(0) for key in ("sums", "squares")}
    return {"per_image": torch.cat([part["per_image"] for part in parts], 1), **sums}


def statistics(whole: Tally, mode: int) -> dict[str, Any]:
    """Numbers about the entropies of one mode."""
    per_image, sums, squares = (whole[key][mode] for key in ("per_image", "sums", "squares"))
    count, own = len(per_image), mean_of(per_image)
    variance = (squares - sums.square() / count).clamp(min=0) / (count - 1)
    return {
        "images": count,
        "mean": own.value,
        "standard_error": own.error,
        "low": own.value - NORMAL_95 * own.error,
        "high": own.value + NORMAL_95 * own.error,
        "by_position": (sums / count).tolist(),
        "by_position_error": (variance / count).sqrt().tolist(),
    }


def _short(count: int) -> str:
    """111,234,567 as 111M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


@dataclass(frozen=True)
class Material:
    """All images of a question for one policy.

    Attributes:
        shots: the images, each with what decides its tokens in `file` and `seed`.
        tokens: gives those of a batch of `batch_size` in a row, int64 [B, T].
        batch_size: how many are kept together.
        identity: what decides the tokens beside that.
        about: where the images are from, for the results.
    """

    shots: list[Shot]
    tokens: Callable[[Sequence[Shot]], Tensor]
    batch_size: int
    identity: list[Any]
    about: dict[str, Any]


def _material(
    policy: Policy, question: Question, sampling: Sampling, batch_size: int, cache: Path | None, team: Team
) -> Material:
    """Pictures are tokenised here, samples drawn when their tokens are needed."""
    if question.data is not None:
        return _pictures(policy, question.data, cache, team)
    if question.prompts is None:
        return team.together(lambda: _scenes(policy, question))
    return team.together(lambda: _samples(policy, question, sampling, batch_size))


def _pictures(policy: Policy, pictures: ImageSet, cache: Path | None, team: Team) -> Material:
    conditions = team.together(lambda: conditions_of(pictures, policy))
    store = image_codes.tokenise(pictures, policy, cache or user_cache() / "codes", team)
    shots = [
        Shot(condition, -1, f"{item.file} {item.stamp}")
        for condition, item in zip(conditions, pictures.items, strict=True)
    ]
    items = {shot.file: item for shot, item in zip(shots, pictures.items, strict=True)}
    tokenizer = policy.tokenizer_fingerprint()
    return Material(
        shots,
        lambda batch: store.read([items[shot.file] for shot in batch])[image_codes.CODES].long(),
        image_codes.CHUNK,
        ["pictures", image_codes.PREPROCESSING, policy.card.image_size, tokenizer],
        {"labels": pictures.note, "preprocessing": image_codes.PREPROCESSING, "tokenizer": tokenizer},
    )


def _scenes(policy: Policy, question: Question) -> Material:
    from argrpo_cli.nano.tokens import load_held_out, load_tokenizer

    if policy.tokenizer_fingerprint() != fingerprint([load_tokenizer()]):
        raise UserError(f"--split val of {policy.card.name} needs --data: a folder of ImageNet's validation pictures")
    task = policy.card.reads
    tokens, conditions = (part[: question.limit] for part in load_held_out(task))
    shots = [Shot(condition, -1, str(index)) for index, condition in enumerate(conditions)]

    def of(batch: Sequence[Shot]) -> Tensor:
        return tokens[int(batch[0].file) :][: len(batch)]

    return Material(shots, of, image_codes.CHUNK, ["scenes", task], {})


def _samples(policy: Policy, question: Question, sampling: Sampling, batch_size: int) -> Material:
    card = policy.card
    if card.reads == "classes":
        raise UserError(f"{card.name} draws classes and reads no prompts; measure it with --split val")
    # Of the official GenEval list, the part that a policy of few words can read.
    few_words = question.prompts == "geneval" and card.words is not None
    prompts = "geneval-nano" if few_words else question.prompts
    conditions = policy.conditions(read_captions(prompts))[: question.limit]
    if len(conditions) < 2:
        raise UserError(f"--prompts {question.prompts} holds one caption, and an interval needs 2 or more")
    seeds.check("entropy", question.seed, len(conditions), "--prompts")
    shots = [
        Shot(condition, seeds.of("entropy", question.seed, index), str(index))
        for index, condition in enumerate(conditions)
    ]

    def draw(batch: Sequence[Shot]) -> Tensor:
        return draw_batch(policy, batch, sampling)[0]

    return Material(shots, draw, batch_size, ["samples"], {"prompts": prompts, "seed": question.seed})
