"""Scoring images with reward models: what `argrpo score` does."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from argrpo_cli.images import READERS, Item, find_items
from argrpo_cli.kept import Rows, in_batches, kept
from argrpo_cli.shapes import Column, Condition, Result, Value
from argrpo_cli.system.errors import UserError, printable
from argrpo_cli.system.files import atomic_path, check_writable, make_dir, save_png, write_jsonl
from argrpo_cli.system.plain import guarded
from argrpo_cli.system.processes import alone_in, notice

if TYPE_CHECKING:
    from PIL import Image

    from argrpo_cli.rewards import RewardSet

SCORES, TABLE, SUMMARY, SHEET = "scores.jsonl", "scores.csv", "summary.json", "best_worst.png"
PARTIAL = "scores.partial"  # of a job that has not ended, or has no score for some images
SHEET_COLUMNS, THUMBNAIL = 8, 128
MOST_BYTES = 2**28  # of images at a time, however many


def score_images(
    sources: Sequence[Path],
    rewards: Sequence[str],
    *,
    prompt: str | None = None,
    class_name: str | None = None,
    captions: Path | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    out: Path | None = None,
    batch_size: int = 64,
    device: str = "auto",
) -> tuple[Result, Path, int, str]:
    """Score images; scores.jsonl, scores.csv, summary.json and best_worst.png go to `out`.

    Scores are raw, in each reward's own unit. Scores of an interrupted call with the same rewards and images are kept,
    and images that lack one are asked again.

    Args:
        sources: a folder, an .npz, or image files; see `images.find_items`.
        prompt, class_name, captions: what the images should show, where nothing beside them says it.
        options: name of a reward to options of its own.
        out: by default the folder of the images, or one beside the .npz.

    Returns:
        The result as written, the folder it is in, how many images had been scored before, and a remark (or "").

    Raises:
        UserError: no images, an unreadable one, an unknown reward, or a reward that looks at the prompt where there is
            none. What was scored until then is kept for the same call.
    """
    if not rewards:
        raise UserError("--rewards is empty; name at least one reward")
    for name in rewards:
        if rewards.count(name) > 1:
            raise UserError(f"--rewards names {name!r} twice")
    images = find_items(sources, prompt, class_name, captions)
    items, target = images.items, out or images.folder
    check_writable(target)
    notice(f"loading {', '.join(rewards)} ...")
    from argrpo_cli.rewards import load_rewards
    from argrpo_cli.system.processes import resolve_device

    reward_set = load_rewards(list(rewards), resolve_device(device), options)
    _check_conditions(reward_set, items)
    busy = f"another `argrpo score` writes to {target}; wait for it, or choose another --out"
    with alone_in(target, busy):
        store = Rows(
            target / PARTIAL, reward_set.identity(options), item_key, complete=lambda row: None not in row.values()
        )

        def score(batch: Sequence[Item]) -> list[dict[str, float | None]]:
            # An image is asked again for all its scores; one that is missing this time is not lost for that.
            earlier = [row or {} for row in store.read(batch)]
            rows = zip(score_rows(reward_set, batch), earlier, strict=True)
            return [{name: old.get(name) if x is None else x for name, x in row.items()} for row, old in rows]

        before = kept(items, score, store, batch_size=batch_size, label="scoring", whole=False)
        scores = store.read(items)
        columns = {name: [row[name] for row in scores] for name in rewards}
        result = _result(printable(sources[0] if len(sources) == 1 else images.folder), reward_set, columns)
        rows = [row_of(item, row) for item, row in zip(items, scores, strict=True)]
        write_jsonl(make_dir(target) / SCORES, rows)
        _write_table(target / TABLE, rows, rewards)
        save_png(target / SHEET, best_and_worst(items, columns))
        result.save(target / SUMMARY)
        if not result.warnings:
            store.remove()  # otherwise the same call asks again for what is missing
    uses_prompt = any(reward_set.entries[name].reads_prompt for name in rewards)
    return result, target, before, images.note if uses_prompt else ""


def score_rows(reward_set: RewardSet, items: Sequence[Item]) -> list[dict[str, float | None]]:
    """{reward: raw score, or None where it has none} of each image; they are read here, and may differ in size."""
    import torch

    rows: list[dict[str, float | None]] = []
    for run, pixels in _runs(items):
        conditions = [item.condition or Condition("") for item in run]
        scores = reward_set.score(torch.from_numpy(pixels), conditions, batch_size=len(run))
        table = zip(*(scores[name].tolist() for name in reward_set.names), strict=True)
        values = ([None if math.isnan(score) else score for score in row] for row in table)
        rows += [dict(zip(reward_set.names, row, strict=True)) for row in values]
    return rows


def _result(source: str, reward_set: RewardSet, columns: Mapping[str, Sequence[float | None]]) -> Result:
    """What summary.json holds: each reward's mean, and its range and what is missing of it in the protocol."""
    values, rewards, warnings = {}, {}, []
    for name, column in columns.items():
        scores = [score for score in column if score is not None]
        count = len(scores)
        error = stdev(scores) / math.sqrt(count) if count > 1 else None
        values[name] = Value(fmean(scores) if scores else None, error, count)
        rewards[name] = {"family": reward_set.family[name]}
        rewards[name] |= {"min": min(scores, default=None), "max": max(scores, default=None)}
        if missing := len(column) - count:
            why = reward_set.last_error.get(name, "it said no more")
            rewards[name] |= {"missing": missing, "last_error": why}
            warnings.append(f"{name} has no score for {missing} images (the latest: {why})")
    return Result(
        benchmark="score",
        columns={
            name: Column(name, better="higher", digits=4, group=family) for name, family in reward_set.family.items()
        },
        rows={source: values},
        protocol={"images": len(next(iter(columns.values()))), "rewards": rewards},
        warnings=warnings,
    )


def best_and_worst(items: Sequence[Item], columns: Mapping[str, Sequence[float | None]]) -> Image.Image:
    """A sheet with two rows for each reward, of the images it likes best and least."""
    from argrpo_cli.system.grids import image_grid

    count = min(SHEET_COLUMNS, len(items))
    rows: list[tuple[str, list[int]]] = []
    for name, scores in columns.items():
        order = sorted((index for index, score in enumerate(scores) if score is not None), key=lambda i: -scores[i])
        for word, chosen in (("best", order[:count]), ("worst", order[::-1][:count])):
            span = f"{scores[chosen[0]]:.4g} to {scores[chosen[-1]]:.4g}" if chosen else "no scores"
            rows.append((f"{name}, {word}: {span}", chosen))
    small = {index: _thumbnail(items[index].read()) for index in sorted({i for _, chosen in rows for i in chosen})}
    blank = np.full((3, THUMBNAIL, THUMBNAIL), 255, np.uint8)
    padded = [index for _, chosen in rows for index in [*chosen, *[-1] * (count - len(chosen))]]
    tiles = [small.get(index, blank) for index in padded]
    return image_grid(np.stack(tiles), count, [label for label, _ in rows])


def _thumbnail(pixels: np.ndarray) -> np.ndarray:
    """The image within a white square, uint8 [3, THUMBNAIL, THUMBNAIL]."""
    from PIL import Image, ImageOps

    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    square = ImageOps.pad(image, (THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC, (255, 255, 255))
    return np.asarray(square).transpose(2, 0, 1)


def _check_conditions(reward_set: RewardSet, items: Sequence[Item]) -> None:
    without = next((item for item in items if item.condition is None), None)
    if without is not None:
        for name in reward_set.names:
            if reward_set.entries[name].reads_prompt:
                raise UserError(
                    f"{name} needs to know what {without.file} should show; give --prompt, --class or --prompts"
                )
    reward_set.check([item.condition for item in items if item.condition is not None])


def _runs(items: Sequence[Item]) -> Iterator[tuple[list[Item], np.ndarray]]:
    """Runs of images of one size, of at most `MOST_BYTES`, as uint8 [B, 3, H, W]."""
    run: list[Item] = []
    pixels: list[np.ndarray] = []
    with ThreadPoolExecutor(READERS) as pool:
        for part in in_batches(items, READERS):
            one_by_one = len({item.stamp for item in part}) < len(part)  # of one file, which is read in order
            images = [item.read() for item in part] if one_by_one else pool.map(lambda item: item.read(), part)
            for item, image in zip(part, images, strict=True):
                if run and (image.shape != pixels[0].shape or (len(run) + 1) * image.size > MOST_BYTES):
                    yield run, np.stack(pixels)
                    run, pixels = [], []
                run.append(item)
                pixels.append(image)
    yield run, np.stack(pixels)


def item_key(item: Item) -> list[Any]:
    """What an image is known by among the scores: it changes when the image, or what it should show, does."""
    return [item.file, item.stamp, item.condition and [item.condition.prompt, item.condition.class_id]]


def row_of(item: Item, scores: Mapping[str, float | None]) -> dict[str, Any]:
    """A line of scores.jsonl."""
    said = {"prompt": item.condition.prompt, "class_id": item.condition.class_id} if item.condition else {}
    return {"file": item.file, **said, **item.extra, "scores": scores}


def _write_table(path: Path, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        columns = ["file", "prompt", "class_id", *names]
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: guarded(cell) for key, cell in (row | row["scores"]).items()} for row in rows)
