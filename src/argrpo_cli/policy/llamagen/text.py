"""Captions to the features a caption-conditional policy reads: a frozen T5 encoder, padded as LlamaGen was trained."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus

import torch
from torch import Tensor

from argrpo_cli.networks.weights import load_pretrained, load_tokenizer, quiet_transformers, save_model
from argrpo_cli.policy.llamagen.model import left_pad
from argrpo_cli.policy.words import check_words, known_words
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import check_fetched, writable
from argrpo_cli.system.processes import resolve_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

SAME, OFFLOAD = "same", "offload"  # beside names of devices: where a text encoder may live
KEPT = 1024  # captions whose features are kept; those of FLAN-T5 XL take half a megabyte each


class TextEncoder:
    """A T5 encoder and its tokenizer.

    Attributes:
        model: the encoder, in evaluation mode and frozen; features have its `d_model` as width.
        tokenizer: any transformers tokenizer with a padding and an end token.
        words: for a tokenizer of whole words, all it knows; None for one that can spell anything.
        cleans: captions go through the published cleaning first, as those did that LlamaGen was trained on.
        right_padded: features stay where the encoder put them, padding and all, as AR-GRPO's code has it; LlamaGen's
            are moved to the right end and their padding is zero.
        device, offloaded: where it reads, and whether it lives elsewhere in between; see `place`.
    """

    def __init__(
        self,
        model: T5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        cleans: bool = False,
        right_padded: bool = False,
    ) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.cleans, self.right_padded = cleans, right_padded
        self.device, self.offloaded = model.device, False
        self._features = lru_cache(maxsize=KEPT)(self._read)
        self.words = known_words(tokenizer)

    @property
    def width(self) -> int:
        """Width of the features."""
        return self.model.config.d_model

    def check(self, prompts: Sequence[str], length: int) -> None:
        """Refuse empty prompts and, for a tokenizer of whole words, words that it does not know and prompts too long.

        Prompts longer than `length` tokens are cut where the tokenizer can spell anything, as published.

        Raises:
            UserError: the first such prompt, in one line.
        """
        check_words(prompts, self.words)
        for prompt in prompts if self.words is not None else ():
            tokens = len(self.tokenizer(prompt).input_ids)
            if tokens > length:
                raise UserError(f"the prompt {prompt!r} has {tokens} tokens and the policy reads {length}: shorten it")

    def place(self, device: str | torch.device, where: str = SAME) -> None:
        """Put the encoder beside a policy on `device` (where = "same"), or on another device (its name).

        With where = "offload" it stays in the CPU's memory and visits `device` only while it reads new captions.

        Raises:
            UserError: this machine has no such device.
        """
        self.offloaded = where == OFFLOAD
        self.device = torch.device(device if where in (SAME, OFFLOAD) else resolve_device(where))
        self.model.to("cpu" if self.offloaded else self.device)

    def encode(self, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Features of prompts, each distinct one encoded once; the latest `KEPT` are remembered from call to call.

        As LlamaGen's: tokens padded or cut to `length`, padding left out of the encoder's attention, features of
        padding zero, the valid rows moved to the right end (unless `right_padded`). Each prompt is read alone: in a
        batch its features would depend, by rounding, on what else is asked for or was remembered, and an interrupted
        job would not end in the same bytes.

        Returns:
            features [B, length, width] in the encoder's dtype and mask int64 [B, length], 1 on valid rows; on the CPU.
        """
        try:
            cleaned = map(published_caption, prompts) if self.cleans else prompts
            rows = [self._features(prompt, length, self.right_padded) for prompt in cleaned]
        finally:
            if self.offloaded:
                self.model.to("cpu")
        return torch.stack([features for features, _ in rows]), torch.stack([mask for _, mask in rows])

    @torch.no_grad()  # not inference mode: a policy may be trained on what this returns
    def _read(self, prompt: str, length: int, right_padded: bool) -> tuple[Tensor, Tensor]:
        """Features [length, width] and mask [length] of a prompt, on the CPU."""
        self.model.to(self.device)  # moves nothing unless the encoder is offloaded
        batch = self.tokenizer(
            [prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device)
        mask = batch.attention_mask
        features = self.model(input_ids=batch.input_ids, attention_mask=mask).last_hidden_state
        if not right_padded:
            features, mask = left_pad(features, mask)
        return features[0].cpu(), mask[0].cpu()

    def save(self, folder: Path) -> None:
        """Write both parts into an existing folder; UserError when it cannot be written."""
        save_model(self.model, folder)
        with writable(folder):
            self.tokenizer.save_pretrained(folder)


def open_text_encoder(name: str, right_padded: bool = False) -> TextEncoder:
    """A published T5 encoder, of the hub or a folder, in bfloat16 as published, with the published caption cleaning.

    Raises:
        UserError: it cannot be fetched.
    """
    from transformers import AutoTokenizer, T5EncoderModel

    if not Path(name).is_dir():
        check_fetched(name)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(name)
        model = T5EncoderModel.from_pretrained(name, dtype=torch.bfloat16)
    except (OSError, ValueError) as error:
        mend = f"fetch it with `hf download {name} --include '*.json' '*.model' '*.safetensors'`"
        raise UserError(f"cannot open the text encoder {name}: {str(error).splitlines()[0]}; {mend}") from error
    return TextEncoder(model, tokenizer, cleans=True, right_padded=right_padded)


def load_text_encoder(folder: Path, dtype: torch.dtype = torch.float32) -> TextEncoder:
    """From a local folder of `save_pretrained` files of both parts.

    Raises:
        UserError: files missing or damaged.
    """
    from transformers import AutoTokenizer, T5EncoderModel

    model = load_pretrained(T5EncoderModel, folder, dtype)
    tokenizer = load_tokenizer(AutoTokenizer, folder)
    last, read = max(tokenizer.get_vocab().values(), default=-1), model.config.vocab_size
    if last >= read:
        raise UserError(f"{folder}: the text tokenizer has a token {last}, and the model reads {read} tokens")
    return TextEncoder(model, tokenizer)


# The caption cleaning that LlamaGen's text features were made with (DeepFloyd IF's, which PixArt took over). What it
# removes (addresses, codes, file names, shop phrases) was noise in web captions; what it leaves is in lower case. The
# order of the rules matters, and each is kept as it is, with its side effects: `download` falls out of 'downloading', a
# comma is followed by a space.
_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


def _address(scheme: str) -> str:
    """A web address that begins with a scheme, or anything that ends like the name of a site."""
    site = rf"[a-zA-Z0-9.\-]+[.](?:{_DOMAINS})[\w/-]*\b\/?(?!@)"
    return rf"\b((?:{scheme}(?:\/{{1,3}}|[a-zA-Z0-9%])|{site}))"


ADDRESSES = _rules(
    ("<person>", "person"),
    (_address("https?:"), ""),
    (_address("www:"), ""),
)
CHARACTERS = _rules(
    (r"@[\w\d]+\b", ""),  # names of users
    # CJK: strokes, phonetic extensions, enclosed and compatible letters, ideographs, hexagrams: seven blocks in a row.
    ("[\u31c0-\u9fff]+", ""),
    # Every dash is "-", every quote ' or ".
    (
        "[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
        "\ufe63\uff0d]+",
        "-",
    ),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # internet addresses
    (r"\d:\d\d\s+$", ""),  # article ids
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_FILE_TYPES})", ""),  # names of files
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~\)\(\]\[\}\{\|\\\/\*]{1,}", " "),
    (r"\s+\.\s+", " "),
)
PHRASES = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_TYPES})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # 640x480, also with a Cyrillic letter
)
EDGES = _rules(
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
)
_JOINT = re.compile(r"(?:\-|\_)")
MOST_JOINTS = 3  # a text with more of - and _ is a name such as this-is-my-cute-cat


def clean_caption(text: str) -> str:
    """One pass of the published cleaning; `published_caption` makes both."""
    import ftfy
    from bs4 import BeautifulSoup

    text = unquote_plus(str(text)).strip().lower()
    text = _apply(ADDRESSES, text)
    text = BeautifulSoup(text, features="html.parser").text
    text = _apply(CHARACTERS, text)
    if len(_JOINT.findall(text)) > MOST_JOINTS:
        text = _JOINT.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _apply(EDGES, _apply(PHRASES, text)).strip()


def published_caption(text: str) -> str:
    """A caption as T5 reads it in LlamaGen: cleaned twice."""
    return clean_caption(clean_caption(text))


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
