"""What README shows is what its commands print (docs/show.py)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHOW = str(ROOT / "docs" / "show.py")


def show(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SHOW, *map(str, arguments)], capture_output=True, text=True)


def test_readme_shows_what_its_commands_print(tmp_path):
    checked = show("--check", "README.md", "--folder", tmp_path)
    assert checked.returncode == 0, checked.stderr


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
