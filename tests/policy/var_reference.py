"""VAR once more, written from the paper's equations over a state dict with the published names: slow and plain.

Every function takes the whole state dict, as a published file holds it. Nothing of the package's model is in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def random_policy(
    scales: Sequence[int] = (1, 2, 3, 4),
    *,
    depth: int = 2,
    width: int = 32,
    heads: int = 4,
    classes: int = 5,
    codes: int = 24,
    code_dim: int = 32,
    shared: bool = False,
    cosine: bool = True,
    seed: int = 0,
) -> State:
    """The published layout with random weights, its computed tensors included."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 0.3) -> Tensor:
        return std * torch.randn(*shape, generator=generator)

    def linear(name: str, out: int, into: int, std: float = 0.15) -> State:
        return {f"{name}.weight": draw(out, into, std=std), f"{name}.bias": draw(out)}

    levels = torch.tensor([k for k, side in enumerate(scales) for _ in range(side**2)])
    state = {
        "pos_start": draw(1, scales[0] ** 2, width),
        "pos_1LC": draw(1, len(levels), width),
        "class_emb.weight": draw(classes + 1, width, std=1.0),
        "lvl_embed.weight": draw(len(scales), width),
        "lvl_1L": levels[None],
        "attn_bias_for_masking": torch.where(levels[:, None] >= levels, 0.0, -torch.inf)[None, None],
        **linear("word_embed", width, code_dim),
        **linear("head", codes, width),
        **linear("head_nm.ada_lin.1", 2 * width, width),
    }
    if shared:
        state |= linear("shared_ada_lin.1", 6 * width, width)
    for index in range(depth):
        block = f"blocks.{index}"
        state |= {
            f"{block}.attn.mat_qkv.weight": draw(3 * width, width),
            f"{block}.attn.q_bias": draw(width),
            f"{block}.attn.v_bias": draw(width),
            f"{block}.attn.zero_k_bias": torch.zeros(width),
            **linear(f"{block}.attn.proj", width, width),
            **linear(f"{block}.ffn.fc1", 4 * width, width),
            **linear(f"{block}.ffn.fc2", width, 4 * width),
        }
        if shared:
            state[f"{block}.ada_gss"] = draw(1, 1, 6, width)
        else:
            state |= linear(f"{block}.ada_lin.1", 6 * width, width)
        if cosine:  # one head is sharper than the published limit of 100
            state[f"{block}.attn.scale_mul_1H11"] = torch.linspace(1.0, 5.0, heads).view(1, heads, 1, 1)
    return state


def random_tokenizer(codes: int = 24, width: int = 32, ch: int = 32, scales: int = 4, seed: int = 1) -> State:
    """The same of the tokenizer; 16 pixels a place."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}

    def conv(name: str, out: int, into: int, kernel: int = 3) -> None:
        state[f"{name}.weight"] = torch.randn(out, into, kernel, kernel, generator=generator) / (into**0.5 * kernel)
        state[f"{name}.bias"] = 0.1 * torch.randn(out, generator=generator)

    def norm(name: str, channels: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(channels, generator=generator)
        state[f"{name}.bias"] = 0.1 * torch.randn(channels, generator=generator)

    def res(name: str, into: int, out: int) -> None:
        norm(f"{name}.norm1", into), conv(f"{name}.conv1", out, into)
        norm(f"{name}.norm2", out), conv(f"{name}.conv2", out, out)
        if into != out:
            conv(f"{name}.nin_shortcut", out, into, 1)

    def attention(name: str, channels: int) -> None:
        norm(f"{name}.norm", channels)
        conv(f"{name}.qkv", 3 * channels, channels, 1)
        conv(f"{name}.proj_out", channels, channels, 1)

    def ends(half: str, into: int, first: int, last: int, out: int, middle: int) -> None:
        conv(f"{half}.conv_in", first, into)
        res(f"{half}.mid.block_1", middle, middle), attention(f"{half}.mid.attn_1", middle)
        res(f"{half}.mid.block_2", middle, middle)
        norm(f"{half}.norm_out", last), conv(f"{half}.conv_out", out, last)

    widths = [ch * factor for factor in (1, 1, 2, 2, 4)]
    ends("encoder", 3, ch, widths[-1], width, widths[-1])
    ends("decoder", width, widths[-1], ch, 3, widths[-1])
    for level, channels in enumerate(widths):
        down, up = f"encoder.down.{level}", f"decoder.up.{level}"
        before, above = widths[max(level - 1, 0)], widths[min(level + 1, 4)]
        for index in range(2):
            res(f"{down}.block.{index}", before if index == 0 else channels, channels)
        for index in range(3):
            res(f"{up}.block.{index}", above if index == 0 else channels, channels)
        for name, count in ((down, 2), (up, 3)):
            for index in range(count if level == 4 else 0):
                attention(f"{name}.attn.{index}", channels)
        if level < 4:
            conv(f"{down}.downsample.conv", channels, channels)
        if level > 0:
            conv(f"{up}.upsample.conv", channels, channels)
    conv("quant_conv", width, width), conv("post_quant_conv", width, width)
    for index in range(4):
        conv(f"quantize.quant_resi.qresi_ls.{index}", width, width)
    state["quantize.embedding.weight"] = torch.randn(codes, width, generator=generator)
    state["quantize.ema_vocab_hit_SV"] = torch.zeros(scales, codes)
    return state


# --- the transformer


def transformer(state: State, classes: Tensor, seen: Tensor, levels: Tensor, heads: int) -> Tensor:
    """Logits [B, n, V] of the first n places, by class ids [B] and the features seen there [B, n - 1, C]."""
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    condition = state["class_emb.weight"][classes]
    first = condition[:, None] + state["pos_start"]
    x = torch.cat([first, F.linear(seen, state["word_embed.weight"], state["word_embed.bias"])], dim=1)
    x = x + state["lvl_embed.weight"][levels] + state["pos_1LC"][:, : len(levels)]
    width = x.shape[-1]

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def normed(value: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    for index in range(depth):
        name = f"blocks.{index}"
        if f"{name}.ada_gss" in state:
            six = linear("shared_ada_lin.1", F.silu(condition)).view(-1, 1, 6, width) + state[f"{name}.ada_gss"]
        else:
            six = linear(f"{name}.ada_lin.1", F.silu(condition)).view(-1, 1, 6, width)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six.unbind(2)
        h = normed(x) * (1 + scale1) + shift1
        q, k, v = (h @ part.T for part in state[f"{name}.attn.mat_qkv.weight"].split(width))
        q, v = q + state[f"{name}.attn.q_bias"], v + state[f"{name}.attn.v_bias"]
        q, k, v = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (q, k, v))
        sharpness = state.get(f"{name}.attn.scale_mul_1H11")
        if sharpness is None:
            scores = q @ k.transpose(2, 3) / (4 * math.sqrt(width // heads))
        else:
            q, k = (one / one.norm(dim=-1, keepdim=True) for one in (q, k))
            scores = q @ k.transpose(2, 3) * sharpness.exp().clamp(max=100)
        scores = scores.masked_fill(levels[:, None] < levels, -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + gamma1 * linear(f"{name}.attn.proj", out)
        h = normed(x) * (1 + scale2) + shift2
        x = x + gamma2 * linear(f"{name}.ffn.fc2", F.gelu(linear(f"{name}.ffn.fc1", h), approximate="tanh"))
    scale, shift = linear("head_nm.ada_lin.1", F.silu(condition)).view(-1, 1, 2, width).unbind(2)
    return linear("head", normed(x) * (1 + scale) + shift)


def logits(state: State, vae: State, classes: Tensor, tokens: Tensor, scales: Sequence[int], heads: int = 4) -> Tensor:
    """Logits [B, T, V] of an image's tokens, each scale by a pass of its own over the scales before it alone."""
    parts = tokens.split([side**2 for side in scales], dim=1)
    levels = torch.tensor([k for k, side in enumerate(scales) for _ in range(side**2)])
    out, seen = [], torch.zeros(len(tokens), 0, vae["quantize.embedding.weight"].shape[1])
    for k, side in enumerate(scales):
        places = levels <= k
        out.append(transformer(state, classes, seen, levels[places], heads)[:, -(side**2) :])
        if k + 1 < len(scales):
            so_far = sum(added(vae, part, index, scales) for index, part in enumerate(parts[: k + 1]))
            shrunk = F.adaptive_avg_pool2d(so_far, scales[k + 1])
            seen = torch.cat([seen, shrunk.flatten(2).transpose(1, 2)], dim=1)
    return torch.cat(out, dim=1)


# --- the tokenizer


def added(vae: State, tokens: Tensor, k: int, scales: Sequence[int]) -> Tensor:
    """What tokens [B, n] of scale k add to the latent (algorithm 2); four scales have a phi each."""
    grid = vae["quantize.embedding.weight"][tokens].transpose(1, 2).unflatten(-1, (scales[k], scales[k]))
    grid = F.interpolate(grid, size=(scales[-1], scales[-1]), mode="bicubic")
    name = f"quantize.quant_resi.qresi_ls.{k}"
    return 0.5 * grid + 0.5 * F.conv2d(grid, vae[f"{name}.weight"], vae[f"{name}.bias"], padding=1)


def quantise(vae: State, latent: Tensor, scales: Sequence[int]) -> Tensor:
    """Tokens [B, T] of a latent (algorithm 1)."""
    rest, tokens = latent, []
    for k, side in enumerate(scales):
        places = F.adaptive_avg_pool2d(rest, side).flatten(2).transpose(1, 2)
        tokens.append(torch.cdist(places, vae["quantize.embedding.weight"][None]).argmin(-1))
        rest = rest - added(vae, tokens[-1], k, scales)
    return torch.cat(tokens, dim=1)


def _conv(vae: State, name: str, x: Tensor, **how: int) -> Tensor:
    return F.conv2d(x, vae[f"{name}.weight"], vae[f"{name}.bias"], **how)


def _norm(vae: State, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, vae[f"{name}.weight"], vae[f"{name}.bias"], eps=1e-6)


def _res(vae: State, name: str, x: Tensor) -> Tensor:
    h = _conv(vae, f"{name}.conv1", F.silu(_norm(vae, f"{name}.norm1", x)), padding=1)
    h = _conv(vae, f"{name}.conv2", F.silu(_norm(vae, f"{name}.norm2", h)), padding=1)
    return h + (_conv(vae, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in vae else x)


def _attention(vae: State, name: str, x: Tensor) -> Tensor:
    q, k, v = (one.flatten(2) for one in _conv(vae, f"{name}.qkv", _norm(vae, f"{name}.norm", x)).chunk(3, dim=1))
    weights = (q.transpose(1, 2) @ k / math.sqrt(x.shape[1])).softmax(-1)
    return x + _conv(vae, f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))


def _middle(vae: State, half: str, x: Tensor) -> Tensor:
    x = _attention(vae, f"{half}.mid.attn_1", _res(vae, f"{half}.mid.block_1", x))
    return _res(vae, f"{half}.mid.block_2", x)


def _level(vae: State, name: str, x: Tensor, blocks: int) -> Tensor:
    for index in range(blocks):
        x = _res(vae, f"{name}.block.{index}", x)
        if f"{name}.attn.{index}.qkv.weight" in vae:
            x = _attention(vae, f"{name}.attn.{index}", x)
    return x


def latent(vae: State, images: Tensor) -> Tensor:
    """Of images in [-1, 1]."""
    x = _conv(vae, "encoder.conv_in", images, padding=1)
    for level in range(5):
        x = _level(vae, f"encoder.down.{level}", x, 2)
        if level < 4:
            x = _conv(vae, f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = F.silu(_norm(vae, "encoder.norm_out", _middle(vae, "encoder", x)))
    return _conv(vae, "quant_conv", _conv(vae, "encoder.conv_out", x, padding=1), padding=1)


def pixels(vae: State, tokens: Tensor, scales: Sequence[int]) -> Tensor:
    """Images of tokens [B, T]."""
    parts = tokens.split([side**2 for side in scales], dim=1)
    whole = sum(added(vae, part, k, scales) for k, part in enumerate(parts))
    x = _middle(
        vae, "decoder", _conv(vae, "decoder.conv_in", _conv(vae, "post_quant_conv", whole, padding=1), padding=1)
    )
    for level in reversed(range(5)):
        x = _level(vae, f"decoder.up.{level}", x, 3)
        if level > 0:
            doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = _conv(vae, f"decoder.up.{level}.upsample.conv", doubled, padding=1)
    return _conv(vae, "decoder.conv_out", F.silu(_norm(vae, "decoder.norm_out", x)), padding=1)
