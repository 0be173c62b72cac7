"""A second family of policies in one file: every token is drawn by itself, from logits of its class and place.

Nothing of LlamaGen is in it: no prefix, no transformer, no image tokenizer. It is registered by one line of
`policy/open.py`'s table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from argrpo_cli.networks.weights import fingerprint, load_pretrained, save_model
from argrpo_cli.policy.classes import class_id
from argrpo_cli.policy.folder import CARD, read_card, sampling_entry
from argrpo_cli.policy.protocol import Card, Compare, Drawn, Scored
from argrpo_cli.shapes import Condition, Sampling, class_prompt
from argrpo_cli.system.files import make_dir, write_json

SIDE, CODES = 4, 4  # tokens a side, each of 2 x 2 pixels of one of four greys


@dataclass(frozen=True)
class Places:
    """Rows of the table, int64 [B]; the last one is that of no class."""

    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | Tensor) -> Places:
        return Places(self.rows[rows])


class ToyConfig(PreTrainedConfig):
    model_type = "toy"
    classes: int = 2
    auto_map: dict[str, str] = field(default_factory=dict)  # TRL asks for it when it loads the reference


class ToyModel(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.table = nn.Parameter(torch.zeros(config.classes + 1, SIDE**2, CODES))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The table begins at zero."""

    def log_probs(self, encoded: Places, sampling: Sampling) -> Tensor:
        """Float32 [B, T, V], guided as the policy guides: on probabilities, which no linear head could do."""
        own = (self.table[encoded.rows] / sampling.temperature).log_softmax(-1)
        if sampling.cfg_scale <= 1:
            return own
        none = (self.table[-1] / sampling.temperature).log_softmax(-1)
        return (none + sampling.cfg_scale * (own - none)).log_softmax(-1)

    def forward(
        self,
        encoded: Places,
        tokens: Tensor,
        sampling: Sampling | None = None,
        entropy: bool = False,
        compare: Compare | None = None,
    ) -> Scored:
        logp = self.log_probs(encoded, sampling or Sampling(cfg_scale=1.0))
        entropies = -(logp.exp() * logp).sum(-1) if entropy else None
        whole = slice(0, tokens.numel())
        compared = None if compare is None else compare(logp.flatten(0, 1), whole).unflatten(0, tokens.shape)
        return Scored(logp.gather(-1, tokens[..., None])[..., 0], entropies, compared)

    def distribution(self, encoded: Places, tokens: Tensor, sampling: Sampling) -> Callable[[slice], Tensor]:
        return self.log_probs(encoded, sampling).flatten(0, 1).__getitem__


AutoConfig.register("toy", ToyConfig)
AutoModelForCausalLM.register(ToyConfig, ToyModel)


@dataclass
class Toy:
    model: ToyModel
    names: list[str]
    name: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, device: str, dtype: str, text_device: str) -> Toy:
        card = read_card(folder)
        model = load_pretrained(ToyModel, folder, getattr(torch, dtype)).to(device)
        return cls(model, card["classes"], sampling=card["sampling"])

    @property
    def card(self) -> Card:
        names, size = tuple(self.names), 2 * SIDE
        return Card(self.name, "toy", "classes", names, size, SIDE**2, CODES, base="toy", sampling=self.sampling)

    def conditions(self, asked: Iterable[str | int]) -> list[Condition]:
        ids = [class_id(one, self.names) for one in asked]
        return [Condition(class_prompt(self.names[one]), one) for one in ids]

    def encode(self, conditions: Sequence[Condition], dropped: Tensor | None = None) -> Places:
        rows = torch.tensor([one.class_id for one in conditions], dtype=torch.long)
        rows = rows if dropped is None else torch.where(dropped, len(self.names), rows)
        return Places(rows.to(self.model.device))

    @torch.no_grad()
    def sample(
        self,
        encoded: Places,
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        model: ToyModel | None = None,
        logp: str | None = None,
    ) -> Drawn:
        network = self.model if model is None else model
        streams = [torch.Generator().manual_seed(seed % 2**32) for seed in seeds]
        uniforms = torch.stack([torch.rand(SIDE**2, 1, generator=one) for one in streams])
        cumulative = network.log_probs(encoded, sampling).exp().cumsum(-1)
        tokens = (cumulative < uniforms).sum(-1).clamp(max=CODES - 1)
        scale = sampling.cfg_scale if logp == "guided" else 1.0
        score = Sampling(cfg_scale=scale, temperature=sampling.temperature)
        return Drawn(tokens, None if logp is None else network(encoded, tokens, score).logp)

    def decode(self, tokens: Tensor, size: int | None = None) -> Tensor:
        greys = (tokens.view(-1, 1, SIDE, SIDE) * (255 / (CODES - 1))).repeat(1, 3, 1, 1)
        return nn.functional.interpolate(greys.float(), size=(size or 2 * SIDE,) * 2).to(torch.uint8)

    def tokenise(self, images: Tensor) -> Tensor:
        greys = nn.functional.avg_pool2d(images.float().mean(1, keepdim=True), 2)
        return (greys / (255 / (CODES - 1))).round().long().flatten(1)

    def code_vectors(self) -> Tensor:
        return torch.eye(CODES)

    def tokenizer_fingerprint(self) -> str:
        return f"greys-{CODES}"

    def parts(self) -> dict[str, list[str]]:
        return {"trainable": ["table"], "lora": [], "adapted": []}

    def fingerprint(self) -> str:
        return fingerprint([self.model])

    def save(self, folder: str | Path) -> None:
        save_model(self.model, make_dir(folder))
        self.save_card(folder)

    def save_card(self, folder: str | Path) -> None:
        card: dict[str, Any] = {"family": "toy", "classes": self.names, "image_size": 2 * SIDE, "base": "toy"}
        write_json(Path(folder) / CARD, {**card, **sampling_entry(self.sampling)})
