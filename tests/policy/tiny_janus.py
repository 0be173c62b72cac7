"""A Janus so small that a pass takes milliseconds: random weights, the same on every call, and eight words."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig, PreTrainedTokenizerFast

from argrpo_cli.policy.janus.model import JanusForImageGeneration
from argrpo_cli.policy.janus.policy import Janus
from argrpo_cli.policy.janus.prompts import IMAGE_STARTS, Prompts
from argrpo_cli.policy.janus.vq import tokenizer_of

SPECIAL = ("<pad>", "<begin>", "<unk>", IMAGE_STARTS)
WORDS = ("<|", "user", "|>:", "assistant", "a", "red", "blue", "big", "dog", "cat", "and")
CODES, TOKENS, IMAGE_SIZE = 32, 16, 16
PROMPTS = ("a dog", "a big red cat and a blue dog")


def tiny_words() -> PreTrainedTokenizerFast:
    """Whole words, those of the published chat template among them; a sentence begins with <begin>."""
    ids = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<begin>",
        unk_token="<unk>",
        extra_special_tokens={"boi_token": IMAGE_STARTS},
    )


def tiny_config() -> JanusConfig:
    width = 32
    return JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(SPECIAL) + len(WORDS),
            hidden_size=width,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=1,
            pad_token_id=0,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=IMAGE_SIZE,
            patch_size=4,
            projection_dim=width,
            num_image_tokens=TOKENS,
        ),
        vq_config=JanusVQVAEConfig(
            num_embeddings=CODES,
            base_channels=32,
            channel_multiplier=[1, 1, 1],
            num_res_blocks=1,
            latent_channels=32,
            projection_dim=width,
            image_token_embed_dim=width,
        ),
        image_token_id=2,
    )


def tiny_janus(cfg_scale: float | None = 3.0) -> Janus:
    """Weights so large that it draws of everything, and that guidance and what was drawn before matter."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = JanusForImageGeneration(tiny_config()).eval()
        drawing = (model.model.language_model, model.model.generation_aligner, model.model.generation_head)
        for module in (one for part in drawing for one in part.modules()):
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.3)
        nn.init.normal_(model.model.generation_embeddings.weight)
    generation = model.generation_config
    generation.bos_token_id, generation.pad_token_id, generation.guidance_scale = 1, 0, cfg_scale
    generation.generation_kwargs = {"boi_token_id": SPECIAL.index(IMAGE_STARTS)}
    sampling = {} if cfg_scale is None else {"cfg_scale": cfg_scale}
    tokenizer = tokenizer_of(model.model.vqmodel, "tiny")
    return Janus(model, Prompts(tiny_words()), tokenizer, None, IMAGE_SIZE, "tiny", sampling=sampling)
