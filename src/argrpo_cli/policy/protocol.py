"""What every family of policies is to the rest of the house: a card, tensors for conditions, tokens, pictures.

A family (LlamaGen is one, `policy/llamagen/`; tests/policy/toy_family.py is the smallest) is a module with a class of
this shape, which has a classmethod `load(folder, device, dtype, text_device)` beside, and one line in `open.py`. Its
conditions, its guidance, its log-probabilities and what comes before what are its own matter: nobody else looks into
`Encoded`, counts positions or knows the name of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

if TYPE_CHECKING:
    from torch import Tensor, nn

    from argrpo_cli.shapes import Condition, Sampling


@dataclass(frozen=True)
class Card:
    """What can be said of a policy without its weights.

    Attributes:
        name: what it was opened by.
        family: "llamagen", ...
        reads: "classes" or "captions".
        names: of the class ids 0, 1, ...; empty for captions.
        image_size: pixels a side.
        tokens: T, of an image.
        codes: V, that a token chooses from.
        base: the policy this one descends from.
        scales: tokens that are drawn together, in their order: 1, 4, 9, ... of VAR, T in all; empty where each is
            drawn by itself.
        words: for captions, all the words it can read, None where it can spell anything.
        sampling: how it is meant to be sampled, settings of `Sampling` but `dtype`; empty where nothing is said.
    """

    name: str
    family: str
    reads: str
    names: tuple[str, ...]
    image_size: int
    tokens: int
    codes: int
    base: str
    words: tuple[str, ...] | None = None
    scales: tuple[int, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)


class Encoded(Protocol):
    """A family's own tensors for B conditions; rows can be chosen, in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | Tensor) -> Self: ...


class Drawn(NamedTuple):
    """Tokens int64 [B, T] and, where asked for, their log-probabilities float32 [B, T]."""

    tokens: Tensor
    logp: Tensor | None


class Scored(NamedTuple):
    """Log-probabilities float32 [B, T] of given tokens and, where asked for, the entropies [B, T] in nats, and what
    `Compare` made of the distributions, [B, T, ...]."""

    logp: Tensor
    entropy: Tensor | None = None
    compared: Tensor | None = None


# Makes [n, ...] of log-probabilities float32 [n, V] over all codes, of those of a batch's B T tokens, image after
# image, that the slice says. It may be asked again in the backward pass, where logits are computed part by part.
Compare = Callable[["Tensor", slice], "Tensor"]


class Policy(Protocol):
    """A policy as `load_policy` gives it.

    Attributes:
        name: what it was opened by; `load_policy` sets it.
        model: a model of transformers: what is trained, sharded and saved. `model(encoded, tokens, sampling, entropy)`
            gives a `Scored` by one teacher-forced pass: log-probabilities under `sampling`'s guidance and temperature
            (its filters are no part of what is trained), differentiable with respect to the parameters; a fifth
            argument `compare` (see `Compare`) fills `Scored.compared`. `model.distribution(encoded, tokens, sampling)`
            gives a function that makes of a slice as there the log-probabilities over all codes, float32 [n, V]. TRL
            loads the reference of the KL term by AutoModelForCausalLM and reads `auto_map` of its configuration.
        sampling: as `Card` has it; training that puts guidance into the weights sets it, `save_card` writes it.
    """

    name: str
    card: Card
    model: nn.Module
    sampling: dict[str, Any]

    def conditions(self, requests: Iterable[str | int]) -> list[Condition]:
        """What it is asked to draw: class names or ids, or captions; UserError for one that it cannot draw."""
        ...

    def encode(self, conditions: Sequence[Condition], dropped: Tensor | None = None) -> Encoded:
        """The family's tensors for conditions; where `dropped` (bool [B]) is set, those of the null condition."""
        ...

    def sample(
        self,
        encoded: Encoded,
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        model: nn.Module | None = None,
        logp: str | None = None,
    ) -> Drawn:
        """Draw an image for each condition, in one batch.

        Args:
            seeds: of each image's noise; the same condition and seed give the same image in any batch, up to rounding.
            model: draws in the place of `self.model`: the same network as a trainer has wrapped it.
            logp: "guided" for log-probabilities under the very distribution that was sampled, "conditional" for those
                of the unguided, unfiltered one at the same temperature.
        """
        ...

    def decode(self, tokens: Tensor, size: int | None = None) -> Tensor:
        """Tokens int64 [B, T] to images uint8 [B, 3, S, S], S = image_size, or `size`."""
        ...

    def tokenise(self, images: Tensor) -> Tensor:
        """Images uint8 [B, 3, image_size, image_size] to tokens int64 [B, T]."""
        ...

    def code_vectors(self) -> Tensor:
        """What the image tokenizer has for each code, scaled to unit length: float32 [V, C]."""
        ...

    def tokenizer_fingerprint(self) -> str:
        """A hash of what tokenises: policies that share it have the same tokens of a picture."""
        ...

    def parts(self) -> dict[str, list[str]]:
        """What `policy.trainable` ("trainable", parameters) and LoRA ("lora", last parts of the names of layers) may
        name, and the layers that adapters are put on where LoRA names none ("adapted")."""
        ...

    def fingerprint(self) -> str:
        """A hash of the weights and of all else that decides what is drawn."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write a policy folder; UserError when it cannot be written."""
        ...

    def save_card(self, folder: str | Path) -> None:
        """Make a policy folder of one that holds what `model.save_pretrained` writes."""
        ...
