"""`argrpo entropy`: the entropy of policies, along held-out images or samples."""

from __future__ import annotations

from pathlib import Path

from argrpo_cli.cli.options import Drawing, check_policies, command, present, tell, warn
from argrpo_cli.policy.folder import glance, unfinished
from argrpo_cli.system.errors import UserError


@command(without=("text_device",))
def entropy(
    policy: list[str] | None = None,
    run: Path | None = None,
    split: str | None = None,
    prompts: str | None = None,
    data: Path | None = None,
    cache: Path | None = None,
    n: int | None = None,
    out: Path = Path("entropy"),
    *,
    drawing: Drawing,
) -> None:
    """Measure the entropy of policies in nats per token, conditional and guided, and by position.

    Options:
        --policy: A policy to measure; repeatable, the first is compared with.  [default: nano-c2i; with --prompts
            nano-t2i]
        --run RUN_DIR: All checkpoints of a training run, in one curve.
        --split: Held-out images to walk along: val.  [default: val]
        --prompts SET|FILE: Walk along samples of these prompts: geneval, or a file.
        --data FOLDER: Real pictures for the split: ImageNet's validation set in class folders or flat with its labels,
            or pictures with a metadata.jsonl.  [default: scenes of the nano world]
        --cache DIR: Where tokens of pictures are kept.  [default: the user's cache]
        --n: At most so many images; with --data of every class equally many.  [default: all]
        --out: Folder for entropy.jsonl and the pictures.
    """
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
    if n is not None and n < 2:
        raise UserError(f"--n {n}: an interval needs 2 images or more")
    if prompts is not None:
        read_captions(prompts)
    from argrpo_cli.evals import entropy_results as results
    from argrpo_cli.image_labels import open_labelled, some_of

    names = policy or ["nano-t2i" if prompts is not None else "nano-c2i"]
    if len(set(names)) < len(names):
        raise UserError(f"--policy names {next(name for name in names if names.count(name) > 1)} twice")
    subjects = [results.NamedPolicy(one, _title(one)) for one in names] if run is None else results.subjects_of_run(run)
    pictures = None if data is None else some_of(open_labelled(data), n)
    for remark in pictures.remarks if pictures else ():
        warn(remark)
    question = results.Question(prompts, n, drawing.seed, pictures)
    results.claim(out, question)
    check_policies([one.path for one in subjects])
    for one in subjects:
        own = {} if (seen := glance(one.path)) is None else seen.sampling
        if {**own, **drawing.sampling}.get("temperature", 1.0) <= 0:
            what = "--temperature 0" if "temperature" in drawing.sampling else f"{one.path} is sampled at temperature 0"
            raise UserError(f"{what}: without noise there is no entropy; give more than 0")
    from argrpo_cli.evals.entropy import measure
    from argrpo_cli.system.processes import join_team

    team = join_team(drawing.device)
    rows = measure(subjects, question, drawing.sampling, drawing.batch_size, team, out / results.JOURNAL, cache)

    def report() -> None:
        figures = results.write_results(rows, out)
        present(results.result_of(rows).plain, lambda width: results.table(rows))
        shown = " and ".join(str(path) for path in figures)
        tell(f"numbers, also by position, in {out / results.NUMBERS}, picture{'s' * (len(figures) > 1)} in {shown}")

    team.lead(report)


def _title(policy: str) -> str:
    """What a policy is called in tables and pictures: as it was given, and the step of a run that is not at its end."""
    where = unfinished(policy)
    return f"{policy} ({where})" if where else policy
