"""What a recipe will do, found out without fetching or training anything: `argrpo train RECIPE --dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from argrpo_cli.policy.llamagen.published import Outline, outline_policy
from argrpo_cli.policy.open import check_targets, choose_trainable
from argrpo_cli.rewards import check_options, check_reward, load_rewards, networks_of
from argrpo_cli.rewards.base import Needs
from argrpo_cli.rewards.shaping import reward_weights
from argrpo_cli.system.files import HubFile, is_cached
from argrpo_cli.training.conditions import check_source, run_captions, run_conditions
from argrpo_cli.training.memory import Part, estimate, trained_parameters
from argrpo_cli.training.shares import images_per_process

if TYPE_CHECKING:
    from argrpo_cli.recipe import Recipe

CAPTION_FILES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Plan:
    """A run that could be.

    Attributes:
        share, micro: images that each device draws for an update, and passes through the model at a time.
        trained: parameters that the optimiser holds.
        asked: what is drawn, in words.
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
    asked: str
    weights: dict[str, float]
    family: dict[str, str]
    needs: dict[str, Needs]
    memory: list[Part]
    memory_there: int | None
    files: dict[HubFile, bool]
    packages: list[str]
    supply: list[str]

    @property
    def to_fetch(self) -> list[HubFile]:
        """What is not in the cache."""
        return [file for file, cached in self.files.items() if not cached]


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
    trained = trained_parameters(recipe, outline)
    needs, packages = _reward_needs(recipe)
    names = [term.name for term in recipe.rewards.terms]
    family = {name: check_reward(name).family for name in names}
    supply = [f"reward {name}: {one.missing}" for name, one in needs.items() if one.missing]
    asked, missing = _asked(recipe, outline)
    files = [*outline.files, *(file for one in needs.values() for file in one.files)]
    parts = estimate(
        recipe,
        outline,
        list({one.network: one for one in needs.values() if not one.server}.values()),
        share=share,
        micro=micro,
        processes=processes,
        device="cpu" if recipe.policy.device == "cpu" else "cuda",
    )
    gpu = recipe.policy.device != "cpu" and torch.cuda.is_available()
    return Plan(
        recipe=recipe,
        outline=outline,
        processes=processes,
        share=share,
        micro=micro,
        trained=trained,
        asked=asked,
        weights=reward_weights(recipe.rewards, family),
        family=family,
        needs=needs,
        memory=parts,
        memory_there=torch.cuda.get_device_properties(0).total_memory if gpu else None,
        files={file: is_cached(file) for file in dict.fromkeys(files)},
        packages=[*packages, *_other_packages(recipe)],
        supply=supply + missing,
    )


def _reward_needs(recipe: Recipe) -> tuple[dict[str, Needs], list[str]]:
    """Needs of the reward networks that are loaded, by name, and the packages that are not installed for them."""
    options = {term.name: term.options for term in recipe.rewards.terms}
    models, _ = networks_of(list(options), options)
    device = "cpu" if recipe.policy.device == "cpu" else "cuda"
    needs, packages = {}, []
    for name, given in models.items():
        needs[name] = check_options(name, given).needs(given, device)
        packages += [pip for module, pip in needs[name].packages.items() if find_spec(module) is None]
    return needs, packages


def _other_packages(recipe: Recipe) -> list[str]:
    wanted = list(recipe.logging.trackers) + (["peft"] if recipe.policy.lora is not None else [])
    return [name for name in wanted if find_spec(name) is None]


def _asked(recipe: Recipe, outline: Outline) -> tuple[str, list[str]]:
    """What is drawn, in words, and what the user has to bring for it; checked as far as it is there."""
    section, policy = recipe.conditions, outline.policy
    check_source(section, outline.draws, recipe.policy.checkpoint)
    if outline.draws == "classes":
        conditions = run_conditions(recipe, policy)
        _check_bundled_rewards(recipe, conditions)
        return f"{len(conditions)} classes" + (" by weights" if section.weights else ""), []
    data = section.dataset
    if data is not None:
        how = "as a stream" if data.streaming else "downloaded first"
        if Path(data.name).expanduser().exists():
            from argrpo_cli.training.streams import open_captions

            open_captions(data)
        return f"captions in the column {data.column!r} of the data set {data.name} ({data.split}), {how}", []
    named = section.captions
    if isinstance(named, str) and Path(named).suffix in CAPTION_FILES and not Path(named).expanduser().is_file():
        say = f"{named} is missing: a file of captions, or name a data set (conditions.dataset)"
        return f"captions of {named}", [say]
    captions = run_captions(section)
    if policy.text_encoder is not None:
        _check_bundled_rewards(recipe, policy.conditions(captions))
    return f"{len(captions)} captions" + (f" of {named}" if isinstance(named, str) else ""), []


def _check_bundled_rewards(recipe: Recipe, conditions: Sequence) -> None:
    """Whether the rewards that are at hand can be loaded and read the conditions."""
    terms = [term for term in recipe.rewards.terms if check_reward(term.name).steps_of is None]
    at_hand = {term.name: term.options for term in terms if check_reward(term.name).needs(term.options) == Needs()}
    load_rewards(list(at_hand), options=at_hand).check(conditions)
