"""The recipe: its sections together, what they must agree on, and the recipe that another one builds on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_origin

from pydantic import Field, field_serializer, model_validator

from argrpo_cli.recipe.grpo import GrpoSection
from argrpo_cli.recipe.real import CcaSection, PixelSection, RealSection
from argrpo_cli.recipe.sections import (
    UNGUIDED,
    ConditionSection,
    DistilSection,
    GuardSection,
    LoggingSection,
    Method,
    OptimSection,
    PolicySection,
    PublishedSection,
    RewardSection,
    SamplingSection,
    Section,
    section_of,
)
from argrpo_cli.rewards import REWARDS, check_reward, published_factor
from argrpo_cli.shapes import Sampling
from argrpo_cli.system.files import expanded

# Keys that say which run this is: `extends` does not hand them on, nor has `start` them from the recipe around it.
OWN_KEYS = ("name", "description", "out", "published")


class Recipe(Section):
    """One training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]  # of the run; that of the file
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of what is drawn, in which order
    out: str | None = None  # run directory; null is runs/<name>
    method: Method = "grpo"  # of training; the section of that name has its settings
    # A run before this one, in the folder start of its run directory, from whose policy this one goes on: the name or
    # path of a recipe, or keys as here. What it does not say is as in this recipe, but its method is distil.
    start: Recipe | None = None
    policy: PolicySection = PolicySection()
    conditions: ConditionSection = ConditionSection()
    sampling: SamplingSection = Sampling()  # and Sampling it is, once read
    rewards: RewardSection = RewardSection()
    grpo: GrpoSection = GrpoSection()
    distil: DistilSection = DistilSection()
    real: RealSection = RealSection()
    cca: CcaSection = CcaSection()
    pixel: PixelSection = PixelSection()
    guards: GuardSection = GuardSection()
    logging: LoggingSection = LoggingSection()
    published: list[PublishedSection] = Field([])

    @property
    def optim(self) -> OptimSection:
        """The section of the recipe's method."""
        return getattr(self, self.method)

    @property
    def stages(self) -> list[Recipe]:
        """The runs that this is, in their order: its start and itself."""
        return [self] if self.start is None else [self.start, self]

    @property
    def scored(self) -> bool:
        """Whether rewards look at images in this run, its start left out."""
        return self.method == "grpo" or (self.method == "distil" and isinstance(self.distil.cfg_scale, list))

    @property
    def unguided(self) -> bool:
        """Whether its policy is drawn without guidance, which is in the weights by then."""
        return self.method in UNGUIDED

    @property
    def learns_from_images(self) -> bool:
        """Whether it needs real images."""
        return self.method in ("cca", "pixel")

    @property
    def selects(self) -> bool:
        """Whether the rewards so far decide what is drawn."""
        return self.method == "grpo" and bool(self.grpo.dynamic_sampling or self.grpo.spread_floor is not None)

    @property
    def scales_globally(self) -> bool:
        """Whether advantages are divided by a deviation over updates."""
        return self.method == "grpo" and self.grpo.scale_rewards == "global"

    @property
    def run_dir(self) -> Path:
        """Where the run is written unless the caller says otherwise."""
        return expanded(self.out) if self.out else Path("runs") / self.name

    @field_serializer("sampling")
    def _sampling_keys(self, sampling: Sampling) -> dict[str, Any]:
        return {key: getattr(sampling, key) for key in SamplingSection.model_fields}

    @model_validator(mode="before")
    @classmethod
    def _start_is_as_this_recipe(cls, keys: Any) -> Any:
        return with_whole_start(keys)

    @model_validator(mode="after")
    def _factors_are_said(self) -> Recipe:
        """Those that are published are in the recipe from here on, so that a run keeps them."""
        terms = [
            term if term.factor is not None else term.model_copy(update={"factor": published_factor(term.name)})
            for term in self.rewards.terms
        ]
        self.rewards = self.rewards.model_copy(update={"terms": terms})
        return self

    @model_validator(mode="after")
    def _rewards_fit(self) -> Recipe:
        for term in self.rewards.terms if self.method == "grpo" else ():
            if term.name in REWARDS and (why := check_reward(term.name).unfit(term.options, self)):
                raise ValueError(f"reward {term.name}: {why}")
        return self

    @model_validator(mode="after")
    def _enough_images_to_contrast(self) -> Recipe:
        if self.method == "cca" and self.cca.batch_size < 2:
            raise ValueError("cca.batch_size 1: an image is held against the condition of another; use 2 or more")
        return self

    @model_validator(mode="after")
    def _start_and_run_fit(self) -> Recipe:
        start = self.start
        if start is None:
            return self
        if start.start is not None:
            raise ValueError("start.start: a start has no start of its own; run that one first, by itself")
        if start.out is not None:
            raise ValueError(f"start.out {start.out!r}: a start is run in the run's own folder start; leave it out")
        if start.policy.checkpoint != self.policy.checkpoint:
            raise ValueError(
                f"start.policy.checkpoint {start.policy.checkpoint!r} is what the run starts from, and "
                f"policy.checkpoint {self.policy.checkpoint!r} is another; say the same"
            )
        return self

    @model_validator(mode="after")
    def _reference_can_move(self) -> Recipe:
        if self.grpo.reference_decay < 1 and self.policy.lora is not None:
            raise ValueError(
                f"grpo.reference_decay {self.grpo.reference_decay:g}: with policy.lora the reference is the policy "
                "without its adapters, which does not move; leave it out, or set policy.lora: null"
            )
        return self

    @model_validator(mode="after")
    def _conditions_can_be_chosen(self) -> Recipe:
        data, key = self.conditions.dataset, "dynamic_sampling" if self.grpo.dynamic_sampling else "spread_floor"
        if self.selects and data is not None and data.streaming:
            raise ValueError(
                f"grpo.{key} chooses among conditions, and a stream is read in its order; "
                "set conditions.dataset.streaming: false"
            )
        return self

    @model_validator(mode="after")
    def _kept_checkpoints_lie_between_batches(self) -> Recipe:
        each = self.optim.updates_per_batch
        for step in self.logging.keep_steps:
            if step % each:
                raise ValueError(
                    f"logging.keep_steps {step} lies between two updates of one batch, where no checkpoint is made; "
                    f"use a multiple of grpo.updates_per_batch {each}, for instance {(step // each + 1) * each}"
                )
        return self

    @model_validator(mode="after")
    def _sampler_and_trained_distribution_agree(self) -> Recipe:
        filtered = self.sampling.top_k != 0 or self.sampling.top_p != 1
        if filtered and not (self.method == "grpo" and self.grpo.allow_filtered_sampling):
            mend = ", or set grpo.allow_filtered_sampling: true" if self.method == "grpo" else ""
            raise ValueError(
                f"sampling.top_k {self.sampling.top_k} and sampling.top_p {self.sampling.top_p:g} draw from "
                f"another distribution than the one that {self.method} trains; use 0 and 1{mend}"
            )
        return self


def merge(base: Any, over: Any) -> Any:
    """`base` with `over` laid on it: mappings merge, everything else is replaced."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return base | {key: merge(base.get(key), value) for key, value in over.items()}


def with_whole_start(keys: Any) -> Any:
    """A recipe's keys with those that its `start` does not say filled in from around it."""
    if not (isinstance(keys, dict) and isinstance(keys.get("start"), dict)):
        return keys
    around = {key: value for key, value in keys.items() if key not in (*OWN_KEYS, "start")}
    own = {"name": f"{keys.get('name')}-start", "method": "distil"}
    return keys | {"start": merge(around | own, keys["start"])}


def sections(model: type[Section], name: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Dotted names and models of the sections, each before those inside it; `[]` after a list of them."""
    yield name, model
    for key, field in model.model_fields.items():
        if (inner := section_of(field.annotation)) and inner is not Recipe:
            several = "[]" if get_origin(field.annotation) is list else ""
            yield from sections(inner, f"{name}.{key}".lstrip(".") + several)
