"""`argrpo entropy`."""

from __future__ import annotations

from typing import Annotated

import typer

from argrpo_cli.cli.options import PolicyOption
from argrpo_cli.errors import UserError


def entropy(
    policy: PolicyOption = "nano-c2i",
    split: Annotated[str, typer.Option("--split", help="Which images to measure on.")] = "val",
) -> None:
    """Policy entropy over a split (not in this version)."""
    raise UserError(
        "entropy is not in this version; `argrpo train` writes the entropy of each step to metrics.jsonl and curves.png"
    )
