"""Prompts against the words of a text tokenizer: one of whole words can read no others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from argrpo_cli.system.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def known_words(tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
    """For a tokenizer of whole words, all it knows, sorted; None for one that can spell anything."""
    whole_words = type(tokenizer.backend_tokenizer.model).__name__ == "WordLevel"
    return sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) if whole_words else None


def check_words(prompts: Sequence[str], words: Sequence[str] | None) -> None:
    """Refuse empty prompts and, where `words` are all that there are, others.

    Raises:
        UserError: the first such prompt, in one line.
    """
    vocabulary = set(words or ())
    for prompt in prompts:
        if not prompt.strip():
            raise UserError("an empty prompt: say what to draw")
        for word in re.findall(r"\w+|[^\w\s]+", prompt.lower()) if words is not None else ():
            if word not in vocabulary:
                hint = did_you_mean(word, words) or f"; the words are {', '.join(words)}"
                raise UserError(f"the policy does not know the word {word!r} in the prompt {prompt!r}{hint}")
