"""What README shows is what its commands print (docs/show.py)."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from argrpo_cli.cli.app import run
from tests.together import forked

ROOT = Path(__file__).parents[1]
SHOW = str(ROOT / "docs" / "show.py")


def show(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SHOW, *map(str, arguments)], capture_output=True, text=True)


def test_readme_shows_what_its_commands_print(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import show as script

    def forked_from_here(command: str, folder: Path) -> str:
        """As `script.run`, where the libraries are loaded already."""
        program, *arguments = shlex.split(command.removeprefix("$ "))
        assert program == "argrpo"
        monkeypatch.chdir(folder)
        done = forked(partial(run, arguments), tmp_path / arguments[0], processes=1)
        assert done.codes == [0], done.err
        return done.err + done.out

    monkeypatch.setattr(script, "run", forked_from_here)
    monkeypatch.setattr("sys.argv", ["show", "--check", "README.md", "--folder", str(tmp_path / "folder")])
    for name, value in (("COLUMNS", script.WIDTH), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 0, capsys.readouterr().err


def test_another_output_is_noticed_and_made(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("""<!-- show: keep=1,-1 -->

```console
$ printf 'a 1\\nb 2\\nc 3\\n'
a 7
...
d 8
```
""")
    assert show("--check", page, "--folder", tmp_path).returncode == 1
    assert show(page, "--folder", tmp_path).returncode == 0
    assert "a 1\n...\nc 3\n```" in page.read_text()
    page.write_text(page.read_text().replace("a 1", "a 5"))  # digits differ from machine to machine
    assert show("--check", page, "--folder", tmp_path).returncode == 0


def test_readme_is_short_and_its_links_lead_somewhere():
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170
