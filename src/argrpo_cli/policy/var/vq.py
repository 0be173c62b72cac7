"""VAR's image tokenizer: LlamaGen's encoder and decoder around a residual quantisation over scales (section 3.2).

Algorithm 1: from the coarsest scale on, what is left of the latent is shrunk to the scale's grid (by areas), every
place takes its nearest code, the codes are enlarged to the full grid (bicubic) and go through a convolution phi, and
that is taken off. Algorithm 2 adds the same up again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from argrpo_cli.policy.llamagen.config import VQConfig
from argrpo_cli.policy.llamagen.geometry import Count, Share
from argrpo_cli.policy.llamagen.pretrained import VQModel
from argrpo_cli.policy.var.config import SCALES, Scales


class MultiScaleVQConfig(VQConfig):
    """Geometry of the tokenizer; the defaults are those of `vae_ch160v4096z32.pth` at 256 pixels.

    Beside LlamaGen's: `scales`, `phis` and `phi_ratio` as of `VARConfig`; the two convolutions around the quantisation
    are `quant_kernel` wide.
    """

    model_type = "var_vq"
    codebook_size: Count = 4096
    codebook_embed_dim: Count = 32
    ch: Count = 160
    z_channels: Count = 32
    scales: Scales = SCALES[256]
    phis: Count = 4
    phi_ratio: Share = 0.5
    quant_kernel: Count = 3

    def __post_init__(self, **others: Any) -> None:
        self.scales = list(self.scales)
        super().__post_init__(**others)


def phi_of_scales(scales: int, phis: int) -> list[int]:
    """Which of `phis` convolutions each of `scales` scales uses: the one whose place in [0, 1] is nearest.

    In the numbers that the published code computes with: at ten scales and four convolutions two are halfway between,
    and rounding decides.
    """
    edge = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    places = np.linspace(edge, 1 - edge, phis)
    return [int(np.argmin(np.abs(places - k / (scales - 1)))) for k in range(scales)]


class ResidualQuantizer(nn.Module):
    """Codes of every scale, and what each adds to the latent; always computed in float32, whatever is around it.

    Args:
        scales, phis, phi_ratio: as of `VARConfig`.
    """

    def __init__(self, codes: int, width: int, scales: list[int] | tuple[int, ...], phis: int, phi_ratio: float):
        super().__init__()
        self.embedding = nn.Embedding(codes, width)
        self.phis = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(phis))
        self.scales, self.ratio = tuple(scales), phi_ratio
        self.phi_index = phi_of_scales(len(self.scales), phis)
        self.counts = [side**2 for side in self.scales]

    def add(self, latent: Tensor | None, tokens: Tensor, k: int) -> Tensor:
        """The latent float32 [B, C, S, S] with what the tokens int64 [B, n_k] of scale k add to it; None is zero."""
        side, full, phi = self.scales[k], self.scales[-1], self.phis[self.phi_index[k]]
        with torch.autocast(tokens.device.type, enabled=False):
            grid = self.embedding(tokens).float().transpose(1, 2).unflatten(-1, (side, side))
            if side != full:
                grid = F.interpolate(grid, size=(full, full), mode="bicubic")
            smooth = F.conv2d(grid, phi.weight.float(), phi.bias.float(), padding=1)
            added = grid * (1 - self.ratio) + smooth * self.ratio
        return added if latent is None else latent + added

    def shrink(self, latent: Tensor, k: int) -> Tensor:
        """A latent [B, C, S, S] as scale k sees it: means over areas, [B, n_k, C]."""
        if self.scales[k] != self.scales[-1]:
            latent = F.interpolate(latent, size=(self.scales[k],) * 2, mode="area")
        return latent.flatten(2).transpose(1, 2)

    def nearest(self, vectors: Tensor) -> Tensor:
        """The nearest codes int64 [B, n] of vectors [B, n, C], by Euclidean distance."""
        codes = self.embedding.weight.float()
        with torch.autocast(vectors.device.type, enabled=False):
            return (codes.square().sum(-1) - 2 * vectors.float() @ codes.t()).argmin(-1)

    def encode(self, latent: Tensor) -> Tensor:
        """A latent [B, C, S, S] to tokens int64 [B, T], scale after scale, rows first."""
        rest, tokens = latent.float(), []
        for k in range(len(self.scales)):
            tokens.append(self.nearest(self.shrink(rest, k)))
            rest = rest - self.add(None, tokens[-1], k)
        return torch.cat(tokens, dim=1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, T] to the latent that they stand for, float32 [B, C, S, S]."""
        latent = None
        for k, part in enumerate(tokens.split(self.counts, dim=1)):
            latent = self.add(latent, part, k)
        return latent

    def inputs(self, tokens: Tensor) -> Tensor:
        """What is known before each scale but the first, as that scale sees it: float32 [B, T - n_1, C].

        Args:
            tokens: int64 [B, T]; those of the last scale are not read.
        """
        latent, seen = None, []
        for k, part in enumerate(tokens.split(self.counts, dim=1)[:-1]):
            latent = self.add(latent, part, k)
            seen.append(self.shrink(latent, k + 1))
        return torch.cat(seen, dim=1)


class MultiScaleVQ(VQModel):
    """The tokenizer: `encode` to the tokens of all scales, `decode_tokens` back to pixels."""

    config_class = MultiScaleVQConfig

    def __init__(self, config: MultiScaleVQConfig):
        super().__init__(config)
        width, kernel = config.codebook_embed_dim, config.quant_kernel
        self.quantize = ResidualQuantizer(config.codebook_size, width, config.scales, config.phis, config.phi_ratio)
        self.quant_conv = nn.Conv2d(config.z_channels, width, kernel, padding=kernel // 2)
        self.post_quant_conv = nn.Conv2d(width, config.z_channels, kernel, padding=kernel // 2)
        self.post_init()

    def encode(self, images: Tensor) -> Tensor:
        """Images float [B, 3, H, W] in [-1, 1] to token ids int64 [B, T]."""
        return self.quantize.encode(self.latent(images))

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [B, T] to float [B, 3, H, W], about [-1, 1], not clamped."""
        return self.decode_latent(self.quantize.decode(tokens))
