"""`argrpo train`: GRPO from a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from argrpo_cli.errors import UserError

if TYPE_CHECKING:
    from argrpo_cli.recipe import Recipe

# What may change when a run is continued: how long, and what is kept. Anything else would be another run.
CHANGEABLE = ("grpo.steps", "grpo.time_limit_minutes", "logging.")


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="A recipe file, or a bundled recipe such as nano/c2i.",
            show_default=False,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. grpo.beta=0; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run directory.  [default: runs/<recipe name>]")] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN_DIR", help="Continue an interrupted run.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check, print the plan (stderr) and the resolved recipe (stdout), then stop."),
    ] = False,
) -> None:
    """Fine-tune a policy by GRPO as a recipe says."""
    from argrpo_cli.recipe import load_recipe

    if resume is not None:
        if recipe is not None or out is not None:
            raise UserError("--resume takes everything from the run directory; leave out the recipe and --out")
        if not (resume / "recipe.yaml").is_file():
            raise UserError(f"cannot resume {resume}: it is no run directory (it has no recipe.yaml)")
        _check_resume_overrides(set_ or [])
        loaded, run_dir = load_recipe(resume / "recipe.yaml", set_ or ()), resume
        if loaded.grpo.schedule != "constant" and any(text.startswith("grpo.steps") for text in set_ or []):
            raise UserError(
                f"--set grpo.steps: the {loaded.grpo.schedule} learning-rate schedule of this run depends on it"
            )
    elif recipe is None:
        raise UserError("train needs a recipe, for instance `argrpo train nano/c2i`, or --resume RUN_DIR")
    else:
        loaded = load_recipe(recipe, set_ or ())
        run_dir = out if out is not None else loaded.run_dir
    if dry_run:
        _dry_run(loaded, processes=1)
        return

    from argrpo_cli.grpo.train import run_training

    result = run_training(loaded, run_dir, resume=resume is not None)
    print(f"before and after   {result / 'before_after.png'}")
    print(f"curves             {result / 'curves.png'}")
    print(f"trained policy     {result / 'policy'}")
    print(f"use it             argrpo sample --policy {result} --out images")


def _check_resume_overrides(overrides: list[str]) -> None:
    for text in overrides:
        if not text.startswith(CHANGEABLE):
            raise UserError(f"--set {text}: a resumed run keeps its recipe; only {', '.join(CHANGEABLE)}* can change")


def _dry_run(recipe: Recipe, processes: int) -> None:
    """The plan for people on standard error, the resolved recipe for a file on standard output."""
    from rich.console import Console

    from argrpo_cli.grpo.plan import plan
    from argrpo_cli.grpo.plan_view import show_plan
    from argrpo_cli.recipe import dump_recipe

    planned = plan(recipe, processes)
    show_plan(planned, Console(file=sys.stderr, highlight=False))
    sys.stdout.write(dump_recipe(recipe))
