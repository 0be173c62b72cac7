"""Trains nano-detector on rendered scenes whose objects, places and colours are known.

    python -m argrpo_cli.nano.make.train_detector [OUT_DIR] [--steps 1500]

Half of the scenes are of the text task, half hold one to four objects of any kind anywhere, so that the detector
expects no grammar. Half of the pictures it learns from are reconstructions by the tokenizer, since all it will be
shown later are.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from argrpo_cli.geneval.nano_detector import NANO_THRESHOLDS, STRIDE, Detector, DetectorNet, Found
from argrpo_cli.nano import scenes
from argrpo_cli.nano.make.training import decay_groups, fit
from argrpo_cli.nano.tokens import decode, encode, load_tokenizer
from argrpo_cli.networks.weights import save_network
from argrpo_cli.policy.llamagen.vq import from_uint8
from argrpo_cli.system.files import WEIGHTS

GEOMETRY = {"width": 80, "dilations": [1, 2, 4, 1]}
SCENES, UNSEEN = 9000, 600
BATCH = 48
CELLS = scenes.IMAGE_SIZE // STRIDE
SPREAD = 0.12  # of a centre's bell over the neighbouring cells, in sides of the box
MATCHING_OVERLAP = 0.5  # intersection over union from which a found box counts


def free_scene(rng: np.random.Generator) -> scenes.Scene:
    """One to four objects of any class, size and place that overlap little; half of them in a colour word."""
    objects: list[scenes.Placed] = []
    for _ in range(int(rng.integers(1, 5))):
        for _ in range(20):
            size = int(rng.integers(20, 61))
            x, y = (int(v) for v in rng.integers(0, scenes.IMAGE_SIZE - size + 1, 2))
            clash = [_shared((x, y, x + size, y + size), (o.x, o.y, o.x + o.size, o.y + o.size)) for o in objects]
            if max(clash, default=0.0) < 0.15:
                color = list(scenes.COLORS)[rng.integers(len(scenes.COLORS))] if rng.integers(2) else None
                hue = 0.0 if color else float(rng.integers(-6, 7)) * scenes.HUE_RANGE / 6
                class_id = int(rng.integers(len(scenes.CLASS_NAMES)))
                objects.append(scenes.Placed(class_id, size, x, y, bool(rng.integers(2)), hue, color))
                break
    return scenes.Scene(tuple(objects), scenes.random_background(rng))


def _shared(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Overlap of two boxes as a share of the smaller."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0.0, width) * max(0.0, height) / smaller


def true_box(placed: scenes.Placed) -> tuple[float, float, float, float]:
    """The box around what is drawn of an object, in pixels."""
    solid = scenes.object_pixels(placed)[1][..., 0] > 0.2
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    return (placed.x + columns[0], placed.y + rows[0], placed.x + columns[-1] + 1, placed.y + rows[-1] + 1)


def truth(scene: scenes.Scene) -> list[Found]:
    """The objects of a scene as a perfect detector would report them; no colours where none was asked for."""
    return [
        Found(
            scenes.CLASS_NAMES[placed.class_id],
            tuple(float(v) for v in true_box(placed)),
            1.0,
            {placed.color: 1.0} if placed.color else {},
        )
        for placed in scene.objects
    ]


def targets(made: list[list[Found]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the maps should say.

    Returns:
        bells float32 [B, C, 16, 16], 1 at centres; a row (image, row, column) per object, int64 [N, 3]; distances to
        the sides [N, 4]; and colour ids int64 [N], -1 where the object has none.
    """
    bells = torch.zeros(len(made), len(scenes.CLASS_NAMES), CELLS, CELLS)
    axis = (torch.arange(CELLS) + 0.5) * STRIDE
    places, sides, colors = [], [], []
    for index, objects in enumerate(made):
        for one in objects:
            x0, y0, x1, y1 = one.box
            column = min(CELLS - 1, int((x0 + x1) / 2 / STRIDE))
            row = min(CELLS - 1, int((y0 + y1) / 2 / STRIDE))
            across = torch.exp(-0.5 * ((axis - axis[column]) / (SPREAD * (x1 - x0))) ** 2)
            down = torch.exp(-0.5 * ((axis - axis[row]) / (SPREAD * (y1 - y0))) ** 2)
            bell = bells[index, scenes.CLASS_NAMES.index(one.name)]
            torch.maximum(bell, down[:, None] * across[None], out=bell)
            x, y = axis[column].item(), axis[row].item()
            places.append((index, row, column))
            sides.append((x - x0, y - y0, x1 - x, y1 - y))
            colors.append(list(scenes.COLORS).index(one.color) if one.colors else -1)
    return bells, torch.tensor(places), torch.tensor(sides), torch.tensor(colors)


def centre_loss(logits: Tensor, bells: Tensor) -> Tensor:
    """Focal loss of centre maps against bells (Law and Deng 2018, eq. 1), per object."""
    p = logits.sigmoid()
    hit = bells == 1
    found = -((1 - p) ** 2 * F.logsigmoid(logits))[hit].sum()
    empty = -((1 - bells) ** 4 * p**2 * F.logsigmoid(-logits))[~hit].sum()
    return (found + empty) / hit.sum().clamp(min=1)


def make_scenes(seed: int, count: int) -> tuple[Tensor, list[scenes.Scene]]:
    """Renderings uint8 [count, 3, 64, 64] and their scenes, half of the text task and half free, in turn."""
    rng = np.random.default_rng(seed)
    made = [free_scene(rng) if index % 2 else scenes.caption_scene(rng) for index in range(count)]
    images = np.stack([scenes.render(scene) for scene in made]).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(images)), made


def train(
    out_dir: str | Path,
    seed: int = 0,
    steps: int = 1500,
    weights: Path = WEIGHTS,
    log=print,
) -> DetectorNet:
    """Train from a fixed seed; save float16 weights; return the network."""
    started = time.time()
    torch.manual_seed(seed)
    say = lambda line: log(f"nano-detector: {line}, {time.time() - started:.0f} s")  # noqa: E731
    vq = load_tokenizer(weights / "nano-vq")
    raw, made = make_scenes(seed + 5, SCENES)
    known = [truth(scene) for scene in made]
    again = decode(vq, encode(vq, raw))
    say(f"{SCENES} scenes rendered")
    unseen_raw, unseen_made = make_scenes(seed + 50_000, UNSEEN)
    unseen = decode(vq, encode(vq, unseen_raw))
    network = DetectorNet(**GEOMETRY).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(decay_groups(list(network.parameters()), 0.02), lr=2e-3, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[Tensor, ...] = ()  # of the loss

    def lesson(step: int) -> Tensor:
        nonlocal parts
        rows = torch.randint(SCENES, (BATCH,), generator=generator)
        reconstructed = torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.5
        images = from_uint8(torch.where(reconstructed, again[rows], raw[rows]))
        bells, places, sides, colors = targets([known[row] for row in rows.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            centres, box, color = network(images.to(memory_format=torch.channels_last))
        at = places[:, 0], slice(None), places[:, 1], places[:, 2]
        parts = (
            centre_loss(centres, bells),
            (box[at] - sides).abs().mean() / 10,
            F.cross_entropy(color[at], colors, ignore_index=-1),
        )
        return sum(parts)

    def report(done: int, _loss: float) -> None:
        losses = ", ".join(f"{part.item():.3f}" for part in parts)
        say(f"step {done}/{steps}, losses {losses}; unseen: {measure(Detector(network), unseen, unseen_made)}")
        network.requires_grad_(True)  # a Detector is frozen

    fit(network, [optimizer], steps, lesson, report, every=250, max_grad_norm=5.0)
    save_network(out_dir, network, GEOMETRY)
    return network


def measure(detector: Detector, images: Tensor, made: list[scenes.Scene]) -> str:
    """`quality` in words."""
    facts = quality(detector, images, made)
    return (
        f"AP50 {facts['ap50']:.1%}, scenes counted right {facts['counted']:.1%}, "
        f"colours right {facts['colors']:.1%}, relations right {facts['relations']:.1%}"
    )


def quality(
    detector: Detector,
    images: Tensor,
    made: list[scenes.Scene],
    threshold: float = NANO_THRESHOLDS.counting_threshold,
) -> dict[str, float]:
    """How well a detector does on scenes whose truth is known.

    Returns:
        ap50: average precision at an overlap of 0.5, the mean over classes (PASCAL VOC 2010: area under the monotone
        precision-recall curve); counted: share of scenes in which every class is found exactly as often as it is there,
        at `threshold`; colors: share of the found coloured objects whose colour is right; relations: share of scenes of
        the category position whose two objects are found and stand as the caption says.
    """
    from argrpo_cli.geneval.rules import relative_position

    found = detector.detect(images)
    hits: dict[str, list[tuple[float, bool]]] = {name: [] for name in scenes.CLASS_NAMES}
    there = dict.fromkeys(scenes.CLASS_NAMES, 0)
    counted, colors, relations = [], [], []
    for objects, scene in zip(found, made, strict=True):
        known = truth(scene)
        sure = [one for one in objects if one.score > threshold]
        names = sorted(one.name for one in known)
        counted.append(sorted(one.name for one in sure) == names)
        for name in names:
            there[name] += 1
        free = list(known)
        for one in objects:
            same = [other for other in free if other.name == one.name]
            best = max(same, key=lambda other: overlap(one.box, other.box), default=None)
            hit = best is not None and overlap(one.box, best.box) >= MATCHING_OVERLAP
            hits[one.name].append((one.score, hit))
            if hit:
                free.remove(best)
                if best.colors and one.score > threshold:
                    colors.append(one.color == best.color)
        if scene.prompt is not None and scene.prompt.tag == "position":
            target, subject = scene.prompt.include
            there_is = {one.name: one for one in reversed(sure)}
            first, second = there_is.get(subject.name), there_is.get(target.name)
            right = first and second and subject.position[0] in relative_position(first.box, second.box)
            relations.append(bool(right))
    return {
        "ap50": float(np.mean([average_precision(hits[name], there[name]) for name in hits if there[name]])),
        "counted": float(np.mean(counted)),
        "colors": float(np.mean(colors)) if colors else float("nan"),
        "relations": float(np.mean(relations)) if relations else float("nan"),
    }


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def average_precision(hits: list[tuple[float, bool]], there: int) -> float:
    """Area under the precision-recall curve, precision made monotone from the right."""
    right = np.array([hit for _, hit in sorted(hits, key=lambda one: -one[0])], dtype=float)
    if not len(right):
        return 0.0
    recall = np.concatenate([[0.0], right.cumsum() / there])
    precision = right.cumsum() / np.arange(1, len(right) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall) * precision).sum())


if __name__ == "__main__":
    from argrpo_cli.nano.make.training import trainer_cli

    trainer_cli(train, "nano-detector")
