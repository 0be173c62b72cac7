"""Moved to `networks/weights.py`."""

from argrpo_cli.networks.weights import fit_state, published_file, read_state

__all__ = ["fit_state", "published_file", "read_state"]
