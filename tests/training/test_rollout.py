"""The adapter to TRL's experimental rollout interface. The first tests fail loudly when that interface moves."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import trl
from torch import Tensor

from argrpo_cli.policy import Policy
from argrpo_cli.policy.llamagen.policy import LlamaGen
from argrpo_cli.seeds import happens, of_training
from argrpo_cli.shapes import Condition, Sampling
from argrpo_cli.system.errors import UserError
from argrpo_cli.training import rollout
from argrpo_cli.training.conditions import condition_order, prompt_dataset
from argrpo_cli.training.grpo import ImageGRPOTrainer
from argrpo_cli.training.rollout import Rollout
from argrpo_cli.training.saving import Gallery
from tests.training.tiny import CLASSES, CODES, TOKENS, FakeRewards, count_of_3, paint, tiny_recipe

Build = Callable[..., ImageGRPOTrainer]
MOVED = (
    f"TRL {trl.__version__} no longer treats rollout_func as argrpo_cli/training/rollout.py expects; adapt that module "
    "and the bounds of trl in pyproject.toml"
)


class Spy:
    """Stands between TRL and the rollout and keeps what goes either way."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout
        self.prompts: list[list[str]] = []
        self.outputs: list[dict[str, Any]] = []

    def __call__(self, prompts: list[str], trainer: ImageGRPOTrainer) -> dict[str, Any]:
        assert isinstance(trainer, trl.GRPOTrainer), MOVED
        self.prompts.append(list(prompts))
        self.outputs.append(self.rollout(prompts, trainer))
        return self.outputs[-1]


class KeepConditions(FakeRewards):
    """Remembers the conditions that came with the images."""

    def score(self, images: Tensor, conditions: Any) -> dict[str, Tensor]:
        self.seen = (images.clone(), list(conditions))
        return super().score(images, conditions)


def test_rollout_contract_of_trl(new_trainer: Build) -> None:
    assert "rollout_func" in inspect.signature(trl.GRPOTrainer.__init__).parameters, MOVED
    rewards = KeepConditions(threes=count_of_3)
    trainer = new_trainer(rewards, steps=1)
    assert isinstance(trainer.rollout_func, Rollout), MOVED
    spy = trainer.rollout_func = Spy(trainer.rollout_func)
    inputs: list[dict[str, Tensor]] = []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, batch, *a, **k: (inputs.append(batch), compute_loss(model, batch, *a, **k))[1]
    trainer.train()

    # One prompt per image, those of a group side by side; one entry per prompt back.
    prompts, output = spy.prompts[0], spy.outputs[0]
    assert len(spy.prompts) == 1, MOVED
    assert len(prompts) == 8, MOVED
    assert prompts[:4] == [prompts[0]] * 4, MOVED
    assert prompts[4:] == [prompts[4]] * 4, MOVED
    # Extra lists reach the reward functions, in the same order.
    images, conditions = rewards.seen
    assert torch.equal(images, torch.stack(output["images"])), MOVED
    assert conditions == output["conditions"], MOVED
    # The ids are what is trained, and our log-probabilities travel with them through TRL's shuffle.
    assert {"prompt_ids", "completion_ids", "sampling_per_token_logps", "advantages"} <= inputs[0].keys(), MOVED
    trained = {
        (prompt.item(), tuple(ids.tolist())): logprobs
        for prompt, ids, logprobs in zip(
            inputs[0]["prompt_ids"], inputs[0]["completion_ids"], inputs[0]["sampling_per_token_logps"], strict=True
        )
    }
    for prompt, ids, logprobs in zip(output["prompt_ids"], output["completion_ids"], output["logprobs"], strict=True):
        assert trained[prompt[0], tuple(ids)].tolist() == pytest.approx(logprobs), MOVED
    # Measurements that reward functions hand over are logged.
    assert "reward_within_group_std" in trainer.state.log_history[0], MOVED


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 2.0}])
def test_log_probability_contract_of_trl(
    new_trainer: Build, monkeypatch: pytest.MonkeyPatch, lora: dict[str, float] | None
) -> None:
    """TRL asks one method for all log-probabilities, of the old, the reference and the trained policy in turn."""
    name, moved = "_get_per_token_logps_and_entropies", MOVED.replace("rollout_func", "log-probabilities")
    moved = moved.replace("rollout.py", "grpo.py")
    method = inspect.signature(getattr(trl.GRPOTrainer, name, None)).parameters
    own = inspect.signature(getattr(ImageGRPOTrainer, name)).parameters
    assert set(own) - {"others"} <= set(method), moved
    calls: list[tuple[bool, bool, list[int]]] = []
    trainer = new_trainer(steps=2, updates_per_batch=2, micro_batch_size=4, beta=0.1, lora=lora)
    measure = getattr(ImageGRPOTrainer, name)

    def spy(self: ImageGRPOTrainer, model: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert input_ids.shape[1] == 1 + TOKENS and {model} <= {self.model, self.model_wrapped, self.ref_model}, moved
        answer = measure(self, model, input_ids, *args, **kwargs)
        calls.append((torch.is_grad_enabled(), answer[1] is not None, sorted(input_ids[:, 0].tolist())))
        return answer

    monkeypatch.setattr(ImageGRPOTrainer, name, spy)
    trainer.train()
    whole = list(range(8))  # rows of the batch
    assert [call[:2] for call in calls] == [(False, False)] * 2 + [(True, True)] * 4, moved
    assert calls[0][2] == calls[1][2] == whole, moved
    assert sorted(calls[2][2] + calls[3][2]) == sorted(calls[4][2] + calls[5][2]) == whole, moved
    assert trainer.ratio_meter.take()[0] == pytest.approx(1, abs=0.2), moved


def test_reused_images_are_drawn_once(new_trainer: Build) -> None:
    trainer = new_trainer(steps=4, updates_per_batch=2)
    spy = trainer.rollout_func = Spy(trainer.rollout_func)
    trainer.train()
    assert len(spy.prompts) == 2


@pytest.mark.parametrize("chunk", [64, 3])
def test_images_show_what_was_asked(
    new_trainer: Build, policy: Policy, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """The same images whether they are drawn at once or in chunks of 3, 3 and 2."""
    monkeypatch.setattr(rollout, "drawn_at_once", lambda tokens: chunk)
    trainer = new_trainer(seed=5)
    output = trainer.rollout_func(["2"] * 5 + ["0"] * 3, trainer)
    assert output["conditions"] == [Condition("a photo of a cat", 2)] * 5 + [Condition("a photo of an ant", 0)] * 3
    assert output["prompt_ids"] == [[row] for row in range(8)]
    assert trainer.encoded.condition.tolist() == [2] * 5 + [0] * 3
    seeds = [of_training(5, 0, index) for index in range(8)]
    tokens = policy.sample(policy.encode(output["conditions"]), Sampling(cfg_scale=2.0), seeds).tokens
    assert output["completion_ids"] == tokens.tolist()
    assert torch.equal(torch.stack(output["images"]), paint(tokens))
    assert len(output["logprobs"][0]) == TOKENS
    assert all(0 <= code < CODES for row in output["completion_ids"] for code in row)


def test_images_depend_on_the_seed_and_the_step_alone(new_trainer: Build) -> None:
    trainer = new_trainer()
    draw = lambda: trainer.rollout_func(["1"] * 4, trainer)["completion_ids"]  # noqa: E731
    first = draw()
    assert len({tuple(row) for row in first}) == 4  # a group is four different images
    torch.manual_seed(99)
    assert draw() == first
    trainer.state.global_step = 1
    assert draw() != first


def test_broken_policy_is_one_line(new_trainer: Build, policy: Policy) -> None:
    trainer = new_trainer()
    torch.nn.init.constant_(policy.model.lm_head.weight, float("nan"))
    with pytest.raises(UserError, match=r"after step 0.*lower grpo\.learning_rate"):
        trainer.rollout_func(["1"], trainer)


def test_image_seeds_are_fixed_for_all_time() -> None:
    assert of_training(0, 0, 0) == 759540517790923586
    assert len({of_training(seed, step, index) for seed in range(5) for step in range(5) for index in range(5)}) == 125
    assert all(0 <= of_training(7, step, 0) < 2**63 for step in range(100))


def test_gallery_pictures_have_seeds_of_their_own(policy: Policy) -> None:
    recipe = tiny_recipe(seed=5, grid_images=24)
    seeds = [shot.seed for shot in Gallery(recipe, policy, policy.conditions(range(CLASSES))).shots]
    assert len(set(seeds)) == 24
    trained = {of_training(5, step, index) for step in range(50) for index in range(64)}
    assert trained.isdisjoint(seeds)


def test_dropped_conditions_train_the_null_class(new_trainer: Build) -> None:
    trainer = new_trainer(condition_dropout=0.5)
    kept = new_trainer(condition_dropout=0.0)
    prompts = ["1"] * 32
    output, plain = trainer.rollout_func(prompts, trainer), kept.rollout_func(prompts, kept)
    dropped = (trainer.encoded.condition == CLASSES).tolist()
    assert 8 <= sum(dropped) <= 24
    assert output["completion_ids"] == plain["completion_ids"]  # the images are drawn for their class all the same
    for drop, logprobs in zip(dropped, output["logprobs"], strict=True):
        assert all((value is None) == drop for value in logprobs)
    assert happens("drop", 1, 1.0)
    assert not happens("drop", 1, 0.0)


def test_training_with_dropped_conditions_measures_the_ratio_of_the_others(new_trainer: Build) -> None:
    trainer = new_trainer(condition_dropout=0.5, steps=1, batch_size=16)
    trainer.train()
    mean, _, deviation = trainer.ratio_meter.take()
    assert mean == pytest.approx(1.0, abs=1e-6)
    assert deviation < 1e-5


def test_every_condition_is_drawn_equally_often_in_an_order_of_its_own() -> None:
    order = condition_order([1.0] * 5, groups=23, seed=3)
    assert all(sorted(order[at : at + 5]) == list(range(5)) for at in range(0, 20, 5))
    assert order[:5] != order[5:10]
    assert condition_order([1.0] * 5, 40, seed=3)[:23] == order  # a longer run starts alike
    assert condition_order([1.0] * 5, 23, seed=4) != order
    assert condition_order([1.0], 3, seed=0) == [0, 0, 0]


def test_prompts_are_indices_of_conditions() -> None:
    data = prompt_dataset(list("abcde"), groups=7, seed=3)
    assert [int(prompt) for prompt in data["prompt"]] == condition_order([1.0] * 5, 7, 3)


def test_recipe_reaches_the_sampler(new_trainer: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Sampling, str]] = []
    sample = LlamaGen.sample

    def spy(self: Policy, encoded: Any, sampling: Sampling, seeds: Any, *, model: Any, logp: str) -> Any:
        seen.append((sampling, logp))
        return sample(self, encoded, sampling, seeds, model=model, logp=logp)

    monkeypatch.setattr(LlamaGen, "sample", spy)
    trainer = new_trainer(cfg_scale=1.5, temperature=0.7, logprob="guided")
    trainer.rollout_func(["0"], trainer)
    assert seen == [(Sampling(cfg_scale=1.5, temperature=0.7), "guided")]
    assert tiny_recipe().sampling.top_k == 0
