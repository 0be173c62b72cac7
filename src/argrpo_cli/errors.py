"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input or a bad machine state, told in one line: the thing, its value and the mend.

    The command line prints it as `argrpo: error: …` and exits with code 2.
    """


def did_you_mean(value: object, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` when one of `allowed` is close to `value`, else an empty string."""
    close = difflib.get_close_matches(str(value), [str(name) for name in allowed], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
