"""What is known of a policy without its weights: what it takes of memory, and the files that it needs.

`open.outline_policy` gives one by name or path; `--dry-run` adds them up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from argrpo_cli.policy.tokens import LOGITS_AT_ONCE

if TYPE_CHECKING:
    from torch import Tensor

    from argrpo_cli.policy.protocol import Encoded, Policy
    from argrpo_cli.system.files import HubFile

DECODE_PIXELS = 2**20  # decoded at a time; at 256 px with VQ-16 about half a gigabyte for each activation
DECODER_LAYERS = 4  # activations of full size that the image decoder holds at once


@dataclass(frozen=True)
class Outline:
    """Of a policy of any family; `blank` and `drawing_bytes` are the family's own.

    Attributes:
        policy: its model and image tokenizer are on the meta device, with shapes and without numbers.
        text_bytes: of a text encoder beside the model in memory, 0 where there is none.
        files: of the hub, what `load_policy` needs.
    """

    policy: Policy
    text_bytes: int
    files: tuple[HubFile, ...]

    @property
    def config(self) -> Any:
        """The geometry of the model."""
        return self.policy.model.config

    @property
    def layers(self) -> int:
        """Layers that gradient checkpointing computes again, one at a time."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return sum(isinstance(module, GradientCheckpointingLayer) for module in self.policy.model.modules())

    @property
    def reads(self) -> bool:
        """Whether `policy.conditions` can be asked: what reads the captions of a published policy may not be here."""
        return True

    @property
    def tokenizer_bytes(self) -> int:
        """Of the image tokenizer, which is in float32."""
        return 4 * sum(one.numel() for one in self.policy.tokenizer.parameters())

    def blank(self, images: int) -> tuple[Encoded, Tensor]:
        """Conditions and tokens int64 [images, T] of the shapes that images of it have, all zero."""
        raise NotImplementedError

    def drawing_bytes(self, images: int, *, guided: bool, recorded: bool, number: int) -> int:
        """What is kept of all layers while images are drawn, in numbers of `number` bytes; with CUDA graphs more."""
        raise NotImplementedError

    def decoding_bytes(self, images: int) -> int:
        """What the image tokenizer holds at once when it decodes images."""
        pixels = self.policy.image_size**2
        at_once = min(images * pixels, max(DECODE_PIXELS, pixels))
        return DECODER_LAYERS * 4 * at_once * self.policy.tokenizer.config.ch

    def logits_bytes(self, images: int) -> int:
        """Of the training pass's logits, what is there at once: float32 logits, their softmax and gradients of both."""
        card = self.policy.card
        return 4 * 4 * min(images * card.tokens * card.codes, LOGITS_AT_ONCE)
