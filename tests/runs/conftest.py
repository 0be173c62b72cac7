"""Fixtures of training that the tests of run directories need, too."""

from tests.training.conftest import no_pages, pages, policy_folder, quiet

__all__ = ["no_pages", "pages", "policy_folder", "quiet"]
