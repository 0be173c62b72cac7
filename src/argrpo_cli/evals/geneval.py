"""`argrpo eval geneval` in the nano world: does a picture show what its prompt asks for?

Prompts, decision rules and averaging are GenEval's (`argrpo_cli.geneval`); the detector is the nano world's, which also
names colours. Two policies draw the same prompts with the same seeds. Everything lies in one folder, written as it
comes, so that an interrupted evaluation goes on where it stopped:

    settings.json                what is measured; a folder is not used for two things
    POLICY/images/00007-0.png    prompt 7, its first image; POLICY/results.jsonl: verdict and objects of each image
    prompts.jsonl                correct images of each prompt, policy by policy
    summary.json, failures.png
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from argrpo_cli.devices import resolve_device
from argrpo_cli.errors import UserError
from argrpo_cli.evals.geneval_sheet import failure_sheet
from argrpo_cli.evals.nano import open_nano_policy
from argrpo_cli.files import make_dir, read_json, read_jsonl, save_png, write_json, write_jsonl
from argrpo_cli.geneval.grammar import Prompt
from argrpo_cli.geneval.prompts import official_jsonl, prompt_set
from argrpo_cli.geneval.rules import judge_image
from argrpo_cli.geneval.summary import Score, summarise, tag_scores
from argrpo_cli.nano.detector import NANO_THRESHOLDS, Detector, Found, by_class, color_of, load_detector
from argrpo_cli.policy import Policy
from argrpo_cli.policy.loading import fingerprint
from argrpo_cli.progress import progress

if TYPE_CHECKING:
    from rich.table import Table

OFFICIAL_PART, EXTRA_PART = "geneval-nano", "geneval-nano-extra"
FIRST_SEED, SEED_STRIDE, MOST_SEEDS = 400_000_000, 100_000, 10_000  # `eval nano` and `entropy` draw others
MOST_FAILURES = 40  # on the sheet


@dataclass(frozen=True)
class GenEvalSettings:
    """What decides the result, beside the policies."""

    per_prompt: int = 4
    cfg_scale: float = 2.0
    temperature: float = 1.0
    seed: int = 0
    sets: tuple[str, ...] = (OFFICIAL_PART, EXTRA_PART)

    @property
    def prompts(self) -> list[Prompt]:
        return [prompt for name in self.sets for prompt in prompt_set(name)]

    def image_seed(self, place: int, sample: int) -> int:
        """Seed of an image: `place` of its prompt in the list, `sample` of that prompt."""
        return FIRST_SEED + self.seed * SEED_STRIDE + place * self.per_prompt + sample


def run_geneval(
    policies: Sequence[str],
    out: Path,
    settings: GenEvalSettings = GenEvalSettings(),
    batch_size: int = 64,
    device: str = "auto",
) -> dict[str, Any]:
    """Draw, detect, judge and average; one policy, or two of which the second is the baseline.

    Returns:
        What summary.json holds: `scores` {policy: {set: {category or "overall": {mean, error, images, prompts}}}},
        `totals` {policy: {correct_images, correct_prompts}}, for two policies `difference` of the shape of a policy's
        scores (errors paired by prompt), and the settings.

    Raises:
        UserError: no such policy, one that reads no captions or knows too few words, an `out` used for something else.
    """
    names = _names(policies)
    most = SEED_STRIDE // len(settings.prompts)
    if not 1 <= settings.per_prompt <= most:
        raise UserError(f"--n {settings.per_prompt}: give 1 to {most} images per prompt")
    if not 0 <= settings.seed < MOST_SEEDS:
        raise UserError(f"--seed {settings.seed}: give 0 to {MOST_SEEDS - 1}")
    device = resolve_device(device)
    loaded = {name: _captioned(path, device) for name, path in zip(names, policies, strict=True)}
    detector = load_detector(device=device)
    identity = {
        **asdict(settings),
        "sets": list(settings.sets),
        "policies": [policy.fingerprint() for policy in loaded.values()],
        "prompts": hashlib.sha256(official_jsonl(settings.prompts).encode()).hexdigest(),
        "detector": {"name": "nano-detector", "weights": fingerprint([detector.network])},
        "thresholds": asdict(NANO_THRESHOLDS),
    }
    _claim(out, identity)
    rows = {name: _judge_policy(policy, detector, settings, out / name, batch_size) for name, policy in loaded.items()}
    result: dict[str, Any] = {
        "scores": {name: _scores(own, settings) for name, own in rows.items()},
        "totals": {name: _totals(own, settings) for name, own in rows.items()},
    }
    if len(names) == 2:
        pairs = zip(rows[names[0]], rows[names[1]], strict=True)
        result["difference"] = _scores([{**a, "correct": a["correct"] - b["correct"]} for a, b in pairs], settings)
    result["settings"] = identity
    write_jsonl(out / "prompts.jsonl", _by_prompt(rows, settings))
    failures = [row for row in rows[names[0]] if not row["correct"]]
    if failures:
        count = min(MOST_FAILURES, len(failures))
        chosen = [failures[index * len(failures) // count] for index in range(count)]
        save_png(out / "failures.png", failure_sheet(chosen, out / names[0] / "images"))
    write_json(out / "summary.json", result)
    return result


def _names(policies: Sequence[str]) -> list[str]:
    """Folder names for one or two policies."""
    if not 1 <= len(policies) <= 2:
        raise UserError(f"{len(policies)} policies; give one, or one and a baseline")
    names = [re.sub(r"[^A-Za-z0-9._-]+", "-", str(path)).strip("-.") or "policy" for path in policies]
    if len(set(names)) < len(names):
        raise UserError(f"{policies[0]} and {policies[1]} are the same policy; give another baseline")
    return names


def _captioned(path: str, device: str) -> Policy:
    policy = open_nano_policy(path, device)
    if policy.text_encoder is None:
        raise UserError(f"{path} draws classes, and GenEval asks with captions; give a policy such as nano-t2i")
    return policy


def _claim(out: Path, identity: dict[str, Any]) -> None:
    """Use a new or empty folder, or one that an interrupted call with the same settings left."""
    if out.exists() and not out.is_dir():
        raise UserError(f"cannot write to {out}: it is a file, not a folder")
    path = out / "settings.json"
    if path.is_file():
        if read_json(path) != identity:
            raise UserError(f"{out} holds an evaluation of something else; choose another --out")
        return
    if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise UserError(f"{out} is not empty; choose another --out")
    make_dir(out)
    write_json(path, identity)


def _judge_policy(
    policy: Policy, detector: Detector, settings: GenEvalSettings, folder: Path, batch_size: int
) -> list[dict[str, Any]]:
    """One row per image, in the order of the prompts; those that an earlier call left are not drawn again."""
    images = make_dir(folder / "images")
    table = folder / "results.jsonl"
    prompts = settings.prompts
    conditions = policy.conditions([prompt.text for prompt in prompts])
    wanted = [(place, sample) for place in range(len(prompts)) for sample in range(settings.per_prompt)]
    kept = {row["file"]: row for row in read_jsonl(table)} if table.is_file() else {}
    rows = [kept.get(_file(prompts[place], sample)) for place, sample in wanted]
    missing = [index for index, row in enumerate(rows) if row is None]
    with progress(f"drawing and judging {folder.name}", len(missing)) as advance:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            tokens = policy.sample(
                [conditions[wanted[index][0]] for index in batch],
                cfg_scale=settings.cfg_scale,
                temperature=settings.temperature,
                seeds=[settings.image_seed(*wanted[index]) for index in batch],
                batch_size=batch_size,
            )
            pixels = policy.decode(tokens)
            for index, picture, objects in zip(batch, pixels.cpu(), detector.detect(pixels), strict=True):
                place, sample = wanted[index]
                file = _file(prompts[place], sample)
                save_png(images / file, Image.fromarray(picture.permute(1, 2, 0).numpy()))
                rows[index] = _row(file, prompts[place], objects)
            write_jsonl(table, [row for row in rows if row is not None])
            advance(len(batch))
    return rows


def _file(prompt: Prompt, sample: int) -> str:
    return f"{prompt.index:05d}-{sample}.png"


def _row(file: str, prompt: Prompt, objects: Sequence[Found]) -> dict[str, Any]:
    verdict = judge_image(prompt, by_class(objects), color_of(objects), NANO_THRESHOLDS)
    found = [
        {"class": one.name, "box": [round(v, 1) for v in one.box], "score": round(one.score, 4), "color": one.color}
        for one in objects
    ]
    return {
        "file": file,
        "index": prompt.index,
        "tag": prompt.tag,
        "prompt": prompt.text,
        "correct": verdict.correct,
        "reason": verdict.reason,
        "objects": found,
    }


def _scores(rows: Sequence[dict[str, Any]], settings: GenEvalSettings) -> dict[str, dict[str, dict[str, float]]]:
    """Categories and overall, for the official part and, where there is more, for all prompts together."""
    known = {prompt.index: prompt for prompt in settings.prompts}
    official = {prompt.index for prompt in prompt_set(OFFICIAL_PART)}
    parts = {OFFICIAL_PART: [row for row in rows if row["index"] in official]}
    if len(settings.sets) > 1:
        parts[" + ".join(settings.sets)] = list(rows)
    result = {}
    for name, own in parts.items():
        by_tag, overall = tag_scores((known[row["index"]], float(row["correct"])) for row in own)
        result[name] = {tag: _plain(score) for tag, score in by_tag.items()} | {"overall": _plain(overall)}
    return result


def _totals(rows: Sequence[dict[str, Any]], settings: GenEvalSettings) -> dict[str, float]:
    """The two totals of the official summary: shares of correct images, and of prompts with a correct image."""
    known = {prompt.index: prompt for prompt in settings.prompts}
    summary = summarise((known[row["index"]], row["correct"]) for row in rows)
    return {"correct_images": summary.correct_images, "correct_prompts": summary.correct_prompts}


def _plain(score: Score) -> dict[str, float | None]:
    """For JSON, which has no NaN."""
    values = asdict(score)
    return {**values, "error": None if values["error"] != values["error"] else values["error"]}


def _by_prompt(rows: dict[str, list[dict[str, Any]]], settings: GenEvalSettings) -> list[dict[str, Any]]:
    """A line per prompt: how many of its images are correct, and why not, policy by policy."""
    lines = []
    for place, prompt in enumerate(settings.prompts):
        line: dict[str, Any] = {"index": prompt.index, "tag": prompt.tag, "prompt": prompt.text}
        for name, own in rows.items():
            images = own[place * settings.per_prompt : (place + 1) * settings.per_prompt]
            reasons = [row["reason"] for row in images if row["reason"]]
            line[name] = {"correct": sum(row["correct"] for row in images), "images": len(images), "reasons": reasons}
        lines.append(line)
    return lines


def table(result: dict[str, Any]) -> Table:
    """The scores as a Rich table: baseline, policy, paired difference; one section per set."""
    from rich.table import Table

    scores, settings = result["scores"], result["settings"]
    names = list(scores)[::-1]  # the baseline first
    out = Table(
        title=f"GenEval in the nano world, {settings['per_prompt']} images per prompt, cfg {settings['cfg_scale']:g}, "
        f"seed {settings['seed']}; share correct ± standard error",
        caption="detector: nano-detector; overall is the plain mean of the categories, as published; "
        "errors are clustered by prompt (none where a category has one)",
    )
    out.add_column("category")
    out.add_column("prompts", justify="right")
    for name in [*names, *(["difference"] if "difference" in result else [])]:
        out.add_column(name, justify="right")
    for part in scores[names[0]]:
        out.add_row(f"[bold]{part}[/bold]")
        for category, score in scores[names[0]][part].items():
            cells = [_cell(scores[name][part][category]) for name in names]
            if "difference" in result:
                cells.append(_cell(result["difference"][part][category], signed=True))
            out.add_row(f"  {category}", str(score["prompts"]), *cells)
        out.add_section()
    return out


def _cell(score: dict[str, Any], signed: bool = False) -> str:
    error = "" if score["error"] is None else f" ± {100 * score['error']:.1f}"
    return f"{100 * score['mean']:{'+' if signed else ''}.1f}{error} %"
