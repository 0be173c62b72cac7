"""The caption cleaning that LlamaGen's text features were made with (DeepFloyd IF's, which PixArt took over).

`clean_caption` is applied twice before T5 reads a caption, as published. What it removes (addresses, codes, file names,
shop phrases) was noise in web captions; what it leaves is in lower case. The order of the rules matters, and each is
kept as it is, with its side effects: `download` falls out of 'downloading', a comma is followed by a space.
"""

from __future__ import annotations

import html
import re
from urllib.parse import unquote_plus

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
    # Blocks of CJK strokes, phonetic extensions, enclosed and compatible letters, ideographs and hexagrams.
    ("[\u31c0-\u31ef]+", ""),
    ("[\u31f0-\u31ff]+", ""),
    ("[\u3200-\u32ff]+", ""),
    ("[\u3300-\u33ff]+", ""),
    ("[\u3400-\u4dbf]+", ""),
    ("[\u4dc0-\u4dff]+", ""),
    ("[\u4e00-\u9fff]+", ""),
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
