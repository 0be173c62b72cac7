"""The sections of a recipe: every key of a training run, its type, its range and its default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from argrpo_cli import paper_numbers
from argrpo_cli.shapes import Sampling
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.hub import check_repo

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Guidance = Annotated[float, Field(gt=1)]
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[int, Field(ge=1, le=10**6)]  # of what is listed before a run begins
Name = Annotated[str, Field(min_length=1)]
Action = Literal["stop", "warn", "ignore"]
Method = Literal["grpo", "distil", "cca", "pixel"]
METHODS: tuple[str, ...] = get_args(Method)
UNGUIDED = ("distil", "cca")  # methods that put guidance into the weights: their policy is drawn without


class Section(BaseModel):
    """A block of keys. Unknown keys and wrong types are errors; a whole number may stand for a float."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, ser_json_inf_nan="constants")


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a key's type is, or has within it, as a list of sections has."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((model for one in get_args(annotation) if (model := section_of(one))), None)


class LoraSection(Section):
    """Low-rank adapters instead of the weights themselves; the policy without them is the reference of the KL term."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    alpha: Positive = 32.0  # the adapters' output is scaled by alpha / rank
    # Linear layers, by name; null: those of the transformer itself, all of them.
    targets: Annotated[list[Name], Field(min_length=1)] | None = None


class PolicySection(Section):
    """The model that is trained."""

    checkpoint: str = "nano-c2i"  # a name, a policy folder, a run directory or a checkpoint
    # Of what is computed; the weights stay in float32. auto: bfloat16 on a GPU, and on a processor with matrix
    # instructions for it (AMX), where an update is twice as fast; otherwise float32.
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    device: str = "auto"  # auto: a GPU when there is one
    text_device: str = "same"  # of the text encoder: same, offload (there only while it reads captions), or a device
    # What is trained: everything, or the parameters with one of these in their names, such as "layers.4.".
    trainable: Name | Annotated[list[Name], Field(min_length=1)] = "all"
    lora: LoraSection | None = None  # null trains the weights themselves

    @model_validator(mode="after")
    def _one_choice_of_what_is_trained(self) -> PolicySection:
        if self.lora is not None and self.trainable != "all":
            raise ValueError(
                "trainable chooses weights and lora trains none; set policy.trainable: all, or policy.lora: null"
            )
        return self


class DatasetSection(Section):
    """A data set of the Hugging Face hub, or a folder or file that its library reads, for the captions in it."""

    name: Name
    config: Name | None = None  # for a data set with several
    split: Name = "train"  # which part of it
    revision: Name | None = None  # a commit or branch; null is the newest
    column: Name = "caption"  # a list of captions in it counts as several
    streaming: bool = True  # read as far as training gets, not downloaded first
    limit: Count | None = None  # captions taken; after them the first comes again. null: all of the data set


class ConditionSection(Section):
    """What the policy is asked to draw."""

    source: Literal["classes", "captions"] = "classes"  # as the policy was made
    classes: Literal["all"] | Annotated[list[str | int], Field(min_length=1)] = "all"  # names or ids
    # How often a class is drawn, by name or id; 1 for one that is not named, 0 is never. Uniform when empty.
    weights: dict[str | int, NonNegative] = {}
    # A bundled set ("nano"), a .txt file with one a line, a .jsonl file with `prompt`, or a list.
    captions: Name | Annotated[list[Name], Field(min_length=1)] = "nano"
    column: Name = "prompt"  # of a .jsonl file
    dataset: DatasetSection | None = None  # takes the place of captions
    deduplicate: bool = True  # a caption that comes twice is drawn once in a pass


class SamplingSection(Section):
    """The distribution the rollouts are drawn from (section 3.1 of the paper)."""

    # Read into a `Sampling`, whose check it is.

    # Guidance s in l_u + s (l_c - l_u); 1, the least, is none. Where it is not said, a policy with guidance in its
    # weights (its policy.json says so, or the start is a distillation) is drawn without.
    cfg_scale: float = Sampling.cfg_scale
    temperature: Positive = Sampling.temperature  # the logits are divided by it
    top_k: int = Sampling.top_k  # 0 keeps every token
    top_p: float = Sampling.top_p  # 1 keeps every token

    @field_validator("*")
    @classmethod
    def _in_range(cls, value: float, info: ValidationInfo) -> float:
        try:
            Sampling(**{info.field_name: value}).check("")
        except UserError as error:
            raise PydanticCustomError("range", "{words}", {"words": str(error).partition(": ")[2]}) from error
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _as_everywhere(cls, keys: Any, read: Callable[[Any], SamplingSection]) -> Sampling:
        return keys if isinstance(keys, Sampling) else Sampling(**read(keys).__dict__)


class RewardTerm(Section):
    """One reward; its family (conditional, quality or realism) decides which lambda applies to it."""

    name: str  # of the package, or of your own: module:function, or file.py:function beside the recipe
    factor: float | None = None  # brings the raw score to the scale of the others; null is the published one, or 1
    weight: float = 1.0  # how much it counts within its family; 0 measures and logs it, for a watch on reward hacking
    options: dict[str, Any] = {}  # of the reward itself, such as {model: ViT-L-14-quickgelu} of clip


class RewardSection(Section):
    """The reward: R = lambda_C R_conditional + lambda_I R_quality + lambda_R R_realism (section 3.3)."""

    lambda_conditional: NonNegative = 1.0
    lambda_quality: NonNegative = 1.0
    lambda_realism: NonNegative = 1.0
    terms: Annotated[list[RewardTerm], Field(min_length=1)] = [
        RewardTerm(name="nano-clip"),
        RewardTerm(name="nano-quality"),
        RewardTerm(name="nano-critic"),
    ]

    # Training stops, with a checkpoint, when a reward that counts lacks more than this share of the scores for a while.
    max_missing: Probability = 0.5

    @model_validator(mode="after")
    def _each_reward_once(self) -> RewardSection:
        names = [term.name for term in self.terms]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the reward {name!r} is listed twice in terms; give it one weight instead")
        return self


class OptimSection(Section):
    """How weights are moved, whatever for: the keys that all methods share."""

    batch_size: Amount = 64  # images per update, of all processes together; of grpo, a multiple of group_size
    micro_batch_size: Count | None = None  # images per forward pass of a process; null takes all that it draws
    steps: Amount = 100  # updates
    time_limit_minutes: Positive | None = None  # stop earlier, with everything saved
    learning_rate: Positive = 1e-5  # of AdamW
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = [0.9, 0.95]  # AdamW
    weight_decay: NonNegative = 0.05
    max_grad_norm: Positive = 1.0  # larger gradients are scaled down to it
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # updates over which the learning rate rises
    # Of the learning rate after that; wsd (warm-up, stable, decay) falls over the second half of the steps, to 0.
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    ema_decay: Decay = 0.0  # of a running mean of the weights, kept as policy_ema beside policy; 0 keeps none
    result: Literal["last", "ema"] = "last"  # what policy/ holds: the weights after the last update, or that mean
    gradient_checkpointing: bool = False  # less memory, one more forward pass

    @model_validator(mode="after")
    def _sizes_fit(self) -> OptimSection:
        if self.micro_batch_size is not None and self.batch_size % min(self.micro_batch_size, self.batch_size):
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is more than steps {self.steps}; lower it too")
        if self.result == "ema" and not self.ema_decay:
            raise ValueError("result: ema is the running mean of the weights; set ema_decay too, for instance to 0.99")
        return self


class DistilSection(OptimSection):
    """Guidance distilled into the weights: generalised knowledge distillation (Agarwal et al. 2024) from the policy as
    it is, under guidance, to the same policy without it. The names are those of TRL's GKD."""

    group_size: ClassVar[int] = 1  # no images are compared,
    updates_per_batch: ClassVar[int] = 1  # and each is drawn for one update

    # Guidance of the teacher. Of a list the policy is sampled at each before training, the rewards look at the images,
    # and the smallest scale within one standard error of the best total is taken.
    cfg_scale: Guidance | Annotated[list[Guidance], Field(min_length=1)] = 2.0
    lmbda: Probability = 0.3  # share of the batches that the student draws itself; the others the guided teacher draws
    beta: Probability = 0.0  # 0 is forward KL(teacher || student), 1 reverse KL, between generalised Jensen-Shannon


# Mean |ratio - 1| that rounding does not explain, measured on the nano policy: 2e-6 in float32, 0.03 under bfloat16
# autocast; a temperature that is off by a tenth gives 0.1 there (0.06 on a policy of random weights), a guidance scale
# of 1.5 for 2 gives 0.3, tokens shifted by one 20.
class RatioLimit(Section):
    """What mean |ratio - 1| over the tokens may be, by `policy.dtype`; one number in the place of both is for both."""

    float32: Positive = 0.01
    bfloat16: Positive = 0.1


class RatioGuard(Section):
    """An on-policy update whose ratio to the sampler is not 1: another distribution, or numbers too coarse."""

    action: Action = "warn"
    limit: RatioLimit = RatioLimit()

    @field_validator("limit", mode="before")
    @classmethod
    def _one_or_both(cls, value: Any) -> Any:
        if value is None:  # as runs before there were two have it
            return {}
        return {"float32": value, "bfloat16": value} if isinstance(value, int | float) else value


class KlGuard(Section):
    """A policy that has left its base; unless ignored, a tenfold jump of the KL is also said."""

    action: Action = "stop"
    limit: Positive = 2.0  # nats per token, in two updates in a row; the bundled recipes stay below 0.3


class ConstantRewardGuard(Section):
    """A reward that counts and gives all images of every group the same score, or hardly another one. Unless ignored,
    advantages or a gradient of exactly 0, and most groups without spread, are also said."""

    action: Action = "warn"
    batches: Count = 10  # in a row


class HeldOutGuard(Section):
    """A held-out reward (weight 0) that falls while the optimised one rises: the policy games its rewards."""

    action: Action = "warn"
    batches: Annotated[int, Field(ge=4)] = 40  # compared at least; also twice as many, four times ..., and all
    errors: Positive = 4.0  # standard errors by which it must have fallen


class GuardSection(Section):
    """What is watched. `stop` ends training with a checkpoint and exit code 2, `warn` says it once."""

    ratio: RatioGuard = RatioGuard()
    kl: KlGuard = KlGuard()
    constant_reward: ConstantRewardGuard = ConstantRewardGuard()
    held_out: HeldOutGuard = HeldOutGuard()
    not_a_number: Literal["stop", "skip"] = "stop"  # a gradient that is none is left out; then stop, or go on


class LoggingSection(Section):
    """What the run directory keeps."""

    log_every: Count = 1  # steps between lines of text; metrics.jsonl has every step
    grid_every: Count = 20  # steps between grids of fixed seeds
    grid_images: Amount = 24  # in a grid
    # Images that the policy before and after training draw at the end under other samplings (unguided, guided, greedy,
    # colder, warmer), for what is left of the gain; 0 leaves it out.
    transfer_images: Annotated[int, Field(ge=0, le=10**6)] = 96
    save_every: Count = 20  # steps between checkpoints
    keep_checkpoints: Count = 2  # older ones are removed
    keep_steps: list[Count] = []  # checkpoints after these updates are made and never removed
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]
    project: Name = "argrpo"  # of wandb and trackio
    # At the end of the run, as `argrpo push RUN hub_model_id` does; log in first (`hf auth login`).
    push_to_hub: bool = False
    hub_model_id: Name | None = None  # user/name
    hub_private_repo: bool | None = None  # of a repository that is made; null is as the account says

    @model_validator(mode="after")
    def _a_name_to_push_to(self) -> LoggingSection:
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("push_to_hub: where to? give hub_model_id: user/name")
        if self.hub_model_id is not None:
            try:
                check_repo(self.hub_model_id)
            except UserError as error:
                raise ValueError(f"hub_model_id: {error}") from error
        return self


class PublishedSection(Section):
    """What a paper reports for this run, to be put beside what comes out of it. Nothing is computed with it."""

    table: Name  # such as "table 2"
    # The update after which the paper measures; 0 where it knows only the policy that training starts from.
    step: Annotated[int, Field(ge=0)]
    row: Name | None = None  # of the AR-GRPO paper's table (paper/numbers.yaml), in the place of the three below
    # What was measured, and a number for each, of the policy that training starts from and of the trained one.
    measures: Annotated[list[Name], Field(min_length=1)]
    base: list[float]
    trained: list[float] = []  # none when step is 0

    @model_validator(mode="before")
    @classmethod
    def _of_the_paper(cls, value: Any) -> Any:
        """The numbers of a row that is named."""
        if not isinstance(value, dict) or value.get("row") is None:
            return value
        measures, base, trained = paper_numbers.of_recipe(str(value.get("table")), str(value["row"]))
        return {**value, "measures": measures, "base": base, "trained": trained if value.get("step") != 0 else []}

    @model_validator(mode="after")
    def _one_number_each(self) -> PublishedSection:
        if len(self.base) != len(self.measures) or len(self.trained) != len(self.measures) * (self.step > 0):
            raise ValueError("base and trained need one number for each of measures, trained none when step is 0")
        return self
