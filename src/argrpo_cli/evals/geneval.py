"""`argrpo eval geneval`: does a picture show what its prompt asks for?

Prompts, decision rules and averaging are GenEval's (`argrpo_cli.geneval`). A policy of the nano world is asked the nano
prompts and judged by the nano world's detector; any other one the benchmark's 553 prompts, judged by Mask2Former and
CLIP. Finished pictures are those of the benchmark's layout. Beside what every benchmark writes (`benchmark.py`):

    POLICY/...             the pictures, official ones as the benchmark's own evaluator reads them
                           (`geneval_pictures.py`), those of the nano world as images/00007-0.png
    POLICY/results.jsonl   verdict and objects of each image; results.official.jsonl: in the evaluator's format
    prompts.jsonl          correct images of each prompt, policy by policy
    failures.png           some pictures that do not show it, with the boxes that were found

Errors cover the choice of the prompts as well as that of the seeds: they are clustered by prompt.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import TypedDict

from argrpo_cli import paper_numbers
from argrpo_cli.evals.benchmark import Benchmark, Subject
from argrpo_cli.evals.geneval_pictures import (
    OFFICIAL_SET,
    SAMPLES,
    failure_sheet,
    official_row,
    read_pictures,
    write_metadata,
)
from argrpo_cli.evals.statistics import Measure, average, mean_of
from argrpo_cli.geneval import DETECTORS, MASK2FORMER, NANO, check_detector
from argrpo_cli.geneval.observers import Observer, load_observer
from argrpo_cli.geneval.prompts import Prompt, official_jsonl, official_prompts, prompt_set
from argrpo_cli.geneval.rules import ClassifyColor, Detection, Detections, judge_image
from argrpo_cli.images import file_item, read_runs
from argrpo_cli.kept import Rows, kept
from argrpo_cli.nano.scenes import draws_nano_world
from argrpo_cli.shapes import Column, Condition, Result, Shot
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import save_png, write_jsonl

if TYPE_CHECKING:
    from argrpo_cli.policy.protocol import Card, Policy
    from argrpo_cli.system.processes import Team

NANO_SETS, OFFICIAL_SETS = ("geneval-nano", "geneval-nano-extra"), (OFFICIAL_SET,)
THESE_IMAGES = "prompts of these images"
RESULTS, OFFICIAL_RESULTS, JOURNAL = "results.jsonl", "results.official.jsonl", ".judging"
MOST_FAILURES = 40  # on the sheet
ERRORS = (
    "overall is the plain mean of the categories, as published; errors are clustered by prompt (none where a category "
    "has one)"
)


# What is kept of a picture: its line of results.jsonl, and the boxes that counted.
class Judged(TypedDict):
    file: str
    tag: str
    prompt: str
    correct: bool
    reason: str


class Verdict(TypedDict):
    row: Judged
    kept: dict[str, Any]


class GenEval(Benchmark):
    """Prompts of GenEval's grammar and a detector.

    Args:
        detector: `nano`, `mask2former` for the published weights, the benchmark's own .pth file, or a folder of
            transformers' Mask2Former; by default that of the policy's world.
        colors: a local file of CLIP ViT-L/14 in the place of the published one.
        detector_batch_size: images in Mask2Former at a time.
        sets: of prompts; by default those of the policy's world.
    """

    name, title, reads, n = "geneval", "GenEval", "captions", 4
    final, of_paper = True, True

    def __init__(
        self,
        detector: str | None = None,
        colors: Path | None = None,
        detector_batch_size: int = 8,
        sets: Sequence[str] | None = None,
    ):
        self.detector, self.colors, self.detector_batch_size, self.sets = detector, colors, detector_batch_size, sets
        self.questions: list[Prompt] = []  # in the order in which they are asked
        self.targets: list[Prompt] = []  # what each picture must show
        self.rows: dict[str, list[dict[str, Any]]] = {}  # policy to verdicts
        self.observer: Observer

    # --- before anything is drawn

    def open(self, cards: Sequence[Card], team: Team) -> None:
        """Prompts and detector by the policies' world.

        Raises:
            UserError: policies of two worlds, prompts or a detector of another one, no such detector, weights that are
                missing, damaged or of another network.
        """
        nano = {card.name: draws_nano_world(card) for card in cards}
        if cards and self.sets is None:
            if len(set(nano.values())) > 1:
                raise UserError(f"{' and '.join(nano)} draw different worlds; give another baseline")
            self.sets = NANO_SETS if all(nano.values()) else OFFICIAL_SETS
        official = not cards or self.official
        others = [path for path, fits in nano.items() if not fits]
        if others and not official:
            raise UserError(
                f"policy {others[0]} does not draw the nano world's objects, so its judges cannot measure it"
            )
        detector = self.detector or (MASK2FORMER if official else NANO)
        if cards and official and detector == NANO:
            raise UserError(f"--detector {NANO}: it knows the nano world alone; leave it out, or give {MASK2FORMER}")
        if detector == NANO and self.colors is not None:
            raise UserError(f"--colors {self.colors}: the detector {NANO} names colours itself; leave it out")
        check_detector(detector)
        name, weights = (detector, None) if detector in DETECTORS else (MASK2FORMER, detector)
        self.observer = load_observer(name, team.device, weights, self.colors, self.detector_batch_size)
        self.packages = self.observer.packages
        self.questions = [prompt for name in self.sets or () for prompt in prompt_set(name)]

    @property
    def official(self) -> bool:
        """Whether the benchmark's own prompts are drawn."""
        return self.sets is not None and tuple(self.sets) == OFFICIAL_SETS

    def prompts(self) -> Sequence[str]:
        return [prompt.text for prompt in self.questions]

    def shots(self, policy: Policy, n: int, seed: int) -> list[Shot]:
        shots = super().shots(policy, n, seed)
        self.targets = [prompt for prompt in self.questions for _ in range(n)]
        return shots

    def file(self, prompt: int, sample: int) -> str:
        index = self.questions[prompt].index
        return f"{index:05d}/{SAMPLES}/{sample:05d}.png" if self.official else f"{index:05d}-{sample}.png"

    def finished(self, images: Path) -> list[Shot]:
        pictures = read_pictures(images)
        self.targets = [prompt for _, prompt in pictures]
        return [Shot(Condition(prompt.text), -1, file) for file, prompt in pictures]

    def identity(self) -> dict[str, Any]:
        return {
            **({} if self.sets is None else {"sets": list(self.sets)}),
            "prompts": hashlib.sha256(official_jsonl(dict.fromkeys(self.targets)).encode()).hexdigest(),
            "detector": self.observer.label,
            "thresholds": asdict(self.observer.thresholds),
        }

    # --- the work

    @property
    def pictures(self) -> str:
        return "" if self.official else "images"

    def gather(self, policy: Policy, subject: Subject, batch_size: int, team: Team) -> None:
        if self.official:
            team.lead(lambda: write_metadata(subject.pictures, dict.fromkeys(self.targets)))
        super().gather(policy, subject, batch_size, team)

    def measure(self, subject: Subject, batch_size: int, team: Team) -> dict[str, Measure]:
        """Verdicts of all pictures, written to results.jsonl and results.official.jsonl, and their shares."""
        pairs = list(zip(subject.shots, self.targets, strict=True))
        store = self._store(subject)
        judge = partial(judge_batch, subject.pictures, self.observer)
        kept(pairs, judge, store, batch_size=batch_size, label=f"judging {subject.name}", team=team)
        verdicts = team.from_lead(lambda: store.read(pairs))
        self.rows[subject.name] = rows = [one["row"] for one in verdicts]

        def write() -> None:
            write_jsonl(subject.folder / OFFICIAL_RESULTS, map(official_row, self.targets, verdicts))
            write_jsonl(subject.folder / RESULTS, rows)

        team.lead(write)
        correct = [(target, row["correct"]) for target, row in zip(self.targets, rows, strict=True)]
        return {
            f"{part}/{tag}": one
            for part, prompts in self._parts().items()
            for tag, one in shares([pair for pair in correct if pair[0] in prompts]).items()
        }

    def _store(self, subject: Subject) -> Rows:
        identity = [self.observer.label, asdict(self.observer.thresholds)]
        return Rows(subject.folder / JOURNAL, identity, lambda pair: [pair[0].file, pair[1].text], shape=Verdict)

    def _parts(self) -> dict[str, set[Prompt]]:
        """The first of the sets of prompts and, where there are more, all together."""
        prompts = set(self.targets)
        if self.sets is None:
            return {OFFICIAL_SET if prompts <= set(prompt_set(OFFICIAL_SET)) else THESE_IMAGES: prompts}
        parts = {self.sets[0]: set(prompt_set(self.sets[0]))}
        return parts if len(self.sets) == 1 else {**parts, " + ".join(self.sets): prompts}

    # --- what is told

    def columns(self) -> dict[str, Column]:
        """The categories of each part in the paper's order, overall, and the two totals of the official summary."""
        order = [*paper_numbers.before_and_after(3)[paper_numbers.AFTER], *TOTALS]
        return {
            f"{part}/{tag}": Column(tag.replace("_", " "), "", "higher", 1, True, part)
            for part, prompts in self._parts().items()
            for tag in order
            if tag in ("overall", *TOTALS) or any(prompt.tag == tag for prompt in prompts)
        }

    def paper(self, subjects: Sequence[Subject]) -> dict[str, dict[str, float]]:
        if OFFICIAL_SET not in self._parts():
            return {}
        return {
            name: {f"{OFFICIAL_SET}/{tag}": number for tag, number in row.items()}
            for name, row in paper_numbers.before_and_after(3).items()
        }

    def protocol(self, subjects: Sequence[Subject]) -> dict[str, Any]:
        label = self.observer.label
        about = f"detector: {label['name']}"
        if "source" in label:
            own = "the benchmark's own weights" if label["benchmarks_own"] else "not the benchmark's own weights"
            about += f", {label['source']} ({own}); colours: {label['colors']['name']}"
        return {**self.identity(), "about": about, "errors": ERRORS}

    def departures(self, subjects: Sequence[Subject]) -> list[str]:
        if subjects[0].card is not None:
            return []
        other = sorted({count for count in Counter(self.targets).values() if count != self.n})
        return [f"images per prompt {' or '.join(map(str, other))} (paper {self.n})"] if other else []

    def warnings(self, subjects: Sequence[Subject]) -> list[str]:
        if subjects[0].card is not None:
            return []
        absent = {one.text for one in official_prompts()} - {one.text for one in self.targets}
        text = f"{len(absent)} of the 553 official prompts have no image: overall is not the paper's"
        return [text] if absent else []

    def finish(self, result: Result, subjects: Sequence[Subject], out: Path) -> Result:
        write_jsonl(out / "prompts.jsonl", by_prompt(self.rows))
        failures = [row for row in self.rows[subjects[0].name] if not row["correct"]]
        if failures:
            count = min(MOST_FAILURES, len(failures))
            some = [failures[index * len(failures) // count] for index in range(count)]
            sheet = failure_sheet(some, subjects[0].pictures, self.observer.thresholds)
            save_png(out / "failures.png", sheet)
        return result

    def clean(self, subjects: Sequence[Subject]) -> None:
        for subject in subjects:
            self._store(subject).remove()


TOTALS = ("correct images", "prompts with a correct image")


def shares(verdicts: Sequence[tuple[Prompt, float]]) -> dict[str, Measure]:
    """The share of correct images in each category, in the order of its first prompt; "overall", their plain mean; and
    the official summary's totals.

    Args:
        verdicts: (prompt, is its image correct), one for each image.

    Raises:
        UserError: there are none.
    """
    if not verdicts:
        raise UserError("there are no images to summarise")
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in verdicts))}

    def mean(rows: Sequence[tuple[Prompt, float]]) -> Measure:
        return mean_of([float(value) for _, value in rows], [places[prompt] for prompt, _ in rows])

    tags = dict.fromkeys(prompt.tag for prompt, _ in verdicts)
    by_tag = {tag: mean([row for row in verdicts if row[0].tag == tag]) for tag in tags}
    best = dict.fromkeys(places, 0.0)
    for prompt, value in verdicts:
        best[prompt] = max(best[prompt], float(value))
    totals = (mean(verdicts), mean_of(list(best.values())))
    return by_tag | {"overall": average(list(by_tag.values()))} | dict(zip(TOTALS, totals, strict=True))


def by_prompt(rows: Mapping[str, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A line per prompt: how many of its images are correct, and why not, policy by policy.

    Args:
        rows: of results.jsonl, the same prompts of each policy.
    """
    lines: dict[tuple[int, str], dict[str, Any]] = {}
    for name, verdicts in rows.items():
        for row in verdicts:
            line = {"index": row["index"], "tag": row["tag"], "prompt": row["prompt"]}
            line = lines.setdefault((row["index"], row["prompt"]), line)
            own = line.setdefault(name, {"correct": 0, "images": 0, "reasons": []})
            own["correct"] += row["correct"]
            own["images"] += 1
            own["reasons"] += [row["reason"]] if row["reason"] else []
    return list(lines.values())


def judge_batch(folder: Path, observer: Observer, pairs: Sequence[tuple[Shot, Prompt]]) -> list[dict[str, Any]]:
    """Of each picture its "row" of results.jsonl and the boxes that counted ("kept"); neighbours of one size are
    looked at together."""
    verdicts = []
    for places, pixels in read_runs([file_item(folder, shot.file) for shot, _ in pairs]):
        run = [pairs[place] for place in places]
        observations = observer.observe(torch.from_numpy(pixels), [prompt for _, prompt in run])
        for (shot, prompt), observation in zip(run, observations, strict=True):
            verdicts.append(_verdict(shot.file, prompt, *observation, observer))
    return verdicts


def _verdict(
    file: str, prompt: Prompt, detections: Detections, classify: ClassifyColor, observer: Observer
) -> dict[str, Any]:
    colors: dict[tuple[str, int | None], str] = {}

    def classify_and_note(name: str, objects: Sequence[Detection]) -> Sequence[str]:
        answers = classify(name, objects)
        colors.update({(name, one.index): color for one, color in zip(objects, answers, strict=True)})
        return answers

    verdict = judge_image(prompt, detections, classify_and_note, observer.thresholds)
    if observer.names_every_color:
        for name, objects in detections.items():
            classify_and_note(name, objects)
    listed = [
        (name, one) for name, objects in detections.items() for one in objects if one.score > observer.least_score
    ]
    row = {
        "file": file,
        "index": prompt.index,
        "tag": prompt.tag,
        "prompt": prompt.text,
        "correct": verdict.correct,
        "reason": verdict.reason,
        "objects": [
            {
                "class": name,
                "box": [round(side, 1) for side in one.box],
                "score": round(one.score, 4),
                "color": colors.get((name, one.index)),
            }
            for name, one in sorted(listed, key=lambda pair: -pair[1].score)
        ],
    }
    boxes = {name: [[*one.box, one.score] for one in objects] for name, objects in verdict.kept.items()}
    return {"row": row, "kept": boxes}
