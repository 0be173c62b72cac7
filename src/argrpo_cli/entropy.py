"""Policy entropy: how undecided a policy is about the next image token (section 4.3 and figures 3 and 4 of the paper).

H_t = - sum_v pi(v | x_<t, c) log pi(v | x_<t, c) in nats, teacher-forced: the tokens before come from held-out scenes
or from samples of the policy itself. `argrpo entropy` prints the mean over tokens and images with its error, and keeps
the mean at each position; for several policies it draws the curve.
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
from argrpo_cli.files import atomic_path, make_dir, read_json, write_jsonl
from argrpo_cli.policy import Policy, load_policy
from argrpo_cli.policy.modeling import teacher_forced
from argrpo_cli.policy.policy import checkpoint_folders
from argrpo_cli.progress import progress

FIRST_SEED, SEED_STRIDE, MOST_SEEDS = 200_000_000, 10_000, 10_000  # of samples of prompts; `eval` draws others
MODES = ("conditional", "guided")
LOGITS_AT_ONCE = 2**26  # a quarter of a gigabyte
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


@torch.inference_mode()
def token_entropy(
    policy: Policy,
    tokens: Tensor,
    conditions: Sequence[Condition],
    cfg_scale: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Entropy in nats of the next-token distribution at every position, float32 [B, T] on the CPU.

    Args:
        tokens: int64 [B, T], what comes before.
        cfg_scale: None for the conditional distribution, a number for the guided one.
        temperature: the logits are divided by it (0 counts as 1e-5, as in sampling).
    """
    model = policy.model
    condition, mask = policy.embed(conditions)
    inputs, predicting = teacher_forced(model.config, condition, mask, tokens.to(model.device))
    before, model.guidance_scale = model.guidance_scale, cfg_scale
    try:
        hidden = model.model(**inputs).last_hidden_state[:, predicting]
    finally:
        model.guidance_scale = before
    rows = []
    for part in hidden.split(max(1, LOGITS_AT_ONCE // (hidden.shape[1] * model.config.vocab_size))):
        log_probs = torch.log_softmax(model.lm_head(part).float() / max(temperature, 1e-5), dim=-1)
        rows.append(-(log_probs.exp() * log_probs).sum(-1).cpu())
    return torch.cat(rows)


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
            row |= {"split": question.split, "prompts": prompts}
            row |= {"cfg_scale": cfg_scale, "temperature": temperature} | _statistics(entropy)
            if mode in first:
                change = entropy.mean(1) - first[mode].mean(1)
                row |= {"change": change.mean().item(), "change_error": _error(change)}
            first.setdefault(mode, entropy)
            rows.append(row)
    return rows


def write_results(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """entropy.jsonl and curve.png in the folder `out`."""
    write_jsonl(make_dir(out) / "entropy.jsonl", rows)
    draw(rows, out / "curve.png")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Two panels: mean entropy against step (or by policy) with 95 % intervals, and entropy by position."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["policy"] for row in rows))
    steps = {row["policy"]: row["step"] for row in rows}
    along_run = len(names) > 1 and all(step is not None for step in steps.values())
    for mode, color in zip(MODES, ("tab:blue", "tab:orange"), strict=True):
        own = [row for row in rows if row["mode"] == mode]
        x = [steps[row["policy"]] if along_run else names.index(row["policy"]) for row in own]
        error = [NORMAL_95 * row["standard_error"] for row in own]
        left.errorbar(x, [row["mean"] for row in own], error, color=color, marker="o", capsize=3, label=mode,
                      linestyle="-" if along_run else "none")  # fmt: skip
    left.set_ylabel("entropy, nats per token")
    left.set_xlabel("step" if along_run else "")
    if not along_run:
        left.set_xticks(range(len(names)), names)
        left.set_xlim(-0.5, len(names) - 0.5)
    left.legend()
    left.grid(alpha=0.3)
    shown = [name for name in names if name in (names[0], names[-1])]
    for name, style in zip(shown, ("-", "--"), strict=False):
        for mode, color in zip(MODES, ("tab:blue", "tab:orange"), strict=True):
            row = next(row for row in rows if row["policy"] == name and row["mode"] == mode)
            right.plot(row["by_position"], style, color=color, label=f"{name}, {mode}", linewidth=1.3)
    right.set_xlabel("position of the token")
    right.set_ylabel("entropy, nats")
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def table(rows: Sequence[dict[str, Any]]) -> Any:
    """A Rich table, one line per policy."""
    from rich.table import Table

    first = rows[0]
    what = f"split {first['split']}" if first["split"] else f"samples of the prompts {first['prompts']}"
    out = Table(title=f"entropy in nats per token, {first['images']} images, {what}; ± 95 % interval")
    out.add_column("policy")
    changes = any("change" in row for row in rows)
    for mode in MODES:
        out.add_column(mode if mode == "conditional" else f"guided, cfg {first['cfg_scale']:g}", justify="right")
        if changes:
            out.add_column("change", justify="right")
    for name in dict.fromkeys(row["policy"] for row in rows):
        cells = []
        for row in (row for row in rows if row["policy"] == name):
            cells.append(f"{row['mean']:.4f} ± {NORMAL_95 * row['standard_error']:.4f}")
            if changes:
                has = "change" in row
                cells.append(f"{row['change']:+.4f} ± {NORMAL_95 * row['change_error']:.4f}" if has else "")
        out.add_row(name, *cells)
    return out


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
