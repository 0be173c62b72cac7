"""What decides the scores of a reward: kept ones are used again only where the same would come out."""

from __future__ import annotations

import importlib
import os
import sys

import pytest

from argrpo_cli.rewards import identity, load_rewards
from argrpo_cli.rewards.custom import find_function
from argrpo_cli.system.files import WEIGHTS


def test_what_changes_no_score_is_left_out():
    asked = {"judge-fake": {"url": "http://a/v1", "timeout": 3.0, "model": "m", "attempts": 2}}
    assert identity(["judge-fake"], asked)["judge-fake"]["options"] == {"model": "m"}


def test_a_file_that_an_option_names_counts_by_its_stamps(tmp_path):
    path = tmp_path / "weights.pt"
    options = {"maniqa": {"weights": str(path)}, "clip": {"model": str(tmp_path)}}
    path.write_text("1")
    before = identity(["maniqa", "clip"], options)
    assert identity(["maniqa", "clip"], options) == before
    os.utime(path, (1_000_000_000, 1_000_000_000))
    after = identity(["maniqa", "clip"], options)
    assert after["maniqa"] != before["maniqa"] and after["clip"] != before["clip"], "also inside a folder"


def test_the_networks_count_once_they_are_loaded(tmp_path):
    names = ["nano-quality", "nano-quality-t2i", "nano-geneval"]
    known = load_rewards(names).identity()
    hashes = [known[name].pop("weights") for name in names]
    assert len(set(hashes)) == 3 and all(hashes), "a part's network counts, too"
    assert known == identity(names)
    copied = {"geneval": {"detector": "nano", "weights": str(WEIGHTS / "nano-detector")}}
    assert load_rewards(["geneval"], options=copied).identity(copied)["geneval"]["weights"] == hashes[2]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes the module of a reward of one's own; as in a new process, it is read anew."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(body):
        (tmp_path / "reward_known.py").write_text(f"def reward(images, conditions):\n    return {body}\n")
        sys.modules.pop("reward_known", None)
        find_function.cache_clear()
        importlib.invalidate_caches()

    yield write
    sys.modules.pop("reward_known", None)
    find_function.cache_clear()


def test_code_of_ones_own_counts(module):
    name = "reward_known:reward"
    module("[1.0] * len(images)")
    first = load_rewards([name]).identity()[name]
    module("[1.0] * len(images)")
    assert load_rewards([name]).identity()[name] == first and first["weights"] is None
    module("[2.0] * len(images)")
    assert identity([name])[name]["code"] != first["code"] != identity(["clip"])["clip"]["code"]
