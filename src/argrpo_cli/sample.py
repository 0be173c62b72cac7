"""Drawing a folder of images from a policy: what `argrpo sample` does.

The folder holds `sampling.json` (the settings, written first), one PNG per image, grid.png, and
metadata.jsonl (written last, so its presence means the folder is complete).

Several processes share the work by batches, and a batch of which something is missing is drawn whole: an image comes
out of the same batch whoever draws it and whenever, so that its bytes are always the same. That is why the batch size
is kept with the settings and an unfinished folder goes on with its own.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from argrpo_cli.images import read_image
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import (
    atomic_path,
    cannot_write,
    make_dir,
    read_json,
    read_text,
    save_png,
    write_json,
    write_jsonl,
)
from argrpo_cli.system.progress import shared_progress

if TYPE_CHECKING:
    from argrpo_cli.policy import Policy

SETTINGS, METADATA, GRID, NPZ = "sampling.json", "metadata.jsonl", "grid.png", "samples.npz"
BATCH_SIZE = "batch_size"
MOST_OF_ONE = 1_000_000  # images of one class or prompt: more is a slip of the finger
LARGEST = 8192  # pixels a side
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
OUR_IMAGE = re.compile(r"\d{3,}-[a-z0-9-]*-\d{5,}\.png")
GRID_COLUMNS, GRID_ROWS = 8, 32  # a look at the samples, not all of them


@dataclass(frozen=True)
class SamplingSettings:
    """What decides the images. Batch size and device change them by rounding at most, and are not part of it."""

    policy: str
    classes: tuple[str, ...] = ()  # names or ids; none means every class
    prompts: tuple[str, ...] = ()  # captions, for a policy that reads them
    n: int = 8  # images per class or prompt
    seed: int = 0  # of the first image of each class or prompt; the next take seed + 1, ...
    cfg_scale: float = 2.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    cfg_interval: int = -1  # the last decoding step that is guided; -1 guides all
    dtype: str = "float32"
    resize: int | None = None  # pixels a side that the images are scaled to, see `Policy.decode`; None as drawn


@dataclass(frozen=True)
class SamplingResult:
    """Where the images are, how many, and how many of them an earlier, interrupted run had drawn."""

    folder: Path
    grid: Path
    count: int
    kept: int
    first: bool = True  # of several processes, the one that reports


@dataclass(frozen=True)
class _Shot:
    """One image to draw."""

    condition: Condition
    name: str  # of the class, or the prompt
    seed: int
    file: str


def run_sampling(
    settings: SamplingSettings,
    out: Path,
    *,
    batch_size: int = 64,
    device: str = "auto",
    text_device: str = "same",
    npz: bool = False,
    overwrite: bool = False,
    show_progress: bool = False,
) -> SamplingResult:
    """Draw the images into `out`.

    An `out` that an interrupted call with the same settings left is completed. Anything else in it is an
    error, unless `overwrite`, which removes the samples of an earlier call (and no other file) first.

    Raises:
        UserError: a setting out of range, an unknown policy or class, an `out` in use or not writable.
    """
    from argrpo_cli.policy import load_policy
    from argrpo_cli.system.processes import join_team

    _check(settings)
    team = join_team(device)
    team.lead(lambda: _check_folder(out, overwrite))
    policy = team.together(lambda: load_policy(settings.policy, team.device, settings.dtype, text_device))
    shots = team.together(lambda: _plan(policy, settings))
    asked = {"classes": list(settings.classes), "prompts": list(settings.prompts)}
    identity = {**asdict(settings), **asked, "weights": policy.fingerprint()}
    team.lead(lambda: _prepare_folder(out, identity, batch_size, overwrite))
    batch_size = read_json(out / SETTINGS)[BATCH_SIZE]

    batches = [shots[start : start + batch_size] for start in range(0, len(shots), batch_size)]
    missing = team.together(lambda: [[shot for shot in batch if not _whole(out / shot.file)] for batch in batches])
    left = sum(map(len, missing))
    mine = [pair for pair in zip(batches, missing, strict=True) if pair[1]][team.index :: team.count]

    def draw() -> None:
        share = sum(len(wanted) for _, wanted in mine) if show_progress else 0
        with shared_progress(team, "sampling", share) as advance:
            for batch, wanted in mine:
                _draw(policy, settings, batch, wanted, out)
                advance(len(wanted))

    team.together(draw)
    team.lead(lambda: _finish(shots, settings, out, npz))
    return SamplingResult(folder=out, grid=out / GRID, count=len(shots), kept=len(shots) - left, first=team.index == 0)


def file_name(number: int, name: str, seed: int) -> str:
    """`003-dog-00000.png`: the class id (or the place among the prompts), what is drawn, and the seed."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:40].strip("-")
    return f"{number:03d}-{slug}-{seed:05d}.png"


def _check(settings: SamplingSettings) -> None:
    for name, value, good, allowed in (
        ("cfg_scale", settings.cfg_scale, settings.cfg_scale >= 1, "1 or more"),
        ("temperature", settings.temperature, settings.temperature >= 0, "0 or more"),
        ("top_p", settings.top_p, 0 < settings.top_p <= 1, "above 0, at most 1"),
    ):
        if not (good and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} {value:g}: must be {allowed}")
    if settings.resize is not None and not 1 <= settings.resize <= LARGEST:
        raise UserError(f"--resize {settings.resize}: must be 1 to {LARGEST}")
    for name, least in (("n", 1), ("seed", 0), ("top_k", 0), ("cfg_interval", -1)):
        if getattr(settings, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be {least} or more")
    if settings.n > MOST_OF_ONE:
        raise UserError(f"--n {settings.n}: must be at most {MOST_OF_ONE} of one class or prompt")
    if settings.seed + settings.n > 2**32:  # torch's CPU generator looks at no more bits: images would repeat
        last = settings.seed + settings.n - 1
        raise UserError(f"--seed {settings.seed} with --n {settings.n}: the last seed, {last}, must be below 2**32")


def _plan(policy: Policy, settings: SamplingSettings) -> list[_Shot]:
    """The images to draw, condition by condition in the order asked for, each condition once."""
    captions = policy.text_encoder is not None
    if captions and settings.classes:
        raise UserError(f"{settings.policy} draws captions, not classes; give --prompt instead of --class")
    if captions and not settings.prompts:
        raise UserError(f"{settings.policy} draws captions; say what with --prompt, or --prompts FILE")
    if settings.prompts and not captions:
        raise UserError(f"{settings.policy} draws classes, not captions; give --class instead of --prompt")
    wanted: Sequence[str | int] = settings.prompts or settings.classes or range(len(policy.class_names))
    shots = []
    for place, condition in enumerate(dict.fromkeys(policy.conditions(list(wanted)))):
        number = place if condition.class_id is None else condition.class_id
        name = condition.prompt if condition.class_id is None else policy.class_names[condition.class_id]
        for seed in range(settings.seed, settings.seed + settings.n):
            shots.append(_Shot(condition, name, seed, file_name(number, name, seed)))
    return shots


def _draw(
    policy: Policy, settings: SamplingSettings, batch: Sequence[_Shot], wanted: Sequence[_Shot], out: Path
) -> None:
    """Draw a batch and write those of its images that are wanted."""
    from PIL import Image

    tokens = policy.sample(
        [shot.condition for shot in batch],
        cfg_scale=settings.cfg_scale,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        cfg_interval=settings.cfg_interval,
        seeds=[shot.seed for shot in batch],
        batch_size=len(batch),
    )
    pixels = policy.decode(tokens, settings.resize).permute(0, 2, 3, 1).cpu().numpy()
    missing = {shot.file for shot in wanted}
    for shot, array in zip(batch, pixels, strict=True):
        if shot.file in missing:
            save_png(out / shot.file, Image.fromarray(array))


def _whole(path: Path) -> bool:
    """Whether a PNG is there, to its end and with the checksums that it was written with."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.verify()
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), 2)
            return file.read() == PNG_END
    except (OSError, SyntaxError, ValueError):
        return False


def _finish(shots: Sequence[_Shot], settings: SamplingSettings, out: Path, npz: bool) -> None:
    """The files of which there is one, metadata last."""
    _write_grid(shots, settings.n, out)
    if npz:
        _write_npz([out / shot.file for shot in shots], out / NPZ)
    write_jsonl(out / METADATA, [_row(shot, settings) for shot in shots])


def _row(shot: _Shot, settings: SamplingSettings) -> dict[str, Any]:
    of_class = {"class_id": shot.condition.class_id, "class_name": shot.name}
    return {
        "file": shot.file,
        "prompt": shot.condition.prompt,
        **(of_class if shot.condition.class_id is not None else {}),
        "seed": shot.seed,
        "policy": settings.policy,
        "cfg_scale": settings.cfg_scale,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "cfg_interval": settings.cfg_interval,
        "dtype": settings.dtype,
        **({} if settings.resize is None else {"resize": settings.resize}),
    }


def _check_folder(out: Path, overwrite: bool) -> None:
    """What can be refused before the policy is loaded."""
    if out.exists() and not out.is_dir():
        raise UserError(f"cannot write to {out}: it is a file, not a folder")
    if out.is_dir() and not overwrite and _others(out) and not (out / SETTINGS).is_file():
        raise UserError(f"{out} is not empty; choose another --out")


def _prepare_folder(out: Path, identity: dict[str, Any], batch_size: int, overwrite: bool) -> None:
    """Make `out` ready: new, emptied of older samples, or an unfinished one of the same `identity`."""
    settings = out / SETTINGS
    if settings.is_file() and not overwrite and _ours(out):
        try:
            held = json.loads(read_text(settings))
        except ValueError:
            held = None
        if not isinstance(held, dict) or not isinstance(held.pop(BATCH_SIZE, None), int):
            held = {}
        if held != identity:
            other = ", ".join(key for key in identity if held.get(key) != identity[key])
            mend = "choose another --out, or --overwrite to replace"
            raise UserError(f"{out} holds samples of other settings ({other}); {mend}")
        return  # with its batch size: images depend on it by rounding
    make_dir(out)
    if settings.is_file() and overwrite:
        for path in _ours(out):
            try:
                path.unlink()
            except OSError as error:
                raise cannot_write(path, error) from error
    write_json(settings, {**identity, BATCH_SIZE: batch_size})


def _ours(out: Path) -> list[Path]:
    """The files in `out` that an earlier call wrote; metadata first, for it vouches for the others."""
    fixed = [out / name for name in (METADATA, GRID, NPZ) if (out / name).is_file()]
    return fixed + [path for path in out.iterdir() if OUR_IMAGE.fullmatch(path.name)]


def _others(out: Path) -> bool:
    try:
        return any(not path.name.startswith(".") for path in out.iterdir())
    except OSError as error:
        raise UserError(f"cannot read the folder {out}: {error.strerror}") from error


def _write_grid(shots: Sequence[_Shot], per_class: int, out: Path) -> None:
    """grid.png: a row per class, as many as fit a sheet."""
    from argrpo_cli.system.grids import image_grid

    columns = min(per_class, GRID_COLUMNS)
    rows = [shots[start : start + columns] for start in range(0, len(shots), per_class)][:GRID_ROWS]
    images = np.stack([read_image(out / shot.file) for row in rows for shot in row])
    scale = max(1, 128 // images.shape[-1])
    save_png(out / GRID, image_grid(images, columns, [row[0].name for row in rows], scale=scale))


def _write_npz(paths: Sequence[Path], target: Path) -> None:
    """`arr_0` uint8 [N, H, W, 3], and `index` int64 [N], the place of each image in metadata.jsonl.

    Shuffled, always in the same way: ADM's evaluator takes the inception score of 5,000 images in a row, and in the
    order of the classes those would be 100 classes. Streamed, so that any number fits in memory.
    """
    order = np.random.default_rng(0).permutation(len(paths))
    first = read_image(paths[0])
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), *first.shape[1:], 3)}
    with atomic_path(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for index in order:
                member.write(np.ascontiguousarray(read_image(paths[index]).transpose(1, 2, 0)).tobytes())
        with archive.open("index.npy", "w") as member:
            np.lib.format.write_array(member, order)
