"""What a benchmark is, and the one function that runs it: open, claim, draw, measure, pair, tell.

A prompt benchmark is a list of prompts and a judge of pictures; a set benchmark is features and a reference. Either is
a class here of one file, whose defaults below are those of prompts. Two policies draw the same conditions with the same
seeds. Everything lies in one folder, written as it comes, so that an interrupted evaluation goes on where it stopped;
several processes share the work:

    settings.json       what is measured; a folder is not used for two things
    POLICY/...          the pictures, and what was found out of each
    summary.json        the `Result`, last
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from argrpo_cli import seeds
from argrpo_cli.images import file_item
from argrpo_cli.kept import PASSED, check_claim, claim
from argrpo_cli.policy.folder import choose_sampling, guidance_warning, unfinished
from argrpo_cli.runs.run import versions
from argrpo_cli.shapes import Column, Result, Sampling, Shot, shared_settings
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.processes import Team, join_team

if TYPE_CHECKING:
    from argrpo_cli.evals.diversity_columns import Diversity
    from argrpo_cli.evals.statistics import Measure
    from argrpo_cli.policy.protocol import Card, Policy

MOST_MISSING = 0.05  # share of pictures without a score from which a mean would be one of other prompts
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Subject:
    """A policy, or a set of finished pictures, that is measured.

    Attributes:
        name: of its row and folder.
        path: what it was opened by.
        folder: where all that is made of it goes.
        pictures: where its pictures lie, or the file they are in.
        shots: of the pictures, in order; empty where nothing says what finished ones show.
        card: of a policy; None of finished pictures.
        identity: plain data that tells it from others: a policy's hash of weights, the number and hash of pictures; of
            two policies that are sampled otherwise how each is.
        sampling: how a policy is sampled.
    """

    name: str
    path: str
    folder: Path
    pictures: Path
    shots: Sequence[Shot]
    card: Card | None
    identity: Mapping[str, Any]
    sampling: Sampling | None = None


def check_reads(policy: str, reads: str, asker: str, asked: str) -> None:
    """UserError where a policy reads other conditions than a benchmark asks with; "" asks with whichever it reads."""
    if asked and reads != asked:
        example = {"captions": "nano-t2i", "classes": "nano-c2i"}[asked]
        raise UserError(f"{policy} draws {reads}, and {asker} asks with {asked}; try {example}")


class Benchmark:
    """What `run` asks of a benchmark.

    Attributes:
        name: as on the command line; `title` as people write it.
        reads: "captions" or "classes" where only such policies can be asked.
        sampling, n: how a policy that does not say it itself is drawn by default; `counted` is what n counts, in words.
        of_paper: that is a paper's protocol, and what is drawn otherwise is told as a departure.
        pictures: the folder of a policy's pictures in its own.
        final: a finished folder is not measured again, since what it was measured from is gone.
        transient: its pictures are gone when they have been seen, so that `gather` looks at them for the diversity.
        diversity: what `run` was asked to measure beside it, None for nothing.
        packages: beside torch, those whose versions belong to the protocol.
    """

    name = ""
    title = ""
    reads = ""
    sampling = Sampling()
    n = 1
    counted = "images per prompt"
    of_paper = False
    pictures = "images"
    final = False
    transient = False
    diversity: Diversity | None = None
    packages: Sequence[str] = ()

    # --- before anything is drawn

    def prompts(self) -> Sequence[str]:
        """The captions, each once, that policies are asked for."""
        raise NotImplementedError

    def check(self, card: Card) -> None:
        """Refuse a policy that cannot be asked; UserError."""
        check_reads(card.name, card.reads, self.title, self.reads)

    def open(self, cards: Sequence[Card], team: Team) -> None:
        """Load what must be known before the first picture: prompts by the policies' world, a judge, a reference."""

    def shots(self, policy: Policy, n: int, seed: int) -> list[Shot]:
        """The images to draw, in order: n of each prompt, each with a seed of its own.

        Raises:
            UserError: n or the seed is out of range, or the policy cannot read a prompt.
        """
        prompts = list(self.prompts())
        seeds.check(self.name, seed, n, prompts=len(prompts))
        conditions = policy.conditions(prompts)
        return [
            Shot(conditions[i // n], seeds.of(self.name, seed, i), self.file(i // n, i % n))
            for i in range(n * len(prompts))
        ]

    def file(self, prompt: int, sample: int) -> str:
        """Name of the picture `sample` of a prompt."""
        return f"{prompt:05d}-{sample}.png"

    def finished(self, images: Path) -> list[Shot]:
        """What finished pictures show and how their files are called (seed -1); UserError where they are no such."""
        raise NotImplementedError

    def about(self, images: Path, shots: Sequence[Shot]) -> dict[str, Any]:
        """Plain data that changes when finished pictures, or what they show, do."""
        listed = "".join(
            f"{shot.file} {shot.condition.prompt} {file_item(images, shot.file).stamp}\n" for shot in shots
        )
        return {"count": len(shots), "files": hashlib.sha256(listed.encode("utf-8", PASSED)).hexdigest()}

    def identity(self) -> dict[str, Any]:
        """Plain data that decides the numbers, beside policies, sampling, n and seed; no paths, no addresses."""
        return {}

    # --- the work

    def gather(self, policy: Policy, subject: Subject, batch_size: int, team: Team) -> None:
        """Draw what is to be measured; pictures here, features where nobody needs the pictures."""
        from argrpo_cli.draw import draw_into

        draw_into(
            subject.pictures,
            policy,
            subject.shots,
            subject.sampling,
            batch_size=batch_size,
            label=f"drawing {subject.name}",
            team=team,
        )

    def measure(self, subject: Subject, batch_size: int, team: Team) -> dict[str, Measure]:
        """Column to measure, of what lies in the folders, in every process. Policies are out of memory by now.

        What is slow is made by `kept`, so that a second call takes it up.
        """
        raise NotImplementedError

    def measure_all(self, subjects: Sequence[Subject], batch_size: int, team: Team) -> dict[str, dict[str, Measure]]:
        """Name of a subject to what `measure` says; at once, for what is too large to be loaded for each."""
        return {one.name: self.measure(one, batch_size, team) for one in subjects}

    # --- what is told

    def columns(self) -> dict[str, Column]:
        """The columns, in order; asked for when all is measured."""
        raise NotImplementedError

    def references(self) -> dict[str, dict[str, Measure]]:
        """Rows beside the policies', such as what real pictures reach."""
        return {}

    def paper(self, subjects: Sequence[Subject]) -> dict[str, dict[str, float]]:
        """Row to column to the number that the paper reports."""
        return {}

    def protocol(self, subjects: Sequence[Subject]) -> dict[str, Any]:
        """What a reader needs to repeat the numbers, beside what `run` notes itself."""
        return {}

    def departures(self, subjects: Sequence[Subject]) -> list[str]:
        """Where that is not the paper's protocol, beside sampling and the number of images."""
        return []

    def warnings(self, subjects: Sequence[Subject]) -> list[str]:
        """What to know before believing the numbers; known before the work."""
        return []

    def late_warnings(self, subjects: Sequence[Subject]) -> list[str]:
        """The same, known only from the pictures themselves."""
        return []

    def finish(self, result: Result, subjects: Sequence[Subject], out: Path) -> Result:
        """In the first process: write the files of one's own, and the result as it is to be saved."""
        return result

    def clean(self, subjects: Sequence[Subject]) -> None:
        """In the first process, when the result is there: remove what only served to go on."""


def run(
    benchmark: Benchmark,
    policies: Sequence[str],
    out: Path,
    *,
    sampling: Mapping[str, Any] | None = None,
    baseline_cfg_scale: float | None = None,
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    text_device: str = "same",
    images: Path | None = None,
    diversity: Sequence[str] = (),
    warn: Callable[[str], None] = lambda text: None,
) -> Result | None:
    """Draw and measure one policy, or two of which the second is the baseline; or measure finished `images`.

    Args:
        sampling: settings of `Sampling`; each of the others is as the policy says, or else as the benchmark does. So
            two policies are drawn each in its own way, with the same seeds.
        baseline_cfg_scale: of the second policy alone, in the place of that of `sampling`.
        n: the benchmark's own by default.
        batch_size: of drawing and measuring; an unfinished `out` goes on with its own.
        diversity: networks of `diversity_networks.NETWORKS` in whose features the images are compared, too.
        warn: is told the warnings, those that are known before the work before it.

    Returns:
        What summary.json holds; None in all of several processes but the first.

    Raises:
        UserError: no such policy, one that cannot be asked, settings out of range, an `out` of something else; or
            nothing could be measured.
    """
    from argrpo_cli.policy import load_policy

    options, n = dict(sampling or {}), benchmark.n if n is None else n
    dtype = replace(benchmark.sampling, **options).check().dtype
    each = [options, options | ({} if baseline_cfg_scale is None else {"cfg_scale": baseline_cfg_scale})]
    policies = policies if images is None else [images.resolve().name]
    names = policy_folders(policies)
    if diversity:
        from argrpo_cli.evals.diversity_columns import Diversity

        benchmark.diversity = Diversity(diversity)
    team = join_team(device)
    team.lead(lambda: check_claim(out))
    loaded: dict[str, Policy] = {}

    def load() -> list[Subject]:
        if images is not None:
            benchmark.open([], team)
            shots = benchmark.finished(images)
            about = benchmark.about(images, shots)
            return [Subject(names[0], str(images), out / names[0], images, shots, None, about)]
        loaded.update((name, load_policy(path, team.device, dtype, text_device)) for name, path in paths)
        cards = {name: replace(loaded[name].card, name=path) for name, path in paths}
        for card in cards.values():
            benchmark.check(card)
        benchmark.open(list(cards.values()), team)
        subjects = []
        for (name, card), own in zip(cards.items(), each, strict=False):
            about = {"weights": loaded[name].fingerprint(), "base": card.base, "image_size": card.image_size}
            about |= {"unfinished": where} if (where := unfinished(card.name)) else {}
            shots, pictures = benchmark.shots(loaded[name], n, seed), out / name / benchmark.pictures
            chosen = choose_sampling(card.name, card.sampling, own, benchmark.sampling)
            subjects.append(Subject(name, card.name, out / name, pictures, shots, card, about, chosen))
        if benchmark.diversity:
            benchmark.diversity.check(subjects)
            benchmark.diversity.open(team)
        return subjects

    paths = list(zip(names, policies, strict=True))
    subjects = team.together(load)
    drawing: dict[str, Any] = {}
    if images is None:
        alike, others = shared_settings([asdict(one.sampling) for one in subjects])
        drawing = {benchmark.counted: n, "sampling": {**alike, "seed": seed}}
        for place, (one, other) in enumerate(zip(subjects, others, strict=True)):
            subjects[place] = replace(one, identity={**one.identity, **({"sampling": other} if other else {})})
    own = [one.identity for one in subjects]
    identity = {"benchmark": benchmark.name, **drawing, **({"images": own[0]} if images else {"policies": own})}
    batch_size = team.from_lead(lambda: claim(out, {**identity, **benchmark.identity()}, batch_size))
    finished = benchmark.final and team.from_lead((out / SUMMARY).is_file)
    departures = benchmark.departures(subjects)
    if drawing and benchmark.of_paper:
        number = [] if n == benchmark.n else [f"{benchmark.counted} {n} (paper {benchmark.n})"]
        departures = [*number, *_departures(subjects, benchmark.sampling), *departures]
    early = benchmark.warnings(subjects)
    for text in early if team.first else ():
        warn(text)
    early += [guidance_warning(one.path, one.card.sampling, one.sampling.cfg_scale) for one in subjects if one.card]
    for subject in subjects if drawing and not finished else ():
        benchmark.gather(loaded.pop(subject.name), subject, batch_size, team)
    measured = {} if finished else benchmark.measure_all(subjects, batch_size, team)
    spread = benchmark.diversity if not (finished and benchmark.transient) else None
    for subject in subjects if spread and not benchmark.transient else ():
        spread.look(subject, batch_size, team)

    def result_of_all() -> Result:
        result = Result.load(out / SUMMARY) if finished else result_of_benchmark()
        if spread:
            result = spread.added(result, spread.measure(subjects, batch_size, team.device))
            result.save(out / SUMMARY)
        return result

    def result_of_benchmark() -> Result:
        from argrpo_cli.evals.statistics import differences

        columns, late = benchmark.columns(), benchmark.late_warnings(subjects)
        every = {**measured, **benchmark.references()}
        rows = {name: {key: own[key].summary() for key in columns if key in own} for name, own in every.items()}
        if all(value.value is None for row in rows.values() for value in row.values()):
            raise UserError(f"nothing could be measured: {'; '.join(late)}; the pictures are kept in {out}")
        result = Result(
            benchmark=benchmark.name,
            columns=columns,
            rows=rows,
            difference=differences(measured, columns),
            paper=benchmark.paper(subjects),
            protocol={
                **drawing,
                "measured": {one.name: {"path": one.path, **one.identity} for one in subjects},
                **benchmark.protocol(subjects),
                "versions": versions(("torch", *benchmark.packages)),
            },
            departures=departures,
            warnings=list(dict.fromkeys(filter(None, [*early, *late]))),
        )
        result = benchmark.finish(result, subjects, out)
        result.save(out / SUMMARY)
        return result

    def finish() -> Result:
        result = result_of_all()
        benchmark.clean(subjects)
        for text in result.warnings:
            if text not in early:
                warn(text)
        return result

    return team.lead(finish)


def _departures(subjects: Sequence[Subject], paper: Sampling) -> list[str]:
    """Where policies are not sampled as the paper does; by name what not all of them share."""
    own = {one.path: one.sampling.departures(paper) for one in subjects}
    of = {text: [path for path, texts in own.items() if text in texts] for texts in own.values() for text in texts}
    return [text if len(paths) == len(own) else f"{text} of {', '.join(paths)}" for text, paths in of.items()]


def policy_folders(policies: Sequence[str]) -> list[str]:
    """Folder names for one policy, or for one and a baseline.

    Raises:
        UserError: another number of them, or the same one twice.
    """
    if not 1 <= len(policies) <= 2:
        raise UserError(f"{len(policies)} policies; give one, or one and a baseline")
    names = [re.sub(r"[^A-Za-z0-9._-]+", "-", str(path)).strip("-.") or "policy" for path in policies]
    if len(set(names)) < len(names):
        raise UserError(f"{policies[0]} and {policies[1]} are the same policy; give another baseline")
    return names
