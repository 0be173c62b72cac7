"""Trains nano-vq, the image tokenizer of the nano world: LlamaGen's VQ network, 8x8 tokens for 64x64 pixels.

    python -m argrpo_cli.nano.make.train_tokenizer OUT_DIR [--steps 4000]

Reconstruction by absolute and squared error of pixels and of their differences (edges are what the eye misses first).
The codebook follows the encoder by running means, begins as encoder outputs, and codes that fall out of use begin again
as outputs of the current batch, so that nearly every code earns its place.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from argrpo_cli.nano.make.training import fit, save_half
from argrpo_cli.nano.scenes import caption_batch, class_batch
from argrpo_cli.policy.llamagen.vq import VQConfig, VQModel, from_uint8, to_uint8

CONFIG = {
    "codebook_size": 1024,
    "codebook_embed_dim": 8,
    "ch": 64,
    "encoder_ch_mult": [1, 2],
    "decoder_ch_mult": [1, 3],
    "num_res_blocks": 1,
    "z_channels": 128,
    "patch_size": 4,
}
BATCH, UNSEEN = 32, 512
QUANTISED_FROM = 60  # step: by then the encoder tells scenes apart; before, latents pass through unquantised
CAPTION_SHARE = 0.25  # scenes of the text task, so that both tasks share this tokenizer
DECAY = 0.98
DEAD_BELOW = 0.05  # expected uses per batch (of 2048 tokens, a code's fair share is 2) below which a code starts again


class RunningCodebook:
    """Exponential running means of the unit latents assigned to each code (van den Oord et al. 2017, appendix A.1)."""

    def __init__(self, embedding: Tensor, generator: torch.Generator):
        self.embedding, self.generator = embedding, generator
        self.uses = torch.ones(len(embedding))
        self.sums = F.normalize(embedding.detach(), dim=-1).clone()

    def start_from(self, latents: Tensor) -> None:
        rows = torch.randint(len(latents), (len(self.embedding),), generator=self.generator)
        self.sums = latents[rows].clone()
        self.uses.fill_(1.0)
        self.embedding.copy_(self.sums)

    def update(self, latents: Tensor, indices: Tensor) -> None:
        count = torch.bincount(indices, minlength=len(self.embedding)).float()
        total = torch.zeros_like(self.sums).index_add_(0, indices, latents)
        self.uses.mul_(DECAY).add_(count, alpha=1 - DECAY)
        self.sums.mul_(DECAY).add_(total, alpha=1 - DECAY)
        dead = (self.uses < DEAD_BELOW).nonzero().flatten()
        if len(dead):
            rows = torch.randint(len(latents), (len(dead),), generator=self.generator)
            self.sums[dead], self.uses[dead] = latents[rows], 1.0
        self.embedding.copy_(F.normalize(self.sums, dim=-1))


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Absolute plus squared error of the pixels and absolute error of their differences; inputs in [-1, 1]."""
    error = output - target
    edges = sum((error.diff(dim=d)).abs().mean() for d in (2, 3))
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


def scene_batch(rng: np.random.Generator, count: int) -> Tensor:
    """uint8 [count, 3, 64, 64], class scenes and caption scenes mixed."""
    captions = round(count * CAPTION_SHARE)
    images = np.concatenate([class_batch(rng, count - captions)[0], caption_batch(rng, captions)[0]])
    return torch.from_numpy(images)


@torch.inference_mode()
def measure(model: VQModel, images: Tensor) -> tuple[float, float]:
    """PSNR in dB (mean over images, 8-bit) and the share of the codebook that the images use."""
    psnr, seen = [], torch.zeros(model.config.codebook_size, dtype=torch.bool)
    for chunk in images.split(64):
        tokens = model.encode(from_uint8(chunk))
        seen[tokens.flatten()] = True
        error = to_uint8(model.decode_tokens(tokens)).float() - chunk.float()
        psnr.append(10 * torch.log10(255**2 / error.square().flatten(1).mean(1)))
    return torch.cat(psnr).mean().item(), seen.float().mean().item()


def train(
    out_dir: str | Path,
    seed: int = 0,
    steps: int = 4000,
    log=print,
) -> VQModel:
    """Train from a fixed seed and save half-precision weights under `out_dir`; returns the model."""
    torch.manual_seed(seed)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    model = VQModel(VQConfig(**CONFIG)).to(memory_format=torch.channels_last)
    model.quantize.embedding.weight.requires_grad_(False)
    codebook = RunningCodebook(model.quantize.embedding.weight, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.2e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    held_out = torch.from_numpy(class_batch(np.random.default_rng(seed + 10_000), UNSEEN, balanced=True)[0])
    started = time.time()

    def lesson(step: int) -> Tensor:
        target = from_uint8(scene_batch(rng, BATCH)).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latent = model.latent(target)
        latent = F.normalize(latent.float(), dim=1)
        flat = latent.detach().permute(0, 2, 3, 1).reshape(-1, latent.shape[1])
        if step == QUANTISED_FROM:
            codebook.start_from(flat)
        if step >= QUANTISED_FROM:
            indices = model.quantize.nearest(latent.detach())
            entries = model.quantize.entries(indices, *latent.shape[2:])
            commitment = (latent - entries).square().sum(1).mean()
            quantised = latent + (entries - latent).detach()
            codebook.update(flat, indices.flatten())
        else:
            quantised, commitment = latent, latent.new_zeros(())
        with torch.autocast("cpu", torch.bfloat16):
            output = model.decode_latent(quantised)
        return reconstruction_loss(output.float(), target) + 0.05 * commitment

    def report(done: int, loss: float) -> None:
        psnr, used = measure(model, held_out)
        log(
            f"nano-vq step {done}/{steps}: loss {loss:.4f}, PSNR {psnr:.2f} dB on unseen scenes, "
            f"codebook in use {used:.0%}, {time.time() - started:.0f} s"
        )
        if not math.isfinite(loss):
            raise RuntimeError(f"nano-vq diverged at step {done}")

    fit(model, [optimizer], steps, lesson, report, every=250, warmup=150)
    save_half(model, out_dir)
    return model


if __name__ == "__main__":
    from argrpo_cli.nano.make.training import trainer_cli

    trainer_cli(train, "nano-vq")
