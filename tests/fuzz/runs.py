"""Run folders with a damaged file: told of, or shown, taken up by `argrpo train --resume` and brought to their end."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from argrpo_cli.evals.entropy_results import subjects_of_run
from argrpo_cli.policy.folder import glance
from argrpo_cli.runs.checkpoints import MANIFEST, write_manifest
from argrpo_cli.runs.run import RunDirectory
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_jsonl
from argrpo_cli.training import run_training
from tests.fuzz.command import answer
from tests.fuzz.mutate import Damage, damaged_file
from tests.training.tiny import save_tiny_policy, tiny_recipe

STEPS = 2  # of the run that is damaged; it is taken up for one more
STATE = (".json", ".jsonl", ".yaml", ".pt", ".pth")
REWARD = "tests.fuzz.pictures:brightness"


def seeds(folder: Path) -> Path:
    """A run of two updates with a checkpoint of each."""
    run = folder / "run"
    if not run.is_dir():
        shutil.rmtree(folder / "made", ignore_errors=True)
        policy = save_tiny_policy(folder / "policy")
        recipe = tiny_recipe(policy, [REWARD], steps=STEPS, save_every=1, keep_checkpoints=2, grid_every=2)
        run_training(recipe, folder / "made", console=Console(file=io.StringIO()))
        (folder / "made").rename(run)
    return run


def case(seeds: Path, rng: Damage, folder: Path) -> str:
    """Glanced at, measured by steps and resumed, with its page and curves."""
    out = Path(shutil.copytree(seeds, folder / "run"))
    files = sorted(one for one in out.rglob("*") if one.is_file() and one.suffix in STATE)
    path = rng.choice([*files, *[out / "run.json", out / "metrics.jsonl", out / "recipe.yaml"] * 5])
    damaged_file(path, rng)
    sealed = (path.parent / MANIFEST).is_file() and path.is_file() and path.name != MANIFEST
    sealed = sealed and not rng.none and rng.random() < 0.7
    if sealed:
        write_manifest(path.parent)  # by whoever damaged it
    told = [_told(lambda: glance(out)), _told(lambda: subjects_of_run(out))]
    said = answer("train", "--resume", out, "--set", f"grpo.steps={STEPS + 1}")
    if said.code == 2:
        assert path.parent == out, "a run is lost that has another checkpoint"
        raise UserError(said.err.splitlines()[-1])
    steps = [row["step"] for row in read_jsonl(RunDirectory(out).metrics_file)]
    assert (out / "policy" / "policy.json").is_file(), "no trained policy"
    assert steps and steps[-1] == STEPS + 1 and steps == sorted(set(steps)), f"steps {steps}"
    return f"ended, {sum(map(bool, told))} refused before"


def _told(action: Callable[[], object]) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return ""
