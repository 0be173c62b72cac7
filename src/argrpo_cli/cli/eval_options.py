"""What the benchmarks' commands share: whose images are measured, a judge behind a server, the table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from argrpo_cli.cli.options import (
    SAMPLING,
    Drawing,
    check_policies,
    present,
    read_settings,
    set_options,
    tell,
    warn,
)
from argrpo_cli.shapes import Result, Sampling
from argrpo_cli.system.errors import UserError

if TYPE_CHECKING:
    from argrpo_cli.evals.benchmark import Benchmark


@dataclass(frozen=True)
class SubjectOptions:
    """Whose images a benchmark measures, how many, and where the result goes.

    Options:
        --policy: A policy of captions: a name, a run directory, a checkpoint folder.
        --baseline: A second policy, drawn with the same seeds, to compare with.
        --baseline-cfg-scale: Guidance of the baseline.  [default: --cfg-scale, else the baseline's own, else 2]
        --images: Measure these pictures instead of a policy: a folder, or an .npz with arr_0.
        --n, --per-prompt: Images per prompt.
        --diversity NETWORKS: Compare the images in features of clip, dinov2, dreamsim, nano-clip, nano-judge, with
            commas between: how they differ within a prompt and, with --baseline, how much of its variety is left.
            clip=FILE and dinov2=FOLDER are local weights.
        --out: Folder for images, verdicts and numbers.
    """

    policy: str | None = None
    baseline: str | None = None
    baseline_cfg_scale: float | None = None
    images: Path | None = None
    n: int = 1
    diversity: str | None = None
    out: Path | None = None


@dataclass(frozen=True)
class JudgeOptions:
    """Prompts with points that a model behind a server judges.

    Options:
        --prompts: A file in the benchmark's format.  [default: the benchmark's own, fetched]
        --wording: The benchmark's evaluator, which says how the judge is asked; read, not run.  [default: fetched]
        --limit: Only so many prompts, for a trial.
        --judge: The judge, as its server calls it.
        --url: Of the OpenAI-compatible server that has the judge, such as http://localhost:8000/v1.
        --set BENCHMARK.KEY=VALUE: Another option of asking: attempts, concurrency, timeout, image_format, backoff.
    """

    prompts: Path | None = None
    wording: Path | None = None
    limit: int | None = None
    judge: str | None = None
    url: str | None = None
    set_: list[str] | None = None

    def options(self, name: str) -> dict[str, Any]:
        """What --judge, --url and --set say of the judge of a benchmark."""
        options = read_settings(self.set_, [name], "the judge's options,").get(name, {})
        return options | {key: value for key, value in (("model", self.judge), ("url", self.url)) if value is not None}


# What finished pictures have no use for, and a policy that draws them has.
BASELINE = ("baseline", "baseline_cfg_scale")
OF_A_POLICY = ("policy", *BASELINE, "n", "diversity", "resize", "keep_images", "seed", "text_device", *SAMPLING)


class Checked(NamedTuple):
    """A subject whose policies, networks and folders were looked at, and how it is drawn."""

    subject: SubjectOptions
    drawing: Drawing
    policies: list[str]
    networks: list[str]


def check_words(context: typer.Context, subject: SubjectOptions, kind: str = "folder") -> tuple[list[str], list[str]]:
    """The policies, and the networks of --diversity; refused is what neither a policy nor the hub is needed for.

    Raises:
        UserError: finished pictures that are not there, or options of drawing beside them; guidance of a baseline that
            is none, or out of range; a network that there is not.
    """
    check_images(context, subject.images, kind)
    policies = [subject.policy] if subject.images is None and subject.policy is not None else []
    if policies and subject.baseline is not None:
        policies.append(subject.baseline)
    if (scale := subject.baseline_cfg_scale) is not None:
        if subject.baseline is None:
            raise UserError(f"--baseline-cfg-scale {scale:g}: there is no --baseline")
        Sampling(cfg_scale=scale).check("--baseline-")
    networks = []
    if subject.diversity is not None:
        from argrpo_cli.evals.diversity_networks import check_networks

        networks = [name.strip() for name in subject.diversity.split(",") if name.strip()]
        check_networks(networks)
    return policies, networks


def check_subject(
    context: typer.Context,
    subject: SubjectOptions,
    drawing: Drawing,
    benchmark: str,
    judges: Mapping[str, Mapping[str, Any]] | None = None,
    kind: str = "folder",
    reads: str = "captions",
) -> Checked:
    """Refuse before torch is loaded what needs none.

    Args:
        benchmark: its name, which is that of its space of seeds.
        judges: rewards that judge the images, with their options.
        kind: of finished pictures, where a benchmark reads more than a folder.
        reads: what it asks policies with, "captions" or "classes"; "" for whichever they read.

    Raises:
        UserError: see `check_words` and `check_policies`; a policy of the other kind.
    """
    from argrpo_cli.evals.benchmark import check_reads
    from argrpo_cli.policy.folder import glance

    policies, networks = check_words(context, subject, kind)
    for name in policies:
        if (seen := glance(name)) is not None:
            check_reads(name, seen.reads, f"eval {benchmark}", reads)
    check_policies(policies, subject.out, benchmark, drawing.seed, subject.n, judges, networks)
    return Checked(subject, drawing, policies, networks)


def run_benchmark(benchmark: Benchmark, checked: Checked) -> Result | None:
    """The result, in the first of several processes."""
    from argrpo_cli.evals.benchmark import run

    subject, networks = checked.subject, checked.networks
    what = {"n": subject.n, "images": subject.images, "diversity": networks}
    return run(benchmark, checked.policies, subject.out, **what, **run_options(checked))


def run_options(checked: Checked) -> dict[str, Any]:
    """How policies are drawn, as every benchmark takes it."""
    return {**vars(checked.drawing), "baseline_cfg_scale": checked.subject.baseline_cfg_scale, "warn": warn}


def show_result(result: Result | None, words: str) -> None:
    """A result as a table, and what it left on disk; of several processes only the first has one to tell of."""
    if result is None:
        return
    from argrpo_cli.evals.tables import table

    present(result.plain, lambda width: table(result, width))
    if words:
        tell(words)


def check_images(context: typer.Context, images: Path | None, kind: str) -> None:
    """UserError where finished pictures, if any, are not there, or an option says how a policy draws some."""
    if images is None:
        return
    for name in set_options(context, OF_A_POLICY):
        raise UserError(f"--images measures finished pictures; leave out --{name.replace('_', '-')}")
    if not images.exists():
        raise UserError(f"no {kind} {images}")


def check_file(path: Path | None) -> None:
    """UserError where a file that a command is to write, if any, cannot be written."""
    if path is None:
        return
    from argrpo_cli.system.files import check_writable

    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; give the name of a file")
    check_writable(path.parent)
