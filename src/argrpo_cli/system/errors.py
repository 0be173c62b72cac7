"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import difflib
import re
import reprlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

SECRET_KEY = r"(?:api_?key|(?:access|auth|hf)_token|passw(?:or)?d|secret)"
USER = r"(?<=//)[^\s/@'\"]+(?=@)"  # and password, of a URL
SECRETS = {  # and what stands in their place
    USER: "***",
    r"(?<=://)([^\s?'\"]*\?)[^\s'\"]+": r"\1***",  # the query of a URL
    rf"(?i)({SECRET_KEY}['\"]?[=:] ?['\"]?)[^\s'\",}}]+": r"\1***",
}
ENVIRONMENT = "have it read from the environment, as a judge does its key (ARGRPO_JUDGE_API_KEY)"
LONG_WORD = 300  # characters; a longer one is no path

# Control characters, ends of lines, marks that reverse the direction, half pairs (bytes of a name that is no UTF-8).
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST = 1_800  # characters of a message
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60


class UserError(Exception):
    """Bad input or a bad machine state, told in one line: the thing, its value and the mend.

    The command line prints it as `argrpo: error: …` and exits with code 2. Whatever it quotes, it has no secrets in it,
    and no words without end.
    """

    def __init__(self, message: str):
        super().__init__(re.sub(rf"\S{{{LONG_WORD},}}", lambda word: word[0][:60] + "...", without_secrets(message)))


def without_secrets(text: str) -> str:
    """A text with *** in the place of passwords and keys, as far as they can be told."""
    for pattern, mask in SECRETS.items():
        text = re.sub(pattern, mask, text)
    return text


def refuse_secrets(value: Any, where: str) -> None:
    """UserError where there is a secret in what will be printed and kept: a URL with a user, or a key."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if re.fullmatch(rf"(?i)(?:\w+_)?{SECRET_KEY}", str(key)) and isinstance(inner, str) and inner:
                raise UserError(f"{where}: {key} is a secret, and this is printed and kept; {ENVIRONMENT}")
            refuse_secrets(inner, where)
    elif isinstance(value, list | tuple):
        for inner in value:
            refuse_secrets(inner, where)
    elif isinstance(value, str) and re.search(USER, value):
        raise UserError(f"{where}: the url has a user or password in it, and this is printed and kept; {ENVIRONMENT}")


class BadPicture(UserError):
    """One picture that cannot be read or looked at; it says nothing of the others."""


@contextmanager
def exit_code(program: str) -> Iterator[None]:
    """Within this context of a program beside `argrpo` a UserError is a line on standard error and exit code 2."""
    try:
        yield
    except UserError as error:
        print(f"{program}: error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def printable(text: object, but: str = "") -> str:
    """A text, such as a name of a file, in which what a terminal may obey or cannot show is written `\\x1b`, `\\udce9`.

    Args:
        but: characters that stay as they are.
    """
    return UNPRINTABLE.sub(lambda one: one[0] if one[0] in but else one[0].encode("unicode_escape").decode(), str(text))


def one_line(message: object) -> str:
    """A message as the terminal gets it: in one line, `printable`, and of a length that can be read."""
    text = printable(" ".join(str(message).split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 300]} ... {text[-300:]}"


def shortened(value: object) -> str:
    """A value as Python writes it, of which a long one keeps its beginning and its end."""
    return SHORT.repr(value)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, with the next after a colon at its end; its type where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on a GPU or a CPU."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def some_names(names: Sequence[str], most: int = 3) -> str:
    """The first few, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def did_you_mean(value: object, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` when one of `allowed` is close to `value`, else an empty string."""
    close = difflib.get_close_matches(str(value), [str(name) for name in allowed], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def offer(value: object, allowed: Iterable[str], lists: str = "", words: str = "there are", more: str = "") -> str:
    """What `value` may have been meant for, first; then all that is `allowed`.

    Args:
        lists: for many names, the kind by which `argrpo list` shows them: where one is close the others are not named.
        words: before the names.
        more: behind them.
    """
    names = [str(name) for name in allowed]
    hint, listed = did_you_mean(value, names), f"{words} {', '.join(names)}{more}"
    if not hint:
        return f"; {listed}"
    return f"{hint} (`argrpo list {lists}` names all)" if lists else f"{hint} {listed[0].upper()}{listed[1:]}"
