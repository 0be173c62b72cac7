"""`argrpo eval`: the benchmarks, and the page of their results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import typer

from argrpo_cli.cli.eval_options import (
    OF_A_POLICY,
    JudgeOptions,
    SubjectOptions,
    check_file,
    check_subject,
    check_words,
    run_benchmark,
    run_options,
    show_result,
)
from argrpo_cli.cli.options import Drawing, check_rewards, command, read_rewards, set_options, tell, warn
from argrpo_cli.geneval import check_detector
from argrpo_cli.rewards import refuse_comparing
from argrpo_cli.rewards.features import ADM_NAME
from argrpo_cli.system.errors import UserError

SETS = "folder or .npz file"  # of finished pictures


@command(without=("diversity",), policy="nano-c2i", n=2016)
def nano(context: typer.Context, *, subject: SubjectOptions, drawing: Drawing) -> None:
    """Single objects of the nano world: rendering match, fidelity, diversity and rewards.

    Of a policy, alone or against a baseline with the same seeds, or of a set of finished pictures.

    Options:
        --policy: A policy: a name, a run directory, a checkpoint folder.
        --n: Images per policy.
        --out: A file for the numbers, as JSON.
    """
    file = subject.out
    checked = check_subject(context, replace(subject, out=None), drawing, "nano", kind=SETS, reads="")
    check_file(file)
    from argrpo_cli.evals.nano import run_nano

    result = run_nano(checked.policies, subject.images, file, n=subject.n, **run_options(checked))
    show_result(result, "" if file is None else f"the numbers are in {file}")


@command(least={"detector_batch_size": 1}, policy="nano-t2i", n=4, out=Path("geneval"))
def geneval(
    context: typer.Context,
    *,
    subject: SubjectOptions,
    detector: str | None = None,
    colors: Path | None = None,
    detector_batch_size: int = 8,
    drawing: Drawing,
) -> None:
    """GenEval: objects, counts, colours and positions that a caption names.

    The nano prompts for a policy of the nano world, else the benchmark's 553. Interrupted, the same command goes on
    where it stopped.

    Options:
        --images: Measure these pictures instead: a folder as the benchmark's scripts write it.
        --detector nano|mask2former|FILE|FOLDER: Who judges: by name, the benchmark's own .pth file, or a folder of
            transformers' Mask2Former.  [default: nano for a policy of the nano world, else mask2former]
        --colors: A local file of OpenAI's CLIP ViT-L/14 in open_clip's layout, for colours.
        --detector-batch-size: Images in Mask2Former at a time.
    """
    check_words(context, subject)
    if detector is not None:
        check_detector(detector)
    checked, out = check_subject(context, subject, drawing, "geneval"), subject.out
    from argrpo_cli.evals.geneval import GenEval

    result = run_benchmark(GenEval(detector, colors, detector_batch_size), checked)
    failed = " and the failures as a picture (failures.png)" if (out / "failures.png").is_file() else ""
    show_result(result, f"images, verdicts, prompts.jsonl, summary.json{failed} in {out}")


@command(least={"limit": 1, "judge_batch_size": 1}, policy="nano-t2i", out=Path("geneval2"))
def geneval2(
    context: typer.Context,
    *,
    subject: SubjectOptions,
    prompts: str | None = None,
    limit: int | None = None,
    judge: str | None = None,
    url: str | None = None,
    set_: list[str] | None = None,
    judge_batch_size: int = 8,
    drawing: Drawing,
) -> None:
    """GenEval 2: a judge is asked about every object, number, attribute and relation of a prompt (Soft-TIFA).

    The nano prompts and the nano detector for a policy of the nano world, else the benchmark's 800 prompts, which are
    CC BY-NC 4.0 and fetched, and Qwen3-VL-8B-Instruct. Interrupted, the same command goes on where it stopped.

    Options:
        --images: Measure these pictures instead: a folder with a metadata.jsonl of file and prompt.
        --prompts FILE|geneval2-nano: A file in the benchmark's format, or the nano prompts.
        --limit: Only so many prompts, for a trial.
        --judge nano|MODEL: The nano detector; a hub name or folder of a vision-language model of transformers; or, with
            --url, a model that the server lists.
        --url: Ask the judge behind this OpenAI-compatible server, which must return top_logprobs.
        --set geneval2.KEY=VALUE: Another option of the judge, such as geneval2.concurrency=32; repeatable.
        --judge-batch-size: Images in the judge at a time.
        --out: Folder for images, answers and numbers.
    """
    from argrpo_cli.geneval import questions

    check_words(context, subject)
    _, options = read_rewards("geneval2", set_, "the judge's options,")
    options = {**options.get("geneval2", {}), **_judge(judge, url)}
    check_rewards(["geneval2"], {"geneval2": options})
    if prompts not in (None, questions.NANO):
        questions.read_items(prompts)
    named = {"geneval2": options} if "model" in options else None  # else the policy's world decides who judges
    checked = check_subject(context, subject, drawing, "geneval2", named)
    from argrpo_cli.evals.geneval2 import GenEval2

    result = run_benchmark(GenEval2(prompts, options, limit, judge_batch_size), checked)
    show_result(result, f"images, answers, summary.json and a picture (geneval2.png) in {subject.out}")


@command(without=("text_device",), n=50_000, out=Path("imagenet"))
def imagenet(
    context: typer.Context,
    *,
    subject: SubjectOptions,
    reference: str = ADM_NAME,
    resize: int | None = None,
    inception: Path | None = None,
    keep_images: bool = False,
    keep_features: bool = False,
    save_statistics: Path | None = None,
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
    measures = subject.policy is not None or subject.images is not None
    if not measures and (save_statistics is None or set_options(context, OF_A_POLICY)):
        raise UserError("nothing to measure; give --policy, such as c2i-b-256, or --images")
    checked = check_subject(context, subject, drawing, "imagenet", kind=SETS, reads="classes") if measures else None
    if reference != ADM_NAME and not Path(reference).exists():
        raise UserError(f"no {SETS} {reference}")
    check_file(save_statistics)
    from argrpo_cli.evals.imagenet import ImageNet, save_reference_statistics

    if checked is not None:
        files = {"keep_images": keep_images, "keep_features": keep_features}
        benchmark = ImageNet(reference=reference, inception=inception, resize=resize, **files)
        words = f"figures, warnings and protocol are in {subject.out / 'summary.json'}"
        show_result(run_benchmark(benchmark, checked), words)
    if save_statistics is not None:
        save_reference_statistics(reference, save_statistics, inception, drawing.batch_size, drawing.device)


@command(least={"limit": 1}, without=("images",), policy="t2i-xl-256", n=5, out=Path("drawbench"), batch_size=32)
def drawbench(
    context: typer.Context,
    *,
    subject: SubjectOptions,
    prompts: str = "sayakpaul/drawbench",
    limit: int | None = None,
    columns: str = "clip,hpsv2,aesthetic,deqa,imagereward,pickscore,unified-reward",
    set_: list[str] | None = None,
    drawing: Drawing,
) -> None:
    """DrawBench: reward models over 200 prompts with five images each, beside table 4 of the paper.

    Interrupted, the same command goes on where it stopped; other --columns of the same images go to the same --out.

    Options:
        --prompts FILE|NAME: A .txt, .jsonl, .csv, .tsv or .json file, a data set of the hub, or bundled captions such
            as nano.
        --limit: Only so many prompts, for a trial.
        --columns: Names of rewards with commas between them.
        --set REWARD.KEY=VALUE: An option of a reward, such as deqa.url=http://...; repeatable.
        --out: Folder for images, scores and numbers.
    """
    names, options = read_rewards(columns, set_, "--columns")
    refuse_comparing(names)
    check_words(context, subject)  # before prompts are fetched
    from argrpo_cli.evals.drawbench import DrawBench
    from argrpo_cli.evals.drawbench_prompts import read_prompts

    texts = read_prompts(prompts, limit)
    checked = check_subject(context, subject, drawing, "drawbench", {name: options.get(name, {}) for name in names})
    show_result(
        run_benchmark(DrawBench(texts, names, options), checked), f"images, scores and summary.json in {subject.out}"
    )


@command(least={"limit": 1}, policy="t2i-xl-256", n=4, out=Path("unigenbench"))
def unigenbench(context: typer.Context, *, subject: SubjectOptions, served: JudgeOptions, drawing: Drawing) -> None:
    """UniGenBench++: 600 prompts, whose test points a model behind a server judges, in ten dimensions.

    Interrupted, or where verdicts are missing, the same command goes on where it stopped.

    Options:
        --images: Measure these pictures instead: a folder with 0_0.png, 0_1.png and so on.
        --prompts: A file in the format of the benchmark's test_prompts_en.csv.  [default: that file, fetched]
        --wording: The benchmark's eval_common.py, which says how the judge is asked; read, not run.  [default: fetched]
        --judge: The judge, as its server calls it.  [default: CodeGoat24/UniGenBench-EvalModel-qwen3vl-32b-v1]
        --set unigenbench.KEY=VALUE: Another option of asking: attempts, concurrency, timeout, image_format, backoff.
    """
    check_words(context, subject)
    options = served.options("unigenbench")
    checked = check_subject(context, subject, drawing, "unigenbench")
    from argrpo_cli.evals.unigenbench import UniGenBench

    result = run_benchmark(UniGenBench(served.prompts, served.wording, options, served.limit), checked)
    show_result(result, f"images, verdicts and summary.json in {subject.out}")


@command(least={"limit": 1}, policy="t2i-xl-256", out=Path("wise"))
def wise(context: typer.Context, *, subject: SubjectOptions, served: JudgeOptions, drawing: Drawing) -> None:
    """WISE-Verified: 1,000 prompts that want world knowledge; a model behind a server says right or wrong.

    Interrupted, or where verdicts are missing, the same command goes on where it stopped.

    Options:
        --images: Measure these pictures instead: a folder with 1.png to 1000.png.
        --prompts: A file in the format of the benchmark's data_verified/merge.json.  [default: that file, fetched]
        --wording: The benchmark's vllm_eval.py, which says how the judge is asked; read, not run.  [default: fetched]
        --judge: The judge, as its server calls it.  [default: Qwen3.5-35B-A3B]
        --set wise.KEY=VALUE: Another option of asking: attempts, concurrency, timeout, thinking, image_format, backoff.
    """
    check_words(context, subject)
    options = served.options("wise")
    checked = check_subject(context, subject, drawing, "wise")
    from argrpo_cli.evals.wise import Wise

    result = run_benchmark(Wise(served.prompts, served.wording, options, served.limit), checked)
    show_result(result, f"images, verdicts and summary.json in {subject.out}")


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
