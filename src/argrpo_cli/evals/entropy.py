"""Policy entropy: how undecided a policy is about the next image token (section 4.3 and figures 3 and 4 of the paper).

Teacher-forced: the tokens before come from real pictures, held-out scenes or samples of the policy itself
(`entropy_material.py`). Kept is the mean over the tokens of each image, and sums at each position: 50,000 images of 576
tokens are a megabyte. Measured chunks are put down in a journal, so that an interrupted measuring goes on and a policy
that was measured before costs nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argrpo_cli import __version__
from argrpo_cli.evals.entropy_material import (
    Chunk,
    Manner,
    Material,
    Question,
    chunk_identity,
    gather,
    open_pictures,
)
from argrpo_cli.policy import Policy, load_policy
from argrpo_cli.policy.folder import checkpoint_folders, find_policy, is_published
from argrpo_cli.policy.llamagen.entropy import token_entropy
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import load_tensors, read_json, save_tensors
from argrpo_cli.system.processes import Team, resolve_device
from argrpo_cli.system.progress import progress

MODES = ("conditional", "guided")
NORMAL_95 = 1.959964  # half-width of a 95 % interval in standard errors
Tally = dict[str, Tensor]  # see `tally`


@dataclass(frozen=True)
class Subject:
    """A policy to measure: how to open it, what to call it, and its step when it is a checkpoint of a run."""

    path: str
    name: str
    step: int | None = None


def subjects_of_run(run: Path) -> list[Subject]:
    """The base policy of a run, its checkpoints in order, and the trained policy where the last checkpoint is older.

    Raises:
        UserError: no run directory, one without checkpoints and trained policy, or its base policy is gone.
    """
    if not (run / "run.json").is_file():
        raise UserError(f"{run} is no run directory: it has no run.json")
    notes = read_json(run / "run.json")
    base = notes.get("base_policy")
    if not base or not Path(base).is_dir():
        raise UserError(f"the base policy of {run} is gone: {base}; measure its checkpoints with --policy")
    found = [Subject(base, "base", 0)]
    checkpoints = checkpoint_folders(run)
    found += [Subject(str(folder), f"step {step}", step) for step, folder in checkpoints.items()]
    finished = (notes.get("finished") or {}).get("step")
    if finished is not None and finished not in checkpoints and (run / "policy").is_dir():
        found.append(Subject(str(run / "policy"), f"step {finished}", finished))
    if len(found) < 2:
        raise UserError(f"{run} has no checkpoints yet; train longer, or lower logging.save_every")
    return found


def measure(
    subjects: Sequence[Subject],
    question: Question,
    cfg_scale: float = 2.0,
    temperature: float = 1.0,
    batch_size: int = 64,
    team: Team | None = None,
    journal: Path | None = None,
    cache: Path | None = None,
) -> list[dict[str, Any]]:
    """One row per policy and mode (conditional, guided), ready for JSON.

    Each row has `mean`, `standard_error` (over images; the tokens of one image are not independent), `low` and `high`
    (95 % interval), `by_position` and `by_position_error` (T numbers each, position 0 first). From the second policy on
    it has `change` and `change_error`, paired by picture, scene, or prompt and seed, against the policy in `against`:
    the first of the same `family` (parameters, pixels and kind of condition), or the first of all where it is new.

    Args:
        team: the processes that share the work, with their devices; by default this one, on a GPU if there is one.
        journal: folder for what is measured; needed by a team of several.
        cache: folder for the tokens of pictures; by default the user's.

    Raises:
        UserError: no such policy, split, folder or prompt set; a policy that the images do not fit.
    """
    if temperature <= 0:
        raise UserError(f"--temperature {temperature:g}: without noise there is no entropy; give more than 0")
    team = team or Team(0, 1, resolve_device("auto"))
    manner = Manner(cfg_scale, temperature, batch_size)
    team.together(lambda: _find_all(subjects))
    pictures = team.together(lambda: open_pictures(question))
    rows: list[dict[str, Any]] = []
    per_image: dict[tuple[str, str], Tensor] = {}  # by policy and mode
    families: dict[str, str] = {}  # to its first policy
    shown: Sequence[Any] = ()  # to the first policy
    for subject in subjects:
        policy = team.together(lambda subject=subject: load_policy(subject.path, team.device))
        material = gather(policy, subject.path, question, pictures, manner, cache, team)
        shown = shown or material.shown
        if material.shown != shown:
            raise UserError(
                f"{subjects[0].path} and {subject.path} are measured on different scenes; measure them alone"
            )
        weights = policy.fingerprint()
        whole = _measure_all(policy, subject, weights, material, manner, team, journal)
        about = _about(policy, weights)
        against = families.setdefault(about["family"], subject.name)
        against = subjects[0].name if against == subject.name else against
        for index, mode in enumerate(MODES):
            row = {"policy": subject.name, "step": subject.step, "mode": mode}
            row |= {"split": question.split, "prompts": None, "asked": question.prompts, "data": question.data}
            row |= {"cfg_scale": cfg_scale, "temperature": temperature} | statistics(whole, index)
            means = per_image[subject.name, mode] = whole["per_image"][index]
            if subject != subjects[0]:
                change = means - per_image[against, mode]
                row |= {"against": against, "change": change.mean().item(), "change_error": _error(change)}
            rows.append(row | material.about | about)
    return rows


def _find_all(subjects: Sequence[Subject]) -> None:
    """Refuse a policy that is not there before the others are measured."""
    for subject in subjects:
        if not is_published(subject.path):
            find_policy(subject.path)


def _measure_all(
    policy: Policy,
    subject: Subject,
    weights: str,
    material: Material,
    manner: Manner,
    team: Team,
    journal: Path | None,
) -> Tally:
    """The tally of all chunks; every process measures its share of those that are not in the journal."""
    settings = [__version__, weights, manner.cfg_scale, manner.temperature]
    parts: dict[int, Tally] = {}
    missing: list[int] = []
    names = [
        hashlib.sha256(json.dumps([settings, chunk_identity(one)]).encode()).hexdigest() for one in material.chunks
    ]
    paths = [None if journal is None else journal / f"{name[:32]}.safetensors" for name in names]
    for index, (chunk, path) in enumerate(zip(material.chunks, paths, strict=True)):
        kept = _kept(path, len(chunk.conditions), policy.model.config.block_size)
        if kept is None:
            missing.append(index)
        else:
            parts[index] = kept
    if team.count > 1 and journal is None:
        raise ValueError("a team of several processes needs a journal to share what it measures")
    mine = team.together(lambda: missing[team.index :: team.count])  # in step: no one looks after another has written

    def work() -> None:
        total = sum(len(material.chunks[index].conditions) for index in mine)
        bar = progress(f"entropy of {subject.name}", total)
        with bar if team.index == 0 and mine else nullcontext(lambda count: None) as advance:
            for index in mine:
                parts[index] = _measure_chunk(policy, material.chunks[index], manner, advance)
                if paths[index] is not None:
                    save_tensors(paths[index], parts[index])

    team.together(work)
    for index in set(missing) - set(mine):
        others = _kept(paths[index], len(material.chunks[index].conditions), policy.model.config.block_size)
        if others is None:
            raise UserError(
                f"{paths[index]} is not there, though another process wrote it; give an --out that all share"
            )
        parts[index] = others
    return merged([parts[index] for index in range(len(material.chunks))])


def _measure_chunk(policy: Policy, chunk: Chunk, manner: Manner, advance: Any) -> Tally:
    tokens = chunk.tokens()
    batches = []
    for start in range(0, len(tokens), manner.batch_size):
        part = slice(start, start + manner.batch_size)
        conditions = chunk.conditions[part]
        pair = [
            token_entropy(policy, tokens[part], conditions, scale, manner.temperature)
            for scale in (None, manner.cfg_scale)
        ]
        batches.append(tally(torch.stack(pair)))
        advance(len(conditions))
    return merged(batches)


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
    count = len(per_image)
    mean, error = per_image.mean().item(), _error(per_image)
    variance = (squares - sums.square() / count).clamp(min=0) / (count - 1)
    return {
        "images": count,
        "mean": mean,
        "standard_error": error,
        "low": mean - NORMAL_95 * error,
        "high": mean + NORMAL_95 * error,
        "by_position": (sums / count).tolist(),
        "by_position_error": (variance / count).sqrt().tolist(),
    }


def _error(values: Tensor) -> float:
    """Standard error of the mean of values [B]."""
    return (values.std() / len(values) ** 0.5).item()


def _kept(path: Path | None, images: int, positions: int) -> Tally | None:
    """A tally of the journal; None where there is none, or a damaged file."""
    found = (None if path is None else load_tensors(path)) or {}
    shapes = {"per_image": (2, images), "sums": (2, positions), "squares": (2, positions)}
    fits = found.keys() == shapes.keys() and all(found[key].shape == shape for key, shape in shapes.items())
    return found if fits else None


def _about(policy: Policy, weights: str) -> dict[str, Any]:
    """What the results say about a policy and the programs."""
    parameters = sum(one.numel() for one in policy.model.parameters())
    kind = "captions" if policy.text_encoder is not None else "classes"
    return {
        "family": f"{_short(parameters)}, {policy.image_size} px, {kind}",
        "parameters": parameters,
        "image_size": policy.image_size,
        "base": policy.base,
        "weights": weights,
        "versions": {"argrpo": __version__, "torch": torch.__version__},
    }


def _short(count: int) -> str:
    """111,234,567 as 111M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
