"""Policies: `load_policy` opens one by name or path, and `Policy` says what can be done with it."""

from argrpo_cli.policy.open import load_policy
from argrpo_cli.policy.protocol import Policy

__all__ = ["Policy", "load_policy"]
