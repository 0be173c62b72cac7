"""TRL, as `trainer.py` sets it up, computes the paper's objective on what the sampler drew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from argrpo_cli.policy import Policy
from argrpo_cli.policy.llamagen.model import Encoded
from argrpo_cli.policy.llamagen.policy import LlamaGen
from argrpo_cli.policy.protocol import Scored
from argrpo_cli.shapes import Sampling
from argrpo_cli.system.errors import UserError
from argrpo_cli.training.grpo import CodeTokenizer, ImageGRPOTrainer, RatioMeter, grpo_config
from tests.training.objective import advantages, grpo_objective, kl_estimate
from tests.training.tiny import CLASSES, CODES, TOKENS, FakeRewards, brightness, count_of_3, redness, tiny_recipe

Build = Callable[..., ImageGRPOTrainer]
GOLDENS = Path(__file__).parents[1] / "data" / "grpo" / "H_grpo.safetensors"


class GivenLogProbs(nn.Module):
    """A "model" whose log-probabilities are its parameters."""

    def __init__(self, logp: Tensor) -> None:
        super().__init__()
        self.logp = nn.Parameter(logp)

    def forward(self, encoded: Encoded, tokens: Tensor, sampling: Sampling, entropy: bool) -> Scored:
        return Scored(self.logp, torch.zeros_like(self.logp))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What TRL hands to the loss, update by update, with the conditions behind it and the loss it got."""
    seen: list[dict[str, Any]] = []
    compute_loss = ImageGRPOTrainer.compute_loss

    def spy(self: ImageGRPOTrainer, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        encoded = self.encoded[inputs["prompt_ids"][:, 0]]
        seen.append(dict(inputs) | {"loss": loss.detach(), "encoded": encoded})
        return loss

    monkeypatch.setattr(ImageGRPOTrainer, "compute_loss", spy)
    return seen


def teacher_forced(policy: Policy, batch: dict[str, Any], scale: float | None, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [N, T] of a batch's tokens, straight from the definition: guided logits, softmax, gather."""
    encoded, tokens = batch["encoded"], batch["completion_ids"]
    with torch.no_grad():
        conditional = policy.model.logits(encoded, tokens)
        logits = conditional
        if scale is not None:
            unconditional = policy.model.logits(Encoded(torch.full_like(encoded.condition, CLASSES)), tokens)
            logits = unconditional + scale * (conditional - unconditional)
    return (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def test_trl_loss_equals_the_golden_loss_and_gradient(new_trainer: Build) -> None:
    golden = load_file(GOLDENS)
    trainer = new_trainer(beta=0.1, epsilon=0.2)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    model = GivenLogProbs(golden["in/logp"])
    images = len(golden["in/logp"])
    trainer.encoded = Encoded(torch.zeros(images, dtype=torch.long))
    loss = trainer.compute_loss(
        model,
        {
            "prompt_ids": torch.zeros(images, 1, dtype=torch.long),
            "prompt_mask": torch.ones(images, 1, dtype=torch.long),
            "completion_ids": torch.zeros(images, TOKENS, dtype=torch.long),
            "completion_mask": torch.ones(images, TOKENS, dtype=torch.long),
            "advantages": golden["out/advantages_sample"].flatten(),
            "old_per_token_logps": golden["in/old_logp"],
            "ref_per_token_logps": golden["in/ref_logp"],
            "sampling_per_token_logps": golden["in/old_logp"],
        },
    )
    loss.backward()
    assert torch.allclose(loss, golden["out/loss_sample"].squeeze(), rtol=0, atol=1e-10)
    assert torch.allclose(model.logp.grad, golden["out/dloss_dlogp_sample"], rtol=0, atol=1e-10)


def test_advantages_are_normalised_within_groups(new_trainer: Build, batches: list[dict[str, Tensor]]) -> None:
    scores: list[Tensor] = []

    def record(images: Tensor) -> Tensor:
        scores.append(brightness(images))
        return scores[-1]

    new_trainer(FakeRewards(bright=record), steps=1).train()
    # TRL shuffles the images of a batch, so the values are compared sorted.
    expected = advantages(scores[0].view(2, 4)).flatten()
    assert torch.allclose(batches[0]["advantages"].sort().values, expected.sort().values, atol=1e-5)


def test_reward_weights_reach_the_advantages(new_trainer: Build, batches: list[dict[str, Tensor]]) -> None:
    weights = {"threes": 5.0, "codes": -0.5}
    seen: list[Tensor] = []

    def mean_code(images: Tensor) -> Tensor:  # varies more than the count, so that each weight shows
        seen.append(images)
        return 255 * brightness(images)

    new_trainer(FakeRewards(threes=count_of_3, codes=mean_code), steps=1, weights=weights).train()
    threes, codes = count_of_3(seen[0]).view(2, 4), 255 * brightness(seen[0]).view(2, 4)

    def sorted_advantages(total: Tensor) -> Tensor:
        return advantages(total).flatten().sort().values

    trained = batches[0]["advantages"].sort().values
    assert torch.allclose(trained, sorted_advantages(5.0 * threes - 0.5 * codes), rtol=0, atol=1e-4)
    for other in (threes + codes, threes, 5.0 * threes + 0.5 * codes):  # the rewards are such that weights matter
        assert not torch.allclose(trained, sorted_advantages(other), rtol=0, atol=1e-2)


@pytest.mark.parametrize(("logprob", "scale"), [("conditional", None), ("guided", 2.0)])
def test_first_on_policy_step_has_ratio_1(new_trainer: Build, logprob: str, scale: float | None) -> None:
    trainer = new_trainer(steps=1, logprob=logprob, temperature=0.8)
    trainer.train()
    mean, _, deviation = trainer.ratio_meter.take()
    assert mean == pytest.approx(1.0, abs=1e-6)
    assert deviation < 1e-5


def test_bfloat16_samples_and_trains_under_autocast(
    new_trainer: Build, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled_under: list[tuple[bool, torch.dtype]] = []
    sample = LlamaGen.sample

    def spy(*args: Any, **kwargs: Any) -> Any:
        sampled_under.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return sample(*args, **kwargs)

    monkeypatch.setattr(LlamaGen, "sample", spy)
    trainer = new_trainer(steps=1, dtype="bfloat16", temperature=0.8)
    assert trainer.args.bf16
    trainer.train()
    assert sampled_under == [(True, torch.bfloat16)]
    mean, _, deviation = trainer.ratio_meter.take()
    assert mean == pytest.approx(1.0, abs=5e-3)
    assert deviation < 0.1
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("logprob", "scale"), [("conditional", None), ("guided", 2.0)])
def test_sampled_trained_and_reference_logprobs_are_one_distribution(
    new_trainer: Build, policy: Policy, batches: list[dict[str, Tensor]], logprob: str, scale: float | None
) -> None:
    """Sampler, training pass and reference agree with the definition, for the guided distribution too."""
    base = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    trainer = new_trainer(steps=1, logprob=logprob, temperature=0.8, updates_per_batch=1, beta=0.1)
    trainer.train()
    policy.model.load_state_dict(base)
    expected = teacher_forced(policy, batches[0], scale, temperature=0.8)
    assert torch.allclose(batches[0]["sampling_per_token_logps"], expected, atol=1e-5)
    assert torch.allclose(batches[0]["ref_per_token_logps"], expected, atol=1e-5)
    other = teacher_forced(policy, batches[0], None if scale else 2.0, temperature=0.8)
    assert not torch.allclose(expected, other, atol=1e-2)


def test_gradient_of_guided_logprob_reaches_the_null_embedding(new_trainer: Build, policy: Policy) -> None:
    null = policy.model.model.class_embedding.weight[CLASSES].detach().clone()
    new_trainer(steps=1, logprob="conditional", weight_decay=0.0).train()
    assert torch.equal(policy.model.model.class_embedding.weight[CLASSES], null)
    new_trainer(steps=1, logprob="guided", weight_decay=0.0).train()
    assert not torch.equal(policy.model.model.class_embedding.weight[CLASSES], null)


def test_ratio_kl_and_clipping_after_the_first_update(
    new_trainer: Build, policy: Policy, batches: list[dict[str, Tensor]]
) -> None:
    """The second update of a batch is off-policy: TRL's loss there is the objective of eq. 4, clipping included."""
    before: list[dict[str, Tensor]] = []
    trainer = new_trainer(steps=2, updates_per_batch=2, learning_rate=0.02, beta=0.1, weight_decay=0.0)
    trainer.add_callback(_Before(policy, before))
    trainer.train()
    batch = batches[1]
    policy.model.load_state_dict(before[1])
    logp = teacher_forced(policy, batch, None)
    objective = grpo_objective(
        logp, batch["old_per_token_logps"], batch["ref_per_token_logps"], batch["advantages"], 0.2, 0.1
    )
    assert objective.clip_low + objective.clip_high > 0.05  # a large step: the test is about clipping
    assert objective.kl > 0
    assert batch["loss"].item() == pytest.approx(objective.loss.item(), abs=1e-5)
    logged = trainer.state.log_history[1]
    assert logged["kl"] == pytest.approx(kl_estimate(logp, batch["ref_per_token_logps"]).mean().item(), abs=1e-5)
    assert logged["clip_ratio/low_mean"] == pytest.approx(objective.clip_low.item(), abs=1e-6)
    assert logged["clip_ratio/high_mean"] == pytest.approx(objective.clip_high.item(), abs=1e-6)


def test_losses_of_whole_images_are_one_where_images_have_one_length(
    new_trainer: Build, policy: Policy, batches: list[dict[str, Tensor]]
) -> None:
    """dr_grpo, dapo and bnpo differ from grpo in how they weigh lengths; the others are other objectives."""
    base = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    second: dict[str, float] = {}
    for loss in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"):
        policy.model.load_state_dict(base)
        batches.clear()
        importance = "sequence" if loss == "luspo" else "token"
        trainer = new_trainer(steps=2, updates_per_batch=2, learning_rate=0.02, loss=loss, importance=importance)
        trainer.train()
        second[loss] = batches[1]["loss"].item()
    for loss in ("dr_grpo", "dapo", "bnpo"):
        assert second[loss] == pytest.approx(second["grpo"], abs=1e-5)
    for loss in ("cispo", "sapo", "luspo", "vespo"):
        assert abs(second[loss] - second["grpo"]) > 1e-3


def test_cispo_clips_the_weight_and_not_the_gradient(
    new_trainer: Build, policy: Policy, batches: list[dict[str, Tensor]]
) -> None:
    """-sg(min(r, 1 + epsilon)) A log pi, averaged over tokens (MiniMax-M1, eq. 4); beta 0."""
    before: list[dict[str, Tensor]] = []
    trainer = new_trainer(steps=2, updates_per_batch=2, learning_rate=0.02, loss="cispo", beta=0.0)
    trainer.add_callback(_Before(policy, before))
    trainer.train()
    batch = batches[1]
    policy.model.load_state_dict(before[1])
    logp = teacher_forced(policy, batch, None)
    r = (logp - batch["old_per_token_logps"]).exp()
    assert (r > 1.2).any()
    expected = -(r.clamp(max=1.2) * batch["advantages"][:, None] * logp).mean()
    assert batch["loss"].item() == pytest.approx(expected.item(), abs=1e-5)


def test_asymmetric_clipping(new_trainer: Build, policy: Policy, batches: list[dict[str, Tensor]]) -> None:
    before: list[dict[str, Tensor]] = []
    trainer = new_trainer(steps=2, updates_per_batch=2, learning_rate=0.02, epsilon=0.05, epsilon_high=0.4, beta=0.0)
    trainer.add_callback(_Before(policy, before))
    trainer.train()
    batch = batches[1]
    policy.model.load_state_dict(before[1])
    r = (teacher_forced(policy, batch, None) - batch["old_per_token_logps"]).exp()
    advantage = batch["advantages"][:, None]
    low, high = ((r < 0.95) & (advantage < 0)).float().mean(), ((r > 1.4) & (advantage > 0)).float().mean()
    assert low > 0 and high > 0
    logged = trainer.state.log_history[1]
    assert logged["clip_ratio/low_mean"] == pytest.approx(low.item(), abs=1e-6)
    assert logged["clip_ratio/high_mean"] == pytest.approx(high.item(), abs=1e-6)
    gain = torch.minimum(r * advantage, r.clamp(0.95, 1.4) * advantage)
    assert batch["loss"].item() == pytest.approx(-gain.mean().item(), abs=1e-5)


def test_the_entropy_bonus_raises_the_entropy(new_trainer: Build, policy: Policy) -> None:
    """With no reward to follow, the bonus is all there is."""
    base = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    flat = FakeRewards(flat=lambda images: torch.zeros(len(images)))
    entropy: dict[float, list[float]] = {}
    for weight in (0.0, 0.5):
        policy.model.load_state_dict(base)
        trainer = new_trainer(flat, steps=6, beta=0.0, entropy_weight=weight, weight_decay=0.0)
        trainer.train()
        entropy[weight] = [record["entropy"] for record in trainer.state.log_history if "entropy" in record]
    assert entropy[0.5][-1] > entropy[0.5][0] + 0.01
    assert entropy[0.5][-1] > entropy[0.0][-1] + 0.01


def test_the_entropy_weight_follows_its_target(new_trainer: Build) -> None:
    """Up by a step after every update below the target, down to 0 after every one above it."""
    weights = {}
    for target in (100.0, 0.01):
        trainer = new_trainer(steps=4, entropy_weight=0.01, entropy_target=target, entropy_step=0.005)
        trainer.train()
        weights[target] = [record["entropy_coef"] for record in trainer.state.log_history if "entropy_coef" in record]
    assert weights[100.0] == pytest.approx([0.015, 0.02, 0.025, 0.03])
    assert weights[0.01] == pytest.approx([0.005, 0, 0, 0])


def _Before(policy: Policy, states: list[dict[str, Tensor]]) -> Any:
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            states.append({name: tensor.clone() for name, tensor in policy.model.state_dict().items()})

    return Keep()


def test_micro_batches_give_the_gradient_of_the_whole_batch(new_trainer: Build, policy: Policy) -> None:
    base = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    norms = []
    for size in (None, 2):
        policy.model.load_state_dict(base)
        trainer = new_trainer(steps=1, micro_batch_size=size)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_rewarded_token_becomes_more_frequent(new_trainer: Build) -> None:
    trainer = new_trainer(steps=40, batch_size=32, group_size=8, learning_rate=3e-3, beta=0.01)
    trainer.train()
    threes = [record["reward"] for record in trainer.state.log_history if "reward" in record]
    assert len(threes) == 40
    assert sum(threes[-5:]) / 5 > 3 * sum(threes[:5]) / 5


def test_missing_score_leaves_its_image_out(new_trainer: Build, batches: list[dict[str, Tensor]]) -> None:
    def sometimes(images: Tensor) -> Tensor:
        scores = brightness(images)
        scores[1] = float("nan")  # of the first group
        return scores

    trainer = new_trainer(FakeRewards(bright=brightness, often=sometimes), steps=1)
    trainer.train()
    assert (batches[0]["advantages"] == 0).sum() == 1
    logged = trainer.state.log_history[0]
    assert logged["images_left_out"] == 1


def test_reference_model_exists_only_for_the_kl_term(new_trainer: Build) -> None:
    assert new_trainer(beta=0.0).ref_model is None
    assert new_trainer(beta=0.1).ref_model is not None


def test_kl_term_without_a_policy_folder_is_refused(new_trainer: Build, policy: Policy) -> None:
    policy.model.config._name_or_path = ""
    with pytest.raises(UserError, match=r"grpo\.beta=0"):
        new_trainer(beta=0.1)


def test_optimiser_is_the_papers_adamw(new_trainer: Build) -> None:
    trainer = new_trainer(learning_rate=1e-5)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed, plain = optimizer.param_groups
    for group in (decayed, plain):
        assert (group["lr"], tuple(group["betas"])) == (1e-5, (0.9, 0.95))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert all(parameter.dim() == 1 for parameter in plain["params"])  # the norms' weights
    assert all(parameter.dim() == 2 for parameter in decayed["params"])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_and_schedule(new_trainer: Build, schedule: str) -> None:
    trainer = new_trainer(steps=6, warmup_steps=2, schedule=schedule, learning_rate=1.0, batch_size=4)
    trainer.create_optimizer_and_scheduler(6)
    rates = []
    for _ in range(6):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[:3] == pytest.approx([0.0, 0.5, 1.0])
    assert (rates[-1] == 1.0) == (schedule == "constant")


def test_settings_that_trl_would_choose_otherwise(tmp_path: Path) -> None:
    config = grpo_config(tiny_recipe(), tmp_path, TOKENS, [5.0, -0.5], "cpu")
    assert config.reward_weights == [5.0, -0.5]
    assert config.loss_type == "grpo"
    assert config.use_bias_correction_kl is False
    assert config.gradient_checkpointing is False
    assert config.mask_truncated_completions is False
    assert config.bf16 is False
    assert config.scale_rewards == "group"
    assert config.num_iterations == 1
    assert config.dataloader_num_workers == 0


@pytest.mark.parametrize(
    ("key", "value", "setting"),
    [
        # Values that are neither the recipe's defaults nor TRL's.
        ("seed", 7, "seed"),
        ("epsilon", 0.3, "epsilon"),
        ("beta", 0.07, "beta"),
        ("learning_rate", 3e-4, "learning_rate"),
        ("weight_decay", 0.02, "weight_decay"),
        ("max_grad_norm", 0.7, "max_grad_norm"),
        ("warmup_steps", 3, "warmup_steps"),
        ("steps", 11, "max_steps"),
        ("group_size", 2, "num_generations"),
        ("updates_per_batch", 4, "num_iterations"),
        ("temperature", 0.9, "temperature"),
        ("loss", "dr_grpo", "loss_type"),
        ("epsilon_high", 0.28, "epsilon_high"),
        ("importance", "sequence", "importance_sampling_level"),
        ("scale_rewards", "batch", "scale_rewards"),
        ("entropy_weight", 0.03, "entropy_coef"),
        ("entropy_target", 3.2, "entropy_target"),
        ("entropy_step", 0.002, "entropy_coef_delta"),
        ("entropy_weight_max", 0.4, "entropy_coef_max"),
        ("gradient_checkpointing", True, "gradient_checkpointing"),
        ("schedule", "cosine", "lr_scheduler_type"),
        ("batch_size", 24, "per_device_train_batch_size"),
    ],
)
def test_recipe_key_reaches_trl(tmp_path: Path, key: str, value: Any, setting: str) -> None:
    config = grpo_config(tiny_recipe(**{key: value}), tmp_path, TOKENS, [1.0], "cpu")
    assert getattr(config, setting) == value


def test_the_upper_clip_bound_is_the_same_in_all_losses(tmp_path: Path) -> None:
    """TRL takes a distance from 1 everywhere but in cispo, where it takes the bound itself."""
    bounds = {
        loss: grpo_config(tiny_recipe(loss=loss, epsilon=0.3), tmp_path, TOKENS, [1.0], "cpu").epsilon_high
        for loss in ("grpo", "dapo", "cispo")
    }
    assert bounds == {"grpo": 0.3, "dapo": 0.3, "cispo": 1.3}


def test_recipe_keys_of_two_settings_reach_trl(tmp_path: Path) -> None:
    recipe = tiny_recipe(betas=[0.85, 0.97], batch_size=24, micro_batch_size=8)
    config = grpo_config(recipe, tmp_path, 13, [1.0], "cpu")
    assert (config.adam_beta1, config.adam_beta2) == (0.85, 0.97)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (8, 3)
    assert config.max_completion_length == 13


def test_each_reward_is_logged_under_its_name_with_its_raw_value(new_trainer: Build) -> None:
    rewards = FakeRewards(bright=brightness, red=redness)
    trainer = new_trainer(rewards, steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["reward"] == pytest.approx(logged["rewards/bright/mean"] + logged["rewards/red/mean"], abs=1e-6)


def test_ratio_meter_counts_every_token_but_those_of_another_distribution() -> None:
    meter = RatioMeter()
    assert meter.take() is None
    logp = torch.log(torch.tensor([[0.5, 0.25], [0.5, 0.5]]))
    sampled = torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    sampled[1] = torch.nan
    meter.add(logp, sampled)
    assert meter.take() == pytest.approx((0.75, 0.25, 0.5))
    assert meter.take() is None


def test_code_tokenizer_says_the_codes() -> None:
    tokenizer = CodeTokenizer(CODES)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == CODES  # never a code
    assert tokenizer.batch_decode([[3, 1], [0, 31]], skip_special_tokens=True) == ["3 1", "0 31"]
    assert tokenizer("3 1 31").input_ids == [3, 1, 31]


def test_entropy_is_that_of_the_trained_distribution(
    new_trainer: Build, policy: Policy, batches: list[dict[str, Tensor]]
) -> None:
    base = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    trainer = new_trainer(steps=1)
    trainer.train()
    policy.model.load_state_dict(base)
    with torch.no_grad():
        logits = policy.model.logits(batches[0]["encoded"], batches[0]["completion_ids"])
    entropy = -(F.softmax(logits, -1) * F.log_softmax(logits, -1)).sum(-1).mean()
    assert trainer.state.log_history[0]["entropy"] == pytest.approx(entropy.item(), abs=1e-5)
