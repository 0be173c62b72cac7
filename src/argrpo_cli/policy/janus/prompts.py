"""Captions to what Janus reads: its chat template, token ids, and the null prompt of guidance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from argrpo_cli.networks.weights import load_tokenizer
from argrpo_cli.policy.words import check_words, known_words
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import writable

# A turn of the user and the beginning of the answer, as Janus-Pro was trained: the begin-of-image token comes next.
TEMPLATE = "<|User|>: {}\n\n<|Assistant|>:"
IMAGE_STARTS = "<begin_of_image>"
AROUND = 64  # tokens of a chat template, at most


class Prompts:
    """The text tokenizer of a Janus, in the words that it was trained on.

    Attributes:
        tokenizer: any of transformers' with a token that begins a sentence; a chat template that it brings along is
            used in the place of the published one.
        words: for a tokenizer of whole words, all it knows; None for one that can spell anything.
        begin, image, pad: ids of the tokens that begin a sentence and an image, and of padding.

    Raises:
        UserError: the tokenizer lacks one of the three.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad: int | None = None, source: str = "the tokenizer"):
        self.tokenizer, self.words = tokenizer, known_words(tokenizer)
        image = tokenizer.get_vocab().get(getattr(tokenizer, "boi_token", None) or IMAGE_STARTS)
        self.begin, self.pad = tokenizer.bos_token_id, tokenizer.pad_token_id if pad is None else pad
        for what, found in (("begins a sentence", self.begin), ("begins an image", image), ("is padding", self.pad)):
            if found is None:
                raise UserError(f"{source}: no token {what}; this is no tokenizer of Janus")
            if type(found) is not int or found < 0:  # of a damaged generation_config.json
                raise UserError(f"{source}: the token that {what} has the id {found!r}")
        self.image: int = image

    @classmethod
    def load(cls, folder: Path, pad: int | None = None) -> Prompts:
        """From the files of `save_pretrained` in a folder.

        Args:
            pad: the padding of the model's generation_config.json, which null prompts are made of.

        Raises:
            UserError: files missing or damaged.
        """
        # As its tokenizer.json says: the class that the published tokenizer_config.json names, Llama's, splits words as
        # SentencePiece does, and these are pairs of bytes.
        return cls(load_tokenizer(PreTrainedTokenizerFast, folder), pad, str(folder))

    def ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt, the one that begins an image last."""
        text = prompt.strip()
        if self.tokenizer.chat_template is None:
            text = TEMPLATE.format(text)
        else:
            turn = {"role": "user", "content": [{"type": "text", "text": text}]}
            text = self.tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        ids = self.tokenizer(text).input_ids
        return [*([] if ids[:1] == [self.begin] else [self.begin]), *ids, self.image]

    def check(self, prompts: Sequence[str], length: int) -> None:
        """Refuse what cannot be read: empty prompts, unknown words, more than `length` tokens.

        Raises:
            UserError: the first such prompt, in one line.
        """
        check_words(prompts, self.words)
        for prompt in prompts:
            if len(prompt.encode()) + AROUND <= length:
                continue  # a token is a byte at least, and there may be many prompts
            if (count := len(self.ids(prompt))) > length:
                raise UserError(f"the prompt {prompt!r} has {count} tokens and the policy reads {length}: shorten it")

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, those of the null prompts, and mask, int64 [B, P] each, left padded to the longest; on the CPU.

        In a null prompt everything between begin of sentence and begin of image is padding, which is read: as published
        (`generation_inference.py` of Janus, and transformers), it is as long as the prompt it replaces.
        """
        rows = [self.ids(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        null = torch.where((ids == self.begin) | (ids == self.image), ids, self.pad)
        return ids, null, mask

    def save(self, folder: Path) -> None:
        """Write it into an existing folder; UserError when it cannot be written."""
        with writable(folder):
            self.tokenizer.save_pretrained(folder)
