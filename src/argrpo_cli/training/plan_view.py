"""A plan in words, for a terminal or a log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from argrpo_cli.policy.llamagen.published import count
from argrpo_cli.rewards import REWARDS, networks_of
from argrpo_cli.training.memory import PHASES, total

if TYPE_CHECKING:
    from rich.console import Console

    from argrpo_cli.recipe import Recipe
    from argrpo_cli.training.plan import Plan


PRECISION = {"float32": "in float32", "bfloat16": "float32 weights, computed in bfloat16"}


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
    model, tokens = count(outline.policy.model), outline.config.block_size
    adapted = recipe.policy.lora is not None
    what = "all of them" if plan.trained == model else f"{_millions(plan.trained)} of adapters" if adapted else ""
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
        ("draws", [f"{plan.asked}, with guidance {recipe.sampling.cfg_scale:g}"]),
        ("update", _update(plan)),
        ("run", [f"{grpo.steps} updates, {_images_in_all(recipe)} images in all" + _end(recipe)]),
        ("rewards", _rewards(plan)),
        ("memory", _memory(plan)),
        ("files", _files(plan)),
    ]
    lacking = [f"pip install {' '.join(dict.fromkeys(plan.packages))}"] if plan.packages else []
    sections += [("missing", lacking), ("to supply", plan.supply)]
    if plan.packages or plan.supply:
        what = " and ".join(name for name, given in (("missing", plan.packages), ("to supply", plan.supply)) if given)
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


def _images_in_all(recipe: Recipe) -> int:
    return -(-recipe.grpo.steps // recipe.grpo.updates_per_batch) * recipe.grpo.batch_size


def _end(recipe: Recipe) -> str:
    minutes = recipe.grpo.time_limit_minutes
    return "" if minutes is None else f", or what {minutes:g} minutes allow"


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
    known = sum(file.size or 0 for file in plan.to_fetch)
    lines = [f"about {_gigabytes(known).strip()} to fetch" if plan.to_fetch else "all in the cache"]
    for file, cached in plan.files.items():
        size = "         " if file.size is None else _gigabytes(file.size)
        lines.append(f"  {size}  {'in the cache' if cached else 'to fetch    '}  {file.repo}: {file.file}")
    return lines


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f} M"


def _gigabytes(number: int) -> str:
    """Bytes, always as wide: gigabytes of 10^9, with megabytes for what is small."""
    return f"{number / 1e9:6.2f} GB" if number >= 1e8 else f"{number / 1e6:6.1f} MB"
