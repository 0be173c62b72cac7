"""`argrpo eval geneval`: does a picture show what its prompt asks for?

Prompts, decision rules and averaging are GenEval's (`argrpo_cli.geneval`). A policy of the nano world is asked the nano
prompts and judged by the nano world's detector; any other one the benchmark's 553 prompts, judged by Mask2Former and
CLIP (`geneval_detectors.py`). Two policies draw the same prompts with the same seeds. Everything lies in one folder,
written as it comes, so that an interrupted evaluation goes on where it stopped; several processes share the work:

    settings.json                what is measured; a folder is not used for two things
    POLICY/...                   the pictures, official ones as the benchmark's own evaluator reads them
                                 (`geneval_folders.py`), those of the nano world as images/00007-0.png
    POLICY/results.jsonl         verdict and objects of each image; results.official.jsonl: in the evaluator's format
    prompts.jsonl                correct images of each prompt, policy by policy
    summary.json, failures.png

`judge_folder` measures finished pictures in the benchmark's layout.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from argrpo_cli.evals.folders import check_claim, claim, policy_folders
from argrpo_cli.evals.geneval_detectors import MASK2FORMER, NANO, Judge, open_judge
from argrpo_cli.evals.geneval_drawing import draw_pictures, draws_nano_world, open_captioned
from argrpo_cli.evals.geneval_folders import OFFICIAL_SET, absent, planned, read_pictures, write_metadata
from argrpo_cli.evals.geneval_judging import judge_pictures
from argrpo_cli.evals.geneval_scores import Rows, by_prompt, difference, part_scores, set_scores, totals
from argrpo_cli.evals.geneval_sheet import failure_sheet
from argrpo_cli.geneval.grammar import Prompt
from argrpo_cli.geneval.prompts import official_jsonl, prompt_set
from argrpo_cli.policy import Policy
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import save_png, write_json, write_jsonl
from argrpo_cli.system.processes import join_team

NANO_SETS, OFFICIAL_SETS = ("geneval-nano", "geneval-nano-extra"), (OFFICIAL_SET,)
FIRST_SEED, SEED_STRIDE, MOST_SEEDS = 400_000_000, 100_000, 10_000  # `eval nano` and `entropy` draw others
MOST_FAILURES = 40  # on the sheet
# The paper's protocol; its authors' scripts start from cfg 7.5 and top-k 2000.
PAPER = {"per_prompt": 4, "cfg_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


@dataclass(frozen=True)
class GenEvalSettings:
    """What decides the result, beside the policies and the detector; `sets` None is by the policy's world."""

    per_prompt: int = 4
    cfg_scale: float = 2.0
    temperature: float = 1.0
    seed: int = 0
    sets: tuple[str, ...] | None = None
    top_k: int = 0
    top_p: float = 1.0
    dtype: str = "float32"

    @property
    def prompts(self) -> list[Prompt]:
        """In the order in which they are asked; those of the nano world where no sets are named."""
        return [prompt for name in self.sets or NANO_SETS for prompt in prompt_set(name)]

    def image_seed(self, place: int, sample: int) -> int:
        """Seed of an image: `place` of its prompt in the list, `sample` of that prompt."""
        return FIRST_SEED + self.seed * SEED_STRIDE + place * self.per_prompt + sample

    @property
    def departures(self) -> list[str]:
        """Where these differ from the paper's, in words."""
        words = {name: name.replace("_", "-") for name in PAPER} | {"per_prompt": "images per prompt"}
        return [
            f"{words[name]} {getattr(self, name):g} (paper {value:g})"
            for name, value in PAPER.items()
            if getattr(self, name) != value
        ]


def run_geneval(
    policies: Sequence[str],
    out: Path,
    settings: GenEvalSettings = GenEvalSettings(),
    batch_size: int = 64,
    device: str = "auto",
    *,
    detector: str | None = None,
    colors: Path | None = None,
    detector_batch_size: int = 8,
    text_device: str = "same",
) -> dict[str, Any] | None:
    """Draw, detect, judge and average; one policy, or two of which the second is the baseline.

    Args:
        detector, colors, detector_batch_size: see `open_judge`; by default the detector is that of the policy's world.

    Returns:
        What summary.json holds: `scores` {policy: {set: {category or "overall": {mean, error, images, prompts}}}},
        `totals` {policy: {correct_images, correct_prompts}}, for two policies `difference` of the shape of a policy's
        scores (errors paired by prompt), the settings, versions, and where they differ from the paper's. None in all
        but the first of several processes.

    Raises:
        UserError: no such policy or detector, a policy that reads no captions or knows too few words, settings out of
            range, an `out` used for something else.
    """
    names = policy_folders(policies)
    _check(settings)
    team = join_team(device)
    team.lead(lambda: check_claim(out))

    def load() -> dict[str, Policy]:
        given = (team.device, settings.dtype, text_device)
        return {name: open_captioned(path, *given) for name, path in zip(names, policies, strict=True)}

    loaded = team.together(load)
    settings, detector = team.together(lambda: _by_world(policies, loaded.values(), settings, detector))
    prompts, official = settings.prompts, settings.sets == OFFICIAL_SETS
    judge = team.together(lambda: open_judge(detector, team.device, colors, detector_batch_size))
    identity = {
        **asdict(settings),
        "sets": list(settings.sets),
        "policies": [policy.fingerprint() for policy in loaded.values()],
        "prompts": hashlib.sha256(official_jsonl(prompts).encode()).hexdigest(),
        "detector": judge.label,
        "thresholds": asdict(judge.observer.thresholds),
    }
    batch_size = team.from_lead(lambda: claim(out, identity, batch_size))
    pictures = planned(prompts, settings.per_prompt, official)
    folders = {name: out / name if official else out / name / "images" for name in names}
    for name, policy in loaded.items():
        if official:
            team.lead(lambda name=name: write_metadata(folders[name], prompts))
        draw_pictures(policy, settings, pictures, folders[name], name, batch_size, team)
    loaded.clear()
    rows = {name: judge_pictures(pictures, folders[name], out / name, judge, batch_size, team) for name in names}
    result: dict[str, Any] = {
        "scores": {name: set_scores(own, prompts, settings.sets) for name, own in rows.items()},
        "totals": {name: totals(own, prompts) for name, own in rows.items()},
    }
    if len(names) == 2:
        result["difference"] = set_scores(difference(rows[names[0]], rows[names[1]]), prompts, settings.sets)
    result |= {"settings": identity, "versions": judge.versions}
    if official:
        result["differs_from_paper"] = settings.departures
    team.lead(lambda: _finish(result, rows, prompts, folders[names[0]], out, judge))
    return result if team.index == 0 else None


def judge_folder(
    folder: Path,
    out: Path,
    batch_size: int = 64,
    device: str = "auto",
    *,
    detector: str = MASK2FORMER,
    colors: Path | None = None,
    detector_batch_size: int = 8,
) -> dict[str, Any] | None:
    """Measure the pictures of a folder in the benchmark's layout, whoever drew them; as `run_geneval` otherwise.

    Returns:
        As `run_geneval`, for one "policy" of the folder's name; the set of prompts is `geneval` where all are official
        ones, and `prompts_absent` how many of those have no picture.

    Raises:
        UserError: see `read_pictures` and `open_judge`.
    """
    name = policy_folders([str(folder.resolve().name)])[0]
    team = join_team(device)
    team.lead(lambda: check_claim(out))
    pictures = team.together(lambda: read_pictures(folder))
    judge = team.together(lambda: open_judge(detector, team.device, colors, detector_batch_size))
    prompts = list(dict.fromkeys(one.prompt for one in pictures))
    listed = "".join(f"{one.file} {one.prompt.text} {_stamp(folder / one.file)}\n" for one in pictures)
    identity = {
        "images": {"count": len(pictures), "files": hashlib.sha256(listed.encode()).hexdigest()},
        "prompts": hashlib.sha256(official_jsonl(prompts).encode()).hexdigest(),
        "detector": judge.label,
        "thresholds": asdict(judge.observer.thresholds),
    }
    batch_size = team.from_lead(lambda: claim(out, identity, batch_size))
    rows = judge_pictures(pictures, folder, out / name, judge, batch_size, team)
    official = {prompt.index for prompt in prompt_set(OFFICIAL_SET)}
    part = OFFICIAL_SET if all(prompt.index in official for prompt in prompts) else "prompts of these images"
    result = {
        "scores": {name: {part: part_scores(rows, prompts)}},
        "totals": {name: totals(rows, prompts)},
        "settings": identity,
        "versions": judge.versions,
        "prompts_absent": absent(pictures),
    }
    counts = Counter(one.prompt for one in pictures)
    if other := sorted({count for count in counts.values() if count != PAPER["per_prompt"]}):
        result["differs_from_paper"] = [f"images per prompt {' or '.join(map(str, other))} (paper 4)"]
    team.lead(lambda: _finish(result, {name: rows}, prompts, folder, out, judge))
    return result if team.index == 0 else None


def _check(settings: GenEvalSettings) -> None:
    if settings.per_prompt < 1 or settings.sets is not None:  # else the most depends on the policies, see `_by_world`
        _check_count(settings)
    if not 0 <= settings.seed < MOST_SEEDS:
        raise UserError(f"--seed {settings.seed}: give 0 to {MOST_SEEDS - 1}")
    if not 0 < settings.top_p <= 1:
        raise UserError(f"--top-p {settings.top_p:g}: must be above 0, at most 1")


def _check_count(settings: GenEvalSettings) -> None:
    most = SEED_STRIDE // len(settings.prompts)
    if not 1 <= settings.per_prompt <= most:
        raise UserError(f"--n {settings.per_prompt}: give 1 to {most} images per prompt")


def _by_world(
    paths: Sequence[str], policies: Iterable[Policy], settings: GenEvalSettings, detector: str | None
) -> tuple[GenEvalSettings, str]:
    """The settings with their sets of prompts, and the detector, where they are left to the policies."""
    policies = dict(zip(paths, policies, strict=True))
    nano = {path: draws_nano_world(policy) for path, policy in policies.items()}
    sets = settings.sets or (NANO_SETS if all(nano.values()) else OFFICIAL_SETS)
    if len(set(nano.values())) > 1 and settings.sets is None:
        first, second = paths
        raise UserError(f"{first} and {second} draw different worlds; give another baseline")
    detector = detector or (NANO if sets != OFFICIAL_SETS else MASK2FORMER)
    for path, fits in nano.items():
        if not fits and sets != OFFICIAL_SETS:
            raise UserError(f"policy {path} does not draw the nano world's objects, so its judges cannot measure it")
    if detector == NANO and sets == OFFICIAL_SETS:
        raise UserError(f"--detector {NANO}: it knows the nano world alone; leave it out, or give {MASK2FORMER}")
    settings = replace(settings, sets=sets)
    _check_count(settings)
    for policy in policies.values():
        policy.conditions([prompt.text for prompt in settings.prompts])  # are all words known?
    return settings, detector


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _finish(
    result: dict[str, Any],
    rows: dict[str, Rows],
    prompts: Sequence[Prompt],
    folder: Path,
    out: Path,
    judge: Judge,
) -> None:
    """The files of which there is one; the summary last."""
    write_jsonl(out / "prompts.jsonl", by_prompt(rows, prompts))
    failures = [row for row in next(iter(rows.values())) if not row["correct"]]
    if failures:
        count = min(MOST_FAILURES, len(failures))
        chosen = [failures[index * len(failures) // count] for index in range(count)]
        save_png(out / "failures.png", failure_sheet(chosen, folder, judge.observer.thresholds))
    write_json(out / "summary.json", result)
