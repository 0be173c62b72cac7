"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input or a bad machine state, told in one line: the thing, its value and the mend.

    The command line prints it as `argrpo: error: …` and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on a GPU or a CPU."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def did_you_mean(value: object, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` when one of `allowed` is close to `value`, else an empty string."""
    close = difflib.get_close_matches(str(value), [str(name) for name in allowed], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
