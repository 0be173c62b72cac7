"""The image tokenizer of Janus is LlamaGen's VQ-16 under other names: here it becomes LlamaGen's network.

That one is in float32 whatever the policy is, stays whole while the policy is shared out over processes, and looks
codes up as published, by unit vectors (transformers' `JanusVQVAE.encode` leaves the lengths in).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from argrpo_cli.networks.weights import fit_state
from argrpo_cli.policy.llamagen.config import VQConfig
from argrpo_cli.policy.llamagen.pretrained import VQModel

if TYPE_CHECKING:
    from transformers import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

# Parts of the names of transformers -> LlamaGen's.
RENAMES = {
    ".down.": ".conv_blocks.", ".up.": ".conv_blocks.", ".block.": ".res.",
    ".mid.block_1.": ".mid.0.", ".mid.attn_1.": ".mid.1.", ".mid.block_2.": ".mid.2.",
}  # fmt: skip
UNUSED = {"quantize.codebook_used": torch.zeros(65536)}  # a buffer of LlamaGen's file


def vq_config(config: JanusVQVAEConfig) -> VQConfig:
    """The same geometry."""
    return VQConfig(
        codebook_size=config.num_embeddings,
        codebook_embed_dim=config.embed_dim,
        in_channels=config.in_channels,
        ch=config.base_channels,
        encoder_ch_mult=list(config.channel_multiplier),
        decoder_ch_mult=list(config.channel_multiplier),
        num_res_blocks=config.num_res_blocks,
        z_channels=config.latent_channels,
    )


def tokenizer_of(vqmodel: JanusVQVAE, source: str) -> VQModel:
    """The tokenizer of a Janus, frozen, float32; weights of that type are shared with it, not copied.

    Raises:
        UserError: keys or shapes that do not fit; `source` says of what.
    """
    names = {}
    for key in vqmodel.state_dict():
        names[key] = key
        for theirs, own in RENAMES.items():
            names[key] = names[key].replace(theirs, own)
    with torch.device("meta"):
        tokenizer = VQModel(vq_config(vqmodel.config))
    device = next(vqmodel.parameters()).device
    unused = {key: value.to(device) for key, value in UNUSED.items()}
    fit_state(tokenizer, vqmodel.state_dict() | unused, f"the image tokenizer of {source}", names=names)
    return tokenizer.eval().requires_grad_(False)
