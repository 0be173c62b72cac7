"""nano-clip, the conditional reward of the nano world: a small open_clip CLIP, cosine similarity of image and prompt.

It was trained to name what it sees and, for the right name, to fall with the damage of the picture
(`nano/make/rewards.py`), because a similarity that only names the object is satisfied by a broken one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argrpo_cli.networks.weights import load_weights, read_config, to_unit
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError, did_you_mean
from argrpo_cli.system.files import WEIGHTS

PAD, UNKNOWN = 0, 1
SAME_WORDS = {"sheeps": "sheep"}  # GenEval's mechanical plural


class WordTokenizer:
    """One id per word. 0 pads, 1 stands for any word it does not know, the highest id ends the text.

    The end must have the highest id: open_clip reads a text's feature at the position of its largest id.
    """

    def __init__(self, words: Sequence[str], context_length: int):
        self.words, self.context_length = list(words), context_length
        self.ids = {word: index for index, word in enumerate(self.words, start=2)}
        self.end = len(self.words) + 2

    @property
    def vocabulary_size(self) -> int:
        return self.end + 1

    @staticmethod
    def split(text: str) -> list[str]:
        """The words of a text, in lower case."""
        return [SAME_WORDS.get(word, word) for word in re.findall(r"[a-z0-9]+", text.lower())]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """int64 [B, context_length]; longer texts lose their tail."""
        out = torch.full((len(texts), self.context_length), PAD)
        for row, text in enumerate(texts):
            words = self.split(text)[: self.context_length - 1]
            ids = [self.ids.get(word, UNKNOWN) for word in words] + [self.end]
            out[row, : len(ids)] = torch.tensor(ids)
        return out


def build_clip(config: dict) -> tuple[nn.Module, WordTokenizer]:
    """An untrained open_clip.CLIP and its tokenizer from a config with `words`, `embed_dim`, `vision` and `text`."""
    import open_clip

    tokenizer = WordTokenizer(config["words"], config["text"]["context_length"])
    text = {**config["text"], "vocab_size": tokenizer.vocabulary_size}
    return open_clip.CLIP(embed_dim=config["embed_dim"], vision_cfg=config["vision"], text_cfg=text), tokenizer


class NanoClip:
    """Cosine similarity in [-1, 1] of image and prompt."""

    def __init__(self, folder: str | Path = WEIGHTS / "nano-clip", device: str = "cpu"):
        network, self.tokenizer = build_clip(read_config(folder))
        self.network = load_weights(network, folder, device)
        self.device = device
        self._features: dict[str, Tensor] = {}  # prompts repeat: a class-conditional run has one per class

    def check(self, conditions: Sequence[Condition]) -> None:
        """Refuse prompts with words it never saw: what it would say of them means nothing.

        Raises:
            UserError: the first such word, with its prompt.
        """
        for prompt in dict.fromkeys(condition.prompt for condition in conditions):
            for word in self.tokenizer.split(prompt):
                if word not in self.tokenizer.ids:
                    hint = did_you_mean(word, self.tokenizer.words)
                    hint = hint or "; it reads captions of the nano world, such as 'a photo of two red cars'"
                    raise UserError(f"nano-clip does not know the word {word!r} in the prompt {prompt!r}{hint}")

    @torch.inference_mode()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [B, D]; UserError as `check` says."""
        fresh = sorted(set(prompts) - self._features.keys())
        if fresh:
            self.check([Condition(prompt) for prompt in fresh])
            features = self.network.encode_text(self.tokenizer(fresh).to(self.device), normalize=True)
            self._features.update(zip(fresh, features, strict=True))
        return torch.stack([self._features[prompt] for prompt in prompts])

    @torch.inference_mode()
    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, 64, 64] and B conditions to float32 [B]."""
        features = F.normalize(self.network.encode_image(to_unit(images)), dim=-1)
        return (features * self.text_features([condition.prompt for condition in conditions])).sum(-1)
