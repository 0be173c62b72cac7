"""`argrpo eval`: the benchmarks, and the page of their results; `argrpo entropy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from argrpo_cli.cli.options import (
    OF_A_POLICY,
    BaselineOption,
    Drawing,
    check_policies,
    check_rewards,
    draws,
    names_in,
    reward_options,
    set_options,
)
from argrpo_cli.geneval import check_detector
from argrpo_cli.system.errors import UserError

CaptionPolicyOption = Annotated[
    str, typer.Option("--policy", help="A policy of captions: a name, a run directory, a checkpoint folder.")
]
ImagesOption = Annotated[
    Path | None,
    typer.Option("--images", help="Measure these pictures instead of a policy: a folder, or an .npz with arr_0."),
]
NANO_IMAGES = 2016
ADM = "adm-256"
DRAWBENCH_COLUMNS = "clip,hpsv2,aesthetic,deqa,imagereward,pickscore,unified-reward"


@draws()
def nano(
    context: typer.Context,
    policy: Annotated[
        str | None,
        typer.Option("--policy", help="A policy: a name, a run directory, a checkpoint folder.  [default: nano-c2i]"),
    ] = None,
    baseline: BaselineOption = None,
    n: Annotated[int | None, typer.Option("--n", help=f"Images per policy.  [default: {NANO_IMAGES}]")] = None,
    images: ImagesOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="A file for the numbers, as JSON.")] = None,
    *,
    drawing: Drawing,
) -> None:
    """Single objects of the nano world: rendering match, fidelity, diversity and rewards.

    Of a policy, alone or against a baseline with the same seeds, or of a set of finished pictures.
    """
    policies = _both(policy or "nano-c2i", baseline) if images is None else []
    _check_images(context, images)
    check_policies(policies)
    _check_file(out)
    from argrpo_cli.evals.nano import run_nano
    from argrpo_cli.evals.tables import show

    result = run_nano(policies, images, out, n=NANO_IMAGES if n is None else n, **vars(drawing))
    if result is None:  # the first of several processes tells
        return
    show(result)
    if out is not None:
        print(f"the numbers are in {out}")


@draws()
def geneval(
    context: typer.Context,
    policy: CaptionPolicyOption = "nano-t2i",
    baseline: BaselineOption = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Measure these pictures instead: a folder as the benchmark's scripts write it."),
    ] = None,
    n: Annotated[int, typer.Option("--n", "--per-prompt", help="Images per prompt.")] = 4,
    detector: Annotated[
        str | None,
        typer.Option(
            "--detector",
            metavar="nano|mask2former|FILE|FOLDER",
            help="Who judges: by name, the benchmark's own .pth file, or a folder of transformers' Mask2Former.  "
            "[default: nano for a policy of the nano world, else mask2former]",
        ),
    ] = None,
    colors: Annotated[
        Path | None,
        typer.Option("--colors", help="A local file of OpenAI's CLIP ViT-L/14 in open_clip's layout, for colours."),
    ] = None,
    detector_batch_size: Annotated[
        int, typer.Option("--detector-batch-size", min=1, help="Images in Mask2Former at a time.")
    ] = 8,
    out: Annotated[Path, typer.Option("--out", help="Folder for images, verdicts and numbers.")] = Path("geneval"),
    *,
    drawing: Drawing,
) -> None:
    """GenEval: objects, counts, colours and positions that a caption names.

    The nano prompts for a policy of the nano world, else the benchmark's 553. Interrupted, the same command goes on
    where it stopped.
    """
    policies = _both(policy, baseline) if images is None else []
    _check_images(context, images, "folder")
    if detector is not None:
        check_detector(detector)
    check_policies(policies, out, "geneval", drawing.seed, n)
    from argrpo_cli.evals.benchmark import run
    from argrpo_cli.evals.geneval import GenEval
    from argrpo_cli.evals.tables import show

    benchmark = GenEval(detector, colors, detector_batch_size)
    result = run(benchmark, policies, out, n=n, images=images, **vars(drawing))
    if result is not None:  # the first of several processes tells
        show(result)
        failed = " and the failures as a picture (failures.png)" if (out / "failures.png").is_file() else ""
        print(f"images, verdicts, prompts.jsonl, summary.json{failed} in {out}")


@draws(without=("text_device",))
def imagenet(
    context: typer.Context,
    policy: Annotated[
        str | None, typer.Option("--policy", help="A policy of classes: a name, a run directory, a checkpoint folder.")
    ] = None,
    baseline: BaselineOption = None,
    images: ImagesOption = None,
    reference: Annotated[
        str,
        typer.Option(
            "--reference",
            metavar="adm-256|PATH",
            help="ADM's batch (fetched, 2 GB), a folder of pictures, an .npz of images or of statistics, or both.",
        ),
    ] = ADM,
    n: Annotated[int, typer.Option("--n", "--total", help="Images per policy.")] = 50_000,
    resize: Annotated[
        int | None,
        typer.Option(
            "--resize", help="Pixels a side of a policy's images before Inception.  [default: 256 for larger ones]"
        ),
    ] = None,
    inception: Annotated[
        Path | None, typer.Option("--inception", help="Inception's weights as a file.  [default: fetched]")
    ] = None,
    keep_images: Annotated[bool, typer.Option("--keep-images", help="Keep the pictures that a policy draws.")] = False,
    keep_features: Annotated[bool, typer.Option("--keep-features", help="Keep Inception's features.")] = False,
    statistics: Annotated[
        Path | None,
        typer.Option("--save-statistics", help="A file for the reference's statistics, as ADM's files have them."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the numbers, and what is kept.")] = Path("imagenet"),
    *,
    drawing: Drawing,
) -> None:
    """ImageNet's measures: IS, FID, sFID, precision and recall as ADM's evaluator computes them.

    Of a policy, alone or against a baseline with the same seeds, or of finished pictures. Interrupted, the same command
    goes on where it stopped; `torchrun --nproc_per_node=2 -m argrpo_cli eval imagenet ...` splits the work.
    """
    _check_images(context, images)
    if policy is None and images is None and (statistics is None or set_options(context, OF_A_POLICY)):
        raise UserError("nothing to measure; give --policy, such as c2i-b-256, or --images")
    policies = _both(policy, baseline) if policy is not None else []
    if policies or images is not None:
        check_policies(policies, out, "imagenet", drawing.seed, n)
    if reference != ADM and not Path(reference).exists():
        raise UserError(f"no folder or .npz file {reference}")
    _check_file(statistics)
    from rich.console import Console

    if policy is None and images is None:
        from argrpo_cli.evals.imagenet import save_reference_statistics

        if save_reference_statistics(reference, statistics, inception, drawing.batch_size, drawing.device):
            print(f"the statistics of {reference} are in {statistics}")
        return
    from argrpo_cli.evals.imagenet import ImageNet, run_imagenet
    from argrpo_cli.evals.tables import table

    complaints = Console(stderr=True)
    benchmark = ImageNet(
        drawing.sampling,
        reference=reference,
        inception=inception,
        resize=resize,
        keep_images=keep_images,
        statistics=statistics,
    )
    result = run_imagenet(
        benchmark,
        policies,
        images,
        out,
        n=n,
        seed=drawing.seed,
        batch_size=drawing.batch_size,
        device=drawing.device,
        keep_features=keep_features,
        warn=lambda text: complaints.print(
            f"WARNING: {text}", style="bold yellow", markup=False, highlight=False, soft_wrap=True
        ),
    )
    if result is None:
        return
    Console().print(table(result))
    print(f"figures, warnings and protocol are in {out / 'summary.json'}")


@draws(batch_size=32)
def drawbench(
    policy: CaptionPolicyOption = "t2i-xl-256",
    baseline: BaselineOption = None,
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts",
            metavar="FILE|NAME",
            help="A .txt, .jsonl, .csv, .tsv or .json file, a data set of the hub, or bundled captions such as nano.",
        ),
    ] = "sayakpaul/drawbench",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only so many prompts, for a trial.")] = None,
    columns: Annotated[
        str, typer.Option("--columns", help="Names of rewards with commas between them.")
    ] = DRAWBENCH_COLUMNS,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="REWARD.KEY=VALUE", help="An option of a reward, such as deqa.url=http://...; repeatable."
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", "--per-prompt", help="Images per prompt.")] = 5,
    out: Annotated[Path, typer.Option("--out", help="Folder for images, scores and numbers.")] = Path("drawbench"),
    *,
    drawing: Drawing,
) -> None:
    """DrawBench: reward models over 200 prompts with five images each, beside table 4 of the paper.

    Interrupted, the same command goes on where it stopped; other --columns of the same images go to the same --out.
    """
    names, policies = names_in(columns), _both(policy, baseline)
    options = reward_options(settings or [], names, "--columns")
    check_policies(policies, out, "drawbench", drawing.seed, n)
    check_rewards(names, options)
    from argrpo_cli.evals.benchmark import run
    from argrpo_cli.evals.drawbench import DrawBench, read_prompts
    from argrpo_cli.evals.tables import show

    benchmark = DrawBench(read_prompts(prompts, limit), names, options)
    result = run(benchmark, policies, out, n=n, **vars(drawing))
    if result is not None:  # the first of several processes tells
        show(result)
        print(f"images, scores and summary.json in {out}")


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS...",
            help="summary.json of eval, score and entropy, what eval nano --out wrote, or folders of such files.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The page: a name that ends in .md or .html.")] = Path("report.md"),
) -> None:
    """Result files as one page: base, trained, difference, and the paper's numbers below."""
    from argrpo_cli.evals.report import CONFLICT, read_results, write_report

    sections = write_report(read_results(results), out)
    notes = 0
    for section in sections:
        notes += len(section.warnings)
        for warning in section.warnings:
            if warning.startswith(CONFLICT):
                print(f"{section.title}: {warning}")
    remarks = f", with {notes} {'note' if notes == 1 else 'notes'}" if notes else ""
    print(f"{len(sections)} {'table' if len(sections) == 1 else 'tables'} in {out}{remarks}")


@draws(without=("text_device",))
def entropy(
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            help="A policy to measure; repeatable, the first is compared with.  "
            "[default: nano-c2i; with --prompts nano-t2i]",
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="RUN_DIR", help="All checkpoints of a training run, in one curve.")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Held-out images to walk along: val.  [default: val]")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="SET|FILE", help="Walk along samples of these prompts: geneval, or a file."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Real pictures for the split: ImageNet's validation set in class folders or flat with its labels, or "
            "pictures with a metadata.jsonl.  [default: scenes of the nano world]",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="DIR", help="Where tokens of pictures are kept.  [default: the user's cache]"),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option("--n", help="At most so many images; with --data of every class equally many.  [default: all]"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for entropy.jsonl and the pictures.")] = Path("entropy"),
    *,
    drawing: Drawing,
) -> None:
    """Measure the entropy of policies in nats per token, conditional and guided, and by position."""
    from argrpo_cli.captions import read_captions

    if split is not None and prompts is not None:
        raise UserError("give --split or --prompts, not both")
    if data is not None and prompts is not None:
        raise UserError("give --data or --prompts, not both")
    if cache is not None and data is None:
        raise UserError("--cache keeps tokens of pictures; give --data with it")
    if run is not None and policy:
        raise UserError("give --policy or --run, not both")
    if split not in (None, "val"):
        raise UserError(f"no split {split!r}; there is val")
    default = "nano-t2i" if prompts is not None else "nano-c2i"
    policies = policy or [default]
    if run is None:
        check_policies(policies)
    if prompts is not None:
        read_captions(prompts)
    from rich.console import Console

    from argrpo_cli.evals.entropy import Question, Subject, measure, subjects_of_run
    from argrpo_cli.evals.entropy_figures import JOURNAL, NUMBERS, claim, table, write_results
    from argrpo_cli.system.processes import join_team

    chosen = subjects_of_run(run) if run is not None else [Subject(one, one) for one in policies]
    names = [one.name for one in chosen]
    if len(set(names)) < len(names):
        raise UserError(f"--policy names {next(name for name in names if names.count(name) > 1)} twice")
    folder = None if data is None else str(data)
    question = Question(None if prompts is not None else split or "val", prompts, n, drawing.seed, folder)
    team = join_team(drawing.device)
    team.lead(lambda: claim(out, question))
    rows = measure(
        chosen,
        question,
        drawing.sampling,
        drawing.batch_size,
        team,
        out / JOURNAL,
        cache,
    )

    def report() -> None:
        pictures = write_results(rows, out)
        Console().print(table(rows))
        shown = " and ".join(str(path) for path in pictures)
        print(f"numbers, also by position, in {out / NUMBERS}, picture{'s' * (len(pictures) > 1)} in {shown}")

    team.lead(report)


BENCHMARKS = {"nano": nano, "geneval": geneval, "imagenet": imagenet, "drawbench": drawbench, "report": report}


def _both(policy: str, baseline: str | None) -> list[str]:
    return [policy] if baseline is None else [policy, baseline]


def _check_images(context: typer.Context, images: Path | None, kind: str = "folder or .npz file") -> None:
    """UserError where finished pictures, if any, are not there, or an option says how a policy draws some."""
    if images is None:
        return
    for name in set_options(context, OF_A_POLICY):
        raise UserError(f"--images measures finished pictures; leave out --{name.replace('_', '-')}")
    if not images.exists():
        raise UserError(f"no {kind} {images}")


def _check_file(path: Path | None) -> None:
    """UserError where a file that a command is to write, if any, cannot be written."""
    if path is None:
        return
    from argrpo_cli.system.files import check_writable

    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; give the name of a file")
    check_writable(path.parent)
