"""Policies: LlamaGen, its image tokenizer, and sampling. `load_policy` opens one by name or path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argrpo_cli.policy.llamagen.policy import Policy, load_policy

__all__ = ["Policy", "load_policy"]


def __getattr__(name: str) -> Any:
    # The command line imports this package for its help texts; torch is loaded only when a policy is.
    if name in __all__:
        from argrpo_cli.policy.llamagen import policy

        return getattr(policy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
