"""`argrpo score`: reward models over images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from argrpo_cli.cli.options import command, present, read_rewards, tell, warn
from argrpo_cli.shapes import Value
from argrpo_cli.system.errors import UserError


@command()
def score(
    images: list[Path],
    rewards: str = "nano-clip,nano-quality,nano-critic",
    prompt: str | None = None,
    class_: str | None = None,
    prompts: Path | None = None,
    set_: list[str] | None = None,
    out: Path | None = None,
    batch_size: int = 64,
    device: str = "auto",
    strict: bool = False,
) -> None:
    """Score images: a table, scores.jsonl, scores.csv, summary.json and a sheet of the best and worst.

    Sub-folders count. Prompts come from the folder's metadata.jsonl, else from --prompt, --class or --prompts, else
    from the names of class folders or of the files.
    The same command after an interruption keeps the scores that are there.

    Options:
        IMAGES...: A folder of images, an .npz, or image files.
        --rewards: Names of rewards, or your own as module:function or file.py:function, with commas between them.
        --prompt: What every image should show, when there is no metadata.jsonl.
        --class NAME: The same, as a class name: 'a photo of a NAME'.
        --prompts FILE: A caption for each image: .txt (one a line), .jsonl, .csv, ...
        --set REWARD.KEY=VALUE: An option of a reward, such as hpsv2.version=2.0; repeatable.
        --out: Where to write the scores.  [default: beside the images]
        --strict: Stop at the first image that cannot be read. Otherwise the others are scored, and the exit code is 2.
    """
    from argrpo_cli.evals.tables import table
    from argrpo_cli.score import SHEET, UNREADABLE, score_images

    names, options = read_rewards(rewards, set_)
    result, folder, before, note = score_images(
        images,
        names,
        prompt=prompt,
        class_name=class_,
        captions=prompts,
        options=options,
        out=out,
        batch_size=batch_size,
        device=device,
        strict=strict,
    )
    ranges = result.protocol["rewards"]
    (means,) = result.rows.values()
    ends = {end: {name: Value(row[end]) for name, row in ranges.items()} for end in ("min", "max")}
    present(result.plain, lambda width: table(replace(result, rows={"mean": means, **ends}), width))
    for warning in result.warnings:
        warn(warning)
    if note:
        tell(note)
    for name, row in ranges.items():
        if row["min"] is None:
            raise UserError(f"{name} scored none of the {result.protocol['images']} images: {row['last_error']}")
    kept = f" ({before} were scored before)" if before else ""
    tell(f"scores{kept} in {folder}, best and worst in {folder / SHEET}")
    if bad := result.protocol.get(UNREADABLE):
        raise UserError(f"{len(bad)} of {result.protocol['images']} images could not be read and have no scores")
