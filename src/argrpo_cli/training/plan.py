"""What a recipe will do, found out without fetching or training anything, and said: `argrpo train RECIPE --dry-run`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from argrpo_cli.nano.scenes import find_font
from argrpo_cli.networks.distance import LINEAR, VGG16, VGG16_PARAMETERS
from argrpo_cli.policy.open import adapted_layers, choose_trainable, outline_policy
from argrpo_cli.policy.tokens import scale_weights
from argrpo_cli.rewards import REWARDS, check_options, check_reward, load_rewards, reward_weights
from argrpo_cli.rewards.base import Needs
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import HubFile, expanded, is_cached
from argrpo_cli.system.processes import is_device, resolve_device
from argrpo_cli.training.conditions import check_source, run_captions, run_conditions
from argrpo_cli.training.launch import check_alone, check_processes, images_per_process, settle_dtype
from argrpo_cli.training.memory import PHASES, Part, estimate, room_here, total, trained_parameters, what_fits
from argrpo_cli.training.real import SCENES
from argrpo_cli.training.shards import NANO, shards
from argrpo_cli.training.streams import open_captions

if TYPE_CHECKING:
    from rich.console import Console

    from argrpo_cli.policy.outline import Outline
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.recipe.sections import OptimSection

CAPTION_FILES = (".txt", ".jsonl")
PRECISION = {"float32": "in float32", "bfloat16": "float32 weights, computed in bfloat16"}


@dataclass(frozen=True)
class Plan:
    """A run that could be.

    Attributes:
        draws: what is drawn, in words.
        memory: parts of the estimate for one device.
        packages: pip's names of those that are needed and not installed.
        supply: what the user has to bring.
        sections: all there is to say, lines under a label.
    """

    draws: str
    memory: list[Part]
    packages: list[str]
    supply: list[str]
    sections: dict[str, list[str]]


def plan(recipe: Recipe, processes: int = 1, config: str = "ddp") -> Plan:
    """Check all of a recipe that can be checked on the spot, and add up what it takes.

    Args:
        processes, config: as `--processes` and `--accelerate-config` say.

    Raises:
        UserError: the recipe cannot be trained as it is: an unknown name, an option that is none, parts of the policy
            that do not exist, images that cannot be shared by so many processes. What a machine merely lacks (memory,
            devices, files, packages, captions) is no error; the plan lists it.
    """
    device = "cpu" if recipe.policy.device == "cpu" else "cuda"
    given, recipe = recipe, settle_dtype(recipe, device)
    optim, policy = recipe.optim, recipe.policy
    share, micro = images_per_process(recipe, processes)
    outline = outline_policy(policy.checkpoint)
    choose_trainable(outline.policy, policy.trainable)
    if recipe.method == "grpo" and recipe.grpo.scale_balance:
        scale_weights(outline.policy.card, recipe.grpo.scale_balance)  # or a word on why there are none
    if policy.lora is not None:
        adapted_layers(outline.policy, policy.lora.targets)
    options = {term.name: term.options for term in recipe.rewards.terms} if recipe.scored else {}
    needs = {name: check_options(name, chosen).needs(chosen, device) for name, chosen in options.items()}
    packages = {module: pip for one in needs.values() for module, pip in one.packages.items()}
    packages |= {name: name for name in recipe.logging.trackers} | ({"peft": "peft"} if policy.lora else {})
    absent = list(dict.fromkeys(pip for module, pip in packages.items() if find_spec(module) is None))
    draws, missing = _draws(recipe, outline)
    real, absent_images = _real(recipe)
    supply = absent_images + [f"reward {name}: {one.missing}" for name, one in needs.items() if one.missing] + missing
    networks, every = _networks(recipe, device), [*needs.values(), *_distance(recipe)]
    memory = estimate(recipe, outline, networks, share=share, micro=micro, processes=processes, device=device)
    lacks, here = _this_machine(given, outline, total(memory), processes)
    lacks += _devices(recipe, processes, config)
    model, trained = outline.policy.model.num_parameters(), trained_parameters(outline.policy, policy.lora)
    size = f"{trained / 1e6:.1f} M"
    what = "all of them" if trained == model else f"{size} of adapters" if policy.lora is not None else size
    images = -(-optim.steps // optim.updates_per_batch) * optim.batch_size
    limit = "" if optim.time_limit_minutes is None else f", or what {optim.time_limit_minutes:g} minutes allow"
    lacking = [label for label, said in (("missing", absent), ("to supply", supply), ("lacking", lacks)) if said]
    sections = {
        "plan": [recipe.name + (f": {recipe.description}" if recipe.description else "")],
        "repeats": _published(recipe),
        "policy": [
            f"{policy.checkpoint}: {model / 1e6:.1f} M parameters, {outline.policy.image_size} pixels, "
            f"{outline.policy.card.tokens} tokens an image",
            f"trained: {what}, {PRECISION[policy.dtype]}",
        ],
        "learns from": [real] if recipe.learns_from_images else [],
        "draws": [f"{draws}, {_guidance(recipe)}"],
        "update": _update(optim, processes, share, micro),
        "run": [f"{optim.steps} updates, {images} images in all{limit}"],
        "rewards": _rewards(recipe, needs) if recipe.scored else [],
        "memory": [*_memory(memory, needs), *here],
        "files": _files([*outline.files, *(file for one in every for file in one.files)]),
        "missing": [f"pip install {' '.join(absent)}"] if absent else [],
        "to supply": supply,
        "lacking": lacks,
        "so": [f"this run cannot start here yet; see {' and '.join(lacking)}"] if lacking else [],
    }
    return Plan(draws, memory, absent, supply, {label: lines for label, lines in sections.items() if lines})


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
        if expanded(data.name).exists():
            open_captions(data)
        return f"captions in the column {data.column!r} of the data set {data.name} ({data.split}), {how}", []
    named = section.captions
    if isinstance(named, str) and Path(named).suffix in CAPTION_FILES and not expanded(named).is_file():
        say = f"{named} is missing: a file of captions, or name a data set (conditions.dataset)"
        return f"captions of {named}", [say]
    captions = run_captions(section)
    if outline.reads:
        _check_bundled_rewards(recipe, policy.conditions(captions))
    return f"{len(captions)} captions" + (f" of {named}" if isinstance(named, str) else ""), []


def _real(recipe: Recipe) -> tuple[str, list[str]]:
    """The real images, in words, and what the user has to bring for them."""
    section = recipe.real
    count = "" if section.limit is None else f", {section.limit:,} at most"
    if not recipe.learns_from_images:
        return "", []
    if section.path == NANO:
        try:
            find_font()
        except UserError as error:
            return "rendered scenes of the nano world", [str(error)]
        return f"{section.limit or SCENES:,} rendered scenes of the nano world", []
    there = any(map(os.path.exists, shards(section.path) or [expanded(section.path)]))
    say = f"real.path {section.path} is missing: a folder of pictures, the .tar files of a webdataset, or codes (.npz)"
    return f"real images of {section.path}{count}", [] if there else [say]


def _check_bundled_rewards(recipe: Recipe, conditions: Sequence) -> None:
    """Whether the rewards that are at hand can be loaded and read the conditions."""
    terms = recipe.rewards.terms if recipe.scored else []
    at_hand = {term.name: term.options for term in terms if check_reward(term.name).needs(term.options) == Needs()}
    load_rewards(list(at_hand), options=at_hand).check(conditions)


# --- in words, for a terminal or a log


def show_plan(plan: Plan, console: Console) -> None:
    """Print a plan: labels in one column, what they stand for in the other."""
    from rich.text import Text

    width = max(map(len, plan.sections)) + 2
    for label, lines in plan.sections.items():
        for head, line in zip_longest([label], lines, fillvalue=""):
            console.print(Text.assemble((head.ljust(width), "bold"), line), soft_wrap=True)


def _published(recipe: Recipe) -> list[str]:
    lines = []
    for one in recipe.published:
        when = f"after {one.step} updates" if one.step else "before training"
        numbers = [f"{name} {base:g}" for name, base in zip(one.measures, one.base, strict=True)]
        if one.trained:
            numbers = [f"{text} -> {trained:g}" for text, trained in zip(numbers, one.trained, strict=True)]
        lines.append(f"{one.table}, {when}: {', '.join(numbers)}")
    return lines


def _guidance(recipe: Recipe) -> str:
    if recipe.learns_from_images:
        return "in grids alone" + ("" if recipe.unguided else f", with guidance {recipe.sampling.cfg_scale:g}")
    if recipe.method == "grpo":
        return f"with guidance {recipe.sampling.cfg_scale:g}"
    scales, own = recipe.distil.cfg_scale, recipe.distil.lmbda
    if isinstance(scales, list):
        what = f"by the teacher with one of the guidances {', '.join(f'{one:g}' for one in scales)}, as rewards choose"
    else:
        what = f"by the teacher with guidance {scales:g}"
    return what + (f"; {own:.0%} of the batches by the student without" if own else "")


def _update(optim: OptimSection, processes: int, share: int, micro: int) -> list[str]:
    size = optim.group_size
    lines = [f"{optim.batch_size} images" + (f": {optim.batch_size // size} groups of {size}" if size > 1 else "")]
    each = share / size
    devices = "1 device" if processes == 1 else f"{processes} devices"
    whose = f" ({each:g} group{'' if each == 1 else 's'})" if size > 1 else ""
    lines.append(f"{devices}: {share} images{whose} each, {micro} at a time in the training pass")
    if optim.updates_per_batch > 1:
        lines.append(f"{optim.updates_per_batch} updates on the same images")
    return lines


def _rewards(recipe: Recipe, needs: Mapping[str, Needs]) -> list[str]:
    family = {term.name: check_reward(term.name).family for term in recipe.rewards.terms}
    width, lines = max(map(len, family)), []
    weights = reward_weights(recipe.rewards, family)
    for term in recipe.rewards.terms:
        name, scale = term.name, getattr(recipe.rewards, f"lambda_{family[term.name]}")
        source = needs[name].network or "bundled"
        if name not in REWARDS:
            source = "your own"
        counts = f"factor {term.factor:<6.4g} weight {term.weight:<6.4g}" + f" lambda {scale:g}" * (scale != 1)
        lines.append(f"{name:{width}}  {family[name]:11}  {counts if weights[name] else 'measured only':27}  {source}")
    return lines


def _memory(memory: Sequence[Part], needs: Mapping[str, Needs]) -> list[str]:
    lines = [f"{_gigabytes(total(memory))} on each device at the worst moment, an estimate:"]
    for phase, when in PHASES.items():
        parts = [part for part in memory if part.phase == phase]
        if parts:
            lines.append(f"  {_gigabytes(sum(part.bytes for part in parts))} {when}")
            lines += [f"    {_gigabytes(part.bytes)} {part.name}" for part in parts]
    unknown = [name for name, one in needs.items() if one.weights is None]
    if unknown:
        lines.append(f"  not counted: the networks of {', '.join(unknown)}")
    return lines


def _networks(recipe: Recipe, device: str) -> list[Needs]:
    """What is loaded of rewards on a device, each network once."""
    terms = recipe.rewards.terms if recipe.scored else []
    needs = [check_reward(term.name).needs(term.options, device) for term in terms]
    needs += _distance(recipe)
    return list({one.network: one for one in needs if not one.server}.values())


def _distance(recipe: Recipe) -> list[Needs]:
    """What compares pictures, where a method does."""
    pixel = recipe.pixel
    if recipe.method != "pixel" or pixel.perceptual == "nano" or not pixel.perceptual_weight:
        return []
    files = (VGG16, LINEAR) if pixel.perceptual_folder is None else ()
    return [Needs(files, weights=4 * VGG16_PARAMETERS, network="LPIPS (VGG16)")]


def _this_machine(recipe: Recipe, outline: Outline, size: int, processes: int) -> tuple[list[str], list[str]]:
    """What this machine lacks of the memory that a run takes, and what it has and would suffice, each in lines.

    Args:
        size: bytes of the estimate for one GPU.
    """
    device = "cuda" if torch.cuda.is_available() and recipe.policy.device != "cpu" else "cpu"
    recipe, room, networks = settle_dtype(recipe, device), room_here(device), _networks(recipe, device)
    kept = {"processes": processes, "device": device}
    if device == "cpu":
        share, micro = images_per_process(recipe, processes)
        size = processes * total(estimate(recipe, outline, networks, share=share, micro=micro, **kept))
        cpu = "this machine's" if recipe.policy.device == "cpu" else "its"
        has = f"on {cpu} CPU the run takes {_gigabytes(size).strip()} of {_gigabytes(room).strip()}"
        has = has if recipe.policy.device == "cpu" else f"this machine has no GPU; {has}"
    else:
        has = f"this machine's GPU has {_gigabytes(room).strip()}"
    if size <= room:
        return [], [has]
    fits = what_fits(recipe, outline, networks, room, **kept)
    lines = [f"  {', '.join(one.changes)}: {_gigabytes(one.bytes).strip()}" for one in fits]
    rewards = {one.network: one.weights for one in networks if one.weights}
    if heavy := 2 * sum(rewards.values()) > size:  # they fill it, whatever the policy
        sizes = ", ".join(f"{name} {_gigabytes(taken).strip()}" for name, taken in rewards.items())
        mend = f"fewer or smaller rewards ({sizes}), or judges on a server (options: {{backend: server, url: ...}})"
    else:
        mend = "a smaller policy, or GPUs that share its weights: --processes N --accelerate-config fsdp2"
    if fits[0].bytes > room:
        return [f"memory: {has}"], [f"{has}, which is not enough, nor with", *lines, f"so take {mend}"]
    lines += [f"  or with {mend}"] if heavy else []
    return [f"memory: {has}"], [f"{has}, which is not enough; it would be with", *lines]


def _devices(recipe: Recipe, processes: int, config: str) -> list[str]:
    """Devices that this machine lacks; UserError for one that no machine has."""
    lines = []
    for key in ("device", "text_device"):
        name = getattr(recipe.policy, key)
        if name not in ("auto", "same", "offload"):
            try:
                resolve_device(name)
            except UserError as error:
                if not is_device(name):
                    raise UserError(f"policy.{key}: {error}") from error
                lines.append(f"policy.{key}: {error}")
    if lines:
        return lines
    try:
        if processes > 1:
            check_processes(processes, recipe.policy.device, config)
        else:
            check_alone(processes, resolve_device(recipe.policy.device))
    except UserError as error:
        lines.append(str(error))
    return lines


def _files(every: Sequence[HubFile]) -> list[str]:
    files = {file: is_cached(file) for file in dict.fromkeys(every)}
    if not files:
        return ["nothing to fetch"]
    sizes = [file.size or 0 for file, cached in files.items() if not cached]
    lines = [f"about {_gigabytes(sum(sizes)).strip()} to fetch" if sizes else "all in the cache"]
    for file, cached in files.items():
        size = "         " if file.size is None else _gigabytes(file.size)
        lines.append(f"  {size}  {'in the cache' if cached else 'to fetch    '}  {file.repo}: {file.file}")
    return lines


def _gigabytes(number: int) -> str:
    """Bytes, always as wide: gigabytes of 10^9, with megabytes for what is small."""
    return f"{number / 1e9:6.2f} GB" if number >= 1e8 else f"{number / 1e6:6.1f} MB"
