"""GRPO on captions: the training pass must see each image's own caption, and nothing else may change."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from argrpo_cli.captions import CAPTION_SETS, read_captions
from argrpo_cli.geneval.prompts import TAGS, content, mirrored, parse_prompt, prompt_set
from argrpo_cli.policy import Policy, load_policy
from argrpo_cli.rewards import reward_weights
from argrpo_cli.seeds import of_training
from argrpo_cli.shapes import Sampling
from argrpo_cli.system.errors import UserError
from argrpo_cli.training import run_training
from argrpo_cli.training.conditions import run_conditions
from argrpo_cli.training.grpo import ImageGRPOTrainer, build_trainer
from argrpo_cli.training.rollout import Rollout, Stopwatch
from argrpo_cli.training.scorer import BatchScorer
from tests.training.tiny import FakeRewards, brightness, paint, tiny_caption_policy, tiny_recipe

CAPTIONS = ["a red dog", "a cat", "a blue cat a dog", "dog"]
Build = Callable[..., ImageGRPOTrainer]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captions") / "policy"
    tiny_caption_policy().save(path)
    return path


@pytest.fixture
def captioned(folder: Path) -> Policy:
    policy = load_policy(folder)
    policy.decode = paint
    return policy


@pytest.fixture
def build(captioned: Policy, tmp_path: Path) -> Build:
    def make(**grpo: Any) -> ImageGRPOTrainer:
        rewards = FakeRewards(bright=brightness)
        recipe = tiny_recipe(rewards=rewards.names, **grpo)
        rollout = Rollout(recipe, captioned.conditions(CAPTIONS), captioned)
        weights = reward_weights(recipe.rewards, rewards.family)
        scorer = BatchScorer(rewards, weights, recipe.grpo.group_size, Stopwatch())
        return build_trainer(recipe, captioned, rollout, scorer, tmp_path / "trainer", callbacks=[])

    return make


def recipe_of(folder: Path, **keys: Any) -> Any:
    return tiny_recipe(folder, conditions={"source": "captions", "captions": CAPTIONS}, **keys)


def train(recipe: Any, out: Path, resume: bool = False) -> None:
    run_training(recipe, out, resume, rewards=FakeRewards(), console=Console(file=io.StringIO()))


@pytest.mark.parametrize("logprob", ["conditional", "guided"])
def test_the_first_step_has_ratio_1_although_captions_differ_in_length(build: Build, logprob: str) -> None:
    trainer = build(steps=1, batch_size=16, logprob=logprob, cfg_scale=3.0, micro_batch_size=8)
    trainer.train()
    mean, _, deviation = trainer.ratio_meter.take()
    assert mean == pytest.approx(1.0, abs=1e-6)
    assert deviation < 2e-5


def test_a_wrong_caption_in_the_training_pass_would_show_in_the_ratio(build: Build, captioned: Policy) -> None:
    trainer = build(steps=1, batch_size=16)
    rollout = trainer.rollout_func

    def swapped(prompts: list[str], trainer: ImageGRPOTrainer) -> dict[str, Any]:
        output = rollout(prompts, trainer)
        output["prompt_ids"] = output["prompt_ids"][::-1]
        return output

    trainer.rollout_func = swapped
    trainer.train()
    assert trainer.ratio_meter.take()[2] > 0.01


def test_the_reference_model_reads_the_same_captions(build: Build) -> None:
    trainer = build(steps=1, beta=0.1, batch_size=16)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0.0, abs=1e-6)


def test_images_show_their_captions(build: Build, captioned: Policy) -> None:
    trainer = build(seed=5)
    output = trainer.rollout_func(["2"] * 4 + ["1"] * 4, trainer)
    assert [one.prompt for one in output["conditions"]] == ["a blue cat a dog"] * 4 + ["a cat"] * 4
    seeds = [of_training(5, 0, index) for index in range(8)]
    tokens = captioned.sample(captioned.encode(output["conditions"]), Sampling(cfg_scale=2.0), seeds).tokens
    assert output["completion_ids"] == tokens.tolist()
    assert output["prompt_ids"] == [[row] for row in range(8)]


def test_dropped_captions_train_the_null_caption_under_their_own_padding(build: Build, captioned: Policy) -> None:
    trainer = build(condition_dropout=0.5)
    output = trainer.rollout_func(["1"] * 32, trainer)
    dropped = torch.tensor([row[0] is None for row in output["logprobs"]])
    assert 8 <= dropped.sum() <= 24
    null, own = captioned.model.model.null_caption, captioned.encode(captioned.conditions(["a cat"]))
    for row, drop in enumerate(dropped):
        assert torch.equal(trainer.encoded.condition[row], null if drop else own.condition[0])
        assert torch.equal(trainer.encoded.mask[row], own.mask[0])


def test_a_whole_run_and_its_resumption(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, save_every=2, steps=4, beta=0.05, condition_dropout=0.2)
    train(recipe, tmp_path / "whole")
    half = recipe.model_copy(update={"grpo": recipe.grpo.model_copy(update={"steps": 2})})
    train(half, tmp_path / "parts")
    train(recipe, tmp_path / "parts", resume=True)
    whole, parts = (load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    base = load_file(folder / "model.safetensors")
    moved = [key for key in whole if not torch.equal(whole[key], base[key])]
    assert any("caption_mlp" in key for key in moved)
    assert "model.null_caption" not in moved  # as published, never trained
    trained = load_policy(tmp_path / "whole")
    assert trained.text_encoder.words == load_policy(folder).text_encoder.words
    card = json.loads((tmp_path / "whole" / "policy" / "policy.json").read_text())
    assert card["text_encoder"] == "text_encoder"


def test_a_file_of_captions_that_changed_is_noticed_at_resume(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("a dog\na cat\n")
    recipe = tiny_recipe(folder, conditions={"source": "captions", "captions": str(file)}, steps=1, save_every=1)
    train(recipe, tmp_path / "run")
    longer = recipe.model_copy(update={"grpo": recipe.grpo.model_copy(update={"steps": 2})})
    file.write_text("a cat\na dog\n")
    with pytest.raises(UserError, match=r"conditions: .*run was started with others.*captions\.txt"):
        train(longer, tmp_path / "run", resume=True)
    file.write_text("a dog\na cat\n")
    train(longer, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"source": "classes"}, r"conditions.source is 'classes', but the policy .* draws captions"),
        ({"source": "captions", "captions": ["a rad dog"]}, "does not know the word 'rad'.*did you mean 'red'"),
        ({"source": "captions", "captions": ["a dog " * 8]}, "has 17 tokens and the policy reads 6: shorten it"),
        ({"source": "captions", "captions": "nowhere.txt"}, "no captions 'nowhere.txt': not a file"),
    ],
)
def test_conditions_that_do_not_fit_are_named(folder: Path, conditions: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_conditions(tiny_recipe(folder, conditions=conditions), load_policy(folder))


def test_captions_are_asked_once_each_in_the_order_given(folder: Path) -> None:
    recipe = tiny_recipe(folder, conditions={"source": "captions", "captions": ["a dog", "a cat", "a dog"]})
    assert [one.prompt for one in run_conditions(recipe, load_policy(folder))] == ["a dog", "a cat"]


def test_captions_come_from_files_and_bundled_sets(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog\n\n  a cat \n")
    assert read_captions(str(tmp_path / "a.txt")) == ["a dog", "a cat"]
    (tmp_path / "b.jsonl").write_text('{"prompt": "a dog", "more": 1}\n')
    assert read_captions(str(tmp_path / "b.jsonl")) == ["a dog"]
    (tmp_path / "b.csv").write_text('prompt,more\n"a dog, red",1\n')
    assert read_captions(str(tmp_path / "b.csv")) == ["a dog, red"]
    (tmp_path / "b.json").write_text('["a dog", "a cat"]')
    assert read_captions(str(tmp_path / "b.json")) == ["a dog", "a cat"]
    (tmp_path / "c.jsonl").write_text('{"prompt": "a dog"}\n{"text": "a cat"}\n')
    with pytest.raises(UserError, match=r"c\.jsonl, line 2: 'prompt' is missing; there are text"):
        read_captions(str(tmp_path / "c.jsonl"))
    (tmp_path / "d.txt").write_text("\n")
    with pytest.raises(UserError, match="holds no captions"):
        read_captions(str(tmp_path / "d.txt"))
    assert len(read_captions("geneval")) == 553
    with pytest.raises(UserError, match=f"{CAPTION_SETS[0]}.*did you mean 'geneval-nano'"):
        read_captions("geneval-nan")


def test_training_captions_ask_for_nothing_of_the_benchmark_but_counts_and_single_objects() -> None:
    captions = read_captions("nano")
    assert len(captions) == len(set(captions))
    prompts = [parse_prompt(caption) for caption in captions]
    counts = Counter(prompt.tag for prompt in prompts)
    assert counts == {**dict.fromkeys(TAGS, 72), "single_object": 24}
    asked = {content(prompt) for name in ("geneval-nano", "geneval-nano-extra") for prompt in prompt_set(name)}
    for prompt in prompts:
        if prompt.tag not in ("single_object", "counting"):
            assert content(prompt) not in asked
        if prompt.tag == "position":
            assert content(mirrored(prompt)) not in asked
    assert captions == read_captions("nano")


def test_a_mirrored_relation_says_the_same_the_other_way_round() -> None:
    assert mirrored(parse_prompt("a photo of a dog left of an apple")).text == "a photo of an apple right of a dog"
    assert mirrored(mirrored(parse_prompt("a photo of a dog below a cat"))).text == "a photo of a dog below a cat"
