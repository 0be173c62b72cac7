"""The family of Janus-Pro behind `protocol.Policy`: a model, its prompts and its image tokenizer.

A policy folder holds what `save_pretrained` writes of model and text tokenizer, and `policy.json`:

    {"family": "janus", "reads": "captions", "image_size": 384, "base": "janus-pro-1b", "sampling": {"cfg_scale": 5.0}}

The image tokenizer is the model's own; with "tokenizer" in policy.json it is a bundled one, or a folder relative to
this one. transformers opens such a folder as JanusForConditionalGeneration. What is published opens by name and folder
as well: `published.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from argrpo_cli.networks.weights import fingerprint, load_pretrained, save_model
from argrpo_cli.policy.folder import BUNDLED_PARTS, CARD, part_of, read_card, sampling_entry
from argrpo_cli.policy.janus.model import Encoded, JanusForImageGeneration
from argrpo_cli.policy.janus.prompts import Prompts
from argrpo_cli.policy.janus.sample import sample_tokens
from argrpo_cli.policy.janus.vq import tokenizer_of
from argrpo_cli.policy.llamagen.pretrained import VQModel
from argrpo_cli.policy.protocol import Card
from argrpo_cli.policy.tokens import TokenPolicy
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import make_dir, write_json

if TYPE_CHECKING:
    from transformers import GenerationConfig, JanusConfig

# Parts that drawing does not use, or must not change: the vision tower and its MLP, the image tokenizer, the text head.
FROZEN = ("model.vision_model.", "model.aligner.", "model.vqmodel.", "lm_head.")
LANGUAGE = "model.language_model."
# Of the language model's configuration, what no weight's shape shows.
NOT_IN_SHAPES = ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_parameters")


@dataclass
class Janus(TokenPolicy):
    """A policy, as `load_policy` gives it; `protocol.Policy` says what its methods do.

    Attributes:
        model: the network, in evaluation mode.
        prompts: the text tokenizer with the chat template; None in an outline.
        tokenizer: image tokenizer, always float32 (token ids must not depend on the policy's dtype).
        tokenizer_name: of policy.json; None where the tokenizer is the model's own.
        image_size: pixels a side.
        base: the policy this one descends from.
        name: what it was opened by.
        sampling: how it is meant to be sampled, see `Card`.
    """

    draw = staticmethod(sample_tokens)

    model: JanusForImageGeneration
    prompts: Prompts | None
    tokenizer: VQModel
    tokenizer_name: str | None
    image_size: int
    base: str
    name: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A trainer writes ids of its own into both.
        self._config: JanusConfig = copy.deepcopy(self.model.config)
        self._generation: GenerationConfig = copy.deepcopy(self.model.generation_config)

    @classmethod
    def load(cls, folder: Path, device: str, dtype: str, text_device: str) -> Self:
        """Open a policy folder; the arguments are those of `load_policy`, and there is no text encoder to place.

        Raises:
            UserError: something is missing or damaged, or the parts do not belong together.
        """
        return cls.open(folder, read_card(folder), device, dtype)

    @classmethod
    def open(cls, folder: Path, card: dict[str, Any], device: str, dtype: str) -> Self:
        """A folder with what policy.json says, or would say."""
        model = load_pretrained(JanusForImageGeneration, folder, getattr(torch, dtype), attn_implementation="sdpa")
        model, name = model.to(device).eval(), card.get("tokenizer")
        if name is None:
            tokenizer = tokenizer_of(model.model.vqmodel, str(folder))
        else:
            part = part_of(folder, "image tokenizer", name)
            tokenizer = load_pretrained(VQModel, part, torch.float32).to(device).eval().requires_grad_(False)
        prompts = Prompts.load(folder, model.generation_config.pad_token_id)
        pairs = [
            ("codes in the image tokenizer", tokenizer.config.codebook_size, "the model draws from", model.codes),
            (
                "tokens at this image size",
                (card["image_size"] // tokenizer.config.downsample) ** 2,
                "the model draws",
                model.length,
            ),
        ]
        for what, count, draws, expected in pairs:
            if count != expected:
                raise UserError(f"{folder}: {count} {what}, but {draws} {expected}")
        if len(prompts.tokenizer) > model.config.text_config.vocab_size:
            known, read = len(prompts.tokenizer), model.config.text_config.vocab_size
            raise UserError(f"{folder}: the text tokenizer has {known} tokens, but the model reads {read}")
        if prompts.pad >= model.config.text_config.vocab_size:
            raise UserError(f"{folder}: the padding has the id {prompts.pad}, which the model does not read")
        base, sampling = card.get("base", str(folder)), card["sampling"]
        return cls(model, prompts, tokenizer, name, card["image_size"], base, sampling=sampling)

    def conditions(self, requests: Iterable[str | int]) -> list[Condition]:
        """What the policy is asked to draw: captions; UserError for one that it cannot read."""
        prompts = [str(prompt) for prompt in requests]
        self.prompts.check(prompts, self.model.config.text_config.max_position_embeddings - self.model.length)
        return [Condition(prompt) for prompt in prompts]

    @property
    def network(self) -> nn.Module:
        return self.model

    @property
    def card(self) -> Card:
        """What can be said of it without its weights."""
        words = None if self.prompts is None else self.prompts.words
        return Card(
            name=self.name,
            family="janus",
            reads="captions",
            names=(),
            image_size=self.image_size,
            tokens=self.model.length,
            codes=self.model.codes,
            base=self.base,
            words=None if words is None else tuple(words),
            sampling=self.sampling,
        )

    def encode(self, conditions: Sequence[Condition], dropped: Tensor | None = None) -> Encoded:
        """See `protocol.Policy`: left padded prompts on the model's device."""
        device = self.model.device
        ids, null, mask = (part.to(device) for part in self.prompts.encode([one.prompt for one in conditions]))
        if dropped is not None:
            ids = torch.where(dropped.to(device)[:, None], null, ids)
        return Encoded(ids, null, mask)

    def parts(self) -> dict[str, list[str]]:
        """Names of the parameters of language model, generation head, embeddings and their MLP; last parts of the names
        of their linear layers, and of these what adapters are put on by default: the language model's."""
        trainable = [name for name, _ in self.model.named_parameters() if not name.startswith(FROZEN)]
        linear = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        last = {
            prefix: list(dict.fromkeys(name.rpartition(".")[2] for name in linear if name.startswith(prefix)))
            for prefix in (LANGUAGE, "model.generation_")
        }
        named = [name for name in last["model.generation_"] if not name.isdigit()]
        return {"trainable": trainable, "lora": last[LANGUAGE] + named, "adapted": last[LANGUAGE]}

    def tokenizer_fingerprint(self) -> str:
        return fingerprint([self.tokenizer])

    def fingerprint(self) -> str:
        """A hash of the weights and of all else that decides what is drawn; see `networks.weights`."""
        text, prompts = self.model.config.text_config, self.prompts
        settings = {key: getattr(text, key) for key in NOT_IN_SHAPES}
        settings |= {"words": prompts.tokenizer.get_vocab(), "template": prompts.tokenizer.chat_template}
        return fingerprint([self.model, self.tokenizer], settings | {"pad": prompts.pad, "begin": prompts.begin})

    def save_card(self, folder: str | Path) -> None:
        """Add to a folder with the model's own files what makes it a policy folder."""
        folder = Path(folder)
        self._config.architectures = [type(self.model).__name__]
        for one in (self._config, self._generation):
            one.save_pretrained(folder)
        self.prompts.save(folder)
        tokenizer = self.tokenizer_name
        if tokenizer is not None and tokenizer not in BUNDLED_PARTS:
            tokenizer = "tokenizer"
            save_model(self.tokenizer, make_dir(folder / tokenizer))
        card: dict[str, Any] = {"family": "janus", "reads": "captions", "image_size": self.image_size}
        card |= {} if tokenizer is None else {"tokenizer": tokenizer}
        write_json(folder / CARD, {**card, "base": self.base, **sampling_entry(self.sampling)})
