"""Real images to learn from, each with what it shows: pictures of a folder or a webdataset, scenes of the nano world,
or codes that somebody has made.

    real = open_real(recipe, policy)          # what there is and what it shows; no picture is looked at yet
    real.tokenise(team)                       # once; the codes are kept in the user's cache
    real.tokens([3, 1]), real.pixels([3, 1])

A picture is cropped in the middle, as `image_codes.read_cropped` says: one view of each, without the ten crops and the
mirror images that LlamaGen's and CCA's authors train on. Codes are in memory, two bytes each: 1.5 GB of ImageNet at 384
px.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from argrpo_cli.captions import asked_by_the_benchmark
from argrpo_cli.image_codes import CHUNK, CODES, Cropped, read_cropped, read_crops, tokenise
from argrpo_cli.image_labels import balanced_order, conditions_of, open_labelled
from argrpo_cli.image_prompts import find_items
from argrpo_cli.images import ImageSet, Item, Read
from argrpo_cli.kept import in_batches
from argrpo_cli.listing import METADATA, image_files, is_npz
from argrpo_cli.nano.scenes import IMAGE_SIZE as NANO_SIZE
from argrpo_cli.networks.distance import load_distance
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import expanded, read_text, user_cache
from argrpo_cli.system.npz import Npz
from argrpo_cli.training.shards import NANO, members, shards

if TYPE_CHECKING:
    from argrpo_cli.nano.scenes import Scene
    from argrpo_cli.networks.distance import Distance
    from argrpo_cli.policy import Policy
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.recipe.real import RealSection
    from argrpo_cli.system.processes import Team

SCENES = 10_000  # of the nano world, where no limit is said
SCENE_SEED = 83  # apart from those that its networks were trained and measured on


@dataclass
class Real:
    """Images of one place.

    Attributes:
        conditions: what each shows, as the policy reads it.
        images: none where there are codes alone.
        cropped: see `image_codes.read_crops`; None for files of `images`.
        codes: whole numbers [N, T], once they are there.
        distance: of two pictures, for a method that compares them.
    """

    policy: Policy
    conditions: list[Condition]
    images: ImageSet | None = None
    cropped: Cropped | None = None
    codes: Tensor | None = None
    distance: Distance | None = None

    def tokenise(self, team: Team, cache: Path | None = None) -> None:
        """Fill `codes`; all processes of the team call this, and share the work."""
        if self.codes is None:
            store = tokenise(self.images, self.policy, cache or user_cache() / "codes", team, self.cropped)
            self.codes = store.column(in_batches(self.images.items, CHUNK), CODES)

    @cached_property
    def digest(self) -> str:
        """A hash of codes and conditions: a run is continued with the same."""
        content = hashlib.sha256(repr(self.conditions).encode())
        content.update(self.codes.contiguous().numpy())  # as they are: a copy may take gigabytes
        return content.hexdigest()[:16]

    def tokens(self, rows: Sequence[int]) -> Tensor:
        """Int64 [B, T] of these images."""
        return self.codes[torch.tensor(rows)].long()

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """Uint8 [B, 3, S, S] of these images; of codes what they are decoded to."""
        if self.images is None:
            return self.policy.decode(self.tokens(rows).to(self.policy.model.device)).cpu()
        items = [self.images.items[row] for row in rows]
        return read_crops(self.images, items, self.policy.card.image_size, self.cropped)


def open_real(recipe: Recipe, policy: Policy) -> Real:
    """What a recipe's `real` names, and the distance of two pictures where its method needs one.

    Raises:
        UserError: as `open_images`; or the distance's weights cannot be had.
    """
    real, pixel = open_images(recipe.real, policy), recipe.pixel
    if recipe.method == "pixel" and pixel.perceptual_weight:
        captions, device = policy.card.reads == "captions", str(policy.model.device)
        if pixel.perceptual == "nano" and policy.card.image_size != NANO_SIZE:
            own = f"{policy.card.name} draws {policy.card.image_size}"
            raise UserError(f"pixel.perceptual nano: of {NANO_SIZE} pixels, and {own}; use lpips")
        real.distance = load_distance(pixel.perceptual, device, captions, pixel.perceptual_folder)
    return real


def open_images(section: RealSection, policy: Policy) -> Real:
    """What a recipe's `real` names.

    Raises:
        UserError: it is not there, holds fewer than two images, or does not say of one what it shows.
    """
    real = _open(section, policy)
    if len(real.conditions) < 2:  # of which none could be held against another
        raise UserError(f"real.path {section.path}: {len(real.conditions)} images are too few to learn from; give more")
    return real


def _open(section: RealSection, policy: Policy) -> Real:
    path, classes = expanded(section.path), policy.card.reads == "classes"
    if section.captions is not None and (classes or section.path == NANO or not os.path.isdir(path)):
        raise UserError(f"real.captions {section.captions}: only for a folder and a policy of captions; leave it out")
    if section.path == NANO:
        return _scenes(section.limit or SCENES, policy)
    if is_npz(path):
        return _of_codes(path, section.limit, policy)
    if tars := shards(section.path):
        items = list(members(tars, section.column, None if classes else section.limit))
        images = ImageSet(tars[0].parent, items, f"the files beside each in {section.path}")
        cropped: Cropped | None = _cropped_member
    elif os.path.isdir(path):
        images, cropped = open_labelled(path) if classes else _captioned(path, section), None
    else:
        raise UserError(f"real.path {section.path}: no folder, .npz or .tar files; or say nano, for rendered scenes")
    if classes:
        order = balanced_order([str(item.extra.get("label")) for item in images.items])[: section.limit]
        images = replace(images, items=[images.items[index] for index in order])
        _refuse_unsaid(images, lambda item: item.extra.get("label"), section)
        return Real(policy, conditions_of(images, policy), images, cropped)
    images = replace(images, items=images.items[: section.limit])
    _refuse_unsaid(images, lambda item: item.condition, section)
    return Real(policy, _asked(policy, [item.condition.prompt for item in images.items], path), images, cropped)


def _asked(policy: Policy, asked: Sequence[str | int], path: Path) -> list[Condition]:
    try:
        return policy.conditions(asked)
    except UserError as error:
        raise UserError(f"real.path {path}: {error}") from error


def _refuse_unsaid(images: ImageSet, said: Callable[[Item], object], section: RealSection) -> None:
    silent = next((item.file for item in images.items if said(item) is None), None)
    if silent is not None:
        raise UserError(f"real.path {section.path}: nothing says what {silent} shows; see real.captions, real.column")


def _captioned(folder: Path, section: RealSection) -> ImageSet:
    """Pictures with captions: of `real.captions`, of metadata.jsonl, of text files beside them, or else by names."""
    if section.captions is not None:
        if (folder / METADATA).exists():
            raise UserError(f"real.captions: {folder / METADATA} says what the pictures show; leave it out")
        return find_items([folder], captions=expanded(section.captions))
    if not (folder / METADATA).exists():
        files, _ = image_files(folder)
        if (folder / files[0]).with_suffix(".txt").is_file():
            images = find_items([folder])
            return replace(images, items=[replace(item, condition=_beside(folder, item)) for item in images.items])
    return find_items([folder])


def _beside(folder: Path, item: Item) -> Condition | None:
    text = (folder / item.file).with_suffix(".txt")
    caption = " ".join(read_text(text).split()) if text.is_file() else ""
    return Condition(caption) if caption else None


def _cropped_member(item: Item, size: int) -> Read:
    return partial(read_cropped, Path(item.file), size, read=lambda _, most, upright: item.read(most, upright=upright))


def _scenes(count: int, policy: Policy) -> Real:
    """Rendered scenes of the nano world, of all classes alike; of captions none that its benchmark asks for."""
    from argrpo_cli.nano import scenes

    card = policy.card
    if not scenes.draws_nano_world(card):
        raise UserError(
            f"real.path nano: scenes of the nano world are nothing to {card.name}; name a folder of pictures"
        )
    scenes.find_font()
    made = [_scene(index, card.reads == "classes") for index in range(count)]

    def read(scene: Scene, most: int | None = None) -> np.ndarray:
        return scenes.render_all([scene])[0]

    items = [Item(f"{card.reads} {index}", f"{SCENE_SEED}", partial(read, one)) for index, one in enumerate(made)]
    asked = [one.class_id for one in made] if card.reads == "classes" else [one.prompt.text for one in made]
    return Real(policy, policy.conditions(asked), ImageSet(Path(NANO), items), lambda item, size: item.read)


def _scene(index: int, of_class: bool) -> Scene:
    """The scene with this number, which depends on nothing else."""
    from argrpo_cli.nano import scenes

    rng = np.random.default_rng([SCENE_SEED, index])
    if of_class:
        return scenes.class_scene(rng, index % len(scenes.CLASS_NAMES))
    while True:
        scene = scenes.caption_scene(rng)
        if not asked_by_the_benchmark(scene.prompt):
            return scene


def _of_codes(path: Path, limit: int | None, policy: Policy) -> Real:
    """Codes that were made before, with `class_ids` or `prompts`."""
    file, card, classes = Npz(path), policy.card, policy.card.reads == "classes"
    key, what = ("class_ids", "whole numbers") if classes else ("prompts", "texts")
    for name in (CODES, key):
        if name not in file.keys:
            raise UserError(f"{path} has {file.content}, and no array {name!r}; {CODES} [N, T] and {key} [N] are read")
    codes, asked = file.read(CODES), file.read(key)
    shape = f"{codes.dtype} {list(codes.shape)}"
    if codes.dtype.kind not in "iu" or codes.ndim != 2 or codes.shape[1] != card.tokens:
        raise UserError(f"{path}: {CODES} is {shape}; {card.name} reads whole numbers [N, {card.tokens}]")
    count = len(codes)
    if asked.shape != (count,) or asked.dtype.kind not in ("iu" if classes else "U"):
        raise UserError(f"{path}: {key} is {asked.dtype} {list(asked.shape)}; {count} {what} are read, one an image")
    low, high = (codes.min(), codes.max()) if count else (0, 0)
    if low < 0 or high >= card.codes:
        raise UserError(f"{path}: {CODES} holds {low} to {high}; {card.name} has the codes 0 to {card.codes - 1}")
    order = balanced_order(asked.tolist())[:limit] if classes else list(range(count))[:limit]
    kept = torch.from_numpy(codes[order].astype(np.int16 if card.codes <= 2**15 else np.int32))
    return Real(policy, _asked(policy, asked[order].tolist(), path), codes=kept)
