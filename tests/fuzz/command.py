"""Commands on damaged files: they end well, or with exit code 2 and one line on standard error."""

from __future__ import annotations

import io
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from argrpo_cli.cli.app import run
from argrpo_cli.recipe import dump_recipe, load_recipe
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_jsonl
from tests.fuzz import files, policies, recipes
from tests.fuzz.mutate import Damage, damaged, damaged_file


def command(arguments: list[str]) -> tuple[int, str]:
    """A command by the command line in this process: its exit code and all that it said.

    Raises:
        UserError: it was refused, in one line.
    """
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(arguments)
    *before, last = err.getvalue().splitlines() or [""]
    assert not any(line.startswith("argrpo: error:") for line in before), "two errors"
    if code == 2 and last.startswith("argrpo: error: ") and not out.getvalue():
        raise UserError(last)
    return code, out.getvalue() + err.getvalue()


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
    path.write_bytes(recipes.mutant(rng.choice(seeds[recipes][:1] + seeds[recipes][4:]), rng))
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(["train", str(path), "--dry-run"])
    if code == 2:
        assert not out.getvalue(), "a refused recipe is printed"
        raise UserError(err.getvalue().splitlines()[-1])
    again = folder / "again.yaml"
    again.write_text(out.getvalue(), encoding="utf-8")
    assert dump_recipe(load_recipe(again)) == out.getvalue(), "the printed recipe is another"
    return "planned"


def _sample(seeds: dict, rng: Damage, folder: Path) -> str:
    path = Path(shutil.copytree(seeds[policies][0], folder / "policy"))
    damaged_file(rng.choice(sorted(path.rglob("*.json"))), rng)
    out = folder / "images"
    code, said = command(["sample", "--policy", str(path), "--class", "0", "--n", "2", "--out", str(out)])
    assert code == 0, f"exit code {code}: {said[-200:]}"
    rows = read_jsonl(out / "metadata.jsonl")
    assert len(rows) == 2 and all((out / row["file"]).is_file() for row in rows), "other images than are asked"
    return "drawn"


def _score(seeds: dict, rng: Damage, folder: Path) -> str:
    path = folder / "set.npz"
    path.write_bytes(damaged(seeds[files]["stored.npz"], rng))
    code, said = command(["score", str(path), "--rewards", "tests.fuzz.pictures:brightness"])
    assert code == 0, f"exit code {code}: {said[-200:]}"
    (name,) = read_jsonl(folder / "set-scores" / "scores.jsonl")[0]["scores"]
    scores = [row["scores"][name] for row in read_jsonl(folder / "set-scores" / "scores.jsonl")]
    means = files.PIXELS.mean((1, 2, 3))
    assert len(scores) == len(means) and max(abs(scores - means)) < 1e-3, "other scores than of what was saved"
    return "scored"


def _report(seeds: dict, rng: Damage, folder: Path) -> str:
    path = folder / "summary.json"
    path.write_bytes(seeds[files]["summary.json"])
    damaged_file(path, rng)
    code, said = command(["eval", "report", str(path), "--out", str(folder / "page.html")])
    assert code == 0 and (folder / "page.html").is_file(), f"exit code {code}: {said[-200:]}"
    return "shown"
