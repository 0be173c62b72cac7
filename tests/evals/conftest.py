"""Fixtures of the evaluations' tests."""

from __future__ import annotations

import pytest

from argrpo_cli.policy.llamagen.policy import LlamaGen
from tests.captioned import as_they_are, replayed, save_captioned_policy


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What is kept in the user's cache is kept elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def policy_of_scenes(tmp_path_factory):
    """A policy of captions that has learnt nothing, and draws real scenes in its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaGen, "sample", replayed)
        patch.setattr(LlamaGen, "encode", as_they_are)
        yield str(save_captioned_policy(tmp_path_factory.mktemp("captioned") / "mine"))
