"""What a recipe may say."""

from __future__ import annotations

import re

import pytest

from argrpo_cli.recipe import load_recipe
from argrpo_cli.system.errors import UserError

REFUSED = [
    ("grpo.bta=1", "unknown key 'grpo.bta'; did you mean 'beta'? The keys of grpo are"),
    ("grpo.lr=1", "unknown key 'grpo.lr'; did you mean 'learning_rate'?"),
    ("sampling.guidance=1", "did you mean 'cfg_scale'?"),
    ("foo=1", "unknown key 'foo'; the keys are name, description"),
    ("rewards.terms.1.nam=2", "unknown key 'rewards.terms.1.nam'", "did you mean 'name'?"),
    ("grpo.beta=-1", "grpo.beta = -1: must be greater than or equal to 0"),
    ("grpo.beta=x", "grpo.beta = 'x': must be a number"),
    ("grpo.beta=.inf", "grpo.beta = inf: must be a finite number"),
    ("grpo.beta='0.1'", "grpo.beta = '0.1': must be a number"),
    ("grpo.epsilon=1", "grpo.epsilon = 1: must be less than 1"),
    ("grpo.group_size=1", "grpo.group_size = 1: must be greater than or equal to 2"),
    ("grpo.steps=1.5", "grpo.steps = 1.5: must be an integer"),
    ("seed=true", "seed = True: must be an integer"),
    ("grpo.betas=[0.9]", "grpo.betas = [0.9]: must have at least 2 entries"),
    ("grpo.betas=[0.9,1.5]", "grpo.betas.1 = 1.5: must be less than 1"),
    (
        "grpo.logprob=guide",
        "grpo.logprob = 'guide': must be 'conditional' or 'guided'",
        "did you mean 'guided'?",
    ),
    ("grpo=3", "grpo = 3: must be a mapping with the keys batch_size"),
    ("rewards.terms=[]", "rewards.terms = []: must have at least 1 entries"),
    ("rewards.terms=[{name: a}, {name: a}]", "the reward 'a' is listed twice"),
    ("conditions.classes=dog", "conditions.classes = 'dog': must be 'all' or a list of class names or ids"),
    ("policy.trainable=[]", "policy.trainable = []: must be 'all', a part of the parameters' names or a list"),
    ("policy.trainable=3", "policy.trainable = 3: must be 'all', a part"),
    ("conditions.classes=[]", "conditions.classes = []: must be 'all' or a list"),
    ("policy.dtype=float16", "policy.dtype = 'float16': must be 'float32', 'bfloat16' or 'auto'"),
    ("sampling.cfg_scale=0.5", "sampling.cfg_scale = 0.5: must be 1 or more"),
    ("sampling.top_p=1.5", "sampling.top_p = 1.5: must be above 0, at most 1"),
    ("sampling.temperature=0", "sampling.temperature = 0: must be greater than 0"),
    ("sampling.top_k=2.0", "sampling.top_k = 2.0: must be an integer"),
    (
        "sampling.dtype=float32",
        "unknown key 'sampling.dtype'; did you mean 'policy.dtype'? The keys of sampling are cfg_scale, temperature",
    ),
    ("start=3", "start = 3: must be null, the name or path of a recipe, or a mapping"),
    ("start=nowhere", "start: no recipe 'nowhere'"),
    ("start.distil.x=3", "unknown key 'start.distil.x'; the keys of start.distil are batch_size"),
    ("start.distil.beta=2", "start.distil.beta = 2: must be less than or equal to 1"),
    ("start.distil.warmup_steps=101", "start.distil: warmup_steps 101 is more than steps 100"),
    ("start.out=here", "start.out 'here': a start is run in the run's own folder"),
    ("start.start={}", "start.start: a start has no start of its own"),
    ("start=c2i_l384", "start.policy.checkpoint 'c2i-l-384' is what the run starts from"),
    ("start.rewards.terms.9.weight=2", "start.rewards.terms has 8 entries"),
    ("distil.cfg_scale=1", "distil.cfg_scale = 1: must be a number above 1, or a list of such numbers"),
    ("distil.cfg_scale=[2, x]", "distil.cfg_scale = [2, 'x']: must be a number above 1, or a list"),
    ("distil.cfg_scale=[]", "distil.cfg_scale = []: must be a number above 1, or a list"),
    ("distil.micro_batch_size=5", "micro_batch_size 5 does not divide batch_size 64"),
    ("name=a/b", "name = 'a/b': must be made of letters"),
    ("name=1e-5", "name = 1e-05: must be text; put it in quotes"),
    ("grpo.steps=1000001", "grpo.steps = 1000001: must be less than or equal to 1000000"),
    ("seed=4294967296", "seed = 4294967296: must be less than 4294967296"),
    ("policy.lora.rank=4097", "must be less than or equal to 4096"),
    ("rewards.terms.²=2", "rewards.terms = {'²': 2}: must be a list"),
]


@pytest.mark.parametrize("case", REFUSED, ids=[case[0] for case in REFUSED])
def test_a_bad_key_or_value_is_named_with_what_is_allowed(case):
    override, *parts = case
    with pytest.raises(UserError) as caught:
        load_recipe("c2i_b256", [override])
    message = str(caught.value)
    assert message.startswith(f"--set {override}: ") and "\n" not in message
    for part in parts:
        assert part in message


def test_a_batch_is_whole_groups():
    with pytest.raises(UserError, match="batch_size 50 is not a multiple of group_size 8; use for instance 48"):
        load_recipe("c2i_b256", ["grpo.batch_size=50", "grpo.micro_batch_size=null"])
    with pytest.raises(UserError, match="micro_batch_size 5 does not divide batch_size 48"):
        load_recipe("c2i_b256", ["grpo.batch_size=48", "grpo.micro_batch_size=5"])


def test_kept_checkpoints_lie_between_batches():
    with pytest.raises(UserError, match=r"logging\.keep_steps 7 .* multiple of grpo\.updates_per_batch 2, .* 8"):
        load_recipe("c2i_b256", ["grpo.updates_per_batch=2", "logging.keep_steps=[4, 7]"])
    load_recipe("c2i_b256", ["logging.keep_steps=[7]"])


@pytest.mark.parametrize("override", ["sampling.top_k=100", "sampling.top_p=0.9"])
def test_a_sampler_that_differs_from_the_trained_distribution_must_be_asked_for(override):
    with pytest.raises(UserError, match=r"another distribution .* grpo\.allow_filtered_sampling: true"):
        load_recipe("c2i_b256", [override])
    assert load_recipe("c2i_b256", [override, "grpo.allow_filtered_sampling=true"])


def test_distillation_is_of_the_whole_distribution():
    with pytest.raises(UserError, match=r"another distribution than the one that distil trains; use 0 and 1$"):
        load_recipe("c2i_b256", ["method=distil", "sampling.top_k=100", "grpo.allow_filtered_sampling=true"])


def test_what_is_wrong_is_told_once_although_a_start_takes_it_over():
    with pytest.raises(UserError, match=r"^--set grpo\.bta=1: unknown key 'grpo\.bta'; [^(]*$"):
        load_recipe("c2i_b256", ["start.distil.steps=3", "grpo.bta=1"])


def test_a_whole_number_is_a_float_too():
    recipe = load_recipe("c2i_b256", ["grpo.beta=0", "sampling.cfg_scale=3"])
    assert recipe.grpo.beta == 0.0 and isinstance(recipe.sampling.cfg_scale, float)


def test_several_faults_are_counted():
    with pytest.raises(UserError, match=r"\(and 2 more\)$"):
        load_recipe("c2i_b256", ["grpo.a=1", "grpo.b=1", "grpo.c=1"])


def test_keys_that_look_like_types_or_locations_are_named():
    for key in ("str", "int", "a[b", "list[str]", "x(y)", "constrained-str"):
        with pytest.raises(
            UserError, match=rf"unknown key '{re.escape(key)}'(; did you mean '\w+'\?|;) [Tt]he keys are name"
        ):
            load_recipe("c2i_b256", [f"{key}=1"])
        with pytest.raises(UserError, match=rf"conditions\.weights\.{re.escape(key)} = -1: must be greater"):
            load_recipe("c2i_b256", [f"conditions.weights.{key}=-1"])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("beta=0", "grpo.beta"),
        ("steps=3", "grpo.steps"),
        ("device=cpu", "policy.device"),
        ("grpo.seed=3", "seed"),
        ("grpo.weight=3", "rewards.terms.0.weight"),
        ("start.temperature=3", "start.sampling.temperature"),
        ("policy.lmbda=0", "distil.lmbda"),
    ],
)
def test_a_key_of_another_section_is_found(override, key):
    with pytest.raises(UserError, match=rf"did you mean '{key}'\? The keys"):
        load_recipe("c2i_b256", [override])


def test_the_sections_of_the_method_come_first():
    with pytest.raises(UserError, match=r"did you mean 'distil\.beta'\? The keys are name"):
        load_recipe("c2i_b256", ["method=distil", "beta=0"])
