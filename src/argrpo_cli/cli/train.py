"""`argrpo train`: GRPO from a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from argrpo_cli.errors import UserError

if TYPE_CHECKING:
    from argrpo_cli.recipe import Recipe

# What may change when a run is continued: how long, what is watched, what is kept. Anything else is another run.
CHANGEABLE = ("grpo.steps", "grpo.time_limit_minutes", "guards.", "logging.")


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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the resolved recipe, then stop.")] = False,
) -> None:
    """Fine-tune a policy by GRPO as a recipe says."""
    from argrpo_cli.recipe import dump_recipe, load_recipe

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
        _check_names(loaded)
        sys.stdout.write(dump_recipe(loaded))
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
            keys = ", ".join(key + "*" if key.endswith(".") else key for key in CHANGEABLE)
            raise UserError(f"--set {text}: a resumed run keeps its recipe; only {keys} can change")


def _check_names(recipe: Recipe) -> None:
    """What a recipe names must exist; everything else about it has been checked when it was read."""
    from argrpo_cli.grpo.prompts import run_conditions
    from argrpo_cli.policy.policy import choose_trainable, load_policy
    from argrpo_cli.rewards import load_rewards

    policy = load_policy(recipe.policy.checkpoint)
    choose_trainable(policy.model, recipe.policy.trainable)
    options = {term.name: term.options for term in recipe.rewards.terms}
    load_rewards(list(options), options=options).check(run_conditions(recipe, policy))
