"""Commands on damaged files: they end well, or with exit code 2 and one line on standard error."""

from __future__ import annotations

import io
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from argrpo_cli.cli.app import run
from argrpo_cli.recipe import dump_recipe, load_recipe
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_jsonl
from tests.fuzz import files, policies, recipes
from tests.fuzz.mutate import Damage, damaged, damaged_file


class Answer(NamedTuple):
    """Exit code, and what was said on the two streams."""

    code: int
    out: str
    err: str


def answer(*arguments: object) -> Answer:
    """A command by the command line in this process; an exit code 2 comes with one error, and that is said last."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run([str(one) for one in arguments])
    lines = err.getvalue().splitlines()
    errors = [line for line in lines if line.startswith("argrpo: error: ")]
    assert errors == (lines[-1:] if code == 2 else []), f"exit code {code} with {len(errors)} errors"
    return Answer(code, out.getvalue(), err.getvalue())


def completed(*arguments: object) -> Answer:
    """The same of a command that is refused or does all that it should.

    Raises:
        UserError: it was refused.
    """
    said = answer(*arguments)
    if said.code == 2:
        assert not said.out, "a refused command says something on standard output"
        raise UserError(said.err.splitlines()[-1])
    assert said.code == 0, f"exit code {said.code}"
    return said


def seeds(folder: Path) -> dict:
    """Those of other kinds, each in a folder of its own."""
    made = {}
    for module in (recipes, policies, files):
        (folder / module.__name__).mkdir(exist_ok=True)
        made[module] = module.seeds(folder / module.__name__)
    return made


def case(seeds: dict, rng: Damage, folder: Path) -> str:
    """One of the commands."""
    return rng.choice((_dry_run, _sample, _score, _report))(seeds, rng, folder)


def _dry_run(seeds: dict, rng: Damage, folder: Path) -> str:
    path = folder / "mine.yaml"
    # Of what is whole all rewards must be at hand.
    text = rng.choice(seeds[recipes][:1] if rng.none else seeds[recipes][:1] + seeds[recipes][4:])
    path.write_bytes(recipes.mutant(text, rng))
    said = completed("train", path, "--dry-run")
    again = folder / "again.yaml"
    again.write_text(said.out, encoding="utf-8")
    assert dump_recipe(load_recipe(again)) == said.out, "the printed recipe is another"
    return "planned"


def _sample(seeds: dict, rng: Damage, folder: Path) -> str:
    path = Path(shutil.copytree(seeds[policies][0], folder / "policy"))
    damaged_file(rng.choice(sorted(path.rglob("*.json"))), rng)
    out = folder / "images"
    completed("sample", "--policy", path, "--class", "0", "--n", "2", "--out", out)
    rows = read_jsonl(out / "metadata.jsonl")
    assert len(rows) == 2 and all((out / row["file"]).is_file() for row in rows), "other images than are asked"
    return "drawn"


def _score(seeds: dict, rng: Damage, folder: Path) -> str:
    path = folder / "set.npz"
    path.write_bytes(damaged(seeds[files]["stored.npz"], rng))
    completed("score", path, "--rewards", "tests.fuzz.pictures:brightness")
    (name,) = read_jsonl(folder / "set-scores" / "scores.jsonl")[0]["scores"]
    scores = [row["scores"][name] for row in read_jsonl(folder / "set-scores" / "scores.jsonl")]
    means = files.PIXELS.mean((1, 2, 3))
    assert len(scores) == len(means) and max(abs(scores - means)) < 1e-3, "other scores than of what was saved"
    return "scored"


def _report(seeds: dict, rng: Damage, folder: Path) -> str:
    path = folder / "summary.json"
    path.write_bytes(seeds[files]["summary.json"])
    damaged_file(path, rng)
    completed("eval", "report", path, "--out", folder / "page.html")
    assert (folder / "page.html").is_file(), "no page"
    return "shown"
