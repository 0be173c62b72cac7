"""What a policy of classes can be asked for, and ImageNet's names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from argrpo_cli.system.errors import UserError, did_you_mean
from argrpo_cli.system.files import read_text


def class_id(request: str | int, names: Sequence[str]) -> int:
    """The id of a class that is asked for by its id (a number, also written as text) or one of its names.

    Raises:
        UserError: there is no such class, or several.
    """
    if isinstance(request, str):
        # ImageNet lists synonyms, and some stand for two classes: "crane" is a bird and a machine.
        exact = [index for index, name in enumerate(names) if name == request]
        matches = exact or [index for index, name in enumerate(names) if request in name.split(", ")]
        if len(matches) > 1:
            raise UserError(f"{request!r} names the classes {' and '.join(map(str, matches))}; give the id")
        if matches:
            return matches[0]
    if isinstance(request, int) or request.strip().isdecimal():
        number = int(request) if len(str(request)) < 20 else len(names)  # Python reads no more than 4,300 digits
        if 0 <= number < len(names):
            return number
        raise UserError(f"no class {str(request)[:20]}: this policy has the ids 0 to {len(names) - 1}")
    hint = did_you_mean(request, names)
    if not hint and len(names) <= 40:
        hint = f"; the classes are {', '.join(names)}"
    raise UserError(f"no class {request!r} among this policy's {len(names)} classes{hint}")


def class_names(count: int) -> list[str]:
    """ImageNet's names as the published code says them, all synonyms: "tench, Tinca tinca"."""
    if count != 1000:
        return [str(index) for index in range(count)]
    lemmas = dict(line.split("\t") for line in _of_timm("imagenet_synset_to_lemma.txt"))
    return [lemmas[wnid] for wnid in class_wnids()]


@cache
def class_wnids() -> list[str]:
    """ImageNet's thousand WordNet ids, sorted: the place of each is its class id."""
    return _of_timm("imagenet_synsets.txt")


def _of_timm(file: str) -> list[str]:
    """Lines of timm's data about ImageNet, read without its code, which needs torch."""
    (timm,) = find_spec("timm").submodule_search_locations
    return read_text(Path(timm) / "data" / "_info" / file).splitlines()
