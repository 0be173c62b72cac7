"""Drawing a folder of images from a policy: what `argrpo sample` does.

The folder holds settings.json (written first), one PNG per image, grid.png, and metadata.jsonl (written last, so its
presence means the folder is complete).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from argrpo_cli.images import SAMPLE
from argrpo_cli.kept import SETTINGS, check_claim, claim
from argrpo_cli.listing import EARLIER_SETTINGS, METADATA
from argrpo_cli.pictures import read_image
from argrpo_cli.policy.folder import LARGEST, check_weights_at_hand, choose_sampling, glance, say_unfinished, unfinished
from argrpo_cli.shapes import Condition, Sampling, Shot
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import atomic_path, make_dir, read_json, save_png, writable, write_json, write_jsonl
from argrpo_cli.system.processes import notice

if TYPE_CHECKING:
    from argrpo_cli.policy.protocol import Card, Policy

GRID, NPZ = "grid.png", "samples.npz"
MOST_OF_ONE = 1_000_000  # images of one class or prompt: more is a slip of the finger
OUR_IMAGE = re.compile(r"\d{3,}-[a-z0-9-]*-\d{5,}\.png")
GRID_COLUMNS, GRID_ROWS = 8, 32  # a look at the samples, not all of them


@dataclass(frozen=True)
class Order:
    """What decides the images. Batch size and device change them by rounding at most, and are not part of it.

    Attributes:
        classes: names or ids; none means every class.
        prompts: captions, for a policy that reads them.
        n: images per class or prompt.
        seed: of the first image of each class or prompt; the next take seed + 1, ...
        sampling: settings of `Sampling` that are given; the others are as the policy says, or else as usual.
        resize: pixels a side that the images are scaled to, see `Policy.decode`; None as drawn.
    """

    policy: str
    classes: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    n: int = 8
    seed: int = 0
    sampling: Mapping[str, Any] = field(default_factory=dict)
    resize: int | None = None

    def check_kind(self, reads: str) -> None:
        """UserError where a policy that reads "classes" or "captions" is asked for the other."""
        if reads == "captions" and self.classes:
            raise UserError(f"{self.policy} draws captions, not classes; give --prompt instead of --class")
        if reads == "captions" and not self.prompts:
            raise UserError(f"{self.policy} draws captions; say what with --prompt, or --prompts FILE")
        if self.prompts and reads == "classes":
            raise UserError(f"{self.policy} draws classes, not captions; give --class instead of --prompt")


def draw_samples(
    order: Order,
    out: Path,
    *,
    batch_size: int = 64,
    device: str = "auto",
    text_device: str = "same",
    npz: bool = False,
    overwrite: bool = False,
) -> tuple[int, int] | None:
    """Draw the images into `out`; several processes share the work.

    An `out` that an interrupted call with the same order left is completed, in batches of its own size. Anything else
    in it is an error, unless `overwrite`, which removes the samples of an earlier call (and no other file) first.

    Returns:
        How many images there are, and how many of them an earlier call had drawn; None in all processes but the first.

    Raises:
        UserError: a setting out of range, an unknown policy or class, an `out` in use or not writable.
    """
    check_resize(order.resize)
    if order.n > MOST_OF_ONE:
        raise UserError(f"--n {order.n}: must be at most {MOST_OF_ONE} of one class or prompt")
    for prompt in order.prompts:
        Condition(prompt)  # which may refuse it
    last = order.seed + order.n - 1
    if last >= 2**32:  # torch's CPU generator looks at no more bits: images would repeat
        raise UserError(f"--seed {order.seed} with --n {order.n}: the last seed, {last}, must be below 2**32")
    seen = glance(order.policy)
    if seen is not None:
        order.check_kind(seen.reads)
        seen.check(order.classes)
    if not overwrite and (out / EARLIER_SETTINGS).is_file():
        raise UserError(f"{out} holds samples of an earlier version; choose another --out, or --overwrite to replace")
    if not overwrite or not out.is_dir():
        check_claim(out)
    check_weights_at_hand(order.policy)
    say_unfinished(order.policy)
    notice(f"loading {order.policy} ...")
    from argrpo_cli.draw import draw_into
    from argrpo_cli.policy import load_policy
    from argrpo_cli.system.processes import join_team

    where = unfinished(order.policy)
    team, dtype = join_team(device), Sampling(**order.sampling).check().dtype
    policy = team.together(lambda: load_policy(order.policy, team.device, dtype, text_device))
    sampling = choose_sampling(order.policy, policy.card.sampling, order.sampling)
    shots = team.together(lambda: _shots(policy, order))
    identity = {"command": SAMPLE, **asdict(order), **asdict(sampling), "weights": policy.fingerprint()}
    del identity["sampling"]  # its settings stand beside the others
    batch_size = team.from_lead(lambda: _claim(out, identity, batch_size, overwrite))
    before = draw_into(
        out, policy, shots, sampling, batch_size=batch_size, label="sampling", team=team, size=order.resize
    )

    def finish() -> None:
        _write_grid(shots, policy.card, order.n, out)
        if npz:
            _write_npz([out / shot.file for shot in shots], out / NPZ)
        rows = [_row(shot, policy.card, order, sampling) for shot in shots]
        if where:
            rows = [row | {"unfinished": where} for row in rows]
        write_jsonl(out / METADATA, rows)

    team.lead(finish)
    return (len(shots), before) if team.first else None


def file_name(number: int, name: str, seed: int) -> str:
    """`003-dog-00000.png`: the class id (or the place among the prompts), what is drawn, and the seed."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:40].strip("-")
    return f"{number:03d}-{slug}-{seed:05d}.png"


def check_resize(resize: int | None) -> None:
    """UserError for a --resize out of range."""
    if resize is not None and not 1 <= resize <= LARGEST:
        raise UserError(f"--resize {resize}: must be 1 to {LARGEST}")


def _shots(policy: Policy, order: Order) -> list[Shot]:
    """The images to draw, condition by condition in the order asked for, each condition once."""
    order.check_kind(policy.card.reads)
    names: Sequence[str | int] = order.prompts or order.classes or range(len(policy.card.names))
    shots = []
    for place, condition in enumerate(dict.fromkeys(policy.conditions(list(names)))):
        number = place if condition.class_id is None else condition.class_id
        for seed in range(order.seed, order.seed + order.n):
            shots.append(Shot(condition, seed, file_name(number, _name(condition, policy.card), seed)))
    return shots


def _name(condition: Condition, card: Card) -> str:
    """What is drawn: the name of the class, or the prompt."""
    return condition.prompt if condition.class_id is None else card.names[condition.class_id]


def _row(shot: Shot, card: Card, order: Order, sampling: Sampling) -> dict[str, Any]:
    condition = shot.condition
    of_class = {"class_id": condition.class_id, "class_name": _name(condition, card)}
    return {
        "file": shot.file,
        "prompt": condition.prompt,
        **(of_class if condition.class_id is not None else {}),
        "seed": shot.seed,
        "policy": order.policy,
        **asdict(sampling),
        **({} if order.resize is None else {"resize": order.resize}),
    }


def _claim(out: Path, identity: dict[str, Any], batch_size: int, overwrite: bool) -> int:
    """Make `out` ready: new, emptied of older samples, or an unfinished one of the same `identity`."""
    there = any((out / name).is_file() for name in (SETTINGS, EARLIER_SETTINGS))
    if overwrite and not _is_of_another_command(out):
        images = [path.name for path in out.iterdir() if OUR_IMAGE.fullmatch(path.name)] if there else []
        # Metadata first, for it vouches for the others.
        for path in [out / name for name in (METADATA, GRID, NPZ, EARLIER_SETTINGS, *images)] if there else []:
            with writable(path):
                path.unlink(missing_ok=True)
        write_json(make_dir(out) / SETTINGS, {**identity, "batch_size": batch_size})
    mend = "choose another --out, or --overwrite to replace"
    return claim(out, identity, batch_size, "samples of other settings", mend)


def _is_of_another_command(out: Path) -> bool:
    try:
        return read_json(out / SETTINGS).get("command") != SAMPLE
    except UserError:  # none, or a damaged one
        return False


def _write_grid(shots: Sequence[Shot], card: Card, per_class: int, out: Path) -> None:
    """grid.png: a row per class, as many as fit a sheet."""
    import numpy as np

    from argrpo_cli.system.grids import image_grid

    columns = min(per_class, GRID_COLUMNS)
    rows = [shots[start : start + columns] for start in range(0, len(shots), per_class)][:GRID_ROWS]
    images = np.stack([read_image(out / shot.file) for row in rows for shot in row])
    scale = max(1, 128 // images.shape[-1])
    save_png(out / GRID, image_grid(images, columns, [_name(row[0].condition, card) for row in rows], scale=scale))


def _write_npz(paths: Sequence[Path], target: Path) -> None:
    """`arr_0` uint8 [N, H, W, 3], and `index` int64 [N], the place of each image in metadata.jsonl.

    Shuffled, always in the same way: ADM's evaluator takes the inception score of 5,000 images in a row, and in the
    order of the classes those would be 100 classes. Streamed, so that any number fits in memory.
    """
    import numpy as np

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
