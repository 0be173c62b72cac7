"""Scoring a folder of images with reward models: what `argrpo score` does."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from argrpo_cli.conditions import Condition, class_prompt
from argrpo_cli.errors import UserError
from argrpo_cli.files import check_writable, make_dir, read_jsonl, write_json, write_jsonl
from argrpo_cli.images import image_files, read_image
from argrpo_cli.progress import progress

if TYPE_CHECKING:
    from argrpo_cli.rewards import RewardSet

METADATA, SCORES, SUMMARY = "metadata.jsonl", "scores.jsonl", "summary.json"
UNFINISHED = "sampling.json"  # of `argrpo sample`, which writes the metadata last
NO_PROMPT_WORDS = {
    "",
    "dsc",
    "generated",
    "image",
    "images",
    "img",
    "output",
    "photo",
    "picture",
    "sample",
    "untitled",
}


@dataclass(frozen=True)
class ScoringResult:
    """The summary as written, where the files are, and a remark on where the prompts came from (or "")."""

    summary: dict[str, Any]
    scores_path: Path
    summary_path: Path
    note: str


@dataclass(frozen=True)
class _Item:
    """One image to score; no condition when nothing says what it should show."""

    file: str
    path: Path
    condition: Condition | None
    extra: dict[str, Any]


def score_folder(
    folder: Path,
    rewards: Sequence[str],
    *,
    prompt: str | None = None,
    class_name: str | None = None,
    out: Path | None = None,
    batch_size: int = 64,
    device: str = "auto",
    show_progress: bool = False,
) -> ScoringResult:
    """Score every image of a folder; scores.jsonl and summary.json go to `out` (default: the folder itself).

    Prompts: metadata.jsonl (`file`, `prompt`, `class_id`), else `prompt`, else `class_name` as a class
    prompt, else file names that are words (`golden_retriever-12.png`). Scores are raw, in each
    reward's own unit.

    Raises:
        UserError: no such folder, no images, an unreadable one, an unknown reward, or a reward that looks
            at the prompt where there is none. Nothing is written then.
    """
    if not rewards:
        raise UserError("--rewards is empty; name at least one reward")
    for name in rewards:
        if rewards.count(name) > 1:
            raise UserError(f"--rewards names {name!r} twice")
    if prompt is not None and class_name is not None:
        raise UserError("give --prompt or --class, not both")
    for option, text in (("--prompt", prompt), ("--class", class_name)):
        if text is not None and not text.strip():
            raise UserError(f"{option} is empty; say what the images should show")
    items, note = _items(folder, prompt, class_name)
    check_writable(out or folder)
    from argrpo_cli.devices import resolve_device
    from argrpo_cli.rewards import load_rewards

    reward_set = load_rewards(list(rewards), device=resolve_device(device))
    without = next((item for item in items if item.condition is None), None)
    if without is not None:
        for name in reward_set.names:
            if reward_set.family[name] == "conditional":
                raise UserError(f"{name} needs to know what {without.path} should show; give --prompt or --class")
    reward_set.check([item.condition for item in items if item.condition is not None])
    if show_progress:
        with progress("scoring", len(items)) as advance:
            columns = _score(reward_set, items, batch_size, advance)
    else:
        columns = _score(reward_set, items, batch_size, lambda count: None)

    rows = []
    for index, item in enumerate(items):
        said = {"prompt": item.condition.prompt, "class_id": item.condition.class_id} if item.condition else {}
        scores = {name: columns[name][index] for name in reward_set.names}
        rows.append({"file": item.file, **said, **item.extra, "scores": scores})
    summary = {
        "images": len(items),
        "folder": str(folder),
        "rewards": {
            name: {"family": reward_set.family[name], **_statistics(columns[name])} for name in reward_set.names
        },
    }
    target = make_dir(out) if out is not None else folder
    write_jsonl(target / SCORES, rows)
    write_json(target / SUMMARY, summary)
    uses_prompt = any(reward_set.family[name] == "conditional" for name in reward_set.names)
    return ScoringResult(summary, target / SCORES, target / SUMMARY, note if uses_prompt else "")


def prompt_from_file_name(stem: str) -> str | None:
    """What a file name says its image shows, or None when it is only a number or a camera's word.

    `a_photo_of_two_cats_007`: `a photo of two cats`; `003-dog-00012`: `a photo of a dog`; `IMG_0012`: None.
    """
    words = re.sub(r"[_\-\s]+", " ", stem).strip()
    words = re.sub(r"^(\d+ )+|( ?\(?\d+\)?)+$", "", words).strip()
    if words.lower() in NO_PROMPT_WORDS or not any(character.isalpha() for character in words):
        return None
    return words if len(words.split()) >= 4 else class_prompt(words)


def _items(folder: Path, prompt: str | None, class_name: str | None) -> tuple[list[_Item], str]:
    """The images of a folder with their conditions, and a remark on guessed ones."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}" if not folder.exists() else f"{folder} is a file, not a folder of images")
    if (folder / METADATA).is_file():
        if prompt is not None or class_name is not None:
            raise UserError(f"{folder / METADATA} says what the images show; leave out --prompt and --class")
        return _items_of_metadata(folder), ""
    if (folder / UNFINISHED).is_file() and prompt is None and class_name is None:
        raise UserError(f"{folder} is unfinished; give the same `argrpo sample` command again to complete it")
    names = image_files(folder)
    if class_name is not None:
        prompt = class_prompt(class_name)
    items, guess = [], ""
    for name in names:
        text = prompt if prompt is not None else prompt_from_file_name(Path(name).stem)
        if prompt is None and text is not None:
            guess = guess or f"prompts were read from the file names ({name}: {text!r})"
        items.append(_Item(name, folder / name, None if text is None else Condition(text), {}))
    return items, guess


def _items_of_metadata(folder: Path) -> list[_Item]:
    path = folder / METADATA
    items = []
    for number, row in enumerate(read_jsonl(path), start=1):
        file, prompt, class_id = row.get("file"), row.get("prompt"), row.get("class_id")
        if not isinstance(file, str) or not file:
            raise UserError(f"{path}, image {number}: 'file' is missing")
        if prompt is not None and not isinstance(prompt, str):
            raise UserError(f"{path}, {file}: prompt = {prompt!r}: must be text")
        if class_id is not None and (not isinstance(class_id, int) or isinstance(class_id, bool)):
            raise UserError(f"{path}, {file}: class_id = {class_id!r}: must be a whole number")
        if not (folder / file).is_file():
            raise UserError(f"{path} lists {file}, which is not there")
        extra = {key: row[key] for key in ("class_name", "seed", "policy") if key in row}
        items.append(_Item(file, folder / file, Condition(prompt, class_id) if prompt is not None else None, extra))
    if not items:
        raise UserError(f"{path} lists no images")
    return items


def _score(reward_set: RewardSet, items: Sequence[_Item], batch_size: int, advance: Any) -> dict[str, list[float]]:
    """Raw scores per reward, one per item; images are read batch by batch."""
    import torch

    columns: dict[str, list[float]] = {name: [] for name in reward_set.names}
    for batch, pixels in _batches(items, batch_size):
        conditions = [item.condition or Condition("") for item in batch]
        scores = reward_set.score(torch.from_numpy(pixels), conditions, batch_size=batch_size)
        for name in reward_set.names:
            columns[name] += scores[name].tolist()
        advance(len(batch))
    return columns


def _batches(items: Sequence[_Item], batch_size: int) -> Iterator[tuple[list[_Item], np.ndarray]]:
    """Runs of images of one size, at most `batch_size` long, as uint8 [B, 3, H, W]."""
    batch: list[_Item] = []
    pixels: list[np.ndarray] = []
    for item in items:
        image = read_image(item.path)
        if batch and (len(batch) == batch_size or image.shape != pixels[0].shape):
            yield batch, np.stack(pixels)
            batch, pixels = [], []
        batch.append(item)
        pixels.append(image)
    if batch:
        yield batch, np.stack(pixels)


def _statistics(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, its standard error (None for a single image), minimum and maximum."""
    count = len(values)
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1) if count > 1 else None
    return {
        "mean": mean,
        "standard_error": math.sqrt(variance / count) if variance is not None else None,
        "min": min(values),
        "max": max(values),
    }
