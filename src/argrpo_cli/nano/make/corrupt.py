"""Scenes broken in the ways an image policy breaks them, with the damage known from the truth.

A policy errs in tokens: one wrong token, a hole, a picture that starts as one dog and goes on as another. Half
of the corruptions therefore work on tokens; the others bend, erase, repeat, blur or recolour pixels and are mostly
tokenised again, so that what a network learns from them is the damage and not the trace of the tool.

The damage of a picture is 1 - exp(-d / TAU), with d the root mean square colour error against the clean
reconstruction, spread over the area of the object (all errors count, wherever they are). A picture joined from two
clean scenes is measured against the nearer one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from argrpo_cli.geneval.prompts import TAGS
from argrpo_cli.nano import scenes
from argrpo_cli.nano.make.fit import Setting
from argrpo_cli.nano.tokens import decode, encode
from argrpo_cli.policy.llamagen.pretrained import VQModel

SMALL_SIZES = (22, 32)  # side of an object's box in pixels where there are several
TAU = 0.2  # colour error (of 1) at which 63% of the quality is gone; an erased object has about 0.4

SIDE = 8  # tokens along a side of a picture

Propose = Callable[[Tensor, Sequence[int | str]], Tensor]


@dataclass(kw_only=True)
class Pool:
    """Clean scenes in pairs of siblings: rows 2i and 2i + 1 are the same objects in the same colours, placed
    differently.

    tokens int64 [N, T]; images uint8 [N, 3, H, W] (reconstructions of the tokens); coverage float32
    [N, 1, H, W] (the objects' alpha); backgrounds float32 [N, 3] in [0, 1]; class_ids int64 [N], of the first object;
    proposals int64 [N, T], if a policy gave some: for each place the token that it would have put there
    after the true tokens before it.
    """

    tokens: Tensor
    images: Tensor
    coverage: Tensor
    backgrounds: Tensor
    class_ids: Tensor
    proposals: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Corrupted:
    """Broken pictures and how broken they are: `images[i]` was scene `rows[i]` of the pool.

    images uint8 [B, 3, H, W]; rows int64 [B]; damage float32 [B] in [0, 1] against the nearest clean scene; own, the
    same against the scene that the row names (they differ where scenes of two classes were joined); nearest int64 [B],
    the row of the nearest clean scene; kind, the corruption's name.
    """

    pool: Pool
    rows: Tensor
    images: Tensor
    damage: Tensor
    own: Tensor
    nearest: Tensor
    kind: list[str]


def _sibling(rng: np.random.Generator, scene: scenes.Scene) -> scenes.Scene:
    """The same objects, colours and background, a little elsewhere, larger or smaller, sometimes mirrored."""
    alone = len(scene.objects) == 1
    reach, (low, high) = (10, scenes.SINGLE_SIZES) if alone else (4, SMALL_SIZES)
    objects = []
    for placed in scene.objects:
        size = int(np.clip(placed.size + rng.integers(-reach, reach + 1), low, high))
        x, y = (
            int(np.clip(v + rng.integers(-reach, reach + 1), 0, scenes.IMAGE_SIZE - size)) for v in (placed.x, placed.y)
        )
        objects.append(replace(placed, size=size, x=x, y=y, mirror=placed.mirror != (rng.uniform() < 0.4)))
    return replace(scene, objects=tuple(objects))


def _coverage(scene: scenes.Scene) -> np.ndarray:
    """The objects' alpha, float32 [1, 64, 64]."""
    out = np.zeros((1, scenes.IMAGE_SIZE, scenes.IMAGE_SIZE), dtype=np.float32)
    for placed in scene.objects:
        window = out[0, placed.y : placed.y + placed.size, placed.x : placed.x + placed.size]
        np.maximum(window, scenes.object_pixels(placed)[1][..., 0], out=window)
    return out


def colour_error(images: Tensor, clean: Tensor, area: Tensor) -> Tensor:
    """Root of the squared colour error (mean over channels, colours in [0, 1]), all pixels, per pixel of object."""
    squared = ((images.float() - clean.float()) / 255).square().mean(1).flatten(1).sum(1)
    return (squared / area.clamp(min=1)).sqrt()


def damage_of(error: Tensor) -> Tensor:
    """Colour error to damage in [0, 1)."""
    return 1 - torch.exp(-error / TAU)


# Corruptions of tokens: each returns new tokens [B, T] and the row whose scene the picture also resembles.


def _replace(pool: Pool, rows: Tensor, mask: np.ndarray, rng: np.random.Generator, codes: int) -> Tensor:
    """Put wrong tokens where mask [B, T] is set: tokens of other scenes, a third of them any code at all."""
    tokens = pool.tokens[rows]
    other = rng.integers(len(pool), size=tokens.shape)
    place = rng.integers(tokens.shape[1], size=tokens.shape)
    wrong = pool.tokens[torch.from_numpy(other), torch.from_numpy(place)]
    any_code = torch.from_numpy(rng.integers(codes, size=tokens.shape))
    wrong = torch.where(torch.from_numpy(rng.uniform(size=tokens.shape) < 0.33), any_code, wrong)
    return torch.where(torch.from_numpy(mask), wrong, tokens)


def _scatter(pool: Pool, rows: Tensor, rng: np.random.Generator, codes: int) -> tuple[Tensor, Tensor]:
    """Single wrong tokens, up to 60% of them, on the object rather than beside it."""
    weight = 0.25 + F.adaptive_avg_pool2d(pool.coverage[rows], SIDE).flatten(1).numpy()
    weight /= weight.mean(1, keepdims=True)
    fraction = 0.01 + 0.59 * rng.uniform(size=(len(rows), 1)) ** 2
    return _replace(pool, rows, rng.uniform(size=weight.shape) < fraction * weight, rng, codes), rows


def _block(pool: Pool, rows: Tensor, rng: np.random.Generator, codes: int) -> tuple[Tensor, Tensor]:
    """A rectangle of wrong tokens."""
    height, width = rng.integers(1, 5, size=(2, len(rows), 1))
    top, left = (rng.integers(0, SIDE - 1, size=(len(rows), 1)) for _ in range(2))
    y, x = np.divmod(np.arange(SIDE * SIDE), SIDE)
    mask = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return _replace(pool, rows, mask, rng, codes), rows


def _shuffle(pool: Pool, rows: Tensor, rng: np.random.Generator, codes: int) -> tuple[Tensor, Tensor]:
    """Tokens change places with a neighbour."""
    tokens = pool.tokens[rows]
    step = rng.integers(-1, 2, size=(2, *tokens.shape))
    moved = rng.uniform(size=tokens.shape) < rng.uniform(0.03, 0.6, size=(len(rows), 1))
    places = np.arange(SIDE * SIDE)
    y, x = np.divmod(places, SIDE)
    source = np.clip(y + step[0], 0, SIDE - 1) * SIDE + np.clip(x + step[1], 0, SIDE - 1)
    source = np.where(moved, source, places)
    return torch.gather(tokens, 1, torch.from_numpy(source)), rows


def _join(pool: Pool, rows: Tensor, partners: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The partner's tokens from some place in raster order on (as a sampler drifts), or within a smooth blob."""
    tokens, count = pool.tokens[rows], pool.tokens.shape[1]
    start = rng.integers(count // 5, count * 4 // 5, size=(len(rows), 1))
    drift = np.arange(count) >= start
    blob = _smooth(rng, len(rows), 1, 3, SIDE).flatten(1).numpy()
    blob = blob > np.quantile(blob, rng.uniform(0.3, 0.8))
    mask = np.where(rng.uniform(size=(len(rows), 1)) < 0.6, drift, blob)
    return torch.where(torch.from_numpy(mask), pool.tokens[partners], tokens), partners


def _drift(pool: Pool, rows: Tensor, rng: np.random.Generator, codes: int) -> tuple[Tensor, Tensor]:
    """The picture goes on as its sibling: the same object in another place, size or direction."""
    return _join(pool, rows, rows ^ 1, rng)


def _stray(pool: Pool, rows: Tensor, rng: np.random.Generator, codes: int) -> tuple[Tensor, Tensor]:
    """The picture goes on as a scene of any class."""
    return _join(pool, rows, torch.from_numpy(rng.integers(len(pool), size=len(rows))), rng)


def _likely(pool: Pool, rows: Tensor, rng: np.random.Generator, codes: int) -> tuple[Tensor, Tensor]:
    """What a policy might have put: its proposals at some places, or along some stretch of the raster."""
    tokens = pool.tokens[rows]
    share = rng.uniform(0.1, 1, size=(len(rows), 1)) ** 1.5
    scattered = rng.uniform(size=tokens.shape) < share
    place = np.arange(tokens.shape[1]) - rng.integers(0, tokens.shape[1], size=(len(rows), 1))
    stretch = (place >= 0) & (place < share * tokens.shape[1])
    mask = np.where(rng.uniform(size=(len(rows), 1)) < 0.5, scattered, stretch)
    return torch.where(torch.from_numpy(mask), pool.proposals[rows], tokens), rows


# Corruptions of pixels: float images [B, 3, H, W] in [0, 1] to the same.


def _smooth(rng: np.random.Generator, count: int, channels: int, cells: int, size: int = scenes.IMAGE_SIZE) -> Tensor:
    """Smooth random fields [B, C, size, size] with standard normal nodes on a grid of cells x cells."""
    nodes = torch.from_numpy(rng.standard_normal((count, channels, cells, cells), dtype=np.float32))
    return F.interpolate(nodes, size=(size, size), mode="bicubic", align_corners=True)


def _patch(coverage: Tensor, rng: np.random.Generator, low: float, high: float) -> Tensor:
    """Soft smooth masks [B, 1, H, W] over a share between low and high of the object."""
    field = _smooth(rng, len(coverage), 1, 5)
    on_object = torch.where(coverage > 0.5, field, -torch.inf).flatten(1).sort(descending=True).values
    share = _column(rng, len(coverage), low, high).flatten()
    rank = (share * (coverage > 0.5).flatten(1).sum(1)).long().clamp(max=on_object.shape[1] - 1)
    level = on_object.gather(1, rank[:, None])[:, :, None, None]
    return torch.sigmoid((field - level) * 12)


def _column(rng: np.random.Generator, count: int, low: float, high: float) -> Tensor:
    return torch.from_numpy(rng.uniform(low, high, size=(count, 1, 1, 1)).astype(np.float32))


def _moved(images: Tensor, shift: Tensor) -> Tensor:
    """Each pixel from where `shift` [B, 2, H, W] points, in pixels right and down; the border is repeated."""
    base = F.affine_grid(torch.eye(2, 3).expand(len(images), 2, 3), list(images.shape), align_corners=False)
    grid = base + shift.permute(0, 2, 3, 1) * (2 / scenes.IMAGE_SIZE)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _elastic(images: Tensor, coverage: Tensor, backgrounds: Tensor, rng: np.random.Generator) -> Tensor:
    """Bent: a smooth displacement of up to a few pixels."""
    return _moved(images, _smooth(rng, len(images), 2, int(rng.integers(3, 7))) * _column(rng, len(images), 0.5, 5))


def _missing(images: Tensor, coverage: Tensor, backgrounds: Tensor, rng: np.random.Generator) -> Tensor:
    """Parts faded into the background, or gone."""
    mask = _patch(coverage, rng, 0.03, 0.6) * _column(rng, len(images), 0.4, 1.2).clamp(max=1)
    return images + mask * (backgrounds[:, :, None, None] - images)


def _duplicate(images: Tensor, coverage: Tensor, backgrounds: Tensor, rng: np.random.Generator) -> Tensor:
    """A part appears a second time elsewhere, or instead of what was there."""
    angle, length = rng.uniform(0, 2 * np.pi, len(images)), rng.uniform(5, 22, len(images))
    shift = torch.from_numpy((np.stack([np.cos(angle), np.sin(angle)], -1) * length[:, None]).astype(np.float32))
    return images + _patch(coverage, rng, 0.05, 0.5) * (_moved(images, shift[:, :, None, None]) - images)


def _blur(images: Tensor, coverage: Tensor, backgrounds: Tensor, rng: np.random.Generator) -> Tensor:
    """Out of focus, everywhere or in part."""
    radius = int(rng.integers(2, 6))
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / (radius / 2)).square())
    line = (line / line.sum()).expand(3, 1, -1)
    blurred = F.conv2d(F.pad(images, (radius,) * 4, mode="replicate"), line[:, :, None], groups=3)
    blurred = F.conv2d(blurred, line[..., None], groups=3)
    mask = _patch(coverage, rng, 0.2, 1.0).clamp(min=float(rng.uniform(0, 0.8)))
    return images + mask * _column(rng, len(images), 0.4, 1) * (blurred - images)


def _noise(images: Tensor, coverage: Tensor, backgrounds: Tensor, rng: np.random.Generator) -> Tensor:
    """Grain and blotches."""
    fine = torch.from_numpy(rng.standard_normal(tuple(images.shape), dtype=np.float32))
    fine *= _column(rng, len(images), 0, 0.1)
    noise = fine + _smooth(rng, len(images), 3, 16) * _column(rng, len(images), 0, 0.2)
    return images + noise * _patch(coverage, rng, 0.2, 1.0)


def _hue(images: Tensor, coverage: Tensor, backgrounds: Tensor, rng: np.random.Generator) -> Tensor:
    """Parts in a wrong colour."""
    degrees = rng.uniform(40, 180, len(images)) * rng.choice([-1, 1], len(images))
    turn = torch.from_numpy(np.stack([scenes.hue_matrix(float(round(d))) for d in degrees]))
    turned = torch.einsum("bij,bjhw->bihw", turn, images)
    return images + _patch(coverage, rng, 0.1, 0.7) * coverage * (turned - images)


TOKEN_KINDS = {f.__name__[1:]: f for f in (_likely, _scatter, _block, _shuffle, _drift, _stray)}
PIXEL_KINDS = {f.__name__[1:]: f for f in (_elastic, _missing, _duplicate, _blur, _noise, _hue)}
# Shares of the kinds. What samples of the base policy show most (bent, joined, unfinished) has the most.
OF_PIXELS = {"elastic": 0.15, "missing": 0.08, "duplicate": 0.06, "blur": 0.05, "noise": 0.02, "hue": 0.04}
MIXTURE = {"scatter": 0.14, "block": 0.08, "shuffle": 0.06, "drift": 0.24, "stray": 0.08} | OF_PIXELS
OF_TOKENS = {"likely": 0.25, "scatter": 0.10, "block": 0.06, "shuffle": 0.04, "drift": 0.20, "stray": 0.06}
MIXTURE_WITH_PROPOSALS = OF_TOKENS | OF_PIXELS
# In scenes of captions objects come in any colour, so that one in another is not broken.
MIXTURE_OF_CAPTIONS = {name: share for name, share in MIXTURE_WITH_PROPOSALS.items() if name != "hue"}
RETOKENISED = 0.8  # share of the pixel corruptions that pass through the tokenizer


@torch.inference_mode()
def corrupt(
    pool: Pool, rows: Tensor, vq: VQModel, rng: np.random.Generator, mixture: dict[str, float] | None = None
) -> Corrupted:
    """One corrupted picture for each row (int64 [B]) of the pool; `mixture` gives the shares of the kinds."""
    mixture = mixture or (MIXTURE if pool.proposals is None else MIXTURE_WITH_PROPOSALS)
    names, shares = list(mixture), np.array(list(mixture.values()))
    kinds = rng.choice(len(names), size=len(rows), p=shares / shares.sum())
    tokens = pool.tokens[rows].clone()
    partners = rows.clone()
    images = torch.empty((len(rows), *pool.images.shape[1:]), dtype=torch.uint8)
    has_pixels = torch.zeros(len(rows), dtype=torch.bool)  # and is not tokenised again
    for index, name in enumerate(names):
        at = np.flatnonzero(kinds == index)
        if len(at) == 0:
            continue
        own_rows = rows[at]
        if name in TOKEN_KINDS:
            tokens[at], partners[at] = TOKEN_KINDS[name](pool, own_rows, rng, vq.config.codebook_size)
            continue
        clean = pool.images[own_rows].float() / 255
        bent = PIXEL_KINDS[name](clean, pool.coverage[own_rows], pool.backgrounds[own_rows], rng).clamp(0, 1)
        bent = (bent * 255).round().to(torch.uint8)
        again = rng.uniform(size=len(at)) < RETOKENISED
        images[at[~again]], has_pixels[at[~again]] = bent[~again], True
        if again.any():
            tokens[at[again]] = encode(vq, bent[again])
    if not has_pixels.all():
        images[~has_pixels] = decode(vq, tokens[~has_pixels])
    area = pool.coverage.flatten(1).sum(1)
    own = colour_error(images, pool.images[rows], area[rows])
    other = colour_error(images, pool.images[partners], area[partners])
    related = pool.class_ids[partners] == pool.class_ids[rows]
    nearest = torch.minimum(own, other)
    return Corrupted(
        pool=pool,
        rows=rows,
        images=images,
        damage=damage_of(nearest),
        nearest=torch.where(other < own, partners, rows),
        own=damage_of(torch.where(related, nearest, own)),
        kind=[names[i] for i in kinds],
    )


def make_study(
    setting: Setting, seed: int, clean: int, broken: int, propose: Propose | None = None, task: str = "classes"
) -> Corrupted:
    """Scenes of a task, from a seed beside the setting's, and corruptions of them. Needs the emoji font.

    Args:
        clean: how many scenes, even; classes (or categories of captions) in equal shares.
        broken: how many corruptions of each.
        propose: takes tokens and the class ids, or captions, of their scenes to proposals; captions need it.
    """
    rng = setting.rng(seed)
    made: list[scenes.Scene] = []
    for pair in range(clean // 2):
        if task == "classes":
            first = scenes.class_scene(rng, pair % len(scenes.CLASS_NAMES))
        else:
            first = scenes.caption_scene(rng, TAGS[pair % len(TAGS)])
        made += [first, _sibling(rng, first)]
    tokens = encode(setting.vq, torch.from_numpy(scenes.render_all(made)))
    labels = [scene.class_id if task == "classes" else scene.prompt.text for scene in made]
    pool = Pool(
        tokens=tokens,
        images=decode(setting.vq, tokens),
        coverage=torch.from_numpy(np.stack([_coverage(scene) for scene in made])),
        backgrounds=torch.tensor([scene.background for scene in made]),
        class_ids=torch.tensor([scene.objects[0].class_id for scene in made]),
        proposals=propose(tokens, labels) if propose else None,
    )
    rows = torch.arange(clean).repeat(broken)
    study = corrupt(pool, rows, setting.vq, rng, MIXTURE_OF_CAPTIONS if task == "captions" else None)
    setting.say(f"{clean} scenes tokenised, {len(rows)} corruptions, mean damage {study.damage.mean():.2f}")
    return study


def augmented(*pictures: Tensor, generator: torch.Generator, reach: int = 4) -> list[Tensor]:
    """The same variation for each of the given uint8 [B, 3, H, W].

    Mirrored half of the time and shifted by up to `reach` pixels half of the time; the border is repeated. (Tokens
    leave traces on a grid of 8 pixels: half of the pictures stay on it.)
    """
    count, size = len(pictures[0]), pictures[0].shape[-1]
    flip = torch.rand(count, generator=generator) < 0.5
    offset = torch.randint(0, 2 * reach + 1, (2, count), generator=generator)
    offset[:, torch.rand(count, generator=generator) < 0.5] = reach
    y = offset[0, :, None] + torch.arange(size)
    x = offset[1, :, None] + torch.arange(size)
    x = torch.where(flip[:, None], x.flip(1), x)
    rows = torch.arange(count)[:, None, None]
    out = []
    for images in pictures:
        padded = F.pad(images.float(), (reach,) * 4, mode="replicate").to(images.dtype)
        out.append(padded[rows, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2))
    return out


def rank_agreement(score: Tensor, truth: Tensor) -> float:
    """Spearman's rank correlation of two float [B]."""
    ranks = torch.stack([score.argsort().argsort().float(), truth.argsort().argsort().float()])
    return torch.corrcoef(ranks)[0, 1].item()
