"""What the reward networks and the judge learn from: clean and broken scenes, a policy's proposals, and variations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from argrpo_cli.nano.make.corrupt import MIXTURE_OF_CAPTIONS, Corrupted, Pool, Propose, corrupt, make_pool
from argrpo_cli.nano.make.fit import Setting
from argrpo_cli.nano.tokens import load_tokenizer
from argrpo_cli.policy import Policy, load_policy
from argrpo_cli.policy.llamagen.text import load_text_encoder


@dataclass
class Study:
    """Clean scenes and broken ones: `broken.images[i]` was scene `rows[i]` of the pool."""

    pool: Pool
    rows: Tensor
    broken: Corrupted


def make_study(
    setting: Setting,
    seed: int,
    clean: int,
    broken_per_scene: int,
    propose: Propose | None = None,
    task: str = "classes",
) -> Study:
    """`clean` scenes of a task and `broken_per_scene` corruptions of each, from a seed beside the setting's; those of
    captions need a `propose`."""
    rng = np.random.default_rng(setting.seed + seed)
    pool = make_pool(setting.vq, rng, clean, propose, task)
    rows = torch.arange(clean).repeat(broken_per_scene)
    broken = corrupt(pool, rows, setting.vq, rng, MIXTURE_OF_CAPTIONS if task == "captions" else None)
    setting.say(f"{clean} scenes tokenised, {len(rows)} corruptions, mean damage {broken.damage.mean():.2f}")
    return Study(pool, rows, broken)


def base_policy(folder: str | Path) -> Policy:
    """The policy in `folder` with the tokenizer and the text encoder beside it; by name it would open the package's."""
    folder, policy = Path(folder), load_policy(folder)
    encoder = folder.with_name("nano-t5")
    return replace(
        policy,
        tokenizer=load_tokenizer(folder.with_name("nano-vq")),
        text_encoder=None if policy.text_encoder is None else load_text_encoder(encoder),
    )


def proposer(folder: str | Path, seed: int) -> Propose:
    """Proposals of the policy in `folder`: for every place, a draw from its conditional distribution after the true
    tokens before. One forward pass serves all places, and the scene they belong to stays known."""
    policy = base_policy(folder)
    generator = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def propose(tokens: Tensor, labels: Sequence[int | str]) -> Tensor:
        proposals = []
        for start in range(0, len(tokens), 100):
            part = tokens[start : start + 100]
            encoded = policy.encode(policy.conditions(labels[start : start + 100]))
            with torch.autocast("cpu", torch.bfloat16):
                logits = policy.model.logits(encoded, part)
            codes = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator)
            proposals.append(codes.view_as(part))
        return torch.cat(proposals)

    return propose


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
