"""The rewards of the nano world, on bundled networks. They see pictures at 64x64 and were trained by `nano/make`.

- nano-clip: does the picture show its prompt? A small open_clip CLIP that learned to name what it sees and, for the
  right name, to fall with the damage of the picture, because a similarity that only names the object is satisfied by a
  broken one.
- nano-quality: how little is a picture damaged, without a reference? A convolutional network that learned from scenes
  broken on purpose (bent, unfinished, joined, blurred, recoloured) how far each was from the truth.
- nano-critic: could this picture be a real scene, or was it generated? A critic that learned scenes against samples of
  the base policy. Its logit is bent softly into (-5, 5), so that no picture wins by an outlier.
- nano-geneval: `geneval` on what the nano detector sees.

In bfloat16 (`Reward.mixed`) scores of samples differ by 1% of their standard deviation, nano-geneval's not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from argrpo_cli.rewards.base import Needs, Reward
from argrpo_cli.rewards.clip import ClipReward
from argrpo_cli.rewards.geneval import GenEval
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError, did_you_mean
from argrpo_cli.system.files import WEIGHTS, read_json

if TYPE_CHECKING:
    from torch import Tensor


class NanoClip(ClipReward):
    """Cosine similarity in [-1, 1] of image and prompt."""

    name, mixed = "nano-clip", True

    def __init__(self, device: str = "cpu", folder: str | Path | None = None):
        from argrpo_cli.networks.clip import ClipModel
        from argrpo_cli.networks.nano import build_clip
        from argrpo_cli.networks.pixels import to_unit
        from argrpo_cli.networks.weights import load_weights

        folder = folder or WEIGHTS / self.name
        network, tokenizer = build_clip(read_json(Path(folder) / "config.json"))
        self.clip = ClipModel(load_weights(network, folder, device), tokenizer, to_unit, device)

    def check(self, conditions: Sequence[Condition]) -> None:
        """UserError for the first word it never saw, with its prompt: what it would say of it means nothing."""
        for prompt in dict.fromkeys(condition.prompt for condition in conditions):
            for word in self.clip.tokenizer.split(prompt):
                if word not in self.clip.tokenizer.ids:
                    hint = did_you_mean(word, self.clip.tokenizer.words)
                    hint = hint or "; it reads captions of the nano world, such as 'a photo of two red cars'"
                    raise UserError(f"nano-clip does not know the word {word!r} in the prompt {prompt!r}{hint}")

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        self.check(conditions)
        return super().score(images, conditions)


class NanoNetwork(Reward):
    """A bundled network that looks at the pictures alone."""

    reads_prompt, mixed = False, True
    kind: ClassVar[str]  # in `networks/nano.py`

    def __init__(self, device: str = "cpu", folder: str | Path | None = None):
        from argrpo_cli.networks import nano
        from argrpo_cli.networks.weights import load_network

        self.network = load_network(getattr(nano, self.kind), folder or WEIGHTS / self.name, device)

    def logits(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to float32 [B]."""
        from argrpo_cli.networks.pixels import to_unit

        return self.network(to_unit(images))


class NanoQuality(NanoNetwork):
    """Quality in [0, 1]; 1 is undamaged."""

    name, family, kind = "nano-quality", "quality", "QualityNet"

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return self.logits(images).sigmoid()


class NanoQualityT2I(NanoQuality):
    """The same for scenes of several objects."""

    name = "nano-quality-t2i"


class NanoCritic(NanoNetwork):
    """Softly bounded logit in (-5, 5); the higher, the more real."""

    name, family, kind = "nano-critic", "realism", "CriticNet"

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        from argrpo_cli.networks.nano import soft_limit

        return soft_limit(self.logits(images))


class NanoCriticT2I(NanoCritic):
    """The same for scenes of several objects."""

    name = "nano-critic-t2i"


class NanoGenEval(GenEval):
    """`GenEval` with the bundled detector."""

    name, mixed = "nano-geneval", True

    def __init__(self, device: str = "cpu", folder: str | Path | None = None):
        super().__init__(device, detector="nano", weights=folder)

    @classmethod
    def needs(cls, options: Mapping[str, Any], device: str = "cpu") -> Needs:
        """Nothing: the detector is bundled."""
        return Needs()
