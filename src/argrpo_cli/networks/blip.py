"""ImageReward's network in transformers' BLIP: an image and a prompt to a number.

BLIP's ViT-L/16 sees the image, BLIP's text encoder reads the prompt with cross attention to it, and linear layers
without activations turn the feature of [CLS] into r. The checkpoint's keys are renamed to those of transformers' BLIP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_text

# transformers' defaults are those of BLIP base at 384 pixels, with 8 heads and another epsilon.
SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION = {**SIZES, "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6}
TEXT = {"vocab_size": 30524, "num_attention_heads": 12, "encoder_hidden_size": 1024, "layer_norm_eps": 1e-12}
HEAD = (1024, 128, 64, 16, 1)

# Published name -> ours, in this order. The head's numbers jump over the dropouts.
RENAMES = [
    (r"^blip\.visual_encoder\.(cls_token)$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.(pos_embed)$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^blip\.text_encoder\.", "text."),
    *((rf"^mlp\.layers\.{theirs}\.", f"head.{ours}.") for ours, theirs in enumerate((0, 2, 4, 6, 7))),
]
IGNORED = re.compile(  # the positions' numbers, and the projections of BLIP's contrastive loss
    r"^blip\.(text_encoder\.embeddings\.position_ids|(vision|text)_proj\.(weight|bias))$"
)


class ImageRewardNetwork(nn.Module):
    """Pixels and tokens to r, before it is normalised."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig, head: Sequence[int]):
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        widths = (text.hidden_size, *head)
        self.head = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(widths)))

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S], tokens int64 [B, T] and their mask (1 for a token) to [B]."""
        image = self.vision(pixels).last_hidden_state
        text = self.text(tokens, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
        return self.head(text[:, 0])[:, 0]


def build_network(
    vision: Mapping[str, Any] = VISION, text: Mapping[str, Any] = TEXT, head: Sequence[int] = HEAD
) -> ImageRewardNetwork:
    """The network without weights: fields of BLIP's two configurations, head widths."""
    with init_empty_weights():  # tables that are computed stay
        network = ImageRewardNetwork(BlipVisionConfig(**vision), BlipTextConfig(**text), head)
    return network.eval().requires_grad_(False)


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's state dict with the names of `ImageRewardNetwork`.

    What the score does not use (`IGNORED`) is left out; an unknown key keeps its name, so that `fit_state` tells it.
    """
    renamed = {}
    for key, value in state.items():
        pattern, ours = next((pair for pair in RENAMES if re.match(pair[0], key)), ("^", ""))
        if not IGNORED.match(key):
            renamed[re.sub(pattern, ours, key)] = value
    return renamed


def load_tokenizer(path: str | Path) -> BertTokenizer:
    """BERT's lower-case word pieces from a vocab.txt; UserError if it is none."""
    vocabulary = {piece: index for index, piece in enumerate(read_text(path).removesuffix("\n").split("\n"))}
    if lacking := [piece for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if piece not in vocabulary]:
        raise UserError(
            f"{path} is not the vocabulary of google-bert/bert-base-uncased: {', '.join(lacking)} not in it"
        )
    return BertTokenizer(vocab=vocabulary)
