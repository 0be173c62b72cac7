"""Lessons of what draws: the tokenizer nano-vq, the policy nano-c2i, and nano-t2i with its text encoder nano-t5."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from argrpo_cli.kept import in_batches
from argrpo_cli.nano.make.corrupt import Propose
from argrpo_cli.nano.make.fit import Lesson, Setting, decay_groups, muon_and_adamw, save_half
from argrpo_cli.nano.scenes import CLASS_NAMES, IMAGE_SIZE, caption_batch, class_batch, vocabulary
from argrpo_cli.nano.tokens import encode, load_tokenizer, psnr
from argrpo_cli.policy import Policy, load_policy
from argrpo_cli.policy.llamagen.config import LlamaGenConfig, VQConfig
from argrpo_cli.policy.llamagen.model import Encoded, left_pad
from argrpo_cli.policy.llamagen.pretrained import LlamaGenForImageGeneration, VQModel
from argrpo_cli.policy.llamagen.text import load_text_encoder
from argrpo_cli.policy.llamagen.vq import from_uint8
from argrpo_cli.system.files import write_json

DROPOUT = 0.1  # of conditions in training, so that guidance has its unconditional half

# --- nano-vq

TOKENIZER = {
    "codebook_size": 1024,
    "codebook_embed_dim": 8,
    "ch": 64,
    "encoder_ch_mult": [1, 2],
    "decoder_ch_mult": [1, 3],
    "num_res_blocks": 1,
    "z_channels": 128,
    "patch_size": 4,
}
CAPTION_SHARE = 0.25  # scenes of the text task, so that both tasks share this tokenizer
DECAY = 0.98
DEAD_BELOW = 0.05  # expected uses per batch (of 2048 tokens, a code's fair share is 2) below which a code starts again


def tokenizer(setting: Setting, batch: int = 32, unseen: int = 512, quantised_from: int = 60) -> Lesson:
    """nano-vq, LlamaGen's VQ network with 8x8 tokens for 64x64 pixels.

    Reconstruction by absolute and squared error of pixels and of their differences (edges are what the eye misses
    first). The codebook follows the encoder by running means, begins as encoder outputs, and codes that fall out of use
    begin again as outputs of the current batch, so that nearly every code earns its place.

    Args:
        quantised_from: step; by then the encoder tells scenes apart. Before, latents pass through unquantised.
    """
    rng = setting.rng(0)
    model = VQModel(VQConfig(**TOKENIZER)).to(memory_format=torch.channels_last)
    model.quantize.embedding.weight.requires_grad_(False)
    codebook = RunningCodebook(model.quantize.embedding.weight, setting)
    held_out = torch.from_numpy(class_batch(setting.rng(10_000), unseen, balanced=True)[0])

    def loss(step: int) -> Tensor:
        captions = round(batch * CAPTION_SHARE)
        images = np.concatenate([class_batch(rng, batch - captions)[0], caption_batch(rng, captions)[0]])
        target = from_uint8(torch.from_numpy(images)).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latent = model.latent(target)
        latent = F.normalize(latent.float(), dim=1)
        flat = latent.detach().permute(0, 2, 3, 1).reshape(-1, latent.shape[1])
        if step == quantised_from:
            codebook.start_from(flat)
        if step >= quantised_from:
            indices = model.quantize.nearest(latent.detach())
            entries = model.quantize.entries(indices, *latent.shape[2:])
            commitment = (latent - entries).square().sum(1).mean()
            quantised = latent + (entries - latent).detach()
            codebook.update(flat, indices.flatten())
        else:
            quantised, commitment = latent, latent.new_zeros(())
        with torch.autocast("cpu", torch.bfloat16):
            output = model.decode_latent(quantised)
        error = output.float() - target
        edges = sum(error.diff(dim=dim).abs().mean() for dim in (2, 3))
        return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 0.05 * commitment

    return Lesson(
        network=model,
        optimizers=[torch.optim.AdamW(model.parameters(), lr=1.2e-3, betas=(0.9, 0.98), weight_decay=1e-4)],
        loss=loss,
        measure=lambda: reconstruction(model, held_out),
        save=lambda folder: save_half(model, folder),
        steps=4000,
        every=250,
        warmup=150,
    )


class RunningCodebook:
    """Exponential running means of the unit latents assigned to each code (van den Oord et al. 2017, appendix A.1)."""

    def __init__(self, embedding: Tensor, setting: Setting):
        self.embedding, self.setting = embedding, setting
        self.uses = torch.ones(len(embedding))
        self.sums = F.normalize(embedding.detach(), dim=-1).clone()

    def start_from(self, latents: Tensor) -> None:
        self.sums = latents[self.setting.rows(len(self.embedding), len(latents))].clone()
        self.uses.fill_(1.0)
        self.embedding.copy_(self.sums)

    def update(self, latents: Tensor, indices: Tensor) -> None:
        count = torch.bincount(indices, minlength=len(self.embedding)).float()
        total = torch.zeros_like(self.sums).index_add_(0, indices, latents)
        self.uses.mul_(DECAY).add_(count, alpha=1 - DECAY)
        self.sums.mul_(DECAY).add_(total, alpha=1 - DECAY)
        dead = (self.uses < DEAD_BELOW).nonzero().flatten()
        if len(dead):
            self.sums[dead], self.uses[dead] = latents[self.setting.rows(len(dead), len(latents))], 1.0
        self.embedding.copy_(F.normalize(self.sums, dim=-1))


def reconstruction(model: VQModel, images: Tensor) -> str:
    """PSNR in dB (mean over images, 8-bit) and the share of the codebook that the images use, in words."""
    tokens = encode(model, images)
    used = len(tokens.unique()) / model.config.codebook_size
    return f"PSNR {psnr(model, tokens, images).mean():.2f} dB, codebook in use {used:.0%}"


# --- the policies, by maximum likelihood on tokenised scenes (eq. 2)

CLASS_POLICY = {"hidden_size": 192, "num_hidden_layers": 5, "num_attention_heads": 6}
CAPTION_POLICY = {"hidden_size": 256, "num_hidden_layers": 5, "num_attention_heads": 8}
TEXT_ENCODER = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
SHARES = {  # of the categories of captions in what nano-t2i learns from
    "single_object": 0.08,
    "two_object": 0.12,
    "counting": 0.12,
    "colors": 0.10,
    "position": 0.32,
    "color_attr": 0.26,
}
CAPTION_TOKENS = 16  # the longest caption has eleven words and an end
SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2 as in T5


@torch.inference_mode()
def tokenised(
    setting: Setting,
    make: Callable[[np.random.Generator, int], tuple[np.ndarray, Any]],
    offset: int,
    count: int,
    vq: VQModel | None = None,
) -> tuple[Tensor, list[Any]]:
    """Tokens int16 [count, T] of fresh scenes by `vq` (nano-vq), and what `make` returns with their images."""
    rng, tokens, labels, vq = setting.rng(offset), [], [], vq or setting.vq
    for start in range(0, count, 250):
        images, some = make(rng, min(250, count - start))
        tokens.append(vq.encode(from_uint8(torch.from_numpy(images))).to(torch.int16))
        labels += list(some)
    return torch.cat(tokens), labels


def save_policy(model: PreTrainedModel, folder: Path, name: str, **card: Any) -> None:
    """Save the weights in float16 and what `load_policy` needs beside them."""
    save_half(model, folder)
    write_json(folder / "policy.json", {"tokenizer": "nano-vq", **card, "image_size": IMAGE_SIZE, "base": name})


def class_lesson(
    setting: Setting,
    name: str,
    vq: nn.Module,
    model: Callable[[int], PreTrainedModel],
    optimizers: Callable[[PreTrainedModel], list[torch.optim.Optimizer]],
    *,
    pool: int = 48_000,
    unseen: int = 1000,
    batch: int = 32,
    card: Mapping[str, Any] = MappingProxyType({}),
    **schedule: Any,
) -> Lesson:
    """A policy that draws classes, by maximum likelihood; one class in ten is replaced by the null class.

    Args:
        vq: the tokenizer of its images.
        model: a new one for so many tokens an image.
        optimizers: of the model.
        pool, unseen: scenes tokenised up front, to learn from and to measure on.
        card: what policy.json says beside what all of them do.
        schedule: of `Lesson`.
    """
    tokens, classes = tokenised(setting, class_batch, 1, pool, vq)
    held, held_classes = tokenised(setting, class_batch, 20_000, unseen, vq)
    classes, held_classes = torch.tensor(classes), torch.tensor(held_classes)
    network = model(tokens.shape[1])
    setting.say(f"{network.num_parameters() / 1e6:.2f} M parameters, {len(tokens)} scenes tokenised")

    def loss(step: int) -> Tensor:
        rows = setting.rows(batch, len(tokens))
        dropped = torch.rand(batch, generator=setting.generator) < DROPOUT
        condition = torch.where(dropped, len(CLASS_NAMES), classes[rows])
        with torch.autocast("cpu", torch.bfloat16):
            return -network(Encoded(condition), tokens[rows].long()).logp.mean()

    @torch.inference_mode()
    def measure() -> str:
        return f"{-network(Encoded(held_classes), held.long()).logp.mean():.3f} nats a token"

    return Lesson(
        network=network,
        optimizers=optimizers(network),
        loss=loss,
        measure=measure,
        save=lambda folder: save_policy(network, folder, name, classes=list(CLASS_NAMES), **card),
        **schedule,
    )


def c2i(setting: Setting, **sizes: int) -> Lesson:
    """nano-c2i, the class-conditional LlamaGen of the nano world.

    Training stops two thirds down its learning-rate curve, at 3.1 nats a token (2.8 at the end): objects are recognised
    and many are deformed, so that reinforcement learning has something to improve.

    Args:
        sizes: of `class_lesson`, where training makes fewer than one pass over the pool.
    """

    def model(tokens: int) -> LlamaGenForImageGeneration:
        config = LlamaGenConfig(
            vocab_size=setting.vq.config.codebook_size,
            block_size=tokens,
            num_classes=len(CLASS_NAMES),
            class_dropout_prob=DROPOUT,
            **CLASS_POLICY,
        )
        return LlamaGenForImageGeneration(config)

    def adamw(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(decay_groups(model.parameters(), 0.05), lr=1.5e-3, betas=(0.9, 0.95))]

    schedule = {"steps": 1200, "warmup": 150, "horizon": 1800}
    return class_lesson(setting, "nano-c2i", setting.vq, model, adamw, **sizes, **schedule)


def t2i(setting: Setting, pool: int = 240_000, unseen: int = 1000, batch: int = 96) -> Lesson:
    """nano-t2i, the caption-conditional LlamaGen of the nano world, together with its text encoder nano-t5.

    LlamaGen takes a text encoder that exists already (FLAN-T5 XL) and never trains it; the nano world has none, so a
    small T5 encoder learns here with the policy and is frozen from then on. It is saved beside the policy. One caption
    in ten is replaced by the null caption, under the padding of the caption it replaces, as published.

    The matrices of the policy's layers learn by Muon, all else by AdamW, and the embedding of an image token starts
    near a random projection of its entry in the tokenizer's codebook: after 100 steps this stood at 5.5 nats a token
    where AdamW and a random embedding stood at 6.0 (one seed).

    Which object is where, and which colour belongs to which, is learnt late; such scenes are more than half of them.

    Args:
        pool: scenes tokenised up front; training sees each two or three times.
    """
    words = text_tokenizer()
    scenes = partial(caption_batch, shares=SHARES)
    tokens, made = tokenised(setting, scenes, 2, pool)
    held, held_made = tokenised(setting, scenes, 30_000, unseen)
    text, held_text = (
        words([one.prompt.text for one in some], padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt")
        for some in (made, held_made)
    )
    both = CaptionedPolicy(words, setting.vq.config.codebook_size, tokens.shape[1])
    policy, encoder = (f"{one.num_parameters() / 1e6:.2f} M" for one in (both.policy, both.encoder))
    setting.say(f"{policy} parameters, text encoder {encoder}, {len(tokens)} scenes tokenised")
    weight, codes = both.policy.model.embed_tokens.weight, setting.vq.quantize.codebook()
    with torch.no_grad():  # codes which look alike begin alike
        projection = torch.randn(codes.shape[1], weight.shape[1])
        weight.mul_(0.5).add_(both.policy.config.initializer_range * codes @ projection)

    if setting.compiles:
        both.policy.compile()  # 1.3 times as fast

    def loss(step: int) -> Tensor:
        rows = setting.rows(batch, len(tokens))
        dropped = torch.rand(batch, generator=setting.generator) < DROPOUT
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # on a CPU, faster for 80 positions
            return both(text.input_ids[rows], text.attention_mask[rows], tokens[rows].long(), dropped)

    @torch.inference_mode()
    def measure() -> str:
        none = torch.zeros(len(held), dtype=torch.bool)
        with torch.compiler.set_stance("force_eager"):  # not compiled once more for this batch
            nats = both(held_text.input_ids, held_text.attention_mask, held.long(), none)
        return f"{nats:.3f} nats a token"

    return Lesson(
        network=both,
        optimizers=muon_and_adamw(both.named_parameters(), "layers.", lr=1.2e-3),
        loss=loss,
        measure=measure,
        save=lambda folder: save_captioned(both, words, folder),
        steps=6000,
        every=300,
        warmup=50,
        kept=True,
    )


class CaptionedPolicy(torch.nn.Module):
    """The policy and the text encoder as they learn together."""

    def __init__(self, words: PreTrainedTokenizerFast, codes: int, tokens: int) -> None:
        super().__init__()
        text = T5Config(vocab_size=len(words), feed_forward_proj="gated-gelu", dropout_rate=0.0, **TEXT_ENCODER)
        self.encoder = T5EncoderModel(text)
        self.policy = LlamaGenForImageGeneration(
            LlamaGenConfig(
                vocab_size=codes,
                block_size=tokens,
                condition="caption",
                cls_token_num=CAPTION_TOKENS,
                caption_dim=text.d_model,
                class_dropout_prob=DROPOUT,
                **CAPTION_POLICY,
            )
        )

    def forward(self, words: Tensor, word_mask: Tensor, tokens: Tensor, dropped: Tensor) -> Tensor:
        """Mean cross entropy in nats a token.

        Args:
            words, word_mask: int64 [B, P], right padded.
            tokens: of images, int64 [B, T].
            dropped: bool [B], whose caption is replaced by the null caption.
        """
        features, mask = left_pad(self.encoder(words, word_mask).last_hidden_state, word_mask)
        features = torch.where(dropped[:, None, None], self.policy.model.null_caption, features)
        return -self.policy(Encoded(features, mask), tokens).logp.mean()


def text_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the nano world's captions; texts are put in lower case and end with </s>."""
    ids = {token: index for index, token in enumerate([*SPECIAL, *vocabulary()])}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


def save_captioned(both: CaptionedPolicy, words: PreTrainedTokenizerFast, folder: Path) -> None:
    """A policy folder, and beside it `nano-t5`, both in float16."""
    encoder = folder.with_name("nano-t5")
    save_half(both.encoder.eval(), encoder)
    words.save_pretrained(encoder)
    save_policy(both.policy.eval(), folder, "nano-t2i", text_encoder="nano-t5")


# --- what later lessons ask of a policy


def base_policy(folder: str | Path) -> Policy:
    """The policy in `folder` with the tokenizer and the text encoder beside it; by name it would open the package's."""
    folder, policy = Path(folder), load_policy(folder)
    encoder = folder.with_name("nano-t5")
    return replace(
        policy,
        tokenizer=load_tokenizer(folder.with_name("nano-vq")),
        text_encoder=None if policy.text_encoder is None else load_text_encoder(encoder),
    )


def proposer(folder: str | Path, seed: int) -> Propose:
    """Proposals of the policy in `folder`: for every place, a draw from its conditional distribution after the true
    tokens before. One forward pass serves all places, and the scene they belong to stays known."""
    policy = base_policy(folder)
    generator = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def propose(tokens: Tensor, labels: Sequence[int | str]) -> Tensor:
        proposals = []
        for part, asked in zip(tokens.split(100), in_batches(labels, 100), strict=True):
            encoded = policy.encode(policy.conditions(asked))
            with torch.autocast("cpu", torch.bfloat16):
                logits = policy.model.logits(encoded, part)
            codes = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator)
            proposals.append(codes.view_as(part))
        return torch.cat(proposals)

    return propose
