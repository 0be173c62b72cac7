"""What is laid over what: terms that are replaced or added, warm-ups of shorter runs, options that stand for keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from argrpo_cli.recipe import dump_recipe, load_recipe
from argrpo_cli.system.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def loaded(recipe, overrides=(), **options):
    lines: list[str] = []
    return load_recipe(recipe, overrides, options, lines.append), lines


def terms(recipe):
    return [(term.name, term.factor, term.weight) for term in recipe.rewards.terms]


BASE = [("nano-clip", 7.0, 1.0), ("nano-quality", 8.0, 1.0), ("nano-critic", 2.0, 0.5)]  # nano/c2i


def test_terms_that_a_recipe_replaces_are_named(write):
    path = write("mine.yaml", "extends: nano/c2i\nrewards: {terms: [{name: nano-critic}]}")
    recipe, lines = loaded(path)
    assert terms(recipe) == terms(recipe.start) == [("nano-critic", 1.0, 1.0)]
    assert lines == [
        f"{path}: rewards.terms takes the place of the terms nano-clip, nano-quality, nano-critic that it extends; to "
        "keep them and add to them, say rewards.add"
    ]
    for text in ("extends: mine.yaml", "rewards: {terms: [{name: nano-critic}]}", "extends: nano/t2i"):
        assert loaded(write("child.yaml", text))[1] == lines * (text == "extends: mine.yaml")


@pytest.mark.parametrize("said", ["{name: hpsv2, weight: 2}", "[{name: hpsv2, weight: 2}]"])
def test_terms_are_added_in_a_file_and_on_the_command_line(write, said):
    path = write("mine.yaml", f"extends: nano/c2i\nrewards: {{add: {said}}}")
    for recipe in (path, "nano/c2i"):
        recipe, lines = loaded(recipe, [f"rewards.add={said}"] if recipe != path else [])
        assert terms(recipe) == terms(recipe.start) == [*BASE, ("hpsv2", 5.0, 2.0)] and lines == []
        again, lines = loaded(write("again.yaml", dump_recipe(recipe)))
        assert again == recipe and lines == []


def test_an_added_term_of_a_name_that_is_there_changes_it(write):
    path = write("mine.yaml", "extends: nano/c2i\nrewards: {add: [{name: nano-critic, weight: 3}, clip]}")
    start = "start.rewards.add={name: clip, weight: 4}"
    recipe, _ = loaded(path, ["rewards.add=ocr", "rewards.terms.0.weight=0", start])
    changed = [("nano-clip", 7.0, 0.0), BASE[1], ("nano-critic", 2.0, 3.0), ("clip", 5.0, 1.0), ("ocr", 1.0, 1.0)]
    assert terms(recipe) == changed
    assert terms(recipe.start) == [("clip", 5.0, 4.0) if one[0] == "clip" else one for one in changed]
    plain, _ = loaded(write("plain.yaml", "rewards: {add: ocr}"))
    assert [name for name, *_ in terms(plain)] == ["nano-clip", "nano-quality", "nano-critic", "ocr"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("[{nam: clip}]", r"unknown key 'rewards\.terms\.3\.nam'.*did you mean 'name'"),
        ("[3]", r"rewards\.terms\.3 = 3: must be a mapping with the keys name"),
        ("{name: clip, weight: x}", r"rewards\.terms\.3\.weight = 'x': must be a number"),
    ],
)
def test_a_wrong_addition_is_told(said, message):
    with pytest.raises(UserError, match=rf"^--set rewards\.add=.*{message}"):
        load_recipe("nano/c2i", [f"rewards.add={said}"])


def test_a_resolved_recipe_has_numbers_where_a_default_might_change():
    recipe, _ = loaded("c2i_b256", ["start=null"])
    assert terms(recipe)[:3] == [("clip", 5.0, 1.0), ("clip-quantized", 1.0, 1.0), ("hpsv2", 5.0, 1.0)]
    assert recipe.grpo.epsilon_high == recipe.grpo.epsilon == 0.2
    assert recipe.guards.ratio.limit.model_dump() == {"float32": 0.01, "bfloat16": 0.1}
    meant = {  # where null has a meaning of its own
        "out", "start", "lora", "dataset", "time_limit_minutes", "beta_end", "spread_floor", "entropy_target",
        "micro_batch_size", "captions", "limit", "perceptual_folder", "hub_model_id", "hub_private_repo",
    }  # fmt: skip
    lines = dump_recipe(recipe).split("published:")[0].splitlines()
    assert {line.partition(":")[0].strip() for line in lines if "null" in line} <= meant


def test_a_term_that_is_named_anew_has_the_factor_of_its_name():
    assert terms(loaded("c2i_b256", ["rewards.terms.0.factor=null"])[0])[0] == ("clip", 5.0, 1.0)
    assert terms(loaded("c2i_b256", ["rewards.terms.0.name=imagereward"])[0])[0][:2] == ("imagereward", 1.0)


def test_one_limit_of_the_ratio_is_for_both_number_formats(write):
    for said, limits in (("0.5", (0.5, 0.5)), ("null", (0.01, 0.1)), ("{bfloat16: 0.2}", (0.01, 0.2))):
        limit = loaded("nano/c2i", [f"guards.ratio.limit={said}"])[0].guards.ratio.limit
        assert (limit.float32, limit.bfloat16) == limits
    with pytest.raises(UserError, match=r"guards\.ratio\.limit = -1: must be greater than 0"):
        load_recipe("nano/c2i", ["guards.ratio.limit=-1"])


def test_a_loss_that_clips_nothing_has_no_clip_range_above():
    assert loaded("nano/c2i", ["grpo.loss=sapo"])[0].grpo.epsilon_high is None


@pytest.mark.parametrize(
    ("steps", "warmup"), [(3, 0), (4, 0), (130, 5), (6, 5), (1000, 5)]
)  # nano/c2i has 130 updates, 5 of warm-up
def test_an_inherited_warmup_has_the_share_of_a_shorter_run(steps, warmup):
    for how in ({"overrides": [f"grpo.steps={steps}"]}, {"steps": steps}):
        recipe, lines = loaded("nano/c2i", **how)
        assert (recipe.grpo.steps, recipe.grpo.warmup_steps) == (steps, warmup)
        assert lines == [f"grpo.warmup_steps: 0 of {steps} updates, in the place of 5 of 130"] * (steps < 5)


def test_the_warmup_of_a_start_is_shortened_too(write):
    recipe, lines = loaded("nano/c2i", ["distil.steps=9"])
    assert recipe.start.distil.steps == 9 and recipe.start.distil.warmup_steps == 9 * 10 // 150 and len(lines) == 1
    recipe, lines = loaded("nano/c2i", ["start.distil.steps=9"])
    assert (recipe.start.distil.warmup_steps, recipe.distil.warmup_steps) == (0, 10)
    assert lines == ["start.distil.warmup_steps: 0 of 9 updates, in the place of 10 of 150"]
    write("long.yaml", "grpo: {steps: 10, warmup_steps: 8, batch_size: 8}")
    assert loaded(write("short.yaml", "extends: long.yaml\ngrpo: {steps: 5}"))[0].grpo.warmup_steps == 4


@pytest.mark.parametrize(
    "overrides",
    [["grpo.steps=3", "grpo.warmup_steps=4"], ["grpo.warmup_steps=4", "grpo.steps=3"], ["grpo.warmup_steps=131"]],
)
def test_a_warmup_that_is_said_to_be_longer_is_refused(overrides):
    with pytest.raises(UserError, match=r"warmup_steps \d+ is more than steps \d+; lower it too"):
        load_recipe("nano/c2i", overrides)


def test_a_batch_smaller_than_its_parts_is_one_part():
    assert loaded("nano/c2i", ["grpo.batch_size=16"])[0].grpo.batch_size == 16
    with pytest.raises(UserError, match="micro_batch_size 96 does not divide batch_size 104"):
        load_recipe("nano/c2i", ["grpo.batch_size=104"])


def test_options_stand_for_the_keys_of_the_method():
    options = {"steps": 7, "lr": 1e-05, "seed": 3, "device": "cpu"}
    recipe, _ = loaded("nano/c2i", **options)
    assert (recipe.grpo.steps, recipe.grpo.learning_rate, recipe.distil.steps) == (7, 1e-5, 150)
    assert (recipe.seed, recipe.policy.device, recipe.start.seed, recipe.start.policy.device) == (3, "cpu", 3, "cpu")
    recipe, _ = loaded("nano/c2i", ["method=distil", "start=null"], **options)
    assert (recipe.grpo.steps, recipe.distil.steps, recipe.distil.learning_rate) == (130, 7, 1e-5)


def test_an_option_and_a_set_may_not_say_two_things():
    assert loaded("nano/c2i", ["grpo.steps=7"], steps=7)[0].grpo.steps == 7
    with pytest.raises(UserError, match=r"--steps 7 and --set grpo\.steps=8 say two things; leave one of them out"):
        load_recipe("nano/c2i", ["grpo.steps=8"], {"steps": 7})
    with pytest.raises(UserError, match=r"^--lr -1\.0: grpo\.learning_rate = -1\.0: must be greater than 0"):
        load_recipe("nano/c2i", [], {"lr": -1.0})
