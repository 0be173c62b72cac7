"""Trains nano-clip, an open_clip CLIP on scenes and their captions, that also feels damage.

    python -m argrpo_cli.nano.make.train_clip [OUT_DIR] [--steps 800]

Three lessons in one loss: name the scene among all captions of the batch and of all classes (contrastive, as CLIP);
keep the similarity of a clean scene and its caption high; and for a broken picture fall below its clean original by an
amount that grows with the damage. Without the third the reward is full as soon as the object can be named.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argrpo_cli.nano import scenes
from argrpo_cli.nano.make.study import Study, augmented, make_study, rank_agreement
from argrpo_cli.nano.make.training import decay_groups, fit
from argrpo_cli.nano.rewards.nano_clip import WordTokenizer, build_clip
from argrpo_cli.nano.tokens import decode, encode, load_tokenizer
from argrpo_cli.networks.weights import save_network, to_unit
from argrpo_cli.shapes import class_prompt
from argrpo_cli.system.files import WEIGHTS

SCENES, BROKEN_PER_SCENE, CAPTION_SCENES, UNSEEN = 3600, 2, 2400, 240
BATCH, CAPTIONED = 40, 24  # pairs of a class scene and its broken version; scenes of the text task
FULL = 0.85  # cosine that a clean scene and its caption should reach
FALL = 0.8  # how much of it total damage takes away
MAX_SCALE = 30.0


def config() -> dict:
    """The geometry: a vision transformer on the tokenizer's 8x8 patches and a two-layer text transformer."""
    return {
        "words": sorted({word for name in scenes.vocabulary() for word in WordTokenizer.split(name)}),
        "embed_dim": 96,
        "vision": {"layers": 4, "width": 128, "head_width": 32, "patch_size": 8, "image_size": scenes.IMAGE_SIZE},
        "text": {"context_length": 16, "width": 128, "heads": 4, "layers": 2},
    }


def class_captions() -> list[str]:
    return [class_prompt(name) for name in scenes.CLASS_NAMES]


def naming_loss(image: Tensor, text: Tensor, label: Tensor, scale: Tensor) -> Tensor:
    """Contrastive loss over unique captions [M, D]: several images [B, D] may share one.

    Image to text by cross entropy; text to image, for the captions that have images, by the mean over their images.
    """
    logits = scale * image @ text.t()
    own = F.one_hot(label, len(text)).float()
    backward = (F.log_softmax(logits, dim=0) * own).sum(0) / own.sum(0).clamp(min=1)
    return F.cross_entropy(logits, label) / 2 - backward[own.sum(0) > 0].mean() / 2


def train(
    out_dir: str | Path,
    seed: int = 0,
    steps: int = 800,
    weights: Path = WEIGHTS,
    log=print,
) -> nn.Module:
    """Train from a fixed seed on top of the networks in `weights`; save float16 weights; return the network."""
    started = time.time()
    torch.manual_seed(seed)
    say = lambda line: log(f"nano-clip: {line}, {time.time() - started:.0f} s")  # noqa: E731
    vq = load_tokenizer(weights / "nano-vq")
    study = make_study(vq, seed + 3, SCENES, BROKEN_PER_SCENE, say)
    captioned, texts = captioned_scenes(vq, seed + 4, CAPTION_SCENES)
    unseen = make_study(vq, seed + 40_000, UNSEEN, 2, lambda line: None)
    unseen_captioned = captioned_scenes(vq, seed + 40_001, UNSEEN)
    settings = config()
    network, words = build_clip(settings)
    optimizer = torch.optim.AdamW(decay_groups(list(network.parameters()), 0.1), lr=1.5e-3, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[Tensor, ...] = ()  # of the loss

    def lesson(step: int) -> Tensor:
        nonlocal parts
        broken = torch.randint(len(study.rows), (BATCH,), generator=generator)
        others = torch.randint(len(texts), (CAPTIONED,), generator=generator)
        clean = study.rows[broken]
        pairs = augmented(study.pool.images[clean], study.broken.images[broken], generator=generator)
        captions = class_captions() + [texts[i] for i in others.tolist()]
        unique = list(dict.fromkeys(captions))
        other_label = torch.tensor([unique.index(texts[i]) for i in others.tolist()])
        label = torch.cat([study.pool.class_ids[clean], other_label])
        with torch.autocast("cpu", torch.bfloat16):
            image = network.encode_image(to_unit(torch.cat([pairs[0], captioned[others], pairs[1]])))
            text = network.encode_text(words(unique))
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        named, damaged = image[: BATCH + CAPTIONED], image[BATCH + CAPTIONED :]
        scale = network.logit_scale.exp().clamp(max=MAX_SCALE)
        similarity = (named * text[label]).sum(-1)
        fallen = (damaged * text[label[:BATCH]]).sum(-1)
        gap = similarity[:BATCH] - fallen
        parts = (
            naming_loss(named, text, label, scale),
            (FULL - similarity).clamp(min=0).square().mean(),
            F.smooth_l1_loss(gap, FALL * study.broken.own[broken], beta=0.1),
        )
        return parts[0] + 4 * parts[1] + 4 * parts[2]

    def report(done: int, _loss: float) -> None:
        losses = ", ".join(f"{part.item():.3f}" for part in parts)
        say(f"step {done}/{steps}, losses {losses}; unseen: {measure(network, words, unseen, unseen_captioned)}")

    fit(network, [optimizer], steps, lesson, report)
    save_network(out_dir, network, settings)
    return network


def captioned_scenes(vq, seed: int, count: int) -> tuple[Tensor, list[str]]:
    """Reconstructions uint8 [count, 3, 64, 64] of scenes of the text task, and their captions."""
    images, made = scenes.caption_batch(np.random.default_rng(seed), count)
    return decode(vq, encode(vq, torch.from_numpy(images))), [scene.caption for scene in made]


@torch.inference_mode()
def measure(network: nn.Module, words: WordTokenizer, unseen: Study, captioned: tuple[Tensor, list[str]]) -> str:
    """Naming and the feeling for damage on scenes that training did not see, in words."""
    text = network.encode_text(words(class_captions()), normalize=True)
    label = unseen.pool.class_ids
    clean = network.encode_image(to_unit(unseen.pool.images), normalize=True) @ text.t()
    broken = network.encode_image(to_unit(unseen.broken.images), normalize=True) @ text.t()
    own = clean.gather(1, label[:, None])[:, 0]
    fallen = broken.gather(1, label[unseen.rows][:, None])[:, 0]
    unique = list(dict.fromkeys(captioned[1]))
    scores = network.encode_image(to_unit(captioned[0]), normalize=True)
    scores = scores @ network.encode_text(words(unique), normalize=True).t()
    right = sum(unique[i] == text for i, text in zip(scores.argmax(1).tolist(), captioned[1], strict=True))
    return (
        f"class named {(clean.argmax(1) == label).float().mean():.1%}, caption among {len(unique)} "
        f"{right / len(captioned[1]):.1%}, cosine clean {own.mean():.3f}, broken {fallen.mean():.3f}, "
        f"rank correlation with damage {rank_agreement(fallen, 1 - unseen.broken.own):.3f}, "
        f"clean above broken {(own[unseen.rows] > fallen).float().mean():.1%}"
    )


if __name__ == "__main__":
    from argrpo_cli.nano.make.training import trainer_cli

    trainer_cli(train, "nano-clip")
