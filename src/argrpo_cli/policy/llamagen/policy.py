"""The family of LlamaGen behind `protocol.Policy`: a model, its image tokenizer and what it is asked in.

A policy folder holds what `save_pretrained` writes (config.json, model.safetensors, ...) and `policy.json`, which for
a class-conditional and a caption-conditional policy says

    {"tokenizer": "nano-vq", "classes": ["airplane", ...], "image_size": 64, "base": "nano-c2i"}
    {"tokenizer": "nano-vq", "text_encoder": "nano-t5", "image_size": 64, "base": "nano-t2i"}

and "sampling", such as {"cfg_scale": 1.0}, where it is meant to be drawn with certain settings. The tokenizer and the
text encoder are bundled ones, published ones or folders relative to this one. What is published (LlamaGen's and
AR-GRPO's checkpoints) opens by name and file as well: `published.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from argrpo_cli.networks.weights import fingerprint, load_plain, save_model
from argrpo_cli.policy.classes import class_id
from argrpo_cli.policy.folder import CARD, NAMED_PARTS, TEXT_ENCODER, part_of, read_card, sampling_entry
from argrpo_cli.policy.llamagen.checkpoints import open_tokenizer
from argrpo_cli.policy.llamagen.model import Encoded, LlamaGenNetwork
from argrpo_cli.policy.llamagen.sample import sample_tokens
from argrpo_cli.policy.llamagen.text import TextEncoder, load_text_encoder, open_text_encoder
from argrpo_cli.policy.llamagen.vq import VQNetwork
from argrpo_cli.policy.protocol import Card
from argrpo_cli.policy.published import TOKENIZERS
from argrpo_cli.policy.tokens import TokenPolicy
from argrpo_cli.shapes import Condition, class_prompt
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import make_dir, write_json

if TYPE_CHECKING:
    from argrpo_cli.policy.llamagen.pretrained import LlamaGenForImageGeneration

# Of a model's configuration, what no weight's shape shows.
NOT_IN_SHAPES = (
    "num_attention_heads", "num_key_value_heads", "block_size", "cls_token_num", "rope_theta", "rms_norm_eps",
)  # fmt: skip


@dataclass
class LlamaGen(TokenPolicy):
    """A policy, as `load_policy` gives it; `protocol.Policy` says what its methods do.

    Attributes:
        network: the LlamaGen, in evaluation mode: plain, or as a model of transformers; see `model`.
        tokenizer: image tokenizer, always float32 (token ids must not depend on the policy's dtype).
        tokenizer_name: name of a bundled or published tokenizer, None if it came from a folder or file.
        class_names: names of the class ids 0, 1, ...; empty for a caption-conditional policy.
        image_size: pixels a side.
        base: the policy this one descends from.
        text_encoder: what reads the captions; None for a class-conditional policy.
        text_encoder_name: name of a bundled or published text encoder, None if it came from a folder.
        name: what it was opened by.
        sampling: how it is meant to be sampled, see `Card`.
    """

    draw = staticmethod(sample_tokens)

    network: LlamaGenNetwork
    tokenizer: VQNetwork
    tokenizer_name: str | None
    class_names: list[str]
    image_size: int
    base: str
    text_encoder: TextEncoder | None = None
    text_encoder_name: str | None = None
    name: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, device: str, dtype: str, text_device: str) -> Self:
        """Open a policy folder; the arguments are those of `load_policy`.

        Raises:
            UserError: something is missing or damaged, or the parts do not belong together.
        """
        card, numbers = read_card(folder, tokenizer=str), getattr(torch, dtype)
        model = load_plain(LlamaGenNetwork, folder, numbers)
        model.origin = str(folder)
        if card["tokenizer"] in TOKENIZERS:
            tokenizer = open_tokenizer(card["tokenizer"])[1]
        else:
            tokenizer = load_plain(VQNetwork, part_of(folder, "image tokenizer", card["tokenizer"]), torch.float32)
        text_encoder, encoder_name = None, card.get("text_encoder")
        if model.config.condition == "caption" and encoder_name == TEXT_ENCODER:
            text_encoder = open_text_encoder(TEXT_ENCODER, card.get("right_padded", False))
        elif model.config.condition == "caption":
            text_encoder = load_text_encoder(part_of(folder, "text encoder", encoder_name), numbers)
            text_encoder.right_padded = card.get("right_padded", False)
        check_fit(folder, model, tokenizer, text_encoder, card)
        if text_encoder is not None:
            text_encoder.place(device, text_device)
        return cls(
            network=model.to(device),
            tokenizer=tokenizer.to(device),
            tokenizer_name=card["tokenizer"] if card["tokenizer"] in NAMED_PARTS else None,
            class_names=card.get("classes", []),
            image_size=card["image_size"],
            base=card.get("base", str(folder)),
            text_encoder=text_encoder,
            text_encoder_name=encoder_name if encoder_name in NAMED_PARTS else None,
            sampling=card["sampling"],
        )

    @property
    def model(self) -> LlamaGenForImageGeneration:
        """The same weights as a model of transformers, made when it is first asked for: to import what it needs takes
        longer than to draw an image."""
        if type(self.network) is LlamaGenNetwork:
            from argrpo_cli.policy.llamagen.pretrained import LlamaGenForImageGeneration

            self.network = LlamaGenForImageGeneration.around(self.network)
        return self.network

    @model.setter
    def model(self, model: LlamaGenNetwork) -> None:
        self.network = model

    def conditions(self, requests: Iterable[str | int]) -> list[Condition]:
        """What the policy is asked to draw: class names or ids (numbers, also written as text), or captions.

        Raises:
            UserError: no such class, or a caption that the text encoder cannot read.
        """
        if self.text_encoder is not None:
            prompts = [str(prompt) for prompt in requests]
            self.text_encoder.check(prompts, self.network.config.cls_token_num)
            return [Condition(prompt) for prompt in prompts]
        ids = [class_id(request, self.class_names) for request in requests]
        return [Condition(class_prompt(self.class_names[index]), index) for index in ids]

    @property
    def card(self) -> Card:
        """What can be said of it without its weights."""
        config, encoder = self.network.config, self.text_encoder
        return Card(
            name=self.name,
            family="llamagen",
            reads="captions" if config.condition == "caption" else "classes",
            names=tuple(self.class_names),
            image_size=self.image_size,
            tokens=config.block_size,
            codes=config.vocab_size,
            base=self.base,
            words=None if encoder is None or encoder.words is None else tuple(encoder.words),
            sampling=self.sampling,
        )

    def encode(self, conditions: Sequence[Condition], dropped: Tensor | None = None) -> Encoded:
        """See `protocol.Policy`: class ids, or left-padded caption features with their mask, on the model's device."""
        device, config = self.network.device, self.network.config
        if self.text_encoder is None:
            mask = None
            condition = torch.tensor([self._known_id(one) for one in conditions], dtype=torch.long, device=device)
            null = torch.tensor(config.num_classes, device=device)
        else:
            prompts = [one.prompt for one in conditions]
            condition, mask = (part.to(device) for part in self.text_encoder.encode(prompts, config.cls_token_num))
            null = self.network.model.null_caption.to(condition.dtype)
        if dropped is not None:
            chosen = dropped.to(device).view(-1, *[1] * (condition.ndim - 1))
            condition = torch.where(chosen, null, condition)
        return Encoded(condition, mask)

    def parts(self) -> dict[str, list[str]]:
        """Names of all parameters, and last parts of the names of the linear layers but the LM head; adapters are by
        default put on those of the transformer, not on what reads a caption."""
        linear = [name for name, module in self.network.named_modules() if isinstance(module, nn.Linear)]
        last = {name: name.rpartition(".")[2] for name in linear if name != "lm_head"}
        return {
            "trainable": [name for name, _ in self.network.named_parameters()],
            "lora": list(dict.fromkeys(last.values())),
            "adapted": list(dict.fromkeys(part for name, part in last.items() if ".layers." in name)),
        }

    def tokenizer_fingerprint(self) -> str:
        return fingerprint([self.tokenizer])

    def fingerprint(self) -> str:
        """A hash of the weights and of all else that decides what is drawn; see `networks.weights`."""
        settings: dict[str, Any] = {key: getattr(self.network.config, key) for key in NOT_IN_SHAPES}
        modules: list[nn.Module] = [self.network, self.tokenizer]
        if self.text_encoder is not None:
            modules.append(self.text_encoder.model)
            settings |= {"cleans": self.text_encoder.cleans, "right_padded": self.text_encoder.right_padded}
        return fingerprint(modules, settings)

    def save_card(self, folder: str | Path) -> None:
        """Add to a folder with the model's own files what makes it a policy folder."""
        folder = Path(folder)
        if self.tokenizer_name is None:
            from argrpo_cli.policy.llamagen.pretrained import VQModel

            save_model(VQModel.around(self.tokenizer), make_dir(folder / "tokenizer"))
        reads: dict[str, Any] = {"classes": self.class_names}
        if self.text_encoder is not None:
            reads = {"text_encoder": self.text_encoder_name or "text_encoder"}
            if self.text_encoder_name is None:
                self.text_encoder.save(make_dir(folder / "text_encoder"))
            if self.text_encoder.right_padded:
                reads["right_padded"] = True
        card = {"tokenizer": self.tokenizer_name or "tokenizer", **reads, "image_size": self.image_size}
        write_json(folder / CARD, {**card, "base": self.base, **sampling_entry(self.sampling)})

    def _known_id(self, condition: Condition) -> int:
        if condition.class_id is None:
            raise UserError(f"condition {condition.prompt!r} has no class id, and this policy draws classes")
        return condition.class_id


def check_fit(
    folder: Path,
    model: LlamaGenNetwork,
    tokenizer: VQNetwork,
    text_encoder: TextEncoder | None,
    card: dict[str, Any],
) -> None:
    """The parts of a policy folder must belong together; a wrong tokenizer would only show as noise."""
    config = model.config
    tokens = (card["image_size"] // tokenizer.config.downsample) ** 2
    pairs = [
        ("codes in the tokenizer", tokenizer.config.codebook_size, "vocab_size", config.vocab_size),
        ("tokens at this image size", tokens, "block_size", config.block_size),
    ]
    if text_encoder is None:
        pairs.append(("class names", len(card.get("classes", [])), "num_classes", config.num_classes))
    else:
        pairs.append(("features in the text encoder", text_encoder.width, "caption_dim", config.caption_dim))
    for what, count, key, expected in pairs:
        if count != expected:
            raise UserError(f"{folder}: {count} {what}, but the model's {key} is {expected}")
