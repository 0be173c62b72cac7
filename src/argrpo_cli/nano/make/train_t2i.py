"""Trains nano-t2i, the caption-conditional LlamaGen of the nano world, together with its text encoder nano-t5.

    python -m argrpo_cli.nano.make.train_t2i [OUT_DIR] [--steps 3000]

Maximum likelihood on tokenised scenes (eq. 2). LlamaGen takes a text encoder that exists already (FLAN-T5 XL) and never
trains it; the nano world has none, so a small T5 encoder learns here with the policy and is frozen from then on. It is
saved beside the policy as `nano-t5`. One caption in ten is replaced by the null caption, under the padding of the
caption it replaces, as published.

The matrices of the policy's layers learn by Muon, all else by AdamW, and the embedding of an image token starts near a
random projection of its entry in the tokenizer's codebook: after 100 steps this stood at 5.5 nats a token where AdamW
and a random embedding stood at 6.0 (one seed).
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from argrpo_cli.nano import scenes
from argrpo_cli.nano.make.training import decay_groups, fit, save_half
from argrpo_cli.nano.tokens import load_tokenizer
from argrpo_cli.policy.llamagen.config import LlamaGenConfig
from argrpo_cli.policy.llamagen.modeling import LlamaGenForImageGeneration, left_pad, teacher_forced
from argrpo_cli.policy.llamagen.vq import VQModel, from_uint8
from argrpo_cli.system.files import WEIGHTS, write_json

GEOMETRY = {"hidden_size": 256, "num_hidden_layers": 5, "num_attention_heads": 8}
TEXT_GEOMETRY = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
CAPTION_TOKENS = 16  # the longest caption has eleven words and an end
BATCH = 48
CAPTION_DROPOUT = 0.1
POOL = 80_000  # scenes tokenised up front; training sees each one or two times
UNSEEN = 1000
MUON_RATE, ADAMW_RATE = 0.02, 1.2e-3
SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2 as in T5


def text_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the nano world's captions; texts are put in lower case and end with </s>."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *scenes.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


@torch.inference_mode()
def tokenised_captions(tokenizer: VQModel, rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
    """Image tokens int16 [count, T] and captions of fresh scenes of the text task."""
    tokens, captions = [], []
    for start in range(0, count, 250):
        images, made = scenes.caption_batch(rng, min(250, count - start))
        tokens.append(tokenizer.encode(from_uint8(torch.from_numpy(images))).to(torch.int16))
        captions += [scene.caption for scene in made]
    return torch.cat(tokens), captions


class CaptionedPolicy(torch.nn.Module):
    """The policy and the text encoder as they learn together."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, codes: int, tokens: int) -> None:
        super().__init__()
        text = T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", dropout_rate=0.0, **TEXT_GEOMETRY)
        self.encoder = T5EncoderModel(text)
        self.policy = LlamaGenForImageGeneration(
            LlamaGenConfig(
                vocab_size=codes,
                block_size=tokens,
                condition="caption",
                cls_token_num=CAPTION_TOKENS,
                caption_dim=text.d_model,
                class_dropout_prob=CAPTION_DROPOUT,
                **GEOMETRY,
            )
        )

    def forward(self, words: Tensor, word_mask: Tensor, images: Tensor, dropped: Tensor) -> Tensor:
        """Mean cross entropy in nats a token.

        Args:
            words, word_mask: int64 [B, P], right padded.
            images: image tokens int64 [B, T].
            dropped: bool [B], whose caption is replaced by the null caption.
        """
        features, mask = left_pad(self.encoder(words, word_mask).last_hidden_state, word_mask)
        features = torch.where(dropped[:, None, None], self.policy.model.null_caption, features)
        inputs, predicting = teacher_forced(self.policy.config, features, mask, images)
        logits = self.policy(**inputs).logits[:, predicting]
        return F.cross_entropy(logits.flatten(0, 1).float(), images.flatten())


@torch.no_grad()
def embed_codes(policy: LlamaGenForImageGeneration, vq: VQModel) -> None:
    """Start the token embedding from the codebook, so that codes which look alike begin alike."""
    weight = policy.model.embed_tokens.weight
    codes = vq.quantize.codebook()
    projection = torch.randn(codes.shape[1], weight.shape[1])
    weight.mul_(0.5).add_(policy.config.initializer_range * codes @ projection)


def optimizers_of(both: CaptionedPolicy) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the policy's layers, AdamW for embeddings, heads, the caption's MLP and norms."""
    matrices = {name: p for name, p in both.named_parameters() if "layers." in name and p.ndim == 2}
    rest = [p for name, p in both.named_parameters() if name not in matrices]
    return [
        torch.optim.Muon(matrices.values(), lr=MUON_RATE, weight_decay=0.05),
        torch.optim.AdamW(decay_groups(rest, 0.05), lr=ADAMW_RATE, betas=(0.9, 0.95)),
    ]


def train(
    out_dir: str | Path,
    seed: int = 0,
    steps: int = 3000,
    weights: Path = WEIGHTS,
    log=print,
) -> CaptionedPolicy:
    """Train from a fixed seed on the tokens of `weights`/nano-vq; save a policy folder and `nano-t5` beside it."""
    started = time.time()
    torch.manual_seed(seed)
    out_dir = Path(out_dir)
    vq = load_tokenizer(weights / "nano-vq")
    words = text_tokenizer()
    pool, captions = tokenised_captions(vq, np.random.default_rng(seed + 2), POOL)
    held, held_captions = tokenised_captions(vq, np.random.default_rng(seed + 30_000), UNSEEN)
    read = lambda texts: words(texts, padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt")  # noqa: E731
    text, held_text = read(captions), read(held_captions)
    both = CaptionedPolicy(words, vq.config.codebook_size, pool.shape[1])
    size = sum(p.numel() for p in both.policy.parameters()), sum(p.numel() for p in both.encoder.parameters())
    log(
        f"nano-t2i: {size[0] / 1e6:.2f} M parameters, text encoder {size[1] / 1e6:.2f} M, "
        f"{len(pool)} scenes tokenised, {time.time() - started:.0f} s"
    )
    embed_codes(both.policy, vq)
    optimizers = optimizers_of(both)
    generator = torch.Generator().manual_seed(seed)

    def lesson(step: int) -> Tensor:
        rows = torch.randint(len(pool), (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # on a CPU, faster for 80 positions
            return both(text.input_ids[rows], text.attention_mask[rows], pool[rows].long(), dropped)

    @torch.inference_mode()
    def report(done: int, loss: float) -> None:
        kept = torch.zeros(len(held), dtype=torch.bool)
        unseen = both(held_text.input_ids, held_text.attention_mask, held.long(), kept).item()
        seconds = time.time() - started
        log(f"nano-t2i step {done}/{steps}: loss {loss:.3f}, unseen {unseen:.3f} nats a token, {seconds:.0f} s")

    fit(both, optimizers, steps, lesson, report, every=300, warmup=50)
    save(both, words, out_dir)
    return both


def save(both: CaptionedPolicy, words: PreTrainedTokenizerFast, out_dir: Path) -> None:
    """A policy folder, and beside it `nano-t5`, both in float16."""
    encoder_dir = out_dir.with_name("nano-t5")
    save_half(both.encoder.eval(), encoder_dir)
    words.save_pretrained(encoder_dir)
    save_half(both.policy.eval(), out_dir)
    card = {"tokenizer": "nano-vq", "text_encoder": "nano-t5", "image_size": scenes.IMAGE_SIZE, "base": "nano-t2i"}
    write_json(out_dir / "policy.json", card)


if __name__ == "__main__":
    from argrpo_cli.nano.make.training import trainer_cli

    trainer_cli(train, "nano-t2i")
