"""The networks of the nano world's rewards, with what only their training needs."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD, UNKNOWN = 0, 1
SAME_WORDS = {"sheeps": "sheep"}  # GenEval's mechanical plural
LIMIT = 5.0  # of nano-critic's scores


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


class Residual(nn.Module):
    """norm, swish, 3x3 convolution, twice, beside the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Body(nn.Sequential):
    """Pixels [B, 3, 64, 64] in [-1, 1] to features [B, widths[-1], 8, 8], one position per token of nano-vq."""

    def __init__(self, widths: Sequence[int] = (32, 48, 80), blocks: Sequence[int] = (1, 2, 2)):
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 3, padding=1)]
        for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            if level:
                layers.append(nn.Conv2d(widths[level - 1], width, 3, stride=2, padding=1))
            layers += [Residual(width) for _ in range(count)]
        super().__init__(*layers, nn.BatchNorm2d(widths[-1]), nn.SiLU())


def pooled(features: Tensor) -> Tensor:
    """[B, C, h, w] to [B, 2 C]: mean and maximum over the positions."""
    return torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=-1)


class QualityNet(nn.Module):
    """64x64 pixels to a logit of quality. Two more heads only serve training: where the damage is, and what is shown
    (one has to know the object to know what is missing)."""

    def __init__(self, widths: Sequence[int] = (32, 48, 80), blocks: Sequence[int] = (1, 2, 2), classes: int = 24):
        super().__init__()
        last = widths[-1]
        self.body = Body(widths, blocks)
        self.local = nn.Conv2d(last, 1, 1)
        self.name = nn.Linear(2 * last, classes)
        self.head = nn.Sequential(nn.Linear(2 * last, last), nn.SiLU(), nn.Linear(last, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, 64, 64] in [-1, 1] to quality logits [B]."""
        return self.head(pooled(self.body(x)))[:, 0]

    def lessons(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quality logits [B], local damage logits [B, 8, 8] and class logits [B, classes]."""
        features = self.body(x)
        both = pooled(features)
        return self.head(both)[:, 0], self.local(features)[:, 0], self.name(both)


class CriticNet(nn.Module):
    """64x64 pixels to a logit; positive means real."""

    def __init__(self, widths: Sequence[int] = (32, 48, 80), blocks: Sequence[int] = (1, 2, 2), dropout: float = 0.3):
        super().__init__()
        last = widths[-1]
        self.body = Body(widths, blocks)
        self.head = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(2 * last, last), nn.SiLU(), nn.Dropout(dropout), nn.Linear(last, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, 64, 64] in [-1, 1] to logits [B]."""
        return self.head(pooled(self.body(x)))[:, 0]


def soft_limit(logits: Tensor) -> Tensor:
    """5 tanh(logit / 5): the logit where it is small, bounded where it is not."""
    return LIMIT * torch.tanh(logits / LIMIT)
