"""`argrpo train`: GRPO, or another method, from a recipe."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from argrpo_cli.cli.options import command, tell
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.processes import again, notice, say

if TYPE_CHECKING:
    from argrpo_cli.recipe import Recipe

PILOT_MINUTES = 5.0


@command(tells=(), least={"processes": 1, "steps": 1})
def train(
    recipe: str | None = None,
    set_: list[str] | None = None,
    steps: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    dry_run: bool = False,
    pilot: bool = False,
    minutes: float | None = None,
    processes: int | None = None,
    accelerate_config: str | None = None,
) -> None:
    """Fine-tune a policy as a recipe says: by GRPO, by distilling its guidance into it, or from real images.

    `--processes 8` starts accelerate's launcher; `accelerate launch -m argrpo_cli train RECIPE` works as well.

    Options:
        [RECIPE]: A recipe file, or a bundled recipe such as nano/c2i.
        --set KEY=VALUE: Override a recipe key, e.g. grpo.beta=0; repeatable.
        --steps NUMBER: Updates; as --set grpo.steps=NUMBER, or in a recipe of another method of its section.
        --lr: Learning rate of the same section.
        --seed: Of what is drawn, in which order; as --set seed=.
        --device: auto, cpu, cuda, cuda:1, mps; as --set policy.device=.
        --out: Run directory.  [default: runs/<recipe name>]
        --resume RUN_DIR: Continue an interrupted run.
        --dry-run: Check, print the plan (stderr) and the resolved recipe (stdout), then stop. Only a wrong recipe is an
            error; what the machine lacks is listed.
        --pilot: Measure for some minutes, without changing a weight, the noise of the gradient, the spread of rewards,
            speed and memory, and write a recipe with the batch size, learning rate and beta that follow, to pilot.yaml
            in --out.  [default: runs/<recipe name>-pilot]
        --minutes: How long a pilot measures.  [default: 5]
        --processes: Train with several processes of this machine, a GPU each.  [one]
        --accelerate-config NAME|FILE: How they share the work: ddp, fsdp2, zero2, zero3, or a file of `accelerate
            config`.  [default: ddp]
    """
    from argrpo_cli.policy.folder import check_weights_at_hand
    from argrpo_cli.recipe import dump_recipe, load_recipe
    from argrpo_cli.runs.run import clear_for_pilot, refuse_edited, refuse_used
    from argrpo_cli.system.files import check_writable
    from argrpo_cli.training.launch import check_launch
    from argrpo_cli.training.shards import check_there

    set_ = set_ or []
    options = {"steps": steps, "lr": lr, "seed": seed, "device": device}
    options = {name: value for name, value in options.items() if value is not None}
    _check_pilot(pilot, minutes, resume, dry_run)
    if resume is not None:
        if recipe is not None or out is not None:
            raise UserError("--resume takes everything from the run directory; leave out the recipe and --out")
        if not (resume / "recipe.yaml").is_file():
            raise UserError(
                f"cannot resume {resume}: it is no run directory (it has no recipe.yaml); "
                f"start with: argrpo train RECIPE --out {resume}"
            )
        loaded, run_dir = load_recipe(resume / "recipe.yaml", set_, options), resume
        refuse_edited(resume, loaded)
    elif recipe is None:
        raise UserError("train needs a recipe, for instance `argrpo train nano/c2i`, or --resume RUN_DIR")
    else:
        loaded = load_recipe(recipe, set_, options)
        _tell_whose(loaded, options)
        run_dir = out if out is not None else loaded.run_dir
        _check_names(loaded)
        if pilot:
            if loaded.method != "grpo":
                raise UserError(f"--pilot: measures GRPO, and method of this recipe is {loaded.method}")
            run_dir = out if out is not None else run_dir.with_name(f"{run_dir.name}-pilot")
            if "RANK" not in os.environ:
                clear_for_pilot(run_dir)
        else:
            refuse_used(run_dir)
            check_writable(run_dir)
    check_launch(processes, loaded.policy.device, accelerate_config)
    if not dry_run:  # which lists what is missing
        check_there(loaded)
    notice(f"loading {loaded.policy.checkpoint} ...")
    if dry_run:
        # The plan for people on standard error, the resolved recipe for a file on standard output.
        from rich.console import Console

        from argrpo_cli.training.plan import plan, show_plan

        for one in loaded.stages:
            show_plan(plan(one, processes or 1, accelerate_config or "ddp"), Console(file=sys.stderr, highlight=False))
        _tell_sampling(loaded)
        sys.stdout.write(dump_recipe(loaded))
        return
    check_weights_at_hand(loaded.policy.checkpoint)
    _check_supplies(loaded)
    if processes is not None and processes > 1:
        what = [str(recipe), "--out", str(run_dir)] if resume is None else ["--resume", str(resume)]
        line = ["train", *what, *(f"--set={text}" for text in set_)]
        line += [f"--{name}={value}" for name, value in options.items()]
        line += ["--pilot", f"--minutes={minutes or PILOT_MINUTES}"] if pilot else []
        return _together(line, loaded, processes, accelerate_config or "ddp")

    if resume is None:
        _tell_sampling(loaded)
    if pilot:
        from argrpo_cli.recipe import find_recipe
        from argrpo_cli.training.pilot import run_pilot

        run_pilot(loaded, find_recipe(recipe), run_dir, minutes or PILOT_MINUTES)
        return

    from argrpo_cli.training.train import run_training

    result = run_training(loaded, run_dir, resume=resume is not None)
    if int(os.environ.get("RANK", "0")):
        return  # of several processes the first one reports
    tell(f"before and after   {result / 'before_after.png'}")
    tell(f"curves             {result / 'curves.png'}")
    tell(f"report             {result / 'report.html'}")
    tell(f"trained policy     {result / 'policy'}")
    if loaded.start is not None:
        tell(f"its start          {result / 'start'}")
    if (result / "policy_ema").is_dir():
        tell(f"running mean       {result / 'policy_ema'}")
    tell(f"use it             {again('sample', '--policy', result, '--out', _unused('images'))}")


def _unused(name: str) -> str:
    """A folder that is not there yet: this name, or one with a number."""
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    return next(one for one in names if not Path(one).exists())


def _check_pilot(pilot: bool, minutes: float | None, resume: Path | None, dry_run: bool) -> None:
    """Refuse options that say nothing together."""
    if minutes is not None and not pilot:
        raise UserError(f"--minutes {minutes:g}: of a pilot; give --pilot as well, or --set grpo.time_limit_minutes")
    if minutes is not None and not 0 < minutes < float("inf"):
        raise UserError(f"--minutes {minutes:g}: must be above 0")
    if pilot and resume is not None:
        raise UserError("--pilot: measures a recipe before its run, and --resume continues a run; give one of them")
    if pilot and dry_run:
        raise UserError("--pilot: measures for some minutes, and --dry-run computes nothing; give one of them")


def _check_names(recipe: Recipe) -> None:
    """Refuse before torch is loaded a policy, rewards, their options and classes that there are not."""
    from argrpo_cli.policy.classes import class_id
    from argrpo_cli.policy.folder import glance
    from argrpo_cli.rewards import check_options
    from argrpo_cli.training.conditions import check_source

    for term in (term for one in recipe.stages if one.scored for term in one.rewards.terms):
        check_options(term.name, term.options)
    section, seen = recipe.conditions, glance(recipe.policy.checkpoint)
    if seen is not None:
        check_source(section, seen.reads, recipe.policy.checkpoint)
        for name in (*(section.classes if section.classes != "all" else ()), *section.weights):
            class_id(name, seen.names)


def _check_supplies(recipe: Recipe) -> None:
    """Refuse before torch is loaded, and a policy fetched, a reward that lacks what it needs."""
    from argrpo_cli.rewards import check_weights

    for term in (term for one in recipe.stages if one.scored for term in one.rewards.terms):
        check_weights(term.name, term.options)


def _tell_whose(recipe: Recipe, options: dict[str, Any]) -> None:
    """Say that --steps and --lr leave a start as it is."""
    own = [f"--{name}" for name in ("steps", "lr") if name in options]
    if recipe.start is not None and own:
        method, optim = recipe.start.method, recipe.start.optim
        say(
            f"{' and '.join(own)}: of {recipe.method}; the start before it keeps its {optim.steps} updates at "
            f"{optim.learning_rate:g} (--set start.{method}.steps=N, or --set start=null to leave it out)"
        )


def _tell_sampling(recipe: Recipe) -> None:
    """Say where rollouts are drawn as the policy is meant to be sampled, and warn of more guidance than that."""
    from argrpo_cli.policy.folder import choose_sampling, glance

    if recipe.method != "grpo":
        return
    seen, rollouts = glance(recipe.policy.checkpoint), recipe.model_dump()["sampling"]
    name, own = recipe.policy.checkpoint, seen.sampling if seen is not None else {}
    if recipe.start is not None and recipe.start.unguided:
        name, own = "the policy of the start", {"cfg_scale": 1.0}
    choose_sampling(name, own, {key: value for key, value in rollouts.items() if own.get(key) != value})


def _together(arguments: list[str], recipe: Recipe, processes: int, config: str) -> None:
    """The command by several processes; what can be checked cheaply is checked once, before they start."""
    from argrpo_cli.training.launch import check_processes, images_per_process, launch

    cpu = check_processes(processes, recipe.policy.device, config)
    for one in recipe.stages:
        images_per_process(one, processes)
    code = launch(arguments, processes, config, cpu)
    if code:
        raise SystemExit(code)
