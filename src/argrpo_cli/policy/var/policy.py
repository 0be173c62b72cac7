"""The family of VAR behind `protocol.Policy`: a model, its tokenizer of many scales, and the classes that it draws.

A policy folder holds what `save_pretrained` writes (config.json, model.safetensors, ...) and `policy.json`, which says

    {"family": "var", "tokenizer": "vq-var", "classes": ["tench, ...", ...], "image_size": 256, "base": "var-d16"}

and "sampling" where it is meant to be drawn with certain settings. The tokenizer is a bundled one, the published one or
a folder relative to this one. What is published opens by name and file as well: `published.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from argrpo_cli.networks.weights import fingerprint, load_pretrained, save_model
from argrpo_cli.policy.classes import class_id
from argrpo_cli.policy.folder import CARD, NAMED_PARTS, part_of, read_card, sampling_entry
from argrpo_cli.policy.llamagen.model import Encoded
from argrpo_cli.policy.protocol import Card
from argrpo_cli.policy.published import TOKENIZERS
from argrpo_cli.policy.tokens import TokenPolicy
from argrpo_cli.policy.var.checkpoints import open_tokenizer
from argrpo_cli.policy.var.config import NOT_IN_SHAPES, VARConfig
from argrpo_cli.policy.var.model import VARForImageGeneration
from argrpo_cli.policy.var.sample import sample_tokens
from argrpo_cli.policy.var.vq import MultiScaleVQ
from argrpo_cli.shapes import Condition, class_prompt
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import make_dir, write_json

LORA = ("mat_qkv", "proj", "fc1", "fc2")  # linear layers of the blocks; those of the modulation have no names


@dataclass
class VAR(TokenPolicy):
    """A policy, as `load_policy` gives it; `protocol.Policy` says what its methods do.

    Attributes:
        model: the transformer, in evaluation mode.
        tokenizer: image tokenizer, always float32.
        tokenizer_name: name of a bundled or published tokenizer, None if it came from a folder or file.
        class_names: names of the class ids 0, 1, ...
        image_size: pixels a side.
        base: the policy this one descends from.
        name: what it was opened by.
        sampling: how it is meant to be sampled, see `Card`.
    """

    draw = staticmethod(sample_tokens)

    model: VARForImageGeneration
    tokenizer: MultiScaleVQ
    tokenizer_name: str | None
    class_names: list[str]
    image_size: int
    base: str
    name: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, device: str, dtype: str, text_device: str = "same") -> Self:
        """Open a policy folder; the arguments are those of `load_policy`.

        Raises:
            UserError: something is missing or damaged, or the parts do not belong together.
        """
        card = read_card(folder, tokenizer=str)
        model = load_pretrained(VARForImageGeneration, folder, getattr(torch, dtype))
        if card["tokenizer"] in TOKENIZERS:
            tokenizer = open_tokenizer(card["tokenizer"], model.config.scales)[1]
        else:
            part = part_of(folder, "image tokenizer", card["tokenizer"])
            tokenizer = load_pretrained(MultiScaleVQ, part, torch.float32)
        check_fit(str(folder), model.config, tokenizer, card["classes"], card["image_size"])
        own = model.quantizer.state_dict()
        for key, value in tokenizer.quantize.state_dict().items():
            if not torch.allclose(
                own[key].float(), value.float(), rtol=0.01, atol=1e-3
            ):  # half precision is near enough
                raise UserError(f"{folder}: the tokenizer's {key} is not the one that the model was trained with")
        return cls(
            model=model.to(device),
            tokenizer=tokenizer.to(device),
            tokenizer_name=card["tokenizer"] if card["tokenizer"] in NAMED_PARTS else None,
            class_names=card["classes"],
            image_size=card["image_size"],
            base=card.get("base", str(folder)),
            sampling=card["sampling"],
        )

    @property
    def network(self) -> nn.Module:
        return self.model

    @property
    def card(self) -> Card:
        """What can be said of it without its weights."""
        config = self.model.config
        return Card(
            name=self.name,
            family="var",
            reads="classes",
            names=tuple(self.class_names),
            image_size=self.image_size,
            tokens=config.block_size,
            codes=config.vocab_size,
            base=self.base,
            scales=config.counts,
            sampling=self.sampling,
        )

    def conditions(self, requests: Iterable[str | int]) -> list[Condition]:
        """Of class names or ids (numbers, also written as text); UserError for a class that there is not."""
        ids = [class_id(request, self.class_names) for request in requests]
        return [Condition(class_prompt(self.class_names[index]), index) for index in ids]

    def encode(self, conditions: Sequence[Condition], dropped: Tensor | None = None) -> Encoded:
        """See `protocol.Policy`: class ids on the model's device."""
        for one in conditions:
            if one.class_id is None:
                raise UserError(f"condition {one.prompt!r} has no class id, and this policy draws classes")
        ids = torch.tensor([one.class_id for one in conditions], dtype=torch.long)
        if dropped is not None:
            ids = torch.where(dropped.cpu(), self.model.config.num_classes, ids)
        return Encoded(ids.to(self.model.device))

    def parts(self) -> dict[str, list[str]]:
        """Names of all parameters but the quantisation's, and of the linear layers of the blocks."""
        names = [name for name, _ in self.model.named_parameters() if not name.startswith("quantizer.")]
        return {"trainable": names, "lora": list(LORA), "adapted": list(LORA)}

    def tokenizer_fingerprint(self) -> str:
        return fingerprint([self.tokenizer], {"scales": list(self.tokenizer.config.scales)})

    def fingerprint(self) -> str:
        """A hash of the weights and of all else that decides what is drawn; see `networks.weights`."""
        settings = {key: getattr(self.model.config, key) for key in NOT_IN_SHAPES}
        return fingerprint([self.model, self.tokenizer], settings)

    def save_card(self, folder: str | Path) -> None:
        """Add to a folder with the model's own files what makes it a policy folder."""
        folder = Path(folder)
        if self.tokenizer_name is None:
            save_model(self.tokenizer, make_dir(folder / "tokenizer"))
        card = {"family": "var", "tokenizer": self.tokenizer_name or "tokenizer", "classes": self.class_names}
        own = {"image_size": self.image_size, "base": self.base, **sampling_entry(self.sampling)}
        write_json(folder / CARD, {**card, **own})


def check_fit(source: str, config: VARConfig, tokenizer: MultiScaleVQ, names: Sequence[str], image_size: int) -> None:
    """The parts of a policy must belong together; a wrong tokenizer would only show as noise."""
    other = tokenizer.config
    pairs = [
        ("scales of the tokenizer", list(other.scales), "scales", list(config.scales)),
        ("codes in the tokenizer", other.codebook_size, "vocab_size", config.vocab_size),
        ("width of the tokenizer's codes", other.codebook_embed_dim, "code_dim", config.code_dim),
        ("image size", image_size, "scales and the tokenizer give", config.scales[-1] * other.downsample),
        ("class names", len(names), "num_classes", config.num_classes),
    ]
    for what, value, key, expected in pairs:
        if value != expected:
            raise UserError(f"{source}: {what}: {value}, but the model's {key} {expected}")
