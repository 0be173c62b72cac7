"""Trains nano-c2i, the class-conditional LlamaGen of the nano world, by maximum likelihood on tokenised scenes (eq. 2).

    python -m argrpo_cli.nano.make.train_policy [OUT_DIR] [--steps 1200]

One class in ten is replaced by the null class, so that classifier-free guidance has its unconditional half. Training
stops two thirds down its learning-rate curve, at 3.1 nats a token (2.8 at the end): objects are recognised and many are
deformed, so that reinforcement learning has something to improve.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from argrpo_cli.nano.make.training import decay_groups, fit, save_half
from argrpo_cli.nano.scenes import CLASS_NAMES, IMAGE_SIZE, class_batch
from argrpo_cli.nano.tokens import load_tokenizer
from argrpo_cli.policy.llamagen.config import LlamaGenConfig
from argrpo_cli.policy.llamagen.modeling import LlamaGenForImageGeneration, teacher_forced
from argrpo_cli.policy.llamagen.vq import VQModel, from_uint8
from argrpo_cli.system.files import WEIGHTS, write_json

GEOMETRY = {"hidden_size": 192, "num_hidden_layers": 5, "num_attention_heads": 6}
BATCH = 32
CLASS_DROPOUT = 0.1
POOL, UNSEEN = 48_000, 1000  # scenes tokenised up front, fewer than one pass over them
HORIZON = 1800  # steps of the learning-rate curve


@torch.inference_mode()
def tokenised_scenes(tokenizer: VQModel, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Tokens int16 [count, T] and class ids int64 [count] of fresh class scenes."""
    tokens, classes = [], []
    for start in range(0, count, 250):
        images, ids = class_batch(rng, min(250, count - start))
        tokens.append(tokenizer.encode(from_uint8(torch.from_numpy(images))).to(torch.int16))
        classes.append(torch.from_numpy(ids))
    return torch.cat(tokens), torch.cat(classes)


def next_token_loss(model: LlamaGenForImageGeneration, classes: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy in nats over all image tokens given the class and the tokens before."""
    inputs, _ = teacher_forced(model.config, classes, None, tokens)
    logits = model(**inputs).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


def train(
    out_dir: str | Path,
    seed: int = 0,
    steps: int = 1200,
    weights: Path = WEIGHTS,
    log=print,
) -> LlamaGenForImageGeneration:
    """Train from a fixed seed on the tokens of `weights`/nano-vq and save a policy folder, weights in float16."""
    torch.manual_seed(seed)
    vq = load_tokenizer(weights / "nano-vq")
    pool, pool_classes = tokenised_scenes(vq, np.random.default_rng(seed + 1), POOL)
    held, held_classes = tokenised_scenes(vq, np.random.default_rng(seed + 20_000), UNSEEN)
    model = LlamaGenForImageGeneration(
        LlamaGenConfig(
            vocab_size=vq.config.codebook_size,
            block_size=pool.shape[1],
            num_classes=len(CLASS_NAMES),
            class_dropout_prob=CLASS_DROPOUT,
            **GEOMETRY,
        )
    )
    parameters = sum(p.numel() for p in model.parameters())
    log(f"nano-c2i: {parameters / 1e6:.2f} M parameters, {len(pool)} scenes tokenised")
    optimizer = torch.optim.AdamW(decay_groups(list(model.parameters()), 0.05), lr=1.5e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    started = time.time()

    def lesson(step: int) -> Tensor:
        rows = torch.randint(len(pool), (BATCH,), generator=generator)
        classes = pool_classes[rows]
        dropped = torch.rand(BATCH, generator=generator) < CLASS_DROPOUT
        classes = torch.where(dropped, len(CLASS_NAMES), classes)
        with torch.autocast("cpu", torch.bfloat16):
            return next_token_loss(model, classes, pool[rows].long())

    @torch.inference_mode()
    def report(done: int, loss: float) -> None:
        unseen = next_token_loss(model, held_classes, held.long()).item()
        seconds = time.time() - started
        log(f"nano-c2i step {done}/{steps}: loss {loss:.3f}, unseen {unseen:.3f} nats a token, {seconds:.0f} s")

    fit(model, [optimizer], steps, lesson, report, warmup=150, horizon=HORIZON)
    save_policy(model, out_dir)
    return model


def save_policy(model: LlamaGenForImageGeneration, folder: str | Path) -> None:
    """Save the weights and what `load_policy` needs beside them."""
    save_half(model, folder)
    facts = {"tokenizer": "nano-vq", "classes": list(CLASS_NAMES), "image_size": IMAGE_SIZE, "base": "nano-c2i"}
    write_json(Path(folder) / "policy.json", facts)


if __name__ == "__main__":
    from argrpo_cli.nano.make.training import trainer_cli

    trainer_cli(train, "nano-c2i")
