"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input or a bad machine state, told in one line: the thing, its value and the mend.

    The command line prints it as `argrpo: error: …` and exits with code 2.
    """


@contextmanager
def exit_code(program: str) -> Iterator[None]:
    """Within this context of a program beside `argrpo` a UserError is a line on standard error and exit code 2."""
    try:
        yield
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


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
