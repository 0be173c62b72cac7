"""LlamaGen's image tokenizer: a convolutional encoder and decoder around a codebook of unit vectors (section 3.1).

The module tree carries the published names (`encoder.conv_blocks.0.res.0.norm1.weight`, ...): a published state dict
loads as it is. One key is ours: `patch_size` > 1 folds pixels into channels before the first convolution and unfolds
them after the last, which makes a small model quick; 1 is the published network.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argrpo_cli.policy.llamagen.geometry import VQGeometry
from argrpo_cli.policy.outline import DECODE_PIXELS


class Norm(nn.GroupNorm):
    """In float32, as autocast has it on a GPU; on a CPU torch's own takes ten times as long in bfloat16."""

    def __init__(self, channels: int):
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class ResBlock(nn.Module):
    """norm, swish, 3x3 convolution, twice, beside a shortcut."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.norm1, self.conv1 = Norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = Norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            self.nin_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if h.shape[1] != x.shape[1] else x) + h


class AttnBlock(nn.Module):
    """One head of full attention over all positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.norm(x)
        q, k, v = (layer(y).view(b, 1, c, h * w).transpose(2, 3) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out.transpose(2, 3).reshape(b, c, h, w))


def _downsample(channels: int) -> nn.Sequential:
    pad = nn.ZeroPad2d((0, 1, 0, 1))  # one pixel right and below, as published
    return nn.Sequential(OrderedDict(pad=pad, conv=nn.Conv2d(channels, channels, 3, stride=2)))


def _upsample(channels: int) -> nn.Sequential:
    nearest = nn.Upsample(scale_factor=2.0, mode="nearest")
    return nn.Sequential(OrderedDict(nearest=nearest, conv=nn.Conv2d(channels, channels, 3, padding=1)))


class Level(nn.Module):
    """The blocks of one resolution, attention only at the lowest; then, by its name, the way to the next one."""

    def __init__(self, cin: int, cout: int, blocks: int, attention: bool, **resample: nn.Module):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(cin if i == 0 else cout, cout) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(cout) for _ in range(blocks if attention else 0))
        for name, module in resample.items():
            self.add_module(name, module)
        self.resample_names = tuple(resample)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for name in self.resample_names:
            x = getattr(self, name)(x)
        return x


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList([ResBlock(channels, channels), AttnBlock(channels), ResBlock(channels, channels)])


class Encoder(nn.Module):
    """Image [B, 3, H, W] in [-1, 1] to latent [B, z_channels, h, w]."""

    def __init__(self, config: VQGeometry):
        super().__init__()
        widths = [config.ch * m for m in config.encoder_ch_mult]
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(config.in_channels * config.patch_size**2, config.ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            down = {} if last else {"downsample": _downsample(width)}
            cin = config.ch if i == 0 else widths[i - 1]
            self.conv_blocks.append(Level(cin, width, config.num_res_blocks, last, **down))
        self.mid = _middle(widths[-1])
        self.norm_out = Norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(x, self.patch_size))
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latent [B, z_channels, h, w] to image [B, 3, H, W], not clamped."""

    def __init__(self, config: VQGeometry):
        super().__init__()
        widths = [config.ch * m for m in reversed(config.decoder_ch_mult)]
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            up = {} if i == len(widths) - 1 else {"upsample": _upsample(width)}
            cin = widths[max(i - 1, 0)]
            self.conv_blocks.append(Level(cin, width, config.num_res_blocks + 1, i == 0, **up))
        self.norm_out = Norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels * config.patch_size**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch_size)


class VectorQuantizer(nn.Module):
    """Nearest entry of a codebook whose entries, like the latent, are scaled to unit length on every use."""

    def __init__(self, config: VQGeometry):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_embed_dim)
        # Counts of recent use in the published files; kept so that state dicts match, not used here.
        self.register_buffer("codebook_used", torch.zeros(65536))

    def codebook(self) -> Tensor:
        return F.normalize(self.embedding.weight, dim=-1)

    def nearest(self, z: Tensor) -> Tensor:
        """z [B, C, h, w] to indices int64 [B, h*w]; for unit vectors the nearest is the largest inner product."""
        flat = F.normalize(z.flatten(2).transpose(1, 2), dim=-1)
        return (flat @ self.codebook().t()).argmax(-1)

    def entries(self, indices: Tensor, height: int, width: int) -> Tensor:
        """Indices [B, h*w] to unit vectors [B, C, h, w]."""
        vectors = F.embedding(indices, self.codebook())
        return vectors.transpose(1, 2).reshape(indices.shape[0], -1, height, width)


class VQNetwork(nn.Module):
    """The tokenizer: `encode` to token ids, `decode_tokens` back to pixels."""

    config_class: ClassVar[type] = VQGeometry

    def __init__(self, config: VQGeometry):
        super().__init__()
        self.config = config
        self.build(config)

    def build(self, config: VQGeometry) -> None:
        """Make the parts; a model of transformers calls it once its own beginning is made."""
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)

    def latent(self, images: Tensor) -> Tensor:
        """Images float [B, 3, H, W] in [-1, 1] to the latent before quantisation, [B, C, h, w]."""
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Tensor) -> Tensor:
        """Images float [B, 3, H, W] in [-1, 1] to token ids int64 [B, T], rows first."""
        return self.quantize.nearest(self.latent(images))

    def decode_latent(self, quantised: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(quantised))

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [B, T] of a square image to float [B, 3, H, W], about [-1, 1], not clamped."""
        side = round(tokens.shape[1] ** 0.5)
        if side * side != tokens.shape[1]:
            raise ValueError(f"{tokens.shape[1]} tokens do not make a square image")
        return self.decode_latent(self.quantize.entries(tokens, side, side))

    def encode_images(self, images: Tensor) -> Tensor:
        """Images uint8 [B, 3, H, W] to tokens int64 [B, T]."""
        return self.encode(from_uint8(images))

    def decode_images(self, tokens: Tensor, image_size: int, size: int | None = None) -> Tensor:
        """Token ids int64 [B, T] to images uint8 [B, 3, size, size], `DECODE_PIXELS` at a time; size is by default
        `image_size`, that of the tokens.

        Another size is reached as in LlamaGen's sampler: bicubic, not antialiased, before the numbers become bytes.
        """
        images = []
        for chunk in tokens.split(max(1, DECODE_PIXELS // image_size**2)):
            pixels = self.decode_tokens(chunk)
            if size is not None and size != image_size:
                pixels = F.interpolate(pixels, (size, size), mode="bicubic")
            images.append(to_uint8(pixels))
        return torch.cat(images)

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruction of images, [B, 3, H, W]."""
        return self.decode_tokens(self.encode(images))


def to_uint8(decoded: Tensor) -> Tensor:
    """Decoder output [-1, 1] to uint8 [0, 255], rounded once (the published scripts truncate in places)."""
    return decoded.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to float32 in [-1, 1]."""
    return images.float().div(127.5).sub(1)
