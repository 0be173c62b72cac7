"""A policy so small that a whole GRPO run takes a second, and rewards that need no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from argrpo_cli.policy import Policy
from argrpo_cli.policy.llamagen.config import LlamaGenConfig, VQConfig
from argrpo_cli.policy.llamagen.policy import LlamaGen
from argrpo_cli.policy.llamagen.pretrained import LlamaGenForImageGeneration, VQModel
from argrpo_cli.policy.llamagen.text import TextEncoder
from argrpo_cli.shapes import Condition, Sampling

if TYPE_CHECKING:
    from argrpo_cli.recipe import Recipe

CODES, TOKENS, CLASSES = 32, 16, 4
NAMES = ("ant", "bee", "cat", "dog")
IMAGE_SIZE = 8  # 4 x 4 tokens of 2 x 2 pixels


def tiny_policy(
    encoder: TextEncoder | None = None, names: Sequence[str] = NAMES, image_size: int = IMAGE_SIZE
) -> LlamaGen:
    """Random weights, the same on every call; conditioned on classes, or with an encoder on captions of five words."""
    reads = {"num_classes": len(names)}
    if encoder is not None:
        reads = {"condition": "caption", "cls_token_num": 6, "caption_dim": encoder.width}
    with torch.random.fork_rng():
        torch.manual_seed(0 if encoder is None else 2)
        model = LlamaGenForImageGeneration(
            LlamaGenConfig(
                vocab_size=CODES,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=128,
                block_size=TOKENS,
                **reads,
            )
        )
        nn.init.normal_(model.lm_head.weight, std=0.1)  # zero as published would be uniform, guided or not
        if encoder is None:
            nn.init.normal_(model.model.class_embedding.weight, std=1.0)
        else:
            nn.init.normal_(model.model.caption_mlp.fc1.weight, std=0.3)
            nn.init.normal_(model.model.caption_mlp.fc2.weight, std=0.3)
        tokenizer = VQModel(
            VQConfig(
                codebook_size=CODES,
                ch=32,
                encoder_ch_mult=(1,),
                decoder_ch_mult=(1,),
                num_res_blocks=1,
                z_channels=32,
                patch_size=image_size // 4,
            )
        )
    names = list(names) if encoder is None else []
    return LlamaGen(model.eval(), tokenizer.eval(), None, names, image_size, "tiny", encoder)


def tiny_text_encoder() -> TextEncoder:
    """A T5 encoder of random weights that knows six words."""
    vocabulary = {
        word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "blue", "dog", "cat"])
    }
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = T5Config(
            vocab_size=len(vocabulary), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
        )
        return TextEncoder(T5EncoderModel(config), tokenizer)


def tiny_caption_policy() -> LlamaGen:
    """As `tiny_policy`, conditioned on captions."""
    return tiny_policy(tiny_text_encoder())


def save_tiny_policy(folder: Path) -> Path:
    """The same as a policy folder."""
    tiny_policy().save(folder)
    return folder


def sample(policy: Policy, conditions: Sequence[Condition], seeds: Sequence[int], **settings: float) -> Tensor:
    """Tokens int64 [B, T], drawn in one batch."""
    return policy.sample(policy.encode(conditions), Sampling(**settings), seeds).tokens


def paint(tokens: Tensor) -> Tensor:
    """A decoder whose images can be read: pixel values are the token ids, uint8 [B, 3, 4, 4]."""
    return tokens.to(torch.uint8).view(-1, 1, 4, 4).repeat(1, 3, 1, 1)


class FakeRewards:
    """Rewards from plain functions of an image batch uint8 [B, 3, H, W].

    Attributes:
        calls: how many batches were scored.
        on_batch: called with the number of the batch (from 1) before it is scored.
    """

    def __init__(self, **functions: Callable[[Tensor], Tensor]) -> None:
        self.functions = functions or {"bright": brightness, "red": redness}
        self.names = list(self.functions)
        families = ["conditional", "quality", "realism"]
        self.family = {name: families[index % 3] for index, name in enumerate(self.names)}
        self.scope = dict.fromkeys(self.names, "image")
        self.calls, self.tolerated = 0, set()
        self.last_error: dict[str, str] = {}
        self.on_batch: Callable[[int], None] = lambda number: None

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        assert images.dtype == torch.uint8
        assert len(images) == len(conditions)
        self.calls += 1
        self.on_batch(self.calls)
        return {name: function(images).float() for name, function in self.functions.items()}

    def look(self, images: Tensor, conditions: Sequence[Condition]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.score(images, conditions), {}


def brightness(images: Tensor) -> Tensor:
    return images.float().mean(dim=(1, 2, 3)) / 255


def redness(images: Tensor) -> Tensor:
    return (images[:, 0].float() - images[:, 1].float()).mean(dim=(1, 2)) / 255


def count_of_3(images: Tensor) -> Tensor:
    """For `paint`: how many of the 16 tokens are token 3."""
    return (images[:, 0] == 3).float().sum(dim=(1, 2))


def tiny_recipe(checkpoint: str | Path = "tiny", rewards: Sequence[str] = ("bright", "red"), **grpo: Any) -> Recipe:
    """A recipe of 4 updates of 2 groups of 4; `grpo` overrides keys of that section, and a few of other sections.

    `weights` gives rewards a weight other than 1, by name.
    """
    from argrpo_cli.recipe import Recipe  # the policies above are used where pydantic is missing

    weights = grpo.pop("weights", {})
    logging = {
        key: grpo.pop(key)
        for key in (
            "save_every",
            "keep_checkpoints",
            "keep_steps",
            "grid_every",
            "grid_images",
            "log_every",
            "transfer_images",
        )
        if key in grpo
    }
    return Recipe.model_validate(
        {
            "name": "tiny",
            "seed": grpo.pop("seed", 5),
            "policy": {
                "checkpoint": str(checkpoint),
                "device": "cpu",
                "dtype": grpo.pop("dtype", "float32"),
                "lora": grpo.pop("lora", None),
            },
            "conditions": grpo.pop("conditions", {}),
            "sampling": {"cfg_scale": grpo.pop("cfg_scale", 2.0), "temperature": grpo.pop("temperature", 1.0)},
            "rewards": {"terms": [{"name": name, "weight": weights.get(name, 1.0)} for name in rewards]},
            "grpo": {"group_size": 4, "batch_size": 8, "steps": 4, "learning_rate": 1e-3, **grpo},
            "logging": {"grid_every": 100, "grid_images": 4, "save_every": 100, "transfer_images": 0, **logging},
        }
    )
