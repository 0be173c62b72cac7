"""Lessons of what measures: the judge's classifier and templates, the detector; and the held-out scenes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from argrpo_cli.geneval.nano_detector import NANO_THRESHOLDS, STRIDE, Detector, DetectorNet, Found, observation
from argrpo_cli.geneval.prompts import TAGS
from argrpo_cli.geneval.rules import judge_image
from argrpo_cli.nano import scenes
from argrpo_cli.nano.judge import LARGEST, RecognitionNet, canonical_layout, save_moments
from argrpo_cli.nano.make.corrupt import augmented
from argrpo_cli.nano.make.fit import Lesson, Setting, decay_groups
from argrpo_cli.nano.tokens import CAPTIONS_FILE, TOKENS_FILE, decode, encode
from argrpo_cli.networks.pixels import to_unit
from argrpo_cli.networks.weights import save_network
from argrpo_cli.policy.llamagen.vq import from_uint8
from argrpo_cli.system.files import save_tensors, write_jsonl


def held_out(setting: Setting, folder: Path, count: int = 1008) -> None:
    """nano-val: the split `val`, `count` scenes of each task as tokens; nothing is learnt."""
    images, ids = scenes.class_batch(setting.rng(80_000), count)
    captioned, made = scenes.caption_batch(setting.rng(80_001), count)
    write_jsonl(folder / CAPTIONS_FILE, [{"prompt": scene.prompt.text} for scene in made])
    tokens = {
        "classes": encode(setting.vq, torch.from_numpy(images)),
        "class_ids": torch.from_numpy(ids),
        "captions": encode(setting.vq, torch.from_numpy(captioned)),
    }
    save_tensors(folder / TOKENS_FILE, {name: some.to(torch.int16) for name, some in tokens.items()})
    setting.say(f"{count} scenes of each task tokenised")


# --- nano-judge

JUDGE = {"recogniser": {"classes": len(scenes.CLASS_NAMES), "growth": 20, "layers": [2, 3, 3], "features": 128}}


def judge(setting: Setting, count: int = 4800, references: int = 1200, batch: int = 64) -> Lesson:
    """nano-judge: tokens of canonical and reference scenes, and the judge's own classifier.

    The classifier learns renderings and reconstructions, mirrored, shifted, with parts hidden and colours varied, so
    that it does not name an object by a scrap of it or by its tint.
    """
    vq = setting.vq
    renderings, ids = map(torch.from_numpy, scenes.class_batch(setting.rng(6), count, balanced=True))
    unseen, unseen_ids = map(torch.from_numpy, scenes.class_batch(setting.rng(60_000), references, balanced=True))
    pictures, labels = torch.cat([renderings, decode(vq, encode(vq, renderings))]), torch.cat([ids, ids])
    layout, classes = canonical_layout(), range(len(scenes.CLASS_NAMES))
    canonical = scenes.render_all(
        scenes.Scene((scenes.Placed(one, LARGEST, x, y),), background) for one in classes for x, y, background in layout
    )
    tokens = {
        "canonical": encode(vq, torch.from_numpy(canonical)).unflatten(0, (len(classes), len(layout))),
        "reference": encode(vq, unseen),
        "reference_classes": unseen_ids,
    }
    unseen = decode(vq, tokens["reference"])
    setting.say(f"{count} scenes to learn and {references} reference scenes tokenised")
    network = RecognitionNet(**JUDGE["recogniser"]).to(memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        rows = setting.rows(batch, len(pictures))
        x = varied(pictures[rows], setting.generator).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(x)
        return F.cross_entropy(logits.float(), labels[rows], label_smoothing=0.05)

    @torch.inference_mode()
    def measure() -> str:
        named = torch.cat([network(to_unit(chunk)).argmax(1) for chunk in unseen.split(100)])
        return f"{(named == unseen_ids).float().mean():.1%} of reconstructions recognised"

    def save(folder: Path) -> None:
        save_tensors(folder / TOKENS_FILE, {name: some.to(torch.int16) for name, some in tokens.items()})
        save_network(folder, network, JUDGE)
        save_moments(folder, network, unseen)

    return Lesson(
        network=network,
        optimizers=[torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)],
        loss=loss,
        measure=measure,
        save=save,
        steps=900,
    )


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 to float in [-1, 1]: mirrored, shifted, one rectangle hidden half of the time, channels scaled by +-10%."""
    (images,) = augmented(images, generator=generator, reach=5)
    x = to_unit(images)
    count, size = len(x), x.shape[-1]
    side = torch.randint(8, 25, (2, count, 1), generator=generator)
    corner = torch.randint(0, size - 8, (2, count, 1), generator=generator)
    line = torch.arange(size)
    rows, columns = ((line >= corner[i]) & (line < corner[i] + side[i]) for i in range(2))
    hidden = rows[:, :, None] & columns[:, None, :] & (torch.rand(count, 1, 1, generator=generator) < 0.5)
    fill = torch.rand(count, 3, 1, 1, generator=generator) * 2 - 1
    x = torch.where(hidden[:, None], fill, x)
    return x * (0.9 + 0.2 * torch.rand(count, 3, 1, 1, generator=generator))


# --- nano-detector

DETECTOR = {"width": 80, "dilations": [1, 2, 4, 1]}
CELLS = scenes.IMAGE_SIZE // STRIDE
SPREAD = 0.12  # of a centre's bell over the neighbouring cells, in sides of the box
MATCHING_OVERLAP = 0.5  # intersection over union from which a detected box counts
Box = tuple[float, float, float, float]


def detector(setting: Setting, count: int = 9000, unseen: int = 600, batch: int = 48) -> Lesson:
    """nano-detector, on rendered scenes whose objects, places and colours are known.

    Half of the scenes are of the text task, half hold one to four objects of any kind anywhere, so that the detector
    expects no grammar. Half of the pictures it learns from are reconstructions by the tokenizer, since all it will be
    shown later are.
    """
    raw, made = make_scenes(setting.rng(5), count)
    known = [truth(scene) for scene in made]
    again = decode(setting.vq, encode(setting.vq, raw))
    setting.say(f"{count} scenes rendered")
    held_raw, held_made = make_scenes(setting.rng(50_000), unseen)
    held = decode(setting.vq, encode(setting.vq, held_raw))
    network = DetectorNet(**DETECTOR).to(memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        rows = setting.rows(batch, count)
        reconstructed = torch.rand(batch, 1, 1, 1, generator=setting.generator) < 0.5
        images = from_uint8(torch.where(reconstructed, again[rows], raw[rows]))
        bells, places, sides, colors = targets([known[row] for row in rows.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            centres, box, color = network(images.to(memory_format=torch.channels_last))
        at = places[:, 0], slice(None), places[:, 1], places[:, 2]
        where = (box[at] - sides).abs().mean() / 10
        return torch.stack([centre_loss(centres, bells), where, F.cross_entropy(color[at], colors, ignore_index=-1)])

    return Lesson(
        network=network,
        optimizers=[torch.optim.AdamW(decay_groups(network.parameters(), 0.02), lr=2e-3, betas=(0.9, 0.98))],
        loss=loss,
        measure=lambda: detector_facts(Detector(network), held, held_made),
        save=lambda folder: save_network(folder, network, DETECTOR),
        steps=1500,
        every=250,
        max_grad_norm=5.0,
    )


def make_scenes(rng: np.random.Generator, count: int) -> tuple[Tensor, list[scenes.Scene]]:
    """Renderings uint8 [count, 3, 64, 64] and their scenes, half of the text task and half free, in turn."""
    made = [free_scene(rng) if index % 2 else scenes.caption_scene(rng) for index in range(count)]
    return torch.from_numpy(scenes.render_all(made)), made


def free_scene(rng: np.random.Generator) -> scenes.Scene:
    """One to four objects of any class, size and place that overlap little; half of them in a colour word."""
    objects: list[scenes.Placed] = []
    for _ in range(int(rng.integers(1, 5))):
        for _ in range(20):
            size = int(rng.integers(20, 61))
            x, y = (int(v) for v in rng.integers(0, scenes.IMAGE_SIZE - size + 1, 2))
            box = x, y, x + size, y + size
            shared = (
                shared_area(box, (o.x, o.y, o.x + o.size, o.y + o.size)) / min(size, o.size) ** 2 for o in objects
            )
            if max(shared, default=0.0) < 0.15:  # of the smaller box
                color = list(scenes.COLORS)[rng.integers(len(scenes.COLORS))] if rng.integers(2) else None
                hue = 0.0 if color else scenes.random_hue(rng)
                class_id = int(rng.integers(len(scenes.CLASS_NAMES)))
                objects.append(scenes.Placed(class_id, size, x, y, bool(rng.integers(2)), hue, color))
                break
    return scenes.Scene(tuple(objects), scenes.random_background(rng))


def truth(scene: scenes.Scene) -> list[Found]:
    """The objects of a scene as a perfect detector would report them: boxes around what is drawn of each, in pixels;
    no colours where none is asked for."""
    result = []
    for placed in scene.objects:
        solid = scenes.object_pixels(placed)[1][..., 0] > 0.2
        rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
        box = (placed.x + columns[0], placed.y + rows[0], placed.x + columns[-1] + 1, placed.y + rows[-1] + 1)
        result.append(Found(scenes.CLASS_NAMES[placed.class_id], tuple(float(v) for v in box), 1.0, placed.color))
    return result


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
            column, row = (min(CELLS - 1, int((low + high) / 2 / STRIDE)) for low, high in ((x0, x1), (y0, y1)))
            x, y = axis[column].item(), axis[row].item()
            across = torch.exp(-0.5 * ((axis - x) / (SPREAD * (x1 - x0))) ** 2)
            down = torch.exp(-0.5 * ((axis - y) / (SPREAD * (y1 - y0))) ** 2)
            bell = bells[index, scenes.CLASS_NAMES.index(one.name)]
            torch.maximum(bell, down[:, None] * across[None], out=bell)
            places.append((index, row, column))
            sides.append((x - x0, y - y0, x1 - x, y1 - y))
            colors.append(list(scenes.COLORS).index(one.color) if one.color else -1)
    return bells, torch.tensor(places), torch.tensor(sides), torch.tensor(colors)


def centre_loss(logits: Tensor, bells: Tensor) -> Tensor:
    """Focal loss of centre maps against bells (Law and Deng 2018, eq. 1), per object."""
    p = logits.sigmoid()
    hit = bells == 1
    centres = -((1 - p) ** 2 * F.logsigmoid(logits))[hit].sum()
    empty = -((1 - bells) ** 4 * p**2 * F.logsigmoid(-logits))[~hit].sum()
    return (centres + empty) / hit.sum().clamp(min=1)


def detector_facts(detector: Detector, images: Tensor, made: list[scenes.Scene]) -> str:
    """How well a detector does on scenes whose truth is known, in words.

    AP50: average precision at an overlap of 0.5, the mean over classes (PASCAL VOC 2010: area under the monotone
    precision-recall curve). Counted right: scenes in which every class is found exactly as often as it is there, at
    GenEval's threshold for counting. Colours: of the coloured objects that are found. For each of GenEval's categories
    the share of its captions that the benchmark's rules find right.
    """
    threshold = NANO_THRESHOLDS.counting_threshold
    hits: dict[str, list[tuple[float, bool]]] = {name: [] for name in scenes.CLASS_NAMES}
    there = Counter(scenes.CLASS_NAMES[placed.class_id] for scene in made for placed in scene.objects)
    right: dict[str, list[bool]] = {tag: [] for tag in TAGS}
    counted, colors = [], []
    for objects, scene in zip(detector.detect(images), made, strict=True):
        known = truth(scene)
        sure = Counter(one.name for one in objects if one.score > threshold)
        counted.append(sure == Counter(one.name for one in known))
        for one in objects:
            same = [other for other in known if other.name == one.name]
            best = max(same, key=lambda other: overlap(one.box, other.box), default=None)
            hit = best is not None and overlap(one.box, best.box) >= MATCHING_OVERLAP
            hits[one.name].append((one.score, hit))
            if hit:
                known.remove(best)
                if best.color and one.score > threshold:
                    colors.append(one.color == best.color)
        if scene.prompt is not None:
            verdict = judge_image(scene.prompt, *observation(objects), NANO_THRESHOLDS)
            right[scene.prompt.tag].append(verdict.correct)
    precision = np.mean([average_precision(hits[name], there[name]) for name in there])
    shares = [f"{tag} {np.mean(verdicts):.1%}" for tag, verdicts in right.items() if verdicts]
    return (
        f"AP50 {precision:.1%}, counted right {np.mean(counted):.1%}, "
        f"colours right {np.mean(colors or [np.nan]):.1%}, captions right: {', '.join(shares)}"
    )


def shared_area(a: Box, b: Box) -> float:
    """Of two boxes (x0, y0, x1, y1)."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    shared = shared_area(a, b)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def average_precision(hits: list[tuple[float, bool]], there: int) -> float:
    """Area under the precision-recall curve, precision made monotone from the right."""
    right = np.array([hit for _, hit in sorted(hits, key=lambda one: -one[0])], dtype=float)
    recall = np.concatenate([[0.0], right.cumsum() / there])
    precision = right.cumsum() / np.arange(1, len(right) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall) * precision).sum())
