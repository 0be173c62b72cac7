"""`argrpo eval`: the benchmarks, and the page of their results."""

from __future__ import annotations

from pathlib import Path

import typer

from argrpo_cli.cli.eval_options import (
    both_policies,
    check_file,
    check_images,
    judge_options,
    networks_of,
    run_options,
    show_result,
)
from argrpo_cli.cli.options import (
    OF_A_POLICY,
    Drawing,
    check_policies,
    check_rewards,
    command,
    read_rewards,
    set_options,
    tell,
    warn,
)
from argrpo_cli.geneval import check_detector
from argrpo_cli.rewards import refuse_comparing
from argrpo_cli.rewards.features import ADM_NAME
from argrpo_cli.system.errors import UserError


@command()
def nano(
    context: typer.Context,
    policy: str = "nano-c2i",
    baseline: str | None = None,
    baseline_cfg_scale: float | None = None,
    n: int = 2016,
    images: Path | None = None,
    out: Path | None = None,
    *,
    drawing: Drawing,
) -> None:
    """Single objects of the nano world: rendering match, fidelity, diversity and rewards.

    Of a policy, alone or against a baseline with the same seeds, or of a set of finished pictures.

    Options:
        --policy: A policy: a name, a run directory, a checkpoint folder.
        --n: Images per policy.
        --out: A file for the numbers, as JSON.
    """
    policies = both_policies(policy, baseline, baseline_cfg_scale) if images is None else []
    check_images(context, images)
    check_policies(policies, None, "nano", drawing.seed, n)
    check_file(out)
    from argrpo_cli.evals.nano import run_nano

    result = run_nano(policies, images, out, n=n, **run_options(drawing, baseline_cfg_scale))
    show_result(result, "" if out is None else f"the numbers are in {out}")


@command(least={"detector_batch_size": 1})
def geneval(
    context: typer.Context,
    policy: str = "nano-t2i",
    baseline: str | None = None,
    baseline_cfg_scale: float | None = None,
    images: Path | None = None,
    n: int = 4,
    detector: str | None = None,
    colors: Path | None = None,
    detector_batch_size: int = 8,
    diversity: str | None = None,
    out: Path = Path("geneval"),
    *,
    drawing: Drawing,
) -> None:
    """GenEval: objects, counts, colours and positions that a caption names.

    The nano prompts for a policy of the nano world, else the benchmark's 553. Interrupted, the same command goes on
    where it stopped.

    Options:
        --policy: A policy of captions: a name, a run directory, a checkpoint folder.
        --images: Measure these pictures instead: a folder as the benchmark's scripts write it.
        --n, --per-prompt: Images per prompt.
        --detector nano|mask2former|FILE|FOLDER: Who judges: by name, the benchmark's own .pth file, or a folder of
            transformers' Mask2Former.  [default: nano for a policy of the nano world, else mask2former]
        --colors: A local file of OpenAI's CLIP ViT-L/14 in open_clip's layout, for colours.
        --detector-batch-size: Images in Mask2Former at a time.
        --out: Folder for images, verdicts and numbers.
    """
    policies = both_policies(policy, baseline, baseline_cfg_scale) if images is None else []
    check_images(context, images, "folder")
    if detector is not None:
        check_detector(detector)
    networks = networks_of(diversity)
    check_policies(policies, out, "geneval", drawing.seed, n, networks=networks)
    from argrpo_cli.evals.benchmark import run
    from argrpo_cli.evals.geneval import GenEval

    benchmark = GenEval(detector, colors, detector_batch_size)
    options = run_options(drawing, baseline_cfg_scale)
    result = run(benchmark, policies, out, n=n, images=images, diversity=networks, **options)
    failed = " and the failures as a picture (failures.png)" if (out / "failures.png").is_file() else ""
    show_result(result, f"images, verdicts, prompts.jsonl, summary.json{failed} in {out}")


@command(least={"limit": 1, "judge_batch_size": 1})
def geneval2(
    context: typer.Context,
    policy: str = "nano-t2i",
    baseline: str | None = None,
    baseline_cfg_scale: float | None = None,
    images: Path | None = None,
    prompts: str | None = None,
    limit: int | None = None,
    judge: str | None = None,
    url: str | None = None,
    set_: list[str] | None = None,
    n: int = 1,
    judge_batch_size: int = 8,
    diversity: str | None = None,
    out: Path = Path("geneval2"),
    *,
    drawing: Drawing,
) -> None:
    """GenEval 2: a judge is asked about every object, number, attribute and relation of a prompt (Soft-TIFA).

    The nano prompts and the nano detector for a policy of the nano world, else the benchmark's 800 prompts, which are
    CC BY-NC 4.0 and fetched, and Qwen3-VL-8B-Instruct. Interrupted, the same command goes on where it stopped.

    Options:
        --policy: A policy of captions: a name, a run directory, a checkpoint folder.
        --images: Measure these pictures instead: a folder with a metadata.jsonl of file and prompt.
        --prompts FILE|geneval2-nano: A file in the benchmark's format, or the nano prompts.
        --limit: Only so many prompts, for a trial.
        --judge nano|MODEL: The nano detector; a hub name or folder of a vision-language model of transformers; or, with
            --url, a model that the server lists.
        --url: Ask the judge behind this OpenAI-compatible server, which must return top_logprobs.
        --set geneval2.KEY=VALUE: Another option of the judge, such as geneval2.concurrency=32; repeatable.
        --n, --per-prompt: Images per prompt.
        --judge-batch-size: Images in the judge at a time.
        --out: Folder for images, answers and numbers.
    """
    from argrpo_cli.geneval import questions

    policies = both_policies(policy, baseline, baseline_cfg_scale) if images is None else []
    check_images(context, images, "folder")
    _, options = read_rewards("geneval2", set_, "the judge's options,")
    options = {**options.get("geneval2", {}), **_judge(judge, url)}
    check_rewards(["geneval2"], {"geneval2": options})
    if prompts not in (None, questions.NANO):
        questions.read_items(prompts)
    networks = networks_of(diversity)
    check_policies(policies, out, "geneval2", drawing.seed, n, networks=networks)
    from argrpo_cli.evals.benchmark import run
    from argrpo_cli.evals.geneval2 import GenEval2

    benchmark = GenEval2(prompts, options, limit, judge_batch_size)
    options = run_options(drawing, baseline_cfg_scale)
    result = run(benchmark, policies, out, n=n, images=images, diversity=networks, **options)
    show_result(result, f"images, answers, summary.json and a picture (geneval2.png) in {out}")


@command(without=("text_device",))
def imagenet(
    context: typer.Context,
    policy: str | None = None,
    baseline: str | None = None,
    baseline_cfg_scale: float | None = None,
    images: Path | None = None,
    reference: str = ADM_NAME,
    n: int = 50_000,
    resize: int | None = None,
    inception: Path | None = None,
    keep_images: bool = False,
    keep_features: bool = False,
    save_statistics: Path | None = None,
    diversity: str | None = None,
    out: Path = Path("imagenet"),
    *,
    drawing: Drawing,
) -> None:
    """ImageNet's measures: IS, FID, sFID, precision and recall as ADM's evaluator computes them.

    Of a policy, alone or against a baseline with the same seeds, or of finished pictures. Interrupted, the same command
    goes on where it stopped; `torchrun --nproc_per_node=2 -m argrpo_cli eval imagenet ...` splits the work.

    Options:
        --policy: A policy of classes: a name, a run directory, a checkpoint folder.
        --reference adm-256|PATH: ADM's batch (fetched, 2 GB), a folder of pictures, an .npz of images or of statistics,
            or both.
        --n, --total: Images per policy.
        --resize: Pixels a side of a policy's images before Inception.  [default: 256 for larger ones]
        --inception: Inception's weights as a file.  [default: fetched]
        --keep-images: Keep the pictures that a policy draws.
        --keep-features: Keep Inception's features.
        --save-statistics: A file for the reference's statistics, as ADM's files have them.
        --out: Folder for the numbers, and what is kept.
    """
    check_images(context, images)
    if policy is None and images is None and (save_statistics is None or set_options(context, OF_A_POLICY)):
        raise UserError("nothing to measure; give --policy, such as c2i-b-256, or --images")
    policies = both_policies(policy, baseline, baseline_cfg_scale) if policy is not None else []
    networks = networks_of(diversity)
    if policies or images is not None:
        check_policies(policies, out, "imagenet", drawing.seed, n, networks=networks)
    if reference != ADM_NAME and not Path(reference).exists():
        raise UserError(f"no folder or .npz file {reference}")
    check_file(save_statistics)
    from argrpo_cli.evals.benchmark import run
    from argrpo_cli.evals.imagenet import ImageNet, save_reference_statistics

    if policies or images is not None:
        benchmark = ImageNet(
            reference=reference,
            inception=inception,
            resize=resize,
            keep_images=keep_images,
            keep_features=keep_features,
        )
        options = run_options(drawing, baseline_cfg_scale)
        result = run(benchmark, policies, out, n=n, images=images, diversity=networks, **options)
        show_result(result, f"figures, warnings and protocol are in {out / 'summary.json'}")
    if save_statistics is not None:
        save_reference_statistics(reference, save_statistics, inception, drawing.batch_size, drawing.device)


@command(least={"limit": 1}, batch_size=32)
def drawbench(
    policy: str = "t2i-xl-256",
    baseline: str | None = None,
    baseline_cfg_scale: float | None = None,
    prompts: str = "sayakpaul/drawbench",
    limit: int | None = None,
    columns: str = "clip,hpsv2,aesthetic,deqa,imagereward,pickscore,unified-reward",
    set_: list[str] | None = None,
    n: int = 5,
    diversity: str | None = None,
    out: Path = Path("drawbench"),
    *,
    drawing: Drawing,
) -> None:
    """DrawBench: reward models over 200 prompts with five images each, beside table 4 of the paper.

    Interrupted, the same command goes on where it stopped; other --columns of the same images go to the same --out.

    Options:
        --policy: A policy of captions: a name, a run directory, a checkpoint folder.
        --prompts FILE|NAME: A .txt, .jsonl, .csv, .tsv or .json file, a data set of the hub, or bundled captions such
            as nano.
        --limit: Only so many prompts, for a trial.
        --columns: Names of rewards with commas between them.
        --set REWARD.KEY=VALUE: An option of a reward, such as deqa.url=http://...; repeatable.
        --n, --per-prompt: Images per prompt.
        --out: Folder for images, scores and numbers.
    """
    policies = both_policies(policy, baseline, baseline_cfg_scale)
    names, options = read_rewards(columns, set_, "--columns")
    refuse_comparing(names)  # before prompts are fetched
    networks = networks_of(diversity)
    from argrpo_cli.evals.drawbench import DrawBench, read_prompts

    asked = read_prompts(prompts, limit)
    judges = {name: options.get(name, {}) for name in names}
    check_policies(policies, out, "drawbench", drawing.seed, n, judges, networks)
    from argrpo_cli.evals.benchmark import run

    benchmark = DrawBench(asked, names, options)
    result = run(benchmark, policies, out, n=n, diversity=networks, **run_options(drawing, baseline_cfg_scale))
    show_result(result, f"images, scores and summary.json in {out}")


@command(least={"limit": 1})
def unigenbench(
    context: typer.Context,
    policy: str = "t2i-xl-256",
    baseline: str | None = None,
    baseline_cfg_scale: float | None = None,
    images: Path | None = None,
    prompts: Path | None = None,
    wording: Path | None = None,
    limit: int | None = None,
    judge: str | None = None,
    url: str | None = None,
    set_: list[str] | None = None,
    n: int = 4,
    diversity: str | None = None,
    out: Path = Path("unigenbench"),
    *,
    drawing: Drawing,
) -> None:
    """UniGenBench++: 600 prompts, whose test points a model behind a server judges, in ten dimensions.

    Interrupted, or where verdicts are missing, the same command goes on where it stopped.

    Options:
        --policy: A policy of captions: a name, a run directory, a checkpoint folder.
        --images: Measure these pictures instead: a folder with 0_0.png, 0_1.png and so on.
        --prompts: A file in the format of the benchmark's test_prompts_en.csv.  [default: that file, fetched]
        --wording: The benchmark's eval_common.py, which says how the judge is asked; read, not run.  [default: fetched]
        --limit: Only so many prompts, for a trial.
        --judge: The judge, as its server calls it.  [default: CodeGoat24/UniGenBench-EvalModel-qwen3vl-32b-v1]
        --url: Of the OpenAI-compatible server that has the judge, such as http://localhost:8000/v1.
        --set unigenbench.KEY=VALUE: Another option of asking: attempts, concurrency, timeout, image_format, backoff.
        --n, --per-prompt: Images per prompt.
        --out: Folder for images, verdicts and numbers.
    """
    policies = both_policies(policy, baseline, baseline_cfg_scale) if images is None else []
    check_images(context, images, "folder")
    networks, options = networks_of(diversity), judge_options("unigenbench", judge, url, set_)
    check_policies(policies, out, "unigenbench", drawing.seed, n, networks=networks)
    from argrpo_cli.evals.benchmark import run
    from argrpo_cli.evals.unigenbench import UniGenBench

    benchmark, drawn = UniGenBench(prompts, wording, options, limit), run_options(drawing, baseline_cfg_scale)
    result = run(benchmark, policies, out, n=n, images=images, diversity=networks, **drawn)
    show_result(result, f"images, verdicts and summary.json in {out}")


@command(least={"limit": 1})
def wise(
    context: typer.Context,
    policy: str = "t2i-xl-256",
    baseline: str | None = None,
    baseline_cfg_scale: float | None = None,
    images: Path | None = None,
    prompts: Path | None = None,
    wording: Path | None = None,
    limit: int | None = None,
    judge: str | None = None,
    url: str | None = None,
    set_: list[str] | None = None,
    n: int = 1,
    diversity: str | None = None,
    out: Path = Path("wise"),
    *,
    drawing: Drawing,
) -> None:
    """WISE-Verified: 1,000 prompts that want world knowledge; a model behind a server says right or wrong.

    Interrupted, or where verdicts are missing, the same command goes on where it stopped.

    Options:
        --policy: A policy of captions: a name, a run directory, a checkpoint folder.
        --images: Measure these pictures instead: a folder with 1.png to 1000.png.
        --prompts: A file in the format of the benchmark's data_verified/merge.json.  [default: that file, fetched]
        --wording: The benchmark's vllm_eval.py, which says how the judge is asked; read, not run.  [default: fetched]
        --limit: Only so many prompts, for a trial.
        --judge: The judge, as its server calls it.  [default: Qwen3.5-35B-A3B]
        --url: Of the OpenAI-compatible server that has the judge, such as http://localhost:8000/v1.
        --set wise.KEY=VALUE: Another option of asking: attempts, concurrency, timeout, thinking, image_format, backoff.
        --n, --per-prompt: Images per prompt.
        --out: Folder for images, verdicts and numbers.
    """
    policies = both_policies(policy, baseline, baseline_cfg_scale) if images is None else []
    check_images(context, images, "folder")
    networks, options = networks_of(diversity), judge_options("wise", judge, url, set_)
    check_policies(policies, out, "wise", drawing.seed, n, networks=networks)
    from argrpo_cli.evals.benchmark import run
    from argrpo_cli.evals.wise import Wise

    benchmark, drawn = Wise(prompts, wording, options, limit), run_options(drawing, baseline_cfg_scale)
    result = run(benchmark, policies, out, n=n, images=images, diversity=networks, **drawn)
    show_result(result, f"images, verdicts and summary.json in {out}")


@command(tells=())
def report(results: list[Path], out: Path = Path("report.md")) -> None:
    """Result files as one page: base, trained, difference, and the paper's numbers below.

    Options:
        RESULTS...: summary.json of eval, score and entropy, what eval nano --out wrote, or folders of such files.
        --out: The page: a name that ends in .md or .html.
    """
    from argrpo_cli.evals.tables import CONFLICT, read_results, write_report

    sections = write_report(read_results(results), out)
    warnings = [(section.title, warning) for section in sections for warning in section.warnings]
    for title, warning in warnings:
        if warning.startswith(CONFLICT):
            warn(f"{title}: {warning}")
    notes = len(warnings)
    remarks = f", with {notes} {'note' if notes == 1 else 'notes'}" if notes else ""
    tell(f"{len(sections)} {'table' if len(sections) == 1 else 'tables'} in {out}{remarks}")


BENCHMARKS = {
    "nano": nano,
    "geneval": geneval,
    "geneval2": geneval2,
    "imagenet": imagenet,
    "drawbench": drawbench,
    "unigenbench": unigenbench,
    "wise": wise,
    "report": report,
}


def _judge(name: str | None, url: str | None) -> dict[str, str]:
    """What --judge and --url say, as options of the reward `geneval2`."""
    if name == "nano":
        return {"backend": "nano"} | ({} if url is None else {"url": url})
    if name is not None and url is None:
        from argrpo_cli.rewards.judge.questions import check_model

        check_model(name)
    return ({} if name is None else {"model": name}) | ({} if url is None else {"backend": "server", "url": url})
