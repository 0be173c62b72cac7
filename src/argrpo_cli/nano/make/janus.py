"""The lesson of nano-janus: a small Janus as transformers has it, on the captions of the nano world."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig, PreTrainedTokenizerFast

from argrpo_cli.nano.make.fit import Lesson, Setting, muon_and_adamw
from argrpo_cli.nano.make.policies import DROPOUT, SHARES, tokenised
from argrpo_cli.nano.scenes import IMAGE_SIZE, caption_batch, vocabulary
from argrpo_cli.policy.janus.model import Encoded, JanusForImageGeneration
from argrpo_cli.policy.janus.policy import FROZEN, Janus
from argrpo_cli.policy.janus.prompts import IMAGE_STARTS, Prompts
from argrpo_cli.system.files import make_dir

LANGUAGE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 6}
LONGEST = 64  # tokens of a prompt that it can read; the longest caption has eleven words
SPECIAL = ("<pad>", "<begin>", "<unk>", IMAGE_STARTS)
TEMPLATE = "{{ messages[0]['content'][0]['text'] }}"  # a caption as it is: nobody talks here


def janus(setting: Setting, pool: int = 120_000, unseen: int = 1000, batch: int = 64) -> Lesson:
    """nano-janus, which reads and draws with one transformer; its image tokens are those of nano-vq.

    As Janus was trained, one caption in ten is replaced by its null prompt, and an image token comes in as its entry of
    the tokenizer's codebook through an MLP. The matrices of the layers learn by Muon, all else by AdamW, as nano-t2i's.
    Like nano-c2i it stops well before its learning-rate curve does, so that reinforcement learning has something to
    improve.

    Args:
        pool: scenes tokenised up front; training makes fewer than one and a half passes over them.
    """
    prompts = Prompts(words())
    scenes = partial(caption_batch, shares=SHARES)
    tokens, made = tokenised(setting, scenes, 2, pool)
    held, held_made = tokenised(setting, scenes, 30_000, unseen)
    text, held_text = (Encoded(*prompts.encode([one.prompt.text for one in some])) for some in (made, held_made))
    vq = setting.vq
    model = JanusForImageGeneration(config(len(prompts.tokenizer), vq.config.codebook_size, tokens.shape[1]))
    with torch.no_grad():
        model.model.generation_embeddings.weight.copy_(vq.quantize.codebook())
        for part in (model.model.vqmodel, model.model.vision_model, model.model.aligner):  # nobody uses these
            for weight in part.requires_grad_(False).parameters():
                weight.zero_()
    generation = model.generation_config
    generation.bos_token_id, generation.pad_token_id = prompts.begin, prompts.pad
    learning = [(name, one) for name, one in model.named_parameters() if not name.startswith(FROZEN)]
    count = sum(one.numel() for _, one in learning)
    setting.say(f"{count / 1e6:.2f} M parameters that draw, {len(tokens)} scenes tokenised")

    def loss(step: int) -> Tensor:
        rows = setting.rows(batch, len(tokens))
        dropped = torch.rand(batch, generator=setting.generator) < DROPOUT
        some = text[rows]
        read = Encoded(torch.where(dropped[:, None], some.null, some.ids), some.null, some.mask)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # twice as fast for 80 positions
            return -model(read, tokens[rows].long()).logp.mean()

    @torch.inference_mode()
    def measure() -> str:
        return f"{-model(held_text, held.long()).logp.mean():.3f} nats a token"

    def save(folder: Path) -> None:
        half = copy.deepcopy(model).half().eval()
        Janus(half, prompts, vq, "nano-vq", IMAGE_SIZE, "nano-janus").save(make_dir(folder))

    return Lesson(
        network=model,
        optimizers=muon_and_adamw(learning, ".layers.", lr=1.5e-3),
        loss=loss,
        measure=measure,
        save=save,
        steps=2400,
        warmup=50,
        horizon=3200,
        kept=True,
    )


def words() -> PreTrainedTokenizerFast:
    """One token per word of the nano world's captions, in lower case, after one that begins a sentence."""
    ids = {token: index for index, token in enumerate([*SPECIAL, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<begin>",
        unk_token="<unk>",
        extra_special_tokens={"boi_token": IMAGE_STARTS},
        chat_template=TEMPLATE,
    )


def config(words: int, codes: int, tokens: int) -> JanusConfig:
    """Vision tower and image tokenizer are as small as they can be: pictures are nano-vq's matter here."""
    width, side = LANGUAGE["hidden_size"], round(tokens**0.5)
    return JanusConfig(
        text_config=LlamaConfig(
            vocab_size=words, max_position_embeddings=tokens + LONGEST, bos_token_id=1, pad_token_id=0, **LANGUAGE
        ),
        vision_config=JanusVisionConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            mlp_ratio=1.0,
            image_size=IMAGE_SIZE,
            patch_size=IMAGE_SIZE // side,
            num_image_tokens=tokens,
            projection_dim=width,
            depth=1,
        ),
        vq_config=JanusVQVAEConfig(
            num_embeddings=codes,
            base_channels=32,
            channel_multiplier=[1],
            num_res_blocks=1,
            latent_channels=32,
            projection_dim=width,
            image_token_embed_dim=width,
        ),
        image_token_id=2,
    )
