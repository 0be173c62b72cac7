"""Policy entropy: how undecided a policy is about the next image token (section 4.3 and figures 3 and 4 of the paper).

Teacher-forced: the tokens before come from held-out scenes or from samples of the policy itself. `argrpo entropy`
prints the mean over tokens and images with its error, and keeps the mean at each position (`entropy_table.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argrpo_cli.captions import read_captions
from argrpo_cli.conditions import Condition
from argrpo_cli.devices import resolve_device
from argrpo_cli.errors import UserError
from argrpo_cli.files import read_json
from argrpo_cli.policy import Policy, load_policy
from argrpo_cli.policy.entropy import token_entropy
from argrpo_cli.policy.policy import checkpoint_folders
from argrpo_cli.progress import progress

FIRST_SEED, SEED_STRIDE, MOST_SEEDS = 200_000_000, 10_000, 10_000  # of samples of prompts; `eval` draws others
MODES = ("conditional", "guided")
NORMAL_95 = 1.959964  # half-width of a 95 % interval in standard errors


@dataclass(frozen=True)
class Subject:
    """A policy to measure: how to open it, what to call it, and its step when it is a checkpoint of a run."""

    path: str
    name: str
    step: int | None = None


@dataclass(frozen=True)
class Question:
    """What the entropy is measured on.

    Attributes:
        split: "val" for held-out scenes, teacher-forced; None for samples.
        prompts: a bundled set or a file of captions to sample; only where split is None.
        limit: at most so many scenes or prompts.
        seed: of the samples.
    """

    split: str | None = "val"
    prompts: str | None = None
    limit: int | None = None
    seed: int = 0


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
    device: str = "auto",
) -> list[dict[str, Any]]:
    """One row per policy and mode (conditional, guided), ready for JSON.

    Each row has `mean`, `standard_error` (over images; the tokens of one image are not independent), `low` and `high`
    (95 % interval), `by_position` and `by_position_error` (T numbers each, position 0 first), and from the second
    policy on `change` and `change_error` against the first, paired by scene or by prompt and seed.

    Raises:
        UserError: no such policy, split or prompt set; a policy that the split does not fit.
    """
    device = resolve_device(device)
    rows: list[dict[str, Any]] = []
    first: dict[str, Tensor] = {}
    asked: list[Condition] = []  # of the first
    for subject in subjects:
        policy = load_policy(subject.path, device)
        tokens, conditions = _material(policy, subject, question, cfg_scale, temperature, batch_size)
        asked = asked or conditions
        if conditions != asked:
            raise UserError(
                f"{subjects[0].path} and {subject.path} are measured on different scenes; measure them alone"
            )
        values: dict[str, list[Tensor]] = {mode: [] for mode in MODES}
        with progress(f"entropy of {subject.name}", len(conditions)) as advance:
            for start in range(0, len(conditions), batch_size):
                part = slice(start, start + batch_size)
                for mode, scale in zip(MODES, (None, cfg_scale), strict=True):
                    values[mode].append(token_entropy(policy, tokens[part], conditions[part], scale, temperature))
                advance(len(conditions[part]))
        prompts = question.prompts and _readable(policy, question.prompts)
        for mode in MODES:
            entropy = torch.cat(values[mode])
            row = {"policy": subject.name, "step": subject.step, "mode": mode}
            row |= {"split": question.split, "prompts": prompts, "asked": question.prompts}
            row |= {"cfg_scale": cfg_scale, "temperature": temperature} | _statistics(entropy)
            if mode in first:
                change = entropy.mean(1) - first[mode].mean(1)
                row |= {"change": change.mean().item(), "change_error": _error(change)}
            first.setdefault(mode, entropy)
            rows.append(row)
    return rows


def _statistics(entropy: Tensor) -> dict[str, Any]:
    """Numbers about entropies [B, T]."""
    per_image = entropy.mean(1)
    mean, error = per_image.mean().item(), _error(per_image)
    return {
        "images": len(entropy),
        "mean": mean,
        "standard_error": error,
        "low": mean - NORMAL_95 * error,
        "high": mean + NORMAL_95 * error,
        "by_position": entropy.mean(0).tolist(),
        "by_position_error": (entropy.std(0) / len(entropy) ** 0.5).tolist(),
    }


def _error(values: Tensor) -> float:
    """Standard error of the mean of values [B]."""
    return (values.std() / len(values) ** 0.5).item()


def _material(
    policy: Policy, subject: Subject, question: Question, cfg_scale: float, temperature: float, batch_size: int
) -> tuple[Tensor, list[Condition]]:
    """Tokens int64 [N, T] to walk along, and what each image is of."""
    if question.limit is not None and question.limit < 2:
        raise UserError(f"--n {question.limit}: an interval needs 2 images or more")
    if question.split is not None:
        if question.split != "val":
            raise UserError(f"no split {question.split!r}; there is val")
        if policy.tokenizer_name != "nano-vq":
            raise UserError(f"split val holds scenes of the nano world, and {subject.path} has another tokenizer")
        from argrpo_cli.nano.held_out import load_held_out

        tokens, conditions = load_held_out("classes" if policy.text_encoder is None else "captions")
        return tokens[: question.limit], conditions[: question.limit]
    if policy.text_encoder is None:
        raise UserError(f"{subject.path} draws classes and reads no prompts; measure it with --split val")
    conditions = policy.conditions(read_captions(_readable(policy, question.prompts)))[: question.limit]
    if len(conditions) < 2:
        raise UserError(f"--prompts {question.prompts} holds one caption, and an interval needs 2 or more")
    if not 0 <= question.seed < MOST_SEEDS:
        raise UserError(f"--seed {question.seed}: give 0 to {MOST_SEEDS - 1}")
    seeds = [FIRST_SEED + question.seed * SEED_STRIDE + index for index in range(len(conditions))]
    drawn = []
    with progress(f"sampling {subject.name}", len(conditions)) as advance:
        for start in range(0, len(conditions), batch_size):
            part = slice(start, start + batch_size)
            drawn.append(
                policy.sample(
                    conditions[part],
                    cfg_scale=cfg_scale,
                    temperature=temperature,
                    seeds=seeds[part],
                    batch_size=batch_size,
                )
            )
            advance(len(conditions[part]))
    return torch.cat(drawn), conditions


def _readable(policy: Policy, prompts: str) -> str:
    """The set itself; for the official GenEval list, the part of it that a policy of few words can read."""
    few_words = policy.text_encoder is not None and policy.text_encoder.words is not None
    return "geneval-nano" if prompts == "geneval" and few_words else prompts
