"""Scoring images with reward models: what `argrpo score` does."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from argrpo_cli.images import Item, Said, find_items
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import (
    cannot_write,
    check_writable,
    make_dir,
    save_png,
    write_json,
    write_jsonl,
    write_text,
)
from argrpo_cli.system.progress import progress

if TYPE_CHECKING:
    from PIL import Image

    from argrpo_cli.rewards import RewardSet

SCORES, TABLE, SUMMARY, SHEET = "scores.jsonl", "scores.csv", "summary.json", "best_worst.png"
PARTIAL = "scores.partial.jsonl"  # of a job that has not ended
SHEET_COLUMNS, THUMBNAIL = 8, 128
READERS = 8  # threads that decode images
MOST_NUMBERS = 2**28  # bytes of images at a time, however many


@dataclass(frozen=True)
class ScoringResult:
    """The summary as written, the folder it is in, how many images had been scored before, and a remark (or "")."""

    summary: dict[str, Any]
    folder: Path
    kept: int
    note: str


def score_images(
    sources: Sequence[Path],
    rewards: Sequence[str],
    *,
    said: Said | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    out: Path | None = None,
    batch_size: int = 64,
    device: str = "auto",
    show_progress: bool = False,
) -> ScoringResult:
    """Score images; scores.jsonl, scores.csv, summary.json and best_worst.png go to `out`.

    Scores are raw, in each reward's own unit. Scores of an interrupted call with the same rewards and images are kept.

    Args:
        sources: a folder, an .npz, or image files; see `score_items.find_items`.
        said: what the images should show, where nothing beside them says it.
        options: name of a reward to options of its own.
        out: by default the folder of the images, or one beside the .npz.

    Raises:
        UserError: no images, an unreadable one, an unknown reward, or a reward that looks at the prompt where there is
            none. What was scored until then is kept for the same call.
    """
    if not rewards:
        raise UserError("--rewards is empty; name at least one reward")
    for name in rewards:
        if rewards.count(name) > 1:
            raise UserError(f"--rewards names {name!r} twice")
    found = find_items(sources, said or Said())
    items, target = found.items, out or found.folder
    check_writable(target)
    from argrpo_cli.rewards import load_rewards
    from argrpo_cli.system.devices import resolve_device

    reward_set = load_rewards(list(rewards), resolve_device(device), options)
    _check_conditions(reward_set, items)
    with _alone_in(target):
        journal = _Journal(target, _identity(rewards, options or {}))
        kept = sum(journal.scores(item) is not None for item in items)
        try:
            with progress("scoring", len(items)) if show_progress else nullcontext(lambda count: None) as advance:
                _score(reward_set, items, journal, batch_size, advance)
        finally:
            journal.close()
        columns = {name: [journal.scores(item)[name] for item in items] for name in rewards}
        summary = _summary(str(sources[0] if len(sources) == 1 else found.folder), reward_set, columns)
        rows = [_row(item, {name: columns[name][index] for name in rewards}) for index, item in enumerate(items)]
        write_jsonl(make_dir(target) / SCORES, rows)
        write_text(target / TABLE, _csv(rows, list(rewards)))
        save_png(target / SHEET, best_and_worst(items, columns))
        write_json(target / SUMMARY, summary)
        if all(None not in column for column in columns.values()):
            journal.remove()  # otherwise the same call asks again for what is missing
    uses_prompt = any(reward_set.entries[name].reads_prompt for name in rewards)
    return ScoringResult(summary, target, kept, found.note if uses_prompt else "")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep a second `argrpo score` of this machine from writing to a folder; UserError when one does already."""
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"argrpo-score-{digest}.lock")  # the folder need not be there yet
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout as error:
        raise UserError(f"another `argrpo score` writes to {folder}; wait for it, or choose another --out") from error


def _summary(source: str, reward_set: RewardSet, columns: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """What summary.json holds: for each reward its statistics and, where scores are missing, why the latest is."""
    rewards = {}
    for name, column in columns.items():
        rewards[name] = {"family": reward_set.family[name], **_statistics(column)}
        if name in reward_set.last_error:
            rewards[name]["last_error"] = reward_set.last_error[name]
    return {"images": len(next(iter(columns.values()))), "folder": source, "rewards": rewards}


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


class _Journal:
    """Scores on disk while a job runs: one line for each image, after a first line that says which job it is."""

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.path, self.identity = folder / PARTIAL, json.loads(json.dumps(identity))
        self._known: dict[str, dict[str, float | None]] = {}
        self._file: io.TextIOWrapper | None = None
        lines = self.path.read_text("utf-8", "replace").splitlines() if self.path.is_file() else []
        rows = [row for row in map(_parsed, lines) if row is not None]
        self.continues = bool(rows) and rows[0] == self.identity
        if self.continues:
            whole = (row for row in rows[1:] if "key" in row and None not in row["scores"].values())
            self._known = {row["key"]: row["scores"] for row in whole}

    def scores(self, item: Item) -> dict[str, float | None] | None:
        """What is known of an image, None where it must be scored."""
        return self._known.get(self._key(item))

    def add(self, items: Sequence[Item], columns: Mapping[str, Sequence[float | None]]) -> None:
        """Note the scores of some images, on disk when this returns."""
        try:
            if self._file is None:
                make_dir(self.path.parent)
                self._file = open(self.path, "a" if self.continues else "w", encoding="utf-8")  # noqa: SIM115
                # A line that was cut off ends here.
                self._file.write("\n" if self.continues else json.dumps(self.identity) + "\n")
            for index, item in enumerate(items):
                scores = {name: column[index] for name, column in columns.items()}
                self._known[self._key(item)] = scores
                self._file.write(json.dumps({"key": self._key(item), "scores": scores}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    @staticmethod
    def _key(item: Item) -> str:
        said = [item.condition.prompt, item.condition.class_id] if item.condition else None
        return json.dumps([item.file, item.stamp, said])


def _identity(rewards: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What decides the scores of an image: the rewards, their options, files these name, and code of one's own."""
    from argrpo_cli.rewards import REWARDS
    from argrpo_cli.rewards.custom import source_digest

    files = {}
    for value in (value for given in options.values() for value in given.values()):
        if isinstance(value, str) and value and Path(value).is_file():
            status = Path(value).stat()
            files[value] = f"{status.st_size} {status.st_mtime_ns}"
    own = {name: source_digest(name) for name in rewards if ":" in name and name not in REWARDS}
    return {"rewards": list(rewards), "options": options, "files": files, "code": own}


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _check_conditions(reward_set: RewardSet, items: Sequence[Item]) -> None:
    without = next((item for item in items if item.condition is None), None)
    if without is not None:
        for name in reward_set.names:
            if reward_set.entries[name].reads_prompt:
                raise UserError(
                    f"{name} needs to know what {without.file} should show; give --prompt, --class or --prompts"
                )
    reward_set.check([item.condition for item in items if item.condition is not None])


def _score(
    reward_set: RewardSet, items: Sequence[Item], journal: _Journal, batch_size: int, advance: Callable[[int], None]
) -> None:
    """Score what the journal does not know; images are read batch by batch."""
    import torch

    left = [item for item in items if journal.scores(item) is None]
    advance(len(items) - len(left))
    for batch, pixels in _batches(left, batch_size):
        conditions = [item.condition or Condition("") for item in batch]
        scores = reward_set.score(torch.from_numpy(pixels), conditions, batch_size=batch_size)
        told = {name: [None if math.isnan(x) else x for x in scores[name].tolist()] for name in reward_set.names}
        journal.add(batch, told)
        advance(len(batch))


def _batches(items: Sequence[Item], batch_size: int) -> Iterator[tuple[list[Item], np.ndarray]]:
    """Runs of images of one size, at most `batch_size` long, as uint8 [B, 3, H, W]."""
    batch: list[Item] = []
    pixels: list[np.ndarray] = []
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(items), READERS):
            part = items[start : start + READERS]
            one_by_one = len({item.stamp for item in part}) < len(part)  # of one file, which is read in order
            images = [item.read() for item in part] if one_by_one else pool.map(lambda item: item.read(), part)
            for item, image in zip(part, images, strict=True):
                full = len(batch) == batch_size or (len(batch) + 1) * image.size > MOST_NUMBERS
                if batch and (full or image.shape != pixels[0].shape):
                    yield batch, np.stack(pixels)
                    batch, pixels = [], []
                batch.append(item)
                pixels.append(image)
    if batch:
        yield batch, np.stack(pixels)


def _row(item: Item, scores: dict[str, float | None]) -> dict[str, Any]:
    said = {"prompt": item.condition.prompt, "class_id": item.condition.class_id} if item.condition else {}
    return {"file": item.file, **said, **item.extra, "scores": scores}


def _csv(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "prompt", "class_id", *names])
    for row in rows:
        writer.writerow([row["file"], row.get("prompt"), row.get("class_id"), *(row["scores"][name] for name in names)])
    return text.getvalue()


def _statistics(scores: Sequence[float | None]) -> dict[str, float | None]:
    """Mean, its standard error (None for a single image), minimum and maximum, and how many are missing if any are."""
    values = [score for score in scores if score is not None]
    missing = {"missing": len(scores) - len(values)} if len(values) < len(scores) else {}
    if not values:
        return {"mean": None, "standard_error": None, "min": None, "max": None, **missing}
    count = len(values)
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1) if count > 1 else None
    return {
        "mean": mean,
        "standard_error": math.sqrt(variance / count) if variance is not None else None,
        "min": min(values),
        "max": max(values),
        **missing,
    }
