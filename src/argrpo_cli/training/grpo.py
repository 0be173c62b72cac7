"""TRL's GRPOTrainer set up to compute the paper's objective on images (sections 3.2 and 3.4)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from argrpo_cli.networks.weights import quiet_transformers
from argrpo_cli.policy.open import adapted_layers, require_peft
from argrpo_cli.policy.tokens import scale_weights
from argrpo_cli.shapes import Sampling
from argrpo_cli.system.errors import UserError
from argrpo_cli.training.conditions import prompt_dataset
from argrpo_cli.training.credit import ADVANTAGE_WEIGHTS, KL_WEIGHTS, Credit, TokenBeta
from argrpo_cli.training.entropy import EntropyCallback, controller
from argrpo_cli.training.gathering import check_sharding
from argrpo_cli.training.image_entropy import image_entropies
from argrpo_cli.training.instruments import RatioMeter
from argrpo_cli.training.launch import check_alone, images_per_process
from argrpo_cli.training.rollout import Rollout
from argrpo_cli.training.saving import ReferenceCallback
from argrpo_cli.training.scorer import ADVANTAGE_EPSILON, BatchScorer

if TYPE_CHECKING:
    from peft import LoraConfig

    from argrpo_cli.policy import Policy
    from argrpo_cli.policy.protocol import Encoded
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.recipe.sections import LoraSection
    from argrpo_cli.training.selection import Selection

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine", "wsd": "warmup_stable_decay"}
WSD = {"decay_type": "linear"}
CHECKPOINTING = {"use_reentrant": False}
ADVANTAGE_STD = "advantage_std"  # in TRL's log
NOISY_LOGGERS = ("transformers", "trl", "accelerate", "datasets", "torch.distributed")


class CodeTokenizer(PreTrainedTokenizerFast):
    """The processing class TRL insists on: the "text" of an image is its codes as decimal numbers.

    Nothing is ever tokenised with it, since rollouts return ids; TRL reads the padding and end ids (an id after the
    codes, which no image contains) and turns ids into text for a table of completions that we do not use.
    """

    def __init__(self, codes: int) -> None:
        words = Tokenizer(WordLevel({str(code): code for code in range(codes)} | {"<end>": codes}, unk_token="<end>"))
        words.pre_tokenizer = WhitespaceSplit()
        super().__init__(tokenizer_object=words, pad_token="<end>", eos_token="<end>", padding_side="left")

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> tuple[str, ...]:
        return ()  # nothing that a checkpoint would need


class ImageGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose log-probabilities are the policy's own, and which measures their ratio to the sampler's.

    The objective is TRL's. TRL's fused head, which it puts on the model's forward, takes no part: it lets calls like
    ours through. What a prompt stands for in them is here and not in the model: `encoded`, what `Rollout` drew for.

    Args:
        sampling: the distribution that is trained: guided, or with cfg_scale 1 the conditional one.
        scorer: whose `functions` are TRL's reward functions.
        selection: with `scale_rewards: global`, whose running deviation advantages are divided by.
        token_weights: float32 [T] of mean 1; None counts all tokens of an image alike.
        credit: shares an image's advantage out among its tokens; None gives all of it to each.
        beta_at: the weight of the KL term after so many updates; None leaves it as it is.

    Attributes:
        states: callbacks whose state a checkpoint holds, and that go on from it.
        reference: the one of them that moves the reference, if it moves.
    """

    def __init__(
        self,
        *args: Any,
        sampling: Sampling,
        scorer: BatchScorer,
        selection: Selection | None = None,
        token_weights: Tensor | None = None,
        credit: Credit | None = None,
        beta_at: Callable[[int], float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, reward_funcs=scorer.functions(), **kwargs)
        self.scorer, self.selection, self.token_weights = scorer, selection, token_weights
        self.sampling, self.ratio_meter, self.credit = sampling, RatioMeter(), credit
        self.encoded: Encoded | None = None
        self.beta_at = beta_at
        self.reference: ReferenceCallback | None = None
        self.states: list[EntropyCallback | ReferenceCallback] = []
        self.null: Encoded | None = None  # the same conditions dropped, where `credit` compares with them

    def _calculate_rewards(self, *args: Any) -> Tensor:
        """TRL's rewards [B, rewards], in float64 as the scorer has them, and so are means and deviations made of them:
        0.1 seven times, added up in float32, is not seven times 0.1."""
        if self.scorer.policy_readers:
            self.scorer.entropies = image_entropies(self, args[-1])
        super()._calculate_rewards(*args)
        device = self.accelerator.device
        return self.scorer.table.to(device, torch.float32 if device.type == "mps" else torch.float64)  # MPS has none

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's batch; its advantages are exactly 0 in a group that has nothing to compare, where float64 leaves 1e-13
        of 0.1 and AdamW makes a whole step of it."""
        if self.beta_at is not None:  # the same for all updates of a batch: where it is 0, TRL asks no reference
            self.beta = self.beta_at(self.state.global_step)
        batch = super()._generate_and_score_completions(inputs)
        advantages, summed = batch["advantages"], self.scorer.summed
        first = self.accelerator.process_index * len(advantages)
        own = slice(first, first + len(advantages))
        if summed is not None and self.scale_rewards == "none":  # TRL always divides such a sum by its deviation
            advantages = summed[own].to(advantages)
        level = ~(self.scorer.spread > 0).repeat_interleave(self.num_generations)[own]
        batch["advantages"] = advantages.masked_fill(level.to(advantages.device), 0).float()
        return batch if self.credit is None else batch | self.credit(self, batch)

    def _prepare_inputs(self, generation_batch: dict[str, Any]) -> dict[str, Any]:
        """TRL's micro-batches, with the images of a group side by side again: it shuffles them, which no update needs.

        So the gradients of micro-batches are those of whole groups, which the noise scale needs (`GradientMeter`).
        """
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        parts = self._buffered_inputs
        if parts is before or parts is None:
            return inputs
        advantages = self.accelerator.gather(torch.cat([part["advantages"] for part in parts]))
        if self.selection is not None:
            scale = self.selection.deviation(advantages) + ADVANTAGE_EPSILON
            advantages = advantages / scale
            for part in parts:
                part["advantages"] /= scale
        self._metrics["train"][ADVANTAGE_STD].append(advantages.std().item())
        if len(parts) > 1:
            order = torch.cat([part["prompt_ids"][:, 0] for part in parts]).argsort()  # rows of `encoded`
            whole = {
                key: torch.cat([part[key] for part in parts])[order] if _has_rows(value, parts[0]) else value
                for key, value in parts[0].items()
            }
            self._buffered_inputs = split_tensor_dict(whole, len(parts))
            inputs = self._buffered_inputs[self._step % len(parts)]
        return inputs

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """TRL's one way to log-probabilities [B, T] and entropies [B, T], of the policy and of the reference.

        Args:
            input_ids: int64 [B, 1 + T], a row of `encoded` and the tokens of an image.
            attention_mask, others: of texts and of models that read pictures.
        """
        rows, tokens = input_ids[:, 0], input_ids[:, -logits_to_keep:]
        parts = zip(*(whole.split(batch_size or len(whole)) for whole in (rows, tokens)), strict=True)
        with self.accelerator.autocast():
            parts = [model(self.encoded[rows], tokens, self.sampling, compute_entropy) for rows, tokens in parts]
        logp = torch.cat([part.logp for part in parts])
        self.logp = logp.detach()  # for `compute_loss`
        return logp, torch.cat([part.entropy for part in parts]) if compute_entropy else None, None

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """TRL's loss of one micro-batch; its log-probabilities are compared with the sampler's on the way.

        Every loss of TRL's is a sum over tokens that a mask multiplies: weights go in as the second of its masks. Those
        of `credit` are on one of its terms: TRL takes advantages [B, T], too, and a beta that multiplies by tokens.
        """
        beta = self.beta
        if ADVANTAGE_WEIGHTS in inputs:
            inputs = {**inputs, "advantages": inputs["advantages"][:, None] * inputs[ADVANTAGE_WEIGHTS]}
        if KL_WEIGHTS in inputs:
            self.beta = TokenBeta(beta)
            self.beta.weights = inputs[KL_WEIGHTS]
        if self.token_weights is not None:
            weights = self.token_weights.to(inputs["completion_mask"].device)
            inputs = {**inputs, "tool_mask": weights.expand(inputs["completion_mask"].shape)}
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.beta = beta
        self.ratio_meter.add(self.logp, inputs["sampling_per_token_logps"])
        return loss


def _has_rows(value: Any, part: dict[str, Any]) -> bool:
    """Whether this is a tensor with a row for each image of a micro-batch."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(part["prompt_ids"])


def trainer_settings(recipe: Recipe, output_dir: Path, device: str, processes: int) -> dict[str, Any]:
    """What transformers' TrainingArguments, and TRL's, say of any method: the optimiser, precision, who reports.

    Args:
        output_dir: where the trainer writes its checkpoints.
        device: "cpu" or the name of an accelerator.
        processes: that share the images of an update.

    Raises:
        UserError: the images cannot be shared by so many.
    """
    optim = recipe.optim
    share, micro = images_per_process(recipe, processes)
    return {
        "output_dir": str(output_dir),
        "seed": recipe.seed,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
        "max_steps": optim.steps,
        "optim": "adamw_torch_fused",
        "learning_rate": optim.learning_rate,
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "warmup_steps": optim.warmup_steps,
        "lr_scheduler_type": SCHEDULES[optim.schedule],
        "lr_scheduler_kwargs": WSD | {"num_decay_steps": optim.steps // 2} if optim.schedule == "wsd" else None,
        # Precision and speed. The weights stay in float32; bfloat16 is autocast around them.
        "bf16": recipe.policy.dtype == "bfloat16",
        "gradient_checkpointing": optim.gradient_checkpointing,
        "gradient_checkpointing_kwargs": CHECKPOINTING if optim.gradient_checkpointing else None,
        "ddp_find_unused_parameters": False,  # every pass uses all of them
        "use_cpu": device == "cpu",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        # The run directory and the display are ours.
        "logging_steps": 1,
        "logging_nan_inf_filter": True,  # the sum of losses would stay NaN for ever; guards look at the gradient
        "save_strategy": "no",
        "report_to": "none",
        "log_level_replica": "error",  # of the processes that do not report
        "disable_tqdm": True,
    }


def grpo_config(
    recipe: Recipe, output_dir: Path, tokens: int, weights: Sequence[float], device: str, processes: int = 1
) -> GRPOConfig:
    """TRL's settings for the recipe; whatever the paper fixes and TRL sets otherwise is said here.

    Args:
        tokens: T, tokens per image.
        weights: of the rewards, in order.
        output_dir, device, processes: as in `trainer_settings`, which also says what it raises.
    """
    grpo = recipe.grpo
    skywork = grpo.entropy_controller == "skywork"
    high = grpo.epsilon_high or grpo.epsilon  # losses without clipping have none, and TRL looks at neither then
    return GRPOConfig(
        **trainer_settings(recipe, output_dir, device, processes),
        # Generation: group_size images per condition, one rollout for updates_per_batch updates.
        num_generations=grpo.group_size,
        num_iterations=grpo.updates_per_batch,
        max_completion_length=tokens,
        temperature=recipe.sampling.temperature,
        shuffle_dataset=False,  # conditions.py fixes the order
        # Objective, eq. 3 to 6.
        loss_type=grpo.loss,  # "grpo": mean over the tokens of an image, then over images
        epsilon=grpo.epsilon,
        epsilon_high=1 + high if grpo.loss == "cispo" else high,  # there TRL means the bound itself
        beta=max(grpo.beta, grpo.beta_end or 0),  # where it is 0 TRL loads no reference
        # With a controller of ours any weight but 0, so that TRL gives a bonus at all.
        entropy_coef=grpo.entropy_weight if skywork else grpo.entropy_weight_max,
        use_adaptive_entropy=skywork and grpo.entropy_target is not None,
        entropy_target=grpo.entropy_target or 0.0,
        entropy_coef_delta=grpo.entropy_step,
        entropy_coef_max=grpo.entropy_weight_max,
        use_bias_correction_kl=False,  # TRL multiplies the KL estimate by the ratio; eq. 4 does not
        importance_sampling_level=grpo.importance,
        scale_rewards="none" if grpo.scale_rewards == "global" else grpo.scale_rewards,
        multi_objective_aggregation=grpo.aggregation,
        reward_weights=list(weights),
        mask_truncated_completions=False,  # an image has no end token: every one counts
        disable_dropout=True,
    )


def lora_config(lora: LoraSection, policy: Policy) -> LoraConfig:
    """PEFT's settings for the recipe; new adapters change nothing, since B starts at zero.

    Raises:
        UserError: a target that is no linear layer of the model, or PEFT is missing.
    """
    require_peft()
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=adapted_layers(policy, lora.targets),
    )  # and no task_type: that of texts would give our arguments names of its own


def build_trainer(
    recipe: Recipe,
    policy: Policy,
    rollout: Rollout,
    scorer: BatchScorer,
    output_dir: Path,
    callbacks: Sequence[TrainerCallback],
) -> ImageGRPOTrainer:
    """The trainer of `policy.model`, in place; parameters that require no gradient stay as they are.

    The reference model of the KL term is loaded again from the folder that the policy came from; with
    `grpo.logprob: guided` both give guided log-probabilities. With `policy.lora` adapters are put into the layers of
    `policy.model`, and the reference is that same model with its adapters switched off.

    Raises:
        UserError: several GPUs without a launcher, no folder for the reference model, or no layer of a LoRA target.
    """
    model = policy.model
    grpo = recipe.grpo
    base = getattr(model.config, "_name_or_path", "")
    check_alone(rollout.team.count, model.device.type)
    if grpo.refers and recipe.policy.lora is None and not (base and Path(base).is_dir()):
        raise UserError(
            f"the KL term needs the base policy as a folder on disk, and {base or 'this policy'!r} is none; "
            "save the policy first, or set grpo.beta=0"
        )
    # One row per group; an update sees batch_size / group_size of them, a batch may serve several updates.
    batches = -(-grpo.steps // grpo.updates_per_batch)
    groups = batches * (grpo.batch_size // grpo.group_size)
    sampling = recipe.sampling
    model.generation_config = GenerationConfig()  # TRL writes its padding id there, and ours is drawn another way
    trainer = ImageGRPOTrainer(
        model,
        selection=rollout.selection if grpo.scale_rewards == "global" else None,
        sampling=sampling if grpo.logprob == "guided" else replace(sampling, cfg_scale=1.0),
        token_weights=scale_weights(policy.card, grpo.scale_balance) if grpo.scale_balance else None,
        credit=None if grpo.tokens.method == "all" else Credit(grpo.tokens, policy, grpo.group_size),
        beta_at=None if grpo.beta_end is None else grpo.beta_at,
        scorer=scorer,
        args=grpo_config(
            recipe,
            output_dir,
            policy.card.tokens,
            list(scorer.weights.values()),
            str(model.device.type),
            rollout.team.count,
        ),
        train_dataset=prompt_dataset(rollout.conditions, groups, recipe.seed),
        processing_class=CodeTokenizer(policy.card.codes),
        rollout_func=rollout,
        callbacks=list(callbacks),
        peft_config=None if recipe.policy.lora is None else lora_config(recipe.policy.lora, policy),
    )
    trainer.remove_callback(PrinterCallback)
    check_sharding(trainer)
    if (moving := controller(grpo, policy.card.codes)) is not None:
        trainer.states.append(EntropyCallback(moving, trainer))
    if grpo.reference_decay < 1:
        reference = trainer.accelerator.unwrap_model(trainer.ref_model)
        trainer.reference = ReferenceCallback(grpo.reference_decay, grpo.reference_every, model, reference)
        trainer.states.append(trainer.reference)
    for callback in trainer.states:
        trainer.add_callback(callback)
    return trainer


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the training libraries' own log lines and progress bars away from ours."""
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
        levels = [logger.level for logger in loggers]
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
