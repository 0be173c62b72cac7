"""What is installed beside the package: each version that safety rests on is asked for, and is here."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ASKED = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["dependencies"]
LEAST = {
    "torch": (2, 6),  # files of weights are read without running what is in them
    "filelock": (3, 30),  # a lock is held by one process alone
    "pillow": (12, 1, 1),  # no damaged picture writes beyond its memory
    "numpy": (1, 24),  # headers of bounded length
    "datasets": (4,),  # no code of a data set is run
    "safetensors": (0, 4),
    "huggingface_hub": (1,),
    "jinja2": (3, 1, 6),
    "pyyaml": (6,),
    "pydantic": (2, 10),
}


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"[\d.]*\d", text)[0].split("."))


@pytest.mark.parametrize("name", LEAST)
def test_a_version_that_is_safe_is_asked_for_and_installed(name: str) -> None:
    (asked,) = [text for text in ASKED if re.match(r"[\w-]+", text)[0] == name]
    assert numbers(asked.partition(">=")[2]) >= LEAST[name]
    assert numbers(version(name)) >= numbers(asked.partition(">=")[2])


def test_no_package_is_asked_for_twice() -> None:
    names = [re.match(r"[\w-]+", text)[0] for text in ASKED]
    assert len(set(names)) == len(names)
