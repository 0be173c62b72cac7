"""Lessons of the reward networks: nano-clip, nano-quality and nano-critic. All learn from scenes and broken scenes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argrpo_cli.draw import draw_batch
from argrpo_cli.geneval.prompts import TAGS
from argrpo_cli.kept import in_batches
from argrpo_cli.nano import scenes
from argrpo_cli.nano.make.corrupt import Corrupted, augmented, damage_of, make_study, rank_agreement
from argrpo_cli.nano.make.fit import Lesson, Setting, decay_groups
from argrpo_cli.nano.make.policies import base_policy, proposer
from argrpo_cli.nano.tokens import decode, encode
from argrpo_cli.networks.nano import CriticNet, QualityNet, WordTokenizer, build_clip, soft_limit
from argrpo_cli.networks.pixels import to_unit
from argrpo_cli.networks.weights import load_network, save_network
from argrpo_cli.policy import Policy
from argrpo_cli.seeds import of as seed_of
from argrpo_cli.shapes import Sampling, Shot, class_prompt

# --- nano-clip

FULL = 0.85  # cosine that a clean scene and its caption should reach
FALL = 0.8  # how much of it total damage takes away
MAX_SCALE = 30.0
CLASS_CAPTIONS = [class_prompt(name) for name in scenes.CLASS_NAMES]
CLIP = {  # a vision transformer on the tokenizer's 8x8 patches and a two-layer text transformer
    "words": sorted({word for name in scenes.vocabulary() for word in WordTokenizer.split(name)}),
    "embed_dim": 96,
    "vision": {"layers": 4, "width": 128, "head_width": 32, "patch_size": 8, "image_size": scenes.IMAGE_SIZE},
    "text": {"context_length": 16, "width": 128, "heads": 4, "layers": 2},
}


def clip(
    setting: Setting,
    clean: int = 3600,
    broken: int = 2,
    captioned: int = 2400,
    unseen: int = 240,
    batch: tuple[int, int] = (40, 24),
) -> Lesson:
    """nano-clip, an open_clip CLIP on scenes and their captions, that also feels damage.

    Three lessons in one loss: name the scene among all captions of the batch and of all classes (contrastive, as CLIP);
    keep the similarity of a clean scene and its caption high; and for a broken picture fall below its clean original by
    an amount that grows with the damage. Without the third the reward is full as soon as the object can be named.

    Args:
        clean, broken: class scenes, and broken pictures of each; captioned: scenes of the text task.
        batch: pairs of a class scene and its broken version, and scenes of the text task.
    """
    study = make_study(setting, 3, clean, broken)
    pictures, texts = captioned_scenes(setting, 4, captioned)
    held = make_study(setting, 40_000, unseen, 2)
    held_pictures, held_texts = captioned_scenes(setting, 40_001, unseen)
    network, words = build_clip(CLIP)
    pairs, others = batch

    def loss(step: int) -> Tensor:
        damaged = setting.rows(pairs, len(study.rows))
        more = setting.rows(others, len(texts))
        originals = study.rows[damaged]
        both = augmented(study.pool.images[originals], study.images[damaged], generator=setting.generator)
        captions = [texts[i] for i in more.tolist()]
        unique = list(dict.fromkeys(CLASS_CAPTIONS + captions))
        label = torch.cat([study.pool.class_ids[originals], torch.tensor([unique.index(one) for one in captions])])
        with torch.autocast("cpu", torch.bfloat16):
            image = network.encode_image(to_unit(torch.cat([both[0], pictures[more], both[1]])))
            text = network.encode_text(words(unique))
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        whole, fallen = image[: pairs + others], image[pairs + others :]
        similarity = (whole * text[label]).sum(-1)
        gap = similarity[:pairs] - (fallen * text[label[:pairs]]).sum(-1)
        naming = naming_loss(whole, text, label, network.logit_scale.exp().clamp(max=MAX_SCALE))
        full = (FULL - similarity).clamp(min=0).square().mean()
        fall = F.smooth_l1_loss(gap, FALL * study.own[damaged], beta=0.1)
        return torch.stack([naming, 4 * full, 4 * fall])

    return Lesson(
        network=network,
        optimizers=[torch.optim.AdamW(decay_groups(network.parameters(), 0.1), lr=1.5e-3, betas=(0.9, 0.98))],
        loss=loss,
        measure=lambda: clip_facts(network, words, held, held_pictures, held_texts),
        save=lambda folder: save_network(folder, network, CLIP),
        steps=800,
    )


def captioned_scenes(setting: Setting, seed: int, count: int) -> tuple[Tensor, list[str]]:
    """Reconstructions uint8 [count, 3, 64, 64] of scenes of the text task, and their captions."""
    images, made = scenes.caption_batch(setting.rng(seed), count)
    return decode(setting.vq, encode(setting.vq, torch.from_numpy(images))), [scene.prompt.text for scene in made]


def naming_loss(image: Tensor, text: Tensor, label: Tensor, scale: Tensor) -> Tensor:
    """Contrastive loss over unique captions [M, D]: several images [B, D] may share one.

    Image to text by cross entropy; text to image, for the captions that have images, by the mean over their images.
    """
    logits = scale * image @ text.t()
    own = F.one_hot(label, len(text)).float()
    backward = (F.log_softmax(logits, dim=0) * own).sum(0) / own.sum(0).clamp(min=1)
    return F.cross_entropy(logits, label) / 2 - backward[own.sum(0) > 0].mean() / 2


@torch.inference_mode()
def clip_facts(network: nn.Module, words: WordTokenizer, held: Corrupted, pictures: Tensor, captions: list[str]) -> str:
    """Naming and the feeling for damage, in words."""

    def similarity(images: Tensor, texts: list[str]) -> Tensor:
        text = network.encode_text(words(texts), normalize=True)
        return network.encode_image(to_unit(images), normalize=True) @ text.t()

    label = held.pool.class_ids
    clean, broken = (similarity(images, CLASS_CAPTIONS) for images in (held.pool.images, held.images))
    own = clean.gather(1, label[:, None])[:, 0]
    fallen = broken.gather(1, label[held.rows][:, None])[:, 0]
    unique = list(dict.fromkeys(captions))
    named = [unique[i] for i in similarity(pictures, unique).argmax(1).tolist()]
    right = sum(one == other for one, other in zip(named, captions, strict=True))
    return (
        f"class named {(clean.argmax(1) == label).float().mean():.1%}, caption among {len(unique)} "
        f"{right / len(captions):.1%}, cosine clean {own.mean():.3f}, broken {fallen.mean():.3f}, "
        f"rank correlation with damage {rank_agreement(fallen, 1 - held.own):.3f}, "
        f"clean above broken {(own[held.rows] > fallen).float().mean():.1%}"
    )


# --- nano-quality

QUALITY = {"widths": [32, 48, 80], "blocks": [1, 2, 2], "classes": len(scenes.CLASS_NAMES)}
LOCAL_WEIGHT, NAMING_WEIGHT = 2.0, 0.2


def quality(
    setting: Setting,
    task: str = "classes",
    clean: int = 4800,
    broken: int = 2,
    unseen: int = 240,
    batch: tuple[int, int] = (20, 44),
) -> Lesson:
    """nano-quality: from a picture alone, how far was the scene damaged?

    Targets come from the truth: exp(-distance / tau) to the clean reconstruction (`corrupt.py`), and, to teach it where
    to look, the same within each 8x8 cell. Clean examples are reconstructions, since a policy can produce nothing
    sharper. The task "captions" makes nano-quality-t2i, which begins as nano-quality and learns from captioned scenes.

    Args:
        clean, broken: scenes, and broken pictures of each.
        batch: clean and broken pictures.
    """
    propose = proposer(setting.weights / ("nano-c2i" if task == "classes" else "nano-t2i"), setting.seed)
    study = make_study(setting, 2, clean, broken, propose, task)
    held = make_study(setting, 30_000, unseen, 2, propose, task)
    network = QualityNet(**QUALITY)
    if task == "captions":
        network.load_state_dict(load_network(QualityNet, setting.weights / "nano-quality").state_dict())

    def loss(step: int) -> Tensor:
        damaged = setting.rows(batch[1], len(study.rows))
        originals = study.rows[damaged[: batch[0]]]  # of some of the broken: the damage is all that differs
        images = torch.cat([study.pool.images[originals], study.images[damaged]])
        nearest = torch.cat([originals, study.nearest[damaged]])
        score = torch.cat([torch.ones(batch[0]), 1 - study.damage[damaged]])
        images, truth = augmented(images, study.pool.images[nearest], generator=setting.generator)
        return quality_loss(network, images, truth, score, study.pool.class_ids[nearest])

    return Lesson(
        network=network,
        optimizers=[torch.optim.AdamW(network.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.02)],
        loss=loss,
        measure=lambda: quality_facts(network, held),
        save=lambda folder: save_network(folder, network, QUALITY),
        steps=1500,
    )


def quality_loss(network: QualityNet, images: Tensor, truth: Tensor, score: Tensor, class_ids: Tensor) -> Tensor:
    """Cross entropy of quality (float [B] in [0, 1]), of the place of the damage and of the class.

    images and truth (their nearest clean scenes) uint8 [B, 3, H, W]; class_ids int64 [B], of the truth.
    """
    with torch.autocast("cpu", torch.bfloat16):
        logit, cells, named = network.lessons(to_unit(images))
    whole = F.binary_cross_entropy_with_logits(logit.float(), score.clamp(0.01, 0.99))
    local = F.binary_cross_entropy_with_logits(cells.float(), local_damage(images, truth))
    naming = F.cross_entropy(named.float(), class_ids)
    return whole + LOCAL_WEIGHT * local + NAMING_WEIGHT * naming


def local_damage(images: Tensor, clean: Tensor) -> Tensor:
    """Damage of each 8x8 cell, float [B, 8, 8]."""
    squared = ((images.float() - clean.float()) / 255).square().mean(1, keepdim=True)
    return damage_of(F.avg_pool2d(squared, images.shape[-1] // 8)[:, 0].sqrt())


@torch.inference_mode()
def quality_facts(network: QualityNet, held: Corrupted) -> str:
    """How well quality follows damage, in words."""
    clean = network(to_unit(held.pool.images)).sigmoid()
    broken = network(to_unit(held.images)).sigmoid()
    truth = 1 - held.damage
    return (
        f"clean {clean.mean():.3f}, broken {broken.mean():.3f} (truth {truth.mean():.3f}), "
        f"error {(broken - truth).abs().mean():.3f}, rank correlation {rank_agreement(broken, truth):.3f}, "
        f"clean above broken {(clean[held.rows] > broken).float().mean():.1%}"
    )


# --- nano-critic

CRITIC = {"widths": [32, 48, 80], "blocks": [1, 2, 2], "dropout": 0.3}
GUIDANCE = (1.0, 1.5, 2.0)
BROKEN_WEIGHT = 0.5
SMOOTH = 0.1  # labels 0.95 and 0.05


def critic(
    setting: Setting,
    task: str = "classes",
    clean: int = 3600,
    samples: int = 2880,
    unseen: int = 288,
    batch: tuple[int, int, int] = (32, 26, 6),
) -> Lesson:
    """nano-critic: scenes against samples of the base policy.

    Real are reconstructions, so that the tokenizer's softness tells nothing. Generated are samples of nano-c2i under
    several guidance scales; a small part are broken scenes, so that the critic has an opinion on pictures that no base
    policy draws. The body begins as that of nano-quality, which sees damage already. Smoothed labels, dropout and
    varied pictures keep the logits from running away: a critic that is sure of everything ranks nothing within a group.
    The task "captions" makes nano-critic-t2i: scenes of captions against samples of nano-t2i.

    Args:
        batch: real, generated and broken pictures.
    """
    base, eye = ("nano-c2i", "nano-quality") if task == "classes" else ("nano-t2i", "nano-quality-t2i")
    propose = None if task == "classes" else proposer(setting.weights / base, setting.seed)
    study = make_study(setting, 5, clean, 1, propose, task)
    policy = base_policy(setting.weights / base)
    generated = sampled(policy, 0, setting.seed, samples)
    setting.say(f"{len(generated)} samples drawn")
    held = make_study(setting, 50_000, unseen, 1, propose, task)
    held_generated = sampled(policy, 1, setting.seed, unseen)
    network = CriticNet(**CRITIC)
    network.body.load_state_dict(load_network(QualityNet, setting.weights / eye).body.state_dict())

    def loss(step: int) -> Tensor:
        material = (study.pool.images, generated, study.images)
        parts = [of[setting.rows(count, len(of))] for of, count in zip(material, batch, strict=True)]
        return critic_loss(network, *parts, setting.generator)

    return Lesson(
        network=network,
        optimizers=[torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.8, 0.98), weight_decay=0.05)],
        loss=loss,
        measure=lambda: critic_facts(network, held.pool.images, held_generated, held.images),
        save=lambda folder: save_network(folder, network, CRITIC),
        steps=700,
    )


def sampled(policy: Policy, block: int, seed: int, count: int) -> Tensor:
    """Images uint8 [count, 3, 64, 64] of the policy, classes (or categories of captions) in equal shares under each
    guidance scale.

    Args:
        block: of the seeds: 0 to learn from, 1 to measure on. They are far from those that users and evaluations take;
            a critic that knew a sample by heart would be no judge of it.
    """
    seeds = [seed_of("critic", block, seed + index) for index in range(count)]
    if policy.card.reads == "classes":
        conditions = policy.conditions([i % len(scenes.CLASS_NAMES) for i in range(count)])
    else:
        rng = np.random.default_rng(seeds[0])
        conditions = policy.conditions(
            [scenes.caption_scene(rng, TAGS[i % len(TAGS)]).prompt.text for i in range(count)]
        )
    shots = [Shot(condition, one) for condition, one in zip(conditions, seeds, strict=True)]
    images = []
    for index, scale in enumerate(GUIDANCE):
        part = shots[index * count // len(GUIDANCE) : (index + 1) * count // len(GUIDANCE)]
        images += [draw_batch(policy, batch, Sampling(cfg_scale=scale))[1] for batch in in_batches(part, 100)]
    return torch.cat(images)


def critic_loss(
    network: CriticNet, real: Tensor, generated: Tensor, broken: Tensor, generator: torch.Generator
) -> Tensor:
    """Smoothed cross entropy of real (1) against generated and broken (0) pictures, each uint8 [B, 3, H, W]."""
    counts = torch.tensor([len(real), len(generated), len(broken)])
    label = torch.tensor([1 - SMOOTH / 2, SMOOTH / 2, SMOOTH / 2]).repeat_interleave(counts)
    weight = torch.tensor([1.0, 1.0, BROKEN_WEIGHT]).repeat_interleave(counts)
    (images,) = augmented(torch.cat([real, generated, broken]), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(to_unit(images)).float()
    loss = (F.binary_cross_entropy_with_logits(logits, label, reduction="none") * weight).mean()
    return loss + 0.005 * logits.square().mean()


@torch.inference_mode()
def critic_facts(network: CriticNet, real: Tensor, generated: Tensor, broken: Tensor) -> str:
    """Mean scores, and how often a real picture beats a generated one, in words."""
    scores = {
        name: torch.cat([soft_limit(network(to_unit(chunk))) for chunk in images.split(120)])
        for name, images in (("real", real), ("generated", generated), ("broken", broken))
    }
    beats = (scores["real"][:, None] > scores["generated"][None]).float().mean()
    means = ", ".join(f"{name} {s.mean():.2f} ± {s.std():.2f}" for name, s in scores.items())
    return f"{means}, real above generated {beats:.1%}"
