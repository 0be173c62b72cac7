"""Trains nano-quality: from a picture alone, how far was the scene damaged?

    python -m argrpo_cli.nano.make.train_quality [OUT_DIR] [--steps 1500]

Targets come from the truth: exp(-distance / tau) to the clean reconstruction (`corrupt.py`), and, to teach it where to
look, the same within each 8x8 cell. Clean examples are reconstructions, since a policy can produce nothing sharper.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from argrpo_cli.nano.make.corrupt import damage_of
from argrpo_cli.nano.make.study import Study, augmented, make_study, proposer, rank_agreement
from argrpo_cli.nano.make.training import fit
from argrpo_cli.nano.rewards.nano_quality import NanoQuality, QualityNet
from argrpo_cli.nano.scenes import CLASS_NAMES
from argrpo_cli.nano.tokens import load_tokenizer
from argrpo_cli.networks.weights import save_network, to_unit
from argrpo_cli.system.files import WEIGHTS

CONFIG = {"widths": [32, 48, 80], "blocks": [1, 2, 2], "classes": len(CLASS_NAMES)}
BATCH = 64
CLEAN = 20  # of a batch
SCENES, BROKEN_PER_SCENE, UNSEEN = 4800, 2, 240
LOCAL_WEIGHT, NAMING_WEIGHT = 2.0, 0.2


def local_damage(images: Tensor, clean: Tensor) -> Tensor:
    """Damage of each 8x8 cell, float [B, 8, 8]."""
    squared = ((images.float() - clean.float()) / 255).square().mean(1, keepdim=True)
    return damage_of(F.avg_pool2d(squared, images.shape[-1] // 8)[:, 0].sqrt())


def train(
    out_dir: str | Path,
    seed: int = 0,
    steps: int = 1500,
    weights: Path = WEIGHTS,
    log=print,
    task: str = "classes",
) -> QualityNet:
    """Train from a fixed seed on top of the networks in `weights`; save float16 weights; return the network.

    The task "captions" makes nano-quality-t2i, which begins as nano-quality and learns from scenes of captions.
    """
    started = time.time()
    torch.manual_seed(seed)
    say = lambda line: log(f"{Path(out_dir).name}: {line}, {time.time() - started:.0f} s")  # noqa: E731
    vq = load_tokenizer(weights / "nano-vq")
    propose = proposer(weights / ("nano-c2i" if task == "classes" else "nano-t2i"), seed)
    study = make_study(vq, seed + 2, SCENES, BROKEN_PER_SCENE, say, propose, task)
    unseen = make_study(vq, seed + 30_000, UNSEEN, 2, lambda line: None, propose, task)
    network = QualityNet(**CONFIG)
    if task == "captions":
        network.load_state_dict(NanoQuality(weights / "nano-quality").network.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.02)
    generator = torch.Generator().manual_seed(seed)

    def lesson(step: int) -> Tensor:
        broken = torch.randint(len(study.rows), (BATCH - CLEAN,), generator=generator)
        clean = study.rows[broken[:CLEAN]]  # the originals of some of the broken: the damage is all that differs
        images = torch.cat([study.pool.images[clean], study.broken.images[broken]])
        nearest = torch.cat([clean, study.broken.nearest[broken]])
        truth = study.pool.images[nearest]
        quality = torch.cat([torch.ones(CLEAN), 1 - study.broken.damage[broken]])
        images, truth = augmented(images, truth, generator=generator)
        return quality_loss(network, images, truth, quality, study.pool.class_ids[nearest])

    def report(done: int, loss: float) -> None:
        say(f"step {done}/{steps}, loss {loss:.3f}; unseen: {measure(network, unseen)}")

    fit(network, [optimizer], steps, lesson, report)
    save_network(out_dir, network, CONFIG)
    return network


def quality_loss(network: QualityNet, images: Tensor, truth: Tensor, quality: Tensor, class_ids: Tensor) -> Tensor:
    """Cross entropy of quality (float [B] in [0, 1]), of the place of the damage and of the class.

    images and truth (their nearest clean scenes) uint8 [B, 3, H, W]; class_ids int64 [B], of the truth.
    """
    with torch.autocast("cpu", torch.bfloat16):
        logit, cells, named = network.lessons(to_unit(images))
    whole = F.binary_cross_entropy_with_logits(logit.float(), quality.clamp(0.01, 0.99))
    local = F.binary_cross_entropy_with_logits(cells.float(), local_damage(images, truth))
    naming = F.cross_entropy(named.float(), class_ids)
    return whole + LOCAL_WEIGHT * local + NAMING_WEIGHT * naming


@torch.inference_mode()
def measure(network: QualityNet, unseen: Study) -> str:
    """How well quality follows damage on scenes that training did not see, in words."""
    clean = network(to_unit(unseen.pool.images)).sigmoid()
    broken = network(to_unit(unseen.broken.images)).sigmoid()
    error = (broken - (1 - unseen.broken.damage)).abs().mean()
    order = (clean[unseen.rows] > broken).float().mean()
    rank = rank_agreement(broken, 1 - unseen.broken.damage)
    return (
        f"clean {clean.mean():.3f}, broken {broken.mean():.3f} (truth {1 - unseen.broken.damage.mean():.3f}), "
        f"error {error:.3f}, rank correlation {rank:.3f}, clean above broken {order:.1%}"
    )


if __name__ == "__main__":
    from argrpo_cli.nano.make.training import trainer_cli

    trainer_cli(train, "nano-quality")
