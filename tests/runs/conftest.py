"""Fixtures of training that the tests of run directories need, too."""

from tests.training.conftest import policy_folder, quiet

__all__ = ["policy_folder", "quiet"]
