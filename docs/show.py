"""Makes every output that README and docs show, from the very commands that stand beside it.

    python docs/show.py                 the commands that take seconds, in README.md and docs/*.md
    python docs/show.py --minutes       those that train or measure for minutes, too (about twenty on two cores)
    python docs/show.py --check         change nothing; exit 1 where an output is not what its command says

A block of the language `console` belongs to this script: a line that begins with `$ ` is run, and what it prints is
what follows. A comment on the line before may say more:

    <!-- show: minutes -->                         only with --minutes
    <!-- show: keep=1-3,-2 -->                     of the output, these lines; the rest is an ellipsis
    <!-- show: picture=docs/samples.png:images/grid.png -->   then copy this picture

All commands run in one scratch folder, as a reader would type them one after the other. Rates and times differ from run
to run, other numbers by rounding from machine to machine; --check compares the words and the layout, without digits.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(?:^<!-- show: (?P<said>[^\n]*?) -->\n+)?^```console\n(?P<body>.*?)^```$", re.M | re.S)
WIDTH = "100"


@dataclass
class Directions:
    """What the comment before a block says."""

    minutes: bool = False
    keep: str = ""
    pictures: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def read(cls, text: str) -> Directions:
        said = cls()
        for word in text.split():
            if word == "minutes":
                said.minutes = True
            elif word.startswith("keep="):
                said.keep = word.removeprefix("keep=")
            elif word.startswith("picture="):
                target, _, source = word.removeprefix("picture=").partition(":")
                said.pictures.append((target, source))
            else:
                raise SystemExit(f"show: {word!r} is no direction")
        return said


def commands_of(body: str) -> list[str]:
    """The commands of a block; a line that ends with a backslash goes on."""
    commands: list[str] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            commands.append(line)
        elif commands and commands[-1].endswith("\\") and not commands[-1].endswith("\\\\"):
            commands[-1] += "\n" + line
    return commands


def run(command: str, folder: Path) -> str:
    """What a shell prints for a command, both streams together; a command that fails ends the script."""
    bin_folder = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "COLUMNS": WIDTH,
        "NO_COLOR": "1",
        "PYTHONPATH": str(ROOT / "src"),
    }
    line = command.removeprefix("$ ")
    print(f"  $ {line}", file=sys.stderr, flush=True)
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail\n{line}"], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"show: exit {done.returncode} of: {line}\n{done.stdout}{done.stderr}")
    return done.stderr + done.stdout


def chosen(output: str, keep: str) -> str:
    """The lines of an output that `keep` names, counted from 1 or, with a minus, from the end."""
    lines = [line.rstrip() for line in output.splitlines()]
    if not keep:
        return "".join(f"{line}\n" for line in lines)
    numbers: set[int] = set()
    for part in keep.split(","):
        first, last = re.fullmatch(r"(-?\d+)(?:-(\d+))?", part).groups()
        start = int(first) - 1 if int(first) > 0 else len(lines) + int(first)
        numbers |= set(range(max(start, 0), int(last) if last else (start + 1 if int(first) > 0 else len(lines))))
    text, before = "", -1
    for number in sorted(one for one in numbers if one < len(lines)):
        text += ("...\n" if number > before + 1 else "") + lines[number] + "\n"
        before = number
    return text + ("...\n" if before < len(lines) - 1 else "")


def shown(match: re.Match[str], folder: Path, minutes: bool, pictures: bool) -> str:
    """A block with what its commands print today."""
    said = Directions.read(match["said"] or "")
    if said.minutes and not minutes:
        return match[0]
    body = "".join(f"{one}\n{chosen(run(one, folder), said.keep)}" for one in commands_of(match["body"]))
    for target, source in said.pictures if pictures else ():
        shutil.copyfile(folder / source, ROOT / target)
    return match[0].replace(match["body"], body)


def layout(text: str) -> str:
    """A page without its digits, blanks and rules as one, equal lines (of progress) once: what must not differ."""
    plain = re.sub(r"[─━]+", "─", re.sub(r" +", " ", re.sub(r"[-+]?\d[\d.,:]*", "#", text)))
    return re.sub(r"^(.+\n)\1+", r"\1", plain, flags=re.M)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make, or check, the outputs that README and docs show.")
    parser.add_argument("pages", nargs="*", default=PAGES, help="by default all of them")
    parser.add_argument("--minutes", action="store_true", help="run the commands that take minutes, too")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where an output differs")
    parser.add_argument("--folder", type=Path, help="where the commands run (default: a new scratch folder)")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="argrpo-show-"))
    folder.mkdir(parents=True, exist_ok=True)
    different = []
    for page in args.pages:
        path = ROOT / page
        before = path.read_text(encoding="utf-8")
        after = BLOCK.sub(lambda match: shown(match, folder, args.minutes, not args.check), before)
        if args.check and layout(after) != layout(before):
            different.append(page)
            print(f"show: {page} does not show what its commands print", file=sys.stderr)
        elif not args.check and after != before:
            path.write_text(after, encoding="utf-8")
            print(f"show: {page} written", file=sys.stderr)
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
