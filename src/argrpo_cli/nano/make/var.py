"""Lessons of nano-var, the VAR of the nano classes: its tokenizer of six scales, nano-msvq, and the policy."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from argrpo_cli.nano.make.fit import Lesson, Setting, muon_and_adamw, save_half
from argrpo_cli.nano.make.policies import DEAD_BELOW, DECAY, DROPOUT, class_lesson, reconstruction
from argrpo_cli.nano.scenes import CLASS_NAMES, class_batch
from argrpo_cli.networks.weights import load_pretrained
from argrpo_cli.policy.llamagen.vq import from_uint8
from argrpo_cli.policy.var.config import VARConfig
from argrpo_cli.policy.var.model import VARForImageGeneration
from argrpo_cli.policy.var.vq import MultiScaleVQ, MultiScaleVQConfig, ResidualQuantizer

SCALES = (1, 2, 3, 4, 6, 8)  # 130 tokens
TOKENIZER = {
    "codebook_size": 512,
    "codebook_embed_dim": 16,
    "ch": 32,
    "encoder_ch_mult": [1, 2],
    "decoder_ch_mult": [1, 3],
    "num_res_blocks": 1,
    "z_channels": 64,
    "patch_size": 4,
    "quant_kernel": 1,
    "scales": SCALES,
}
POLICY = {"hidden_size": 160, "num_hidden_layers": 6, "num_attention_heads": 5, "shared_modulation": True}
COMMITMENT = 0.25  # how much the encoder is drawn to its codes, as published


class Tokenizer(nn.Module):
    """The tokenizer as it learns, with how often each code is used in a batch (a running mean)."""

    def __init__(self, model: MultiScaleVQ) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("uses", torch.ones(model.config.codebook_size))


def quantised(quantizer: ResidualQuantizer, latent: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Tokens int64 [B, T] of a latent [B, C, S, S], what is said of it after each scale, with gradients of codes and
    convolutions, and the vectors [B T, C] that codes were looked for."""
    rest, so_far, steps, tokens, vectors = latent, None, [], [], []
    for k in range(len(quantizer.scales)):
        vectors.append(quantizer.shrink(rest, k))
        tokens.append(quantizer.nearest(vectors[-1].detach()))
        so_far = quantizer.add(so_far, tokens[-1], k)
        steps.append(so_far)
        rest = latent - so_far.detach()
    return torch.cat(tokens, dim=1), steps, torch.cat(vectors, dim=1).flatten(0, 1)


def tokenizer(
    setting: Setting, pool: int = 12_000, batch: int = 32, unseen: int = 512, quantised_from: int = 100
) -> Lesson:
    """nano-msvq: LlamaGen's encoder and decoder, small, around VAR's residual quantisation of 8x8 places.

    Reconstruction as nano-vq's. The codes learn by gradients (VAR's loss: after each scale what is said of the latent
    is drawn to it, and, less, the latent to that), begin as latents of all sizes, and begin again where they fall out
    of use.

    Args:
        pool: scenes rendered up front.
        quantised_from: step; before, latents pass through unquantised.
    """
    images = torch.from_numpy(class_batch(setting.rng(40_000), pool)[0])
    held_out = torch.from_numpy(class_batch(setting.rng(10_000), unseen, balanced=True)[0])
    model = MultiScaleVQ(MultiScaleVQConfig(**TOKENIZER)).to(memory_format=torch.channels_last)
    network, codes = Tokenizer(model), model.quantize.embedding.weight

    def some(vectors: Tensor, count: int) -> Tensor:
        """So many of these vectors, shrunk at random: later scales choose codes for what is left."""
        share = torch.rand(count, 1, generator=setting.generator)
        return vectors[setting.rows(count, len(vectors))] * share

    def loss(step: int) -> Tensor:
        target = from_uint8(images[setting.rows(batch, pool)]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latent = model.latent(target)
        latent, said = latent.float(), latent.new_zeros((), dtype=torch.float32)
        if step == quantised_from:
            with torch.no_grad():
                codes.copy_(some(latent.flatten(2).transpose(1, 2).flatten(0, 1), len(codes)))
        through = latent
        if step >= quantised_from:
            tokens, steps, vectors = quantised(model.quantize, latent)
            goal = latent.detach()
            said = sum(F.mse_loss(one, goal) + COMMITMENT * F.mse_loss(latent, one.detach()) for one in steps) / len(
                steps
            )
            through = latent + (steps[-1] - latent).detach()
            with torch.no_grad():
                count = torch.bincount(tokens.flatten(), minlength=len(codes)).float()
                network.uses.mul_(DECAY).add_(count, alpha=1 - DECAY)
                dead = (network.uses < DEAD_BELOW).nonzero().flatten()
                if len(dead):
                    codes[dead], network.uses[dead] = some(vectors, len(dead)), 1.0
        with torch.autocast("cpu", torch.bfloat16):
            output = model.decode_latent(through)
        error = output.float() - target
        edges = sum(error.diff(dim=dim).abs().mean() for dim in (2, 3))
        return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + said

    return Lesson(
        network=network,
        optimizers=[torch.optim.AdamW(model.parameters(), lr=1.2e-3, betas=(0.9, 0.98), weight_decay=1e-4)],
        loss=loss,
        measure=lambda: reconstruction(model, held_out),
        save=lambda folder: save_half(model, folder),
        steps=4000,
        every=250,
        warmup=150,
        kept=True,
    )


def load_msvq(folder: Path) -> MultiScaleVQ:
    """nano-msvq in float32, evaluation mode."""
    return load_pretrained(MultiScaleVQ, folder, torch.float32).eval().requires_grad_(False)


def policy(setting: Setting, **sizes: int) -> Lesson:
    """nano-var, by maximum likelihood on tokenised scenes. The matrices of its blocks learn by Muon, as nano-t2i's.

    Its policy.json names the tokenizer beside it.

    Args:
        sizes: of `class_lesson`.
    """
    vq = load_msvq(setting.weights / "nano-msvq")

    def model(tokens: int) -> VARForImageGeneration:
        config = VARConfig(
            vocab_size=vq.config.codebook_size,
            code_dim=vq.config.codebook_embed_dim,
            num_classes=len(CLASS_NAMES),
            scales=vq.config.scales,
            phis=vq.config.phis,
            phi_ratio=vq.config.phi_ratio,
            class_dropout_prob=DROPOUT,
            **POLICY,
        )
        model = VARForImageGeneration(config)
        model.quantizer.load_state_dict(vq.quantize.state_dict())
        return model

    def optimizers(model: VARForImageGeneration) -> list[torch.optim.Optimizer]:
        trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
        return muon_and_adamw(trained, "blocks.", lr=1.2e-3)

    card = {"family": "var", "tokenizer": "../nano-msvq"}
    schedule = {"steps": 2000, "every": 200, "warmup": 50, "kept": True}
    return class_lesson(setting, "nano-var", vq, model, optimizers, card=card, **sizes, **schedule)
