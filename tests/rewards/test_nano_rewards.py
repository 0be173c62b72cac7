"""The bundled nano rewards: what they prefer, and that nothing but the picture and the prompt decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from argrpo_cli.geneval.prompts import TAGS, parse_prompt
from argrpo_cli.nano.judge import load_judge
from argrpo_cli.nano.make import corrupt as c
from argrpo_cli.nano.scenes import CLASS_NAMES
from argrpo_cli.nano.tokens import load_held_out
from argrpo_cli.networks.nano import PAD, UNKNOWN, WordTokenizer
from argrpo_cli.networks.weights import load_weights, save_network
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.llamagen.policy import class_prompt
from argrpo_cli.rewards import REWARDS, load_rewards
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from tests.training.tiny import sample

NAMES = ["nano-clip", "nano-quality", "nano-critic"]


@pytest.fixture(scope="module")
def rewards():
    return load_rewards(NAMES)


@pytest.fixture(scope="module")
def pictures():
    """Clean reconstructions, their class ids and broken versions; no font needed."""
    judge = load_judge()
    tokens, ids = judge.reference_tokens[:120], judge.reference_classes[:120]
    images = c.decode(judge.tokenizer, tokens)
    border = images[:, :, 0, :].float().median(-1).values
    differs = (images.float() - border[:, :, None, None]).abs().amax(1, keepdim=True) > 25
    pool = c.Pool(tokens=tokens, images=images, coverage=differs.float(), backgrounds=border / 255, class_ids=ids)
    mixture = {"scatter": 1.0, "block": 1.0, "elastic": 1.0, "missing": 1.0, "duplicate": 1.0}
    broken = c.corrupt(pool, torch.arange(120), judge.tokenizer, np.random.default_rng(0), mixture)
    return images, ids, broken


@pytest.fixture(scope="module")
def scores(rewards, pictures):
    """Of the clean pictures, and of the broken ones."""
    images, ids, broken = pictures
    return [rewards.score(some, conditions(ids)) for some in (images, broken.images)]


def conditions(ids: torch.Tensor) -> list[Condition]:
    return [Condition(class_prompt(CLASS_NAMES[i]), i) for i in ids.tolist()]


def test_families_and_names(rewards):
    assert rewards.names == NAMES
    assert rewards.family == {"nano-clip": "conditional", "nano-quality": "quality", "nano-critic": "realism"}
    assert set(NAMES) <= set(REWARDS)


@pytest.mark.parametrize("name", NAMES)
def test_clean_scenes_score_above_clearly_broken_ones(scores, pictures, name):
    clean, worse = (one[name] for one in scores)
    clearly = pictures[2].damage > 0.35
    assert clearly.sum() > 40
    assert (clean > worse)[clearly].float().mean() > (0.75 if name == "nano-critic" else 0.9)


def test_the_more_damage_the_lower_quality_and_similarity(scores, pictures):
    own = pictures[2].own.argsort().argsort()
    for name, bound in (("nano-clip", -0.3), ("nano-quality", -0.5)):  # -0.43 and -0.63 with the bundled weights
        order = torch.corrcoef(torch.stack([scores[1][name].argsort().argsort(), own]).float())
        assert order[0, 1] < bound, name


def test_clip_names_the_class(rewards, pictures):
    images, ids = (some[:48] for some in pictures[:2])  # two of each class
    clip = rewards.rewards["nano-clip"]
    prompts = [Condition(class_prompt(name), i) for i, name in enumerate(CLASS_NAMES)]
    scores = torch.stack([clip.score(images, [prompt] * len(images)) for prompt in prompts], 1)
    assert (scores.argmax(1) == ids).float().mean() > 0.95


def test_scores_are_float32_finite_and_in_their_ranges(scores):
    for name, (low, high) in {"nano-clip": (-1, 1), "nano-quality": (0, 1), "nano-critic": (-5, 5)}.items():
        own = scores[0][name]
        assert own.dtype == torch.float32 and own.shape == (120,)
        assert low <= own.min() and own.max() <= high
        assert not own.requires_grad


def test_scores_do_not_depend_on_the_batch_or_the_order(rewards, scores, pictures):
    images, ids, _ = pictures
    together = scores[0]
    single = rewards.score(images[:7], conditions(ids[:7]), batch_size=1)
    backwards = rewards.score(images.flip(0), conditions(ids.flip(0)), batch_size=50)
    for name in NAMES:
        torch.testing.assert_close(single[name], together[name][:7], atol=1e-4, rtol=0)
        torch.testing.assert_close(backwards[name].flip(0), together[name], atol=1e-4, rtol=0)


def test_no_images_give_no_scores(rewards, pictures):
    assert all(len(v) == 0 for v in rewards.score(pictures[0][:0], []).values())


def test_images_and_conditions_must_match(rewards, pictures):
    with pytest.raises(ValueError, match="3 images but 2"):
        rewards.score(pictures[0][:3], conditions(pictures[1][:2]))


def test_an_unknown_reward_is_named_before_anything_is_loaded():
    with pytest.raises(UserError, match=r"'nano-qualty' is unknown; did you mean 'nano-quality'\? \(`argrpo"):
        load_rewards(["nano-clip", "nano-qualty"])


def test_words_become_ids_and_the_end_has_the_highest():
    words = WordTokenizer(["a", "cat", "dog"], context_length=5)
    ids = words(["A dog", "a purple cat", "a cat a cat a cat"])
    end = words.end
    assert ids.tolist() == [
        [2, 4, end, PAD, PAD],
        [2, UNKNOWN, 3, end, PAD],
        [2, 3, 2, 3, end],
    ]
    assert end == ids.max() == words.vocabulary_size - 1


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("a photo of a dgo", "'dgo' in the prompt 'a photo of a dgo'; did you mean 'dog'"), ("a photo of a 3", "'3' in")],
)
def test_clip_refuses_words_it_never_saw(rewards, pictures, prompt, said):
    strange = [Condition("a photo of a dog"), Condition(prompt)]
    for ask in (rewards.check, lambda given: rewards.score(pictures[0][:2], given)):
        with pytest.raises(UserError, match=f"nano-clip does not know the word {said}"):
            ask(strange)
    rewards.check([Condition("a photo of three Red buses")])


def test_saved_networks_come_back_in_float32_without_gradients(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    save_network(tmp_path, network, {"any": 1})
    back = load_weights(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)), tmp_path)
    assert not back.training and not any(p.requires_grad for p in back.parameters())
    assert back[0].weight.dtype == torch.float32
    torch.testing.assert_close(back[0].weight, network[0].weight.half().float())
    with pytest.raises(UserError, match="do not fit"):
        load_weights(torch.nn.Linear(4, 2), tmp_path)
    with pytest.raises(UserError, match="not found"):
        load_weights(torch.nn.Linear(4, 2), tmp_path / "nowhere")


def test_bfloat16_changes_scores_by_little_of_their_deviation(rewards, pictures, monkeypatch):
    images, ids, _ = pictures
    conditions = [Condition(class_prompt(CLASS_NAMES[i]), i) for i in ids[:32].tolist()]
    exact = rewards.score(images[:32], conditions)
    monkeypatch.setattr(rewards, "mixed", True)
    for name, scores in rewards.score(images[:32], conditions).items():
        assert 0 < (scores - exact[name]).abs().mean() < 0.05 * exact[name].std(), name


@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_other_sizes_are_resized(rewards, pictures, name):
    images, ids, _ = pictures
    conditions = [Condition(class_prompt(CLASS_NAMES[i]), i) for i in ids[:8].tolist()]
    own = rewards.score(images[:8], conditions)[name]
    large = images[:8].repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(rewards.score(large, conditions)[name], own, rtol=1e-4, atol=1e-4)
    for height, width in ((1, 1), (30, 101)):
        odd = torch.zeros(8, 3, height, width, dtype=torch.uint8)
        assert rewards.score(odd, conditions)[name].isfinite().all()


def test_the_rewards_of_captions_tell_scenes_from_samples_of_each_category():
    """Held-out scenes against samples of nano-t2i for the same captions."""
    policy = load_policy("nano-t2i")
    tokens, conditions = load_held_out("captions")
    tags = [parse_prompt(one.prompt).tag for one in conditions]
    chosen = [place for tag in TAGS for place in [i for i, own in enumerate(tags) if own == tag][:64]]
    asked = [conditions[i] for i in chosen]
    scenes = policy.decode(tokens[chosen])
    drawn = policy.decode(sample(policy, asked, range(len(chosen))))
    known = load_rewards(["nano-quality-t2i", "nano-critic-t2i"])
    real, generated = known.score(scenes, asked), known.score(drawn, asked)
    above = {name: (real[name] > generated[name]).float().mean().item() for name in known.names}
    assert above["nano-critic-t2i"] > 0.58 and above["nano-quality-t2i"] > 0.61, f"{above}; by chance 0.50 ± 0.025"
