"""Scoring images with reward models: what `argrpo score` does."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import TypedDict

from argrpo_cli.image_prompts import find_items
from argrpo_cli.images import Item, read_runs, refuse
from argrpo_cli.kept import Rows, kept
from argrpo_cli.listing import PARTIAL, SCORES, SUMMARY, TABLE
from argrpo_cli.pictures import LARGE
from argrpo_cli.shapes import Column, Condition, Result, Value
from argrpo_cli.system.errors import BadPicture, UserError, printable
from argrpo_cli.system.files import atomic_path, check_writable, make_dir, save_png, write_jsonl
from argrpo_cli.system.plain import guarded
from argrpo_cli.system.processes import alone_in, notice, say
from argrpo_cli.system.references import title

if TYPE_CHECKING:
    from PIL import Image

    from argrpo_cli.images import ImageSet
    from argrpo_cli.rewards import RewardSet

SHEET = "best_worst.png"
SHEET_COLUMNS, THUMBNAIL = 8, 128
UNREADABLE = "unreadable"  # in the protocol: images that could not be read, and why


Scores = dict[str, float | None]  # by reward, None where there is none


class ScoredRow(TypedDict):
    """A line of scores.jsonl, see `row_of`."""

    file: str
    scores: Scores


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
    strict: bool = False,
) -> tuple[Result, Path, int, str]:
    """Score images; scores.jsonl, scores.csv, summary.json and best_worst.png go to `out`.

    Scores are raw, in each reward's own unit. Scores of an interrupted call with the same rewards and images are kept,
    and images that lack one are asked again. An image that cannot be read is named, has no scores, and is in the
    protocol under `UNREADABLE`.

    Args:
        sources: a folder, an .npz, or image files; see `image_prompts.find_items`.
        prompt, class_name, captions: what the images should show, where nothing beside them says it.
        options: name of a reward to options of its own.
        out: by default the folder of the images, or one beside the .npz.
        strict: an image that cannot be read is an error.

    Returns:
        The result as written, the folder it is in, how many images had been scored before, and a remark (or "").

    Raises:
        UserError: no images that can be read, an unknown reward, or a reward that looks at the prompt where there is
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
    if len(items) == 1:
        items[0].read(LARGE)  # a bad one is refused before anything is loaded
    from argrpo_cli.rewards import check_weights, load_rewards

    for name in rewards:
        check_weights(name, (options or {}).get(name, {}))
    notice(f"loading {', '.join(rewards)} ...")
    from argrpo_cli.system.processes import resolve_device

    reward_set = load_rewards(list(rewards), resolve_device(device), options)
    _check_conditions(reward_set, images)
    for remark in images.remarks:
        say(remark)
    comparing = [name for name in rewards if reward_set.entries[name].scope != "image"]
    single = reward_set.only([name for name in rewards if name not in comparing]) if comparing else reward_set
    unreadable: dict[str, str] = {}

    def note(item: Item, error: BadPicture) -> None:
        if strict or len(items) == 1:
            raise error
        unreadable[item.file] = str(error)

    busy = f"another `argrpo score` writes to {target}; wait for it, or choose another --out"
    with alone_in(target, busy):
        store = Rows(
            target / PARTIAL,
            single.identity(options),
            item_key,
            complete=lambda row: None not in row.values(),
            shape=Scores,
        )

        def score(batch: Sequence[Item]) -> list[dict[str, float | None] | None]:
            # An image is asked again for all its scores; one that is missing this time is not lost for that.
            earlier = [row or {} for row in store.read(batch)]
            rows = zip(score_rows(single, batch, note), earlier, strict=True)
            merged = [{name: old.get(name) if x is None else x for name, x in row.items()} for row, old in rows]
            return [row if any(x is not None for x in row.values()) else None for row in merged]

        before, compared = 0, {}
        if single.names:
            before = kept(items, score, store, batch_size=batch_size, label="scoring", whole=False)
            reward_set.last_error |= single.last_error
        if comparing:
            some = reward_set.only(comparing)
            compared = compare_items(some, items, batch_size, note)
            reward_set.last_error |= some.last_error
        for why in unreadable.values():
            say(why)
        if len(unreadable) == len(items):
            raise UserError(f"none of the {len(items)} images could be read")
        blank = dict.fromkeys(rewards)
        by_themselves = store.read(items) if single.names else [None] * len(items)
        scores = [
            blank | (row or {}) | {name: column[place] for name, column in compared.items()}
            for place, row in enumerate(by_themselves)
        ]
        columns = {name: [row[name] for row in scores] for name in rewards}
        source = printable(sources[0] if len(sources) == 1 else images.folder)
        result = _result(source, reward_set, columns, unreadable)
        rows = [row_of(item, row) for item, row in zip(items, scores, strict=True)]
        write_jsonl(make_dir(target) / SCORES, rows)
        _write_table(target / TABLE, rows, rewards)
        save_png(target / SHEET, best_and_worst(items, columns))
        result.save(target / SUMMARY)
        if not result.warnings:
            store.remove()  # otherwise the same call asks again for what is missing
    uses_prompt = any(reward_set.entries[name].reads_prompt for name in rewards)
    return result, target, before, images.note if uses_prompt else ""


def score_rows(
    reward_set: RewardSet, items: Sequence[Item], unreadable: Callable[[Item, BadPicture], None] = refuse
) -> list[dict[str, float | None]]:
    """{reward: raw score, or None where it has none} of each image; they are read here, and may differ in size.

    Args:
        unreadable: is told of an image that cannot be read, or that a reward cannot look at; it has no scores.
    """
    import torch

    rows: list[dict[str, float | None]] = [dict.fromkeys(reward_set.names) for _ in items]
    for places, pixels in read_runs(items, unreadable):
        conditions = [items[place].condition or Condition("") for place in places]
        try:
            scores = reward_set.score(torch.from_numpy(pixels), conditions, batch_size=len(places))
        except BadPicture as error:  # of its size, which all of them have
            for place in places:
                unreadable(items[place], BadPicture(f"{items[place].file}: {error}"))
            continue
        finally:
            del pixels  # before the next are read
        table = zip(*(scores[name].tolist() for name in reward_set.names), strict=True)
        for place, row in zip(places, table, strict=True):
            values = (None if math.isnan(score) else score for score in row)
            rows[place] = dict(zip(reward_set.names, values, strict=True))
    return rows


def compare_items(
    reward_set: RewardSet, items: Sequence[Item], batch_size: int, unreadable: Callable[[Item, BadPicture], None]
) -> dict[str, list[float | None]]:
    """Raw scores of all images, read here, by rewards that compare them: all, or those that should show the same.

    Args:
        unreadable: as in `score_rows`; such an image has no scores, and the others are compared without it.

    Raises:
        UserError: a reward needs the images themselves, and they differ in size.
    """
    import torch

    known: list[int] = []
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in reward_set.names}
    for start in range(0, len(items), batch_size):
        for offsets, pixels in read_runs(items[start : start + batch_size], unreadable):
            places = [start + offset for offset in offsets]
            try:
                _, parts = reward_set.look(torch.from_numpy(pixels), [Condition("")] * len(places), len(places))
            except BadPicture as error:
                for place in places:
                    unreadable(items[place], BadPicture(f"{items[place].file}: {error}"))
                continue
            known += places
            for name, part in parts.items():
                if seen[name] and part.shape[1:] != seen[name][0].shape[1:]:
                    raise UserError(
                        f"reward {name} compares images of one size, and {items[places[0]].file} has another"
                    )
                seen[name].append(part)
    conditions = [items[place].condition or Condition("") for place in known]
    columns: dict[str, list[float | None]] = {}
    for name, parts in seen.items():
        columns[name] = [None] * len(items)
        scores = reward_set.compare(name, torch.cat(parts) if parts else None, conditions).tolist()
        for place, score in zip(known, scores, strict=True):
            columns[name][place] = None if math.isnan(score) else score
    return columns


def _result(
    source: str, reward_set: RewardSet, columns: Mapping[str, Sequence[float | None]], unreadable: Mapping[str, str]
) -> Result:
    """What summary.json holds: each reward's mean, and its range and what is missing of it in the protocol."""
    values, rewards, warnings = {}, {}, []
    if unreadable:
        warnings.append(f"{len(unreadable)} images cannot be read and have no scores")
    for name, column in columns.items():
        scores = [score for score in column if score is not None]
        count = len(scores)
        error = stdev(scores) / math.sqrt(count) if count > 1 else None
        values[name] = Value(fmean(scores) if scores else None, error, count)
        rewards[name] = {"family": reward_set.family[name]}
        rewards[name] |= {"min": min(scores, default=None), "max": max(scores, default=None)}
        if missing := len(column) - count:
            why = reward_set.last_error.get(name) or next(reversed(unreadable.values()), "it said no more")
            rewards[name] |= {"missing": missing, "last_error": why}
            if missing > len(unreadable):
                warnings.append(f"{name} has no score for {missing} images (the latest: {why})")
    return Result(
        benchmark="score",
        columns={
            name: Column(title(name), better="higher", digits=4, group=family)
            for name, family in reward_set.family.items()
        },
        rows={source: values},
        protocol={"images": len(next(iter(columns.values()))), "rewards": rewards}
        | ({UNREADABLE: dict(unreadable)} if unreadable else {}),
        warnings=warnings,
    )


def best_and_worst(items: Sequence[Item], columns: Mapping[str, Sequence[float | None]]) -> Image.Image:
    """A sheet with two rows for each reward, of the images it likes best and least, their scores and captions below."""
    from argrpo_cli.system.grids import image_grid

    count = min(SHEET_COLUMNS, len(items))
    rows: list[tuple[str, list[int]]] = []
    for name, scores in columns.items():
        order = sorted((index for index, score in enumerate(scores) if score is not None), key=lambda i: -scores[i])
        for word, chosen in (("best", order[:count]), ("worst", order[::-1][:count])):
            span = f"{scores[chosen[0]]:.4g} to {scores[chosen[-1]]:.4g}" if chosen else "no scores"
            rows.append((f"{title(name)}, {word}: {span}", chosen))
    small = {}
    for index in sorted({i for _, chosen in rows for i in chosen}):
        with suppress(BadPicture):  # gone since it was scored
            small[index] = _thumbnail(items[index].read())
    blank = np.full((3, THUMBNAIL, THUMBNAIL), 255, np.uint8)
    padded = [index for _, chosen in rows for index in [*chosen, *[-1] * (count - len(chosen))]]
    tiles = [small.get(index, blank) for index in padded]
    named = [name for name in columns for _ in range(2)]  # the reward of each row
    scores = [columns[name] for name in named for _ in range(count)]
    captions = [_caption(items[i], score[i]) if i >= 0 else "" for i, score in zip(padded, scores, strict=True)]
    return image_grid(np.stack(tiles), count, [label for label, _ in rows], captions=captions)


def _caption(item: Item, score: float) -> str:
    """What an image scored and should show, or where that is not known its file."""
    return f"{score:.4g} {item.file if item.condition is None else item.condition.prompt}"


def _thumbnail(pixels: np.ndarray) -> np.ndarray:
    """The image within a white square, uint8 [3, THUMBNAIL, THUMBNAIL]."""
    from PIL import Image, ImageOps

    square, bicubic = (THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC
    return np.stack([ImageOps.pad(Image.fromarray(channel), square, bicubic, 255) for channel in pixels])


def _check_conditions(reward_set: RewardSet, images: ImageSet) -> None:
    without = next((item for item in images.items if item.condition is None), None)
    if without is not None:
        for name in reward_set.names:
            if reward_set.entries[name].reads_prompt:
                raise UserError(
                    f"{name} needs to know what {without.file} should show; give --prompt, --class or --prompts"
                )
    named = {item.condition: item for item in images.items if item.condition is not None}
    for condition, item in named.items():
        if images.note and not (images.path / item.file).is_file():  # a pipe, say: its name is no prompt
            continue
        try:
            reward_set.check([condition])
        except UserError as error:
            if not images.note:
                raise
            raise UserError(
                f"{item.file}: {error}; the prompt was read from its name: give --prompt, --class or --prompts"
            ) from error


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
