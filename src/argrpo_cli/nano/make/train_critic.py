"""Trains nano-critic: scenes against samples of the base policy.

    python -m argrpo_cli.nano.make.train_critic [OUT_DIR] [--steps 700]

Real are reconstructions, so that the tokenizer's softness tells nothing. Generated are samples of nano-c2i under
several guidance scales; a small part are broken scenes, so that the critic has an opinion on pictures that no base
policy draws. The body begins as that of nano-quality, which sees damage already. Smoothed labels, dropout and varied
pictures keep the logits from running away: a critic that is sure of everything ranks nothing within a group.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from argrpo_cli.geneval.grammar import TAGS
from argrpo_cli.nano import scenes
from argrpo_cli.nano.make.study import augmented, base_policy, make_study, proposer
from argrpo_cli.nano.make.training import fit
from argrpo_cli.nano.rewards.nano_critic import CriticNet, soft_limit
from argrpo_cli.nano.rewards.nano_quality import NanoQuality
from argrpo_cli.nano.scenes import CLASS_NAMES
from argrpo_cli.nano.tokens import load_tokenizer
from argrpo_cli.networks.weights import save_network, to_unit
from argrpo_cli.policy import Policy
from argrpo_cli.system.files import WEIGHTS

CONFIG = {"widths": [32, 48, 80], "blocks": [1, 2, 2], "dropout": 0.3}
SCENES, SAMPLES, UNSEEN = 3600, 2880, 288
GUIDANCE = (1.0, 1.5, 2.0)
REAL, GENERATED, BROKEN = 32, 26, 6  # of a batch
BROKEN_WEIGHT = 0.5
SMOOTH = 0.1  # labels 0.95 and 0.05


def sampled(policy: Policy, seed: int, count: int) -> Tensor:
    """Images uint8 [count, 3, 64, 64] of the policy, classes (or categories of captions) in equal shares under each
    guidance scale."""
    if policy.text_encoder is None:
        conditions = policy.conditions([i % len(CLASS_NAMES) for i in range(count)])
    else:
        rng = np.random.default_rng(seed)
        conditions = policy.conditions([scenes.caption_scene(rng, TAGS[i % len(TAGS)]).caption for i in range(count)])
    images = []
    for index, scale in enumerate(GUIDANCE):
        part = slice(index * count // len(GUIDANCE), (index + 1) * count // len(GUIDANCE))
        seeds = list(range(seed, seed + count))[part]
        images.append(policy.decode(policy.sample(conditions[part], cfg_scale=scale, seeds=seeds, batch_size=100)))
    return torch.cat(images)


def train(
    out_dir: str | Path,
    seed: int = 0,
    steps: int = 700,
    weights: Path = WEIGHTS,
    log=print,
    task: str = "classes",
) -> CriticNet:
    """Train from a fixed seed on top of the networks in `weights`; save float16 weights; return the network.

    The task "captions" makes nano-critic-t2i: scenes of captions against samples of nano-t2i.
    """
    started = time.time()
    torch.manual_seed(seed)
    say = lambda line: log(f"{Path(out_dir).name}: {line}, {time.time() - started:.0f} s")  # noqa: E731
    vq = load_tokenizer(weights / "nano-vq")
    base, eye = ("nano-c2i", "nano-quality") if task == "classes" else ("nano-t2i", "nano-quality-t2i")
    propose = None if task == "classes" else proposer(weights / base, seed)
    study = make_study(vq, seed + 5, SCENES, 1, say, propose, task)
    drawer = base_policy(weights / base)
    # Seeds far from those that users and evaluation take; a critic that knew a sample by heart would be no judge of it.
    generated = sampled(drawer, 50_000_000 + seed, SAMPLES)
    say(f"{len(generated)} samples drawn")
    unseen = make_study(vq, seed + 50_000, UNSEEN, 1, lambda line: None, propose, task)
    unseen_generated = sampled(drawer, 60_000_000 + seed, UNSEEN)
    network = CriticNet(**CONFIG)
    network.body.load_state_dict(NanoQuality(weights / eye).network.body.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.8, 0.98), weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    pick = lambda of, count: of[torch.randint(len(of), (count,), generator=generator)]  # noqa: E731

    def lesson(step: int) -> Tensor:
        parts = [pick(study.pool.images, REAL), pick(generated, GENERATED), pick(study.broken.images, BROKEN)]
        return critic_loss(network, *parts, generator)

    def report(done: int, loss: float) -> None:
        unseen_scores = measure(network, unseen.pool.images, unseen_generated, unseen.broken.images)
        say(f"step {done}/{steps}, loss {loss:.3f}; unseen: {unseen_scores}")

    fit(network, [optimizer], steps, lesson, report)
    save_network(out_dir, network, CONFIG)
    return network


def critic_loss(
    network: CriticNet, real: Tensor, generated: Tensor, broken: Tensor, generator: torch.Generator
) -> Tensor:
    """Smoothed cross entropy of real (1) against generated and broken (0) pictures, each uint8 [B, 3, H, W]."""
    label = torch.full((len(real) + len(generated) + len(broken),), SMOOTH / 2)
    label[: len(real)] = 1 - SMOOTH / 2
    weight = torch.ones(len(label))
    weight[len(real) + len(generated) :] = BROKEN_WEIGHT
    (images,) = augmented(torch.cat([real, generated, broken]), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(to_unit(images)).float()
    loss = (F.binary_cross_entropy_with_logits(logits, label, reduction="none") * weight).mean()
    return loss + 0.005 * logits.square().mean()


@torch.inference_mode()
def measure(network: CriticNet, real: Tensor, generated: Tensor, broken: Tensor) -> str:
    """Scores of pictures that training did not see, and how often a real one beats a generated one, in words."""
    scores = {
        name: torch.cat([soft_limit(network(to_unit(chunk))) for chunk in images.split(120)])
        for name, images in (("real", real), ("generated", generated), ("broken", broken))
    }
    beats = (scores["real"][:, None] > scores["generated"][None]).float().mean()
    means = ", ".join(f"{name} {s.mean():.2f} ± {s.std():.2f}" for name, s in scores.items())
    return f"{means}, real above generated {beats:.1%}"


if __name__ == "__main__":
    from argrpo_cli.nano.make.training import trainer_cli

    trainer_cli(train, "nano-critic")
