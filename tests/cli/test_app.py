"""The command as a whole: help, versions, exit codes, one-line errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import argrpo_cli
from argrpo_cli.cli.app import _terminate, app, run
from argrpo_cli.system.processes import again

COMMANDS = ("sample", "score", "train", "eval", "entropy", "list", "push")
HEAVY = (
    "torch",
    "transformers",
    "trl",
    "open_clip",
    "numpy",
    "PIL",
    "matplotlib",
    "pydantic",
    "yaml",
    "rich",
)


def test_help_lists_the_commands_and_is_what_no_argument_shows(capsys):
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in result.output
    assert run([]) == 0
    assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0 and "Usage:" in result.output


def test_the_version_is_the_package_s(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"argrpo {argrpo_cli.__version__}\n"


def test_help_in_a_fresh_process_imports_no_heavy_library():
    code = (
        "import sys\n"
        "from argrpo_cli.cli.app import run\n"
        "assert run(['--help']) == 0\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_drawing_loads_nothing_that_trains(tmp_path):
    code = (
        "import sys\n"
        "from argrpo_cli.cli.app import run\n"
        "assert run(['sample', '--class', 'dog', '--n', '1', '--device', 'cpu', '--out', sys.argv[1]]) == 0\n"
        "heavy = {'transformers', 'torch._dynamo', 'torch._inductor', 'sympy', 'scipy', 'torchvision', 'pandas'}\n"
        "heavy &= sys.modules.keys()\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "grid.png").is_file()


def test_python_dash_m_is_the_command():
    result = subprocess.run([sys.executable, "-m", "argrpo_cli", "train", "nowhere"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("argrpo: error: no recipe 'nowhere'") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smaple"], "smaple"),
        (["sample"], "--out"),
        (["sample", "--out", "x", "--n", "0"], "--n 0: "),
        (["sample", "--out", "x", "--n", "many"], "--n many: "),
        (["sample", "--out", "x", "--dtype", "float8"], "--dtype float8: "),
        (["sample", "--out", "x", "--cfg-scale=0.5"], "--cfg-scale 0.5: "),
        (["sample", "--out", "x", "--temprature", "1"], "--temprature"),
        (["sample", "--out", "x", "--cfg-scale", "nan"], "--cfg-scale nan: "),
        (["sample", "--out", "x", "--top-p", "0"], "--top-p 0: must be above 0, at most 1"),
        (["sample", "--out", "x", "--seed", str(2**32)], "the last seed, 4294967303, must be below 2**32"),
        (["score"], "IMAGES"),
        (["score", "x", "--rewards", ","], "--rewards is empty"),
        (["score", "x", "--rewards", "nano-clip,nano-clip"], "names 'nano-clip' twice"),
        (["score", "no-such-folder"], "no folder no-such-folder"),
        (["train"], "train needs a recipe"),
        (["train", "nano/c2i", "--set", "grpo.bta=1"], "unknown key 'grpo.bta'"),
        (["train", "nano/c2i", "--resume", "x"], "leave out the recipe and --out"),
        (["train", "--resume", "x"], "cannot resume x: it is no run directory"),
        (["eval"], "BENCHMARK"),
        (["eval", "geneval", "--policy", "nano-c2i"], "nano-c2i draws classes"),
        (["eval", "nanno"], "No such command 'nanno'. Did you mean 'nano'?"),
        (["entropy", "--cfg-scale", "inf"], "--cfg-scale inf: must be a number, not infinite"),
        (["eval", "nano", "--temperature", "nan"], "--temperature nan: must be"),
        (["entropy", "--split", "train"], "no split 'train'; there is val"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(arguments, message, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message.lower() in fails(*arguments).lower()
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_the_resolved_recipe_and_writes_nothing(capsys, tmp_path, monkeypatch):
    from argrpo_cli.recipe import load_recipe

    monkeypatch.chdir(tmp_path)
    assert run(["train", "nano/c2i", "--set", "grpo.beta=0.5", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "r.yaml").write_text(printed)
    assert load_recipe(tmp_path / "r.yaml") == load_recipe("nano/c2i", ["grpo.beta=0.5"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rewards.terms=[{name: nano-clop}]", "'nano-clop' is unknown; did you mean 'nano-clip'"),
        ("policy.checkpoint=nano-c3i", "no policy 'nano-c3i'"),
    ],
)
def test_a_dry_run_checks_the_names_in_the_recipe(override, message, fails):
    assert message in fails("train", "nano/c2i", "--set", override, "--dry-run")


def test_a_resumed_run_keeps_its_recipe(fails, capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    line = fails("train", "--resume", tmp_path, "--set", "grpo.beta=1", "--dry-run")
    assert "a resumed run keeps its recipe" in line
    assert run(["train", "--resume", str(tmp_path), "--set", "grpo.steps=500", "--dry-run"]) == 0
    assert "steps: 500" in capsys.readouterr().out


def test_ctrl_c_is_one_line_and_code_130(capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("argrpo_cli.recipe.load_recipe", interrupted)
    assert run(["train", "nano/c2i"]) == 130
    assert capsys.readouterr().err == "argrpo: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "goes_on"),
    [
        (["score", "x"], "; the same command goes on where it stopped"),
        (["sample", "--out", "x", "--overwrite"], "; the same command without --overwrite goes on where it stopped"),
        (["eval", "geneval"], "; the same command goes on where it stopped"),
        (["eval", "nano"], ""),
    ],
)
def test_an_interrupted_command_says_whether_it_goes_on(arguments, goes_on, capsys, monkeypatch, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    def terminated(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("argrpo_cli.system.processes.resolve_device", interrupted)
    monkeypatch.setattr("argrpo_cli.policy.folder.find_policy", interrupted)
    monkeypatch.setattr("argrpo_cli.score.find_items", interrupted)
    assert run(arguments) == 130
    assert capsys.readouterr().err == f"argrpo: interrupted{goes_on}\n"
    before = signal.signal(signal.SIGTERM, _terminate)  # as `main` does
    try:
        monkeypatch.setattr("argrpo_cli.policy.folder.find_policy", terminated)
        monkeypatch.setattr("argrpo_cli.score.find_items", terminated)
        assert run(arguments) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == f"argrpo: terminated{goes_on}\n"


def test_a_hint_is_a_command_that_works_as_typed(monkeypatch, tmp_path):
    """After `make demo` the command is none of the shell's."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    script = tmp_path / "venv" / "bin" / "argrpo"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(script), "train"])
    monkeypatch.setenv("PATH", "/bin")
    assert again("train", "--resume", tmp_path / "my run") == f"venv/bin/argrpo train --resume '{tmp_path}/my run'"
    monkeypatch.setenv("PATH", str(script.parent))
    assert again("sample") == "argrpo sample"
    monkeypatch.setattr("sys.argv", ["/x/argrpo_cli/__main__.py"])
    monkeypatch.setattr("sys.executable", str(tmp_path / "venv" / "bin" / "python"))
    assert again("sample") == "venv/bin/python -m argrpo_cli sample"
    monkeypatch.setattr("sys.argv", ["/x/pytest"])
    assert again("sample") == "argrpo sample"


def test_an_os_error_is_told_in_the_system_s_words(fails, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "some/file")

    monkeypatch.setattr("argrpo_cli.recipe.load_recipe", full)
    assert "some/file: No space left on device" in fails("train", "nano/c2i")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("argrpo_cli.recipe.load_recipe", broken)
    with pytest.raises(ZeroDivisionError):
        run(["train", "nano/c2i"])


def test_completion_can_be_printed():
    result = CliRunner().invoke(app, ["--show-completion", "bash"])
    assert result.exit_code in (0, 1, 2)  # it depends on the shell the tests run in; it must not crash
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_a_message_is_never_longer_than_can_be_read(capsys):
    assert run(["score", "x" * 9000 + "z", "--rewards", "nano-quality"]) == 2
    line = capsys.readouterr().err
    assert len(line) < 2000 and line.startswith("argrpo: error: ") and line.count("\n") == 1 and "xz" in line
