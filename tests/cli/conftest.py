"""Running the command line inside the test process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from argrpo_cli.cli.app import run


@pytest.fixture
def fails(capsys) -> Callable[..., str]:
    """Run a command that must end with exit code 2 and one line on standard error; returns the line."""

    def fails(*arguments: object) -> str:
        capsys.readouterr()
        assert run([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("argrpo: error: ") and captured.err.count("\n") == 1, captured.err
        return captured.err

    return fails
