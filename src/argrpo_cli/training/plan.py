"""What a recipe will do, found out without fetching or training anything, and said: `argrpo train RECIPE --dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from argrpo_cli.policy.llamagen.published import Outline, count, outline_policy
from argrpo_cli.policy.open import check_targets, choose_trainable
from argrpo_cli.rewards import REWARDS, check_options, check_reward, load_rewards, networks_of, reward_weights
from argrpo_cli.rewards.base import Needs
from argrpo_cli.system.files import HubFile, is_cached
from argrpo_cli.training.conditions import check_source, run_captions, run_conditions
from argrpo_cli.training.launch import images_per_process
from argrpo_cli.training.memory import PHASES, Part, estimate, total, trained_parameters
from argrpo_cli.training.streams import open_captions

if TYPE_CHECKING:
    from rich.console import Console

    from argrpo_cli.recipe import Recipe

CAPTION_FILES = (".txt", ".jsonl")
PRECISION = {"float32": "in float32", "bfloat16": "float32 weights, computed in bfloat16"}


@dataclass(frozen=True)
class Plan:
    """A run that could be.

    Attributes:
        share, micro: images that each device draws for an update, and passes through the model at a time.
        trained: parameters that the optimiser holds.
        draws: what is drawn, in words.
        weights, family: of the rewards, by name.
        needs: of the networks that are loaded for them, by name.
        memory: parts of the estimate for one device; `memory_there` are the bytes of this machine's GPU, if it has one.
        files: of the hub, and whether each is in the cache.
        packages: pip's names of those that are needed and not installed.
        supply: what the user has to bring.
    """

    recipe: Recipe
    outline: Outline
    processes: int
    share: int
    micro: int
    trained: int
    draws: str
    weights: dict[str, float]
    family: dict[str, str]
    needs: dict[str, Needs]
    memory: list[Part]
    memory_there: int | None
    files: dict[HubFile, bool]
    packages: list[str]
    supply: list[str]


def plan(recipe: Recipe, processes: int = 1) -> Plan:
    """Check all of a recipe that can be checked on the spot, and add up what it takes.

    Raises:
        UserError: the recipe cannot be trained as it is: an unknown name, an option that is none, parts of the policy
            that do not exist, images that cannot be shared by so many processes. What a machine merely lacks (files,
            packages, captions) is no error; the plan lists it.
    """
    share, micro = images_per_process(recipe.grpo, processes)
    outline = outline_policy(recipe.policy.checkpoint)
    choose_trainable(outline.policy, recipe.policy.trainable)
    if recipe.policy.lora is not None:
        check_targets(outline.policy, recipe.policy.lora.targets)
    trained = trained_parameters(outline.policy.model, recipe.policy.lora)
    options = {term.name: term.options for term in recipe.rewards.terms}
    device = "cpu" if recipe.policy.device == "cpu" else "cuda"
    networks, _ = networks_of(list(options), options)
    needs = {name: check_options(name, chosen).needs(chosen, device) for name, chosen in networks.items()}
    packages = {module: pip for one in needs.values() for module, pip in one.packages.items()}
    packages |= {name: name for name in recipe.logging.trackers} | ({"peft": "peft"} if recipe.policy.lora else {})
    family = {name: check_reward(name).family for name in options}
    draws, missing = _draws(recipe, outline)
    files = [*outline.files, *(file for one in needs.values() for file in one.files)]
    parts = estimate(
        recipe,
        outline,
        list({one.network: one for one in needs.values() if not one.server}.values()),
        share=share,
        micro=micro,
        processes=processes,
        device=device,
    )
    gpu = device != "cpu" and torch.cuda.is_available()
    return Plan(
        recipe=recipe,
        outline=outline,
        processes=processes,
        share=share,
        micro=micro,
        trained=trained,
        draws=draws,
        weights=reward_weights(recipe.rewards, family),
        family=family,
        needs=needs,
        memory=parts,
        memory_there=torch.cuda.get_device_properties(0).total_memory if gpu else None,
        files={file: is_cached(file) for file in dict.fromkeys(files)},
        packages=list(dict.fromkeys(pip for module, pip in packages.items() if find_spec(module) is None)),
        supply=[f"reward {name}: {one.missing}" for name, one in needs.items() if one.missing] + missing,
    )


def _draws(recipe: Recipe, outline: Outline) -> tuple[str, list[str]]:
    """What is drawn, in words, and what the user has to bring for it; checked as far as it is there."""
    section, policy = recipe.conditions, outline.policy
    check_source(section, policy.card.reads, recipe.policy.checkpoint)
    if policy.card.reads == "classes":
        conditions = run_conditions(recipe, policy)
        _check_bundled_rewards(recipe, conditions)
        return f"{len(conditions)} classes" + (" by weights" if section.weights else ""), []
    data = section.dataset
    if data is not None:
        how = "as a stream" if data.streaming else "downloaded first"
        if Path(data.name).expanduser().exists():
            open_captions(data)
        return f"captions in the column {data.column!r} of the data set {data.name} ({data.split}), {how}", []
    named = section.captions
    if isinstance(named, str) and Path(named).suffix in CAPTION_FILES and not Path(named).expanduser().is_file():
        say = f"{named} is missing: a file of captions, or name a data set (conditions.dataset)"
        return f"captions of {named}", [say]
    captions = run_captions(section)
    if policy.text_encoder is not None:  # of a published policy it is not here
        _check_bundled_rewards(recipe, policy.conditions(captions))
    return f"{len(captions)} captions" + (f" of {named}" if isinstance(named, str) else ""), []


def _check_bundled_rewards(recipe: Recipe, conditions: Sequence) -> None:
    """Whether the rewards that are at hand can be loaded and read the conditions."""
    terms = [term for term in recipe.rewards.terms if check_reward(term.name).steps_of is None]
    at_hand = {term.name: term.options for term in terms if check_reward(term.name).needs(term.options) == Needs()}
    load_rewards(list(at_hand), options=at_hand).check(conditions)


# --- in words, for a terminal or a log


def show_plan(plan: Plan, console: Console) -> None:
    """Print a plan: labels in one column, what they stand for in the other."""
    from rich.text import Text

    sections = _sections(plan)
    width = max(len(label) for label, _ in sections) + 2
    for label, lines in sections:
        for number, line in enumerate(lines):
            head = label if number == 0 else ""
            console.print(Text.assemble((head.ljust(width), "bold"), line), soft_wrap=True)


def _sections(plan: Plan) -> list[tuple[str, list[str]]]:
    recipe, outline, grpo = plan.recipe, plan.outline, plan.recipe.grpo
    model, tokens = count(outline.policy.model), outline.policy.card.tokens
    adapted = recipe.policy.lora is not None
    what = "all of them" if plan.trained == model else f"{_millions(plan.trained)} of adapters" if adapted else ""
    images = -(-grpo.steps // grpo.updates_per_batch) * grpo.batch_size
    minutes = grpo.time_limit_minutes
    limit = "" if minutes is None else f", or what {minutes:g} minutes allow"
    sections = [
        ("plan", [recipe.name + (f": {recipe.description}" if recipe.description else "")]),
        ("repeats", _published(recipe)),
        (
            "policy",
            [
                f"{recipe.policy.checkpoint}: {_millions(model)} parameters, {outline.policy.image_size} pixels, "
                f"{tokens} tokens an image",
                f"trained: {what or _millions(plan.trained)}, {PRECISION[recipe.policy.dtype]}",
            ],
        ),
        ("draws", [f"{plan.draws}, with guidance {recipe.sampling.cfg_scale:g}"]),
        ("update", _update(plan)),
        ("run", [f"{grpo.steps} updates, {images} images in all" + limit]),
        ("rewards", _rewards(plan)),
        ("memory", _memory(plan)),
        ("files", _files(plan)),
    ]
    lacking = [f"pip install {' '.join(plan.packages)}"] if plan.packages else []
    sections += [("missing", lacking), ("to supply", plan.supply)]
    if plan.packages or plan.supply:
        what = " and ".join(name for name, lines in (("missing", plan.packages), ("to supply", plan.supply)) if lines)
        sections.append(("so", [f"this run cannot start here yet; see {what}"]))
    return [(label, lines) for label, lines in sections if lines]


def _published(recipe: Recipe) -> list[str]:
    return [
        f"{one.table}, after {one.step} updates: "
        + ", ".join(
            f"{name} {base:g} -> {trained:g}"
            for name, base, trained in zip(one.measures, one.base, one.trained, strict=True)
        )
        for one in recipe.published
    ]


def _update(plan: Plan) -> list[str]:
    grpo = plan.recipe.grpo
    groups = grpo.batch_size // grpo.group_size
    lines = [f"{grpo.batch_size} images: {groups} groups of {grpo.group_size}"]
    each = plan.share / grpo.group_size
    devices = "1 device" if plan.processes == 1 else f"{plan.processes} devices"
    whose = f"{each:g} group{'' if each == 1 else 's'}"
    lines.append(f"{devices}: {plan.share} images ({whose}) each, {plan.micro} at a time in the training pass")
    if grpo.updates_per_batch > 1:
        lines.append(f"{grpo.updates_per_batch} updates on the same images")
    return lines


def _rewards(plan: Plan) -> list[str]:
    _, steps = networks_of(list(plan.weights), {term.name: term.options for term in plan.recipe.rewards.terms})
    width = max(len(name) for name in plan.weights)
    lines = []
    for name, weight in plan.weights.items():
        source = f"steps of {steps[name][0]}" if name in steps else plan.needs[name].network or "bundled"
        if name not in REWARDS:
            source = "your own"
        counts = f"weight {weight:<7.4g}" if weight else "measured only "
        lines.append(f"{name:{width}}  {plan.family[name]:11}  {counts}  {source}")
    return lines


def _memory(plan: Plan) -> list[str]:
    lines = [f"{_gigabytes(total(plan.memory))} on each device at the worst moment, an estimate:"]
    for phase, when in PHASES.items():
        parts = [part for part in plan.memory if part.phase == phase]
        if parts:
            lines.append(f"  {_gigabytes(sum(part.bytes for part in parts))} {when}")
            lines += [f"    {_gigabytes(part.bytes)} {part.name}" for part in parts]
    unknown = [name for name, one in plan.needs.items() if one.weights is None]
    if unknown:
        lines.append(f"  not counted: the networks of {', '.join(unknown)}")
    if plan.memory_there is not None:
        there = f"this machine's GPU has {_gigabytes(plan.memory_there).strip()}"
        if total(plan.memory) > plan.memory_there:
            there += ", which is less: lower grpo.micro_batch_size, or set grpo.gradient_checkpointing or policy.lora"
        lines.append(there)
    return lines


def _files(plan: Plan) -> list[str]:
    if not plan.files:
        return ["nothing to fetch"]
    sizes = [file.size or 0 for file, cached in plan.files.items() if not cached]
    lines = [f"about {_gigabytes(sum(sizes)).strip()} to fetch" if sizes else "all in the cache"]
    for file, cached in plan.files.items():
        size = "         " if file.size is None else _gigabytes(file.size)
        lines.append(f"  {size}  {'in the cache' if cached else 'to fetch    '}  {file.repo}: {file.file}")
    return lines


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f} M"


def _gigabytes(number: int) -> str:
    """Bytes, always as wide: gigabytes of 10^9, with megabytes for what is small."""
    return f"{number / 1e9:6.2f} GB" if number >= 1e8 else f"{number / 1e6:6.1f} MB"
