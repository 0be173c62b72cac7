"""Moved to `networks/weights.py`."""

from argrpo_cli.networks.weights import fingerprint, load_pretrained, quiet_transformers, save_model

__all__ = ["fingerprint", "load_pretrained", "quiet_transformers", "save_model"]
