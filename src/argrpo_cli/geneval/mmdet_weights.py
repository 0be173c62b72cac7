"""The names of the benchmark's own detector file, `mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco*.pth`, in
transformers' network.

mmdet 2.x and transformers compute the same from the same numbers under other names, but for three things:

- query, key and value of an attention are one matrix in mmdet, in this order; transformers has three, except in the
  decoder's attention across to the pixels;
- where Swin merges four pixels into one, mmdet's columns run over channels and within each over the pixels (0, 0),
  (0, 1), (1, 0), (1, 1) as (row, column); transformers' over the pixels (0, 0), (1, 0), (0, 1), (1, 1) and within each
  over the channels;
- Swin's indices of relative positions are stored by mmdet and computed by transformers.

Feature levels run from coarse to fine in both; classes are COCO's 80 in its order, "no object" last, in both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

MERGED_PIXELS = (0, 2, 1, 3)  # transformers' order of the four pixels, in mmdet's numbers
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
FUSED = re.compile(r"(.*)\.(?:qkv\.|in_proj_)(weight|bias)")
KEPT_FUSED = ".cross_attn"
COMPUTED = ".relative_position_index"

_SWIN = "model.pixel_level_module.encoder"
_BLOCK, _OWN_BLOCK = "backbone.stages.#.blocks.#", f"{_SWIN}.swin.encoder.layers.#.blocks.#"
_PIXEL, _OWN_PIXEL = "panoptic_head.pixel_decoder", "model.pixel_level_module.decoder"
_ENCODER, _OWN_ENCODER = f"{_PIXEL}.encoder.layers.#", f"{_OWN_PIXEL}.encoder.layers.#"
_QUERIES = "model.transformer_module"
_DECODER, _OWN_DECODER = "panoptic_head.transformer_decoder.layers.#", f"{_QUERIES}.decoder.layers.#"

# The beginnings of mmdet's keys and transformers' in their place; # is a number, the same in both.
NAMES = {
    "backbone.patch_embed.projection": f"{_SWIN}.swin.embeddings.patch_embeddings.projection",
    "backbone.patch_embed.norm": f"{_SWIN}.swin.embeddings.norm",
    f"{_BLOCK}.norm1": f"{_OWN_BLOCK}.layernorm_before",
    f"{_BLOCK}.norm2": f"{_OWN_BLOCK}.layernorm_after",
    f"{_BLOCK}.attn.w_msa.qkv": f"{_OWN_BLOCK}.attention.qkv",
    f"{_BLOCK}.attn.w_msa.proj": f"{_OWN_BLOCK}.attention.o_proj",
    f"{_BLOCK}.attn.w_msa": f"{_OWN_BLOCK}.attention.relative_position_bias",
    f"{_BLOCK}.ffn.layers.0.0": f"{_OWN_BLOCK}.mlp.fc1",
    f"{_BLOCK}.ffn.layers.1": f"{_OWN_BLOCK}.mlp.fc2",
    "backbone.stages.#.downsample": f"{_SWIN}.swin.encoder.layers.#.downsample",
    **{f"backbone.norm{stage}": f"{_SWIN}.hidden_states_norms.stage{stage + 1}" for stage in range(4)},
    f"{_PIXEL}.input_convs.#.conv": f"{_OWN_PIXEL}.input_projections.#.0",
    f"{_PIXEL}.input_convs.#.gn": f"{_OWN_PIXEL}.input_projections.#.1",
    f"{_PIXEL}.level_encoding.weight": f"{_OWN_PIXEL}.level_embed",
    f"{_PIXEL}.lateral_convs.0.conv": f"{_OWN_PIXEL}.adapter_1.0",
    f"{_PIXEL}.lateral_convs.0.gn": f"{_OWN_PIXEL}.adapter_1.1",
    f"{_PIXEL}.output_convs.0.conv": f"{_OWN_PIXEL}.layer_1.0",
    f"{_PIXEL}.output_convs.0.gn": f"{_OWN_PIXEL}.layer_1.1",
    f"{_PIXEL}.mask_feature": f"{_OWN_PIXEL}.mask_projection",
    f"{_ENCODER}.attentions.0": f"{_OWN_ENCODER}.self_attn",
    f"{_ENCODER}.norms.0": f"{_OWN_ENCODER}.self_attn_layer_norm",
    f"{_ENCODER}.norms.1": f"{_OWN_ENCODER}.final_layer_norm",
    f"{_ENCODER}.ffns.0.layers.0.0": f"{_OWN_ENCODER}.fc1",
    f"{_ENCODER}.ffns.0.layers.1": f"{_OWN_ENCODER}.fc2",
    f"{_DECODER}.attentions.0.attn": f"{_OWN_DECODER}.cross_attn",  # comes first in a layer
    f"{_DECODER}.attentions.1.attn": f"{_OWN_DECODER}.self_attn",
    f"{_DECODER}.norms.0": f"{_OWN_DECODER}.cross_attn_layer_norm",
    f"{_DECODER}.norms.1": f"{_OWN_DECODER}.self_attn_layer_norm",
    f"{_DECODER}.norms.2": f"{_OWN_DECODER}.final_layer_norm",
    f"{_DECODER}.ffns.0.layers.0.0": f"{_OWN_DECODER}.fc1",
    f"{_DECODER}.ffns.0.layers.1": f"{_OWN_DECODER}.fc2",
    "panoptic_head.transformer_decoder.post_norm": f"{_QUERIES}.decoder.layernorm",
    "panoptic_head.query_embed": f"{_QUERIES}.queries_embedder",
    "panoptic_head.query_feat": f"{_QUERIES}.queries_features",
    "panoptic_head.level_embed": f"{_QUERIES}.level_embed",
    "panoptic_head.cls_embed": "class_predictor",
    **{
        f"panoptic_head.mask_embed.{2 * layer}": f"{_QUERIES}.decoder.mask_predictor.mask_embedder.{layer}.0"
        for layer in range(3)
    },
}


def from_mmdet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmdet's state dict in transformers' names and layout; a key that has no place there stays as it is."""
    mapped: dict[str, Tensor] = {}
    for key, value in state.items():
        name = renamed(key)
        fused = FUSED.fullmatch(name)
        if key.endswith(COMPUTED):
            continue
        if ".downsample." in name:
            mapped[name] = merged_pixels(value)
        elif fused and not fused[1].endswith(KEPT_FUSED):
            parts = zip(PROJECTIONS, value.chunk(3), strict=True)
            mapped.update({f"{fused[1]}.{part}.{fused[2]}": rows.contiguous() for part, rows in parts})
        else:
            mapped[name] = value
    return mapped


def renamed(key: str) -> str:
    """transformers' name of a key of mmdet, attentions still in one; the key itself where there is none."""
    for theirs, own in NAMES.items():
        found = re.match(re.escape(theirs).replace(r"\#", r"(\d+)") + r"(?=\.|$)", key)
        if found:
            for number in found.groups():
                own = own.replace("#", number, 1)
            return own + key[found.end() :]
    return key


def merged_pixels(value: Tensor) -> Tensor:
    """[..., 4 C]: mmdet's columns (channel, pixel) as transformers' (pixel, channel)."""
    by_pixel = value.unflatten(-1, (-1, 4)).transpose(-1, -2)
    return by_pixel[..., MERGED_PIXELS, :].flatten(-2).contiguous()
