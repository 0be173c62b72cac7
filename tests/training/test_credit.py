"""Which tokens of an image its advantage goes to: each published weight by hand, and what TRL's loss makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from argrpo_cli.policy import Policy
from argrpo_cli.policy.llamagen.model import Encoded
from argrpo_cli.training import credit
from argrpo_cli.training.grpo import ImageGRPOTrainer
from tests.training.test_scale_balance import GivenLogProbs
from tests.training.tiny import CLASSES, CODES, TOKENS, FakeRewards, brightness, tiny_recipe

Build = Callable[..., ImageGRPOTrainer]


# GCPO


def test_the_gradient_of_entropy_is_that_of_means_over_neighbours_drawn_before() -> None:
    """A ramp to the right of slope 3 and down of slope 1, on a grid of 4."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    length = credit.entropy_gradient((rows + 3 * columns).view(1, 16), [4]).view(4, 4)

    def mean(row: int, column: int) -> float:
        """By hand: itself, left, above left, above, above right, as far as they are there."""
        near = [(row, column), (row, column - 1), (row - 1, column - 1), (row - 1, column), (row - 1, column + 1)]
        there = [(a, b) for a, b in near if a >= 0 and 0 <= b < 4]
        return sum(a + 3 * b for a, b in there) / len(there)

    right = [mean(1, 1) - mean(1, 0), (mean(1, 2) - mean(1, 0)) / 2, mean(1, 3) - mean(1, 2)]
    down = [(mean(2, column) - mean(0, column)) / 2 for column in (0, 1, 3)]
    expected = [math.hypot(*both) for both in zip(right, down, strict=True)]
    assert length[1, [0, 1, 3]].tolist() == pytest.approx(expected)
    assert mean(1, 1) == pytest.approx((4 + 1 + 0 + 3 + 6) / 5)


def test_every_scale_has_a_gradient_of_its_own() -> None:
    """1 + 4 tokens: what lies in another grid is no neighbour, and a single token has no gradient."""
    first = credit.entropy_gradient(torch.tensor([[7.0, 0.0, 2.0, 0.0, 0.0]]), [1, 2])
    other = credit.entropy_gradient(torch.tensor([[1.0, 0.0, 2.0, 0.0, 0.0]]), [1, 2])
    assert torch.equal(first, other) and first[0, 0] == 0
    means = torch.tensor([[0, 1], [2 / 3, 0.5]])  # above right of the lower left lies the 2
    right, down = means[:, 1] - means[:, 0], means[1] - means[0]
    expected = [math.hypot(right[row], down[column]) for row in (0, 1) for column in (0, 1)]
    assert first[0, 1:].tolist() == pytest.approx(expected)


def test_critical_tokens_are_first_ones_steep_ones_and_unlike_ones_each_once() -> None:
    """25 tokens: 2 of each kind. The step of entropy lies between the last two rows, right of the middle."""
    entropy = torch.zeros(1, 5, 5)
    entropy[0, 4, 3:] = 5.0
    similarity = torch.linspace(0.0, 0.24, 25)[None]  # least like each other at the beginning
    chosen = credit.critical_tokens(entropy.view(1, 25), similarity, [5])
    steep = credit.entropy_gradient(entropy.view(1, 25), [5])[0].topk(2).indices.tolist()
    assert min(steep) > 15
    assert chosen[0].nonzero().flatten().tolist() == sorted([0, 1, 2, 3, *steep])
    opposite = credit.critical_tokens(entropy.view(1, 25), -similarity, [5])
    left = [index for index in range(24, -1, -1) if index not in steep]
    assert opposite[0].nonzero().flatten().tolist() == sorted([0, 1, *steep, *left[:2]])


def test_similarity_across_a_group_is_the_mean_cosine_of_its_pairs() -> None:
    vectors = F.normalize(torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = [F.cosine_similarity(vectors[:, i], vectors[:, j], dim=-1) for i, j in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(credit.mutual_similarity(vectors), sum(pairs) / 3)


def test_confidence_is_the_running_mean_of_clipped_ratios() -> None:
    weights = credit.confidence(torch.tensor([[math.log(1.2), 3.0, -3.0]]), 0.5)
    high, low = math.exp(0.5), math.exp(-0.5)
    assert weights[0].tolist() == pytest.approx([1.2, (1.2 + high) / 2, (1.2 + high + low) / 3])


# STAGE


def test_opposed_similarity_and_its_weights_by_hand() -> None:
    """Three images of two tokens: the first gains, the two others lose."""
    east, north, west = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
    vectors = torch.tensor([[[east, east], [east, west], [north, west]]])
    similarity = credit.opposed_similarity(vectors, torch.tensor([[2.0, -1.0, -1.0]]))
    assert similarity[0].tolist() == [[0.5, -1.0], [1.0, -1.0], [0.0, -1.0]]
    weights, kl_weights = credit.stage_weights(similarity)
    assert weights[0].tolist() == [[0.25, 1.0], [0.0, 1.0], [0.5, 1.0]]
    assert kl_weights[0].tolist() == [[1.0, 0.5], [1.0, 0.5], [1.0, 0.5]]
    assert credit.stage_weights(torch.tensor(-0.6))[1].item() == pytest.approx(0.7)


def test_an_image_without_advantage_is_held_against_all_others_and_they_against_it() -> None:
    """A_i A_j <= 0 takes 0 in: north is compared with both, they with north alone."""
    east, north = [1.0, 0.0], [0.6, 0.8]
    vectors = torch.tensor([[[east], [east], [north]]])
    similarity = credit.opposed_similarity(vectors, torch.tensor([[1.0, 1.0, 0.0]]))
    assert similarity.flatten().tolist() == pytest.approx([0.6, 0.6, 0.6])
    similarity = credit.opposed_similarity(vectors, torch.tensor([[1.0, 0.0, -1.0]]))
    assert similarity.flatten().tolist() == pytest.approx([0.8, 0.8, 0.6])


def test_nothing_speaks_against_an_image_that_none_opposes() -> None:
    vectors = F.normalize(torch.randn(1, 2, 3, 4), dim=-1)
    assert (credit.opposed_similarity(vectors, torch.tensor([[1.0, 2.0]])) == -1).all()


# the guidance contrast


def test_weights_rise_with_the_rank_of_the_divergence() -> None:
    """Ranks 3, 1, 4, 2 of 4, to the power ln 0.2 / ln 0.6 - 1, of mean 1."""
    weights = credit.rank_weights(torch.tensor([[0.5, 0.1, 9.0, 0.2]]))
    power = math.log(0.2) / math.log(0.6) - 1
    shares = [(rank / 4) ** power for rank in (3, 1, 4, 2)]
    assert weights[0].tolist() == pytest.approx([4 * share / sum(shares) for share in shares])
    many = credit.rank_weights(torch.rand(1, 1000))[0].sort().values
    assert many[600:].sum() / many.sum() == pytest.approx(0.8, abs=0.002)


def test_equal_divergences_weigh_alike() -> None:
    assert torch.equal(credit.rank_weights(torch.tensor([[1e-7, 0.0, 3e-8]])), torch.ones(1, 3))
    first, second, third = credit.rank_weights(torch.tensor([[2.0, 2.0, 1.0]]))[0]
    assert first == second > third


# EG-GRPO


def test_budget_moves_from_the_surest_tokens_to_the_least_sure() -> None:
    """Ten tokens of entropy 1 to 10: two are left out, and 6 to 10, 40 in all, share out what they had."""
    entropy = torch.arange(1.0, 11.0).expand(3, 10)
    advantages = torch.tensor([2.0, -1.0, 0.0])
    weighed = advantages[:, None] * credit.entropy_weights(entropy, advantages)
    bonus = [0.0] * 5 + [4.0 * h / 40 for h in range(6, 11)]
    assert weighed[0].tolist() == pytest.approx([(0 if h < 3 else 2) + bonus[h - 1] for h in range(1, 11)])
    assert weighed[1].tolist() == pytest.approx([(0 if h < 3 else -1) + bonus[h - 1] / 2 for h in range(1, 11)])
    assert not weighed[2].any()
    assert weighed[0].sum() == pytest.approx(20)  # as without any weights


# in training


def batch_of(trainer: ImageGRPOTrainer, images: int, **others: Tensor) -> dict[str, Any]:
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    trainer.model.train()
    trainer.encoded = Encoded(torch.zeros(images, dtype=torch.long))
    ones = torch.ones(images, TOKENS, dtype=torch.long)
    return {
        "prompt_ids": ones[:, :1] * 0, "prompt_mask": ones[:, :1], "completion_ids": ones * 0, "completion_mask": ones,
        "num_items_in_batch": ones.sum(), **others,
    }  # fmt: skip


def test_weights_are_on_the_term_that_they_are_for(new_trainer: Build) -> None:
    """In every loss: advantages of their own for the tokens, and of the KL term its weights alone."""
    beta, images = 0.1, 4
    trainer = new_trainer(beta=beta, epsilon=0.2)
    torch.manual_seed(0)
    old, reference = (-3 * torch.rand(images, TOKENS) for _ in range(2))
    advantages, weights, kl_weights = torch.randn(images), torch.rand(images, TOKENS), torch.rand(images, TOKENS)
    logp = old + 0.3 * torch.randn(images, TOKENS)

    def gradient(**others: Tensor) -> Tensor:
        model = GivenLogProbs(logp.clone())
        common = {"old_per_token_logps": old, "sampling_per_token_logps": old, "ref_per_token_logps": reference}
        inputs = batch_of(trainer, images, advantages=advantages, **common, **others)
        return torch.autograd.grad(trainer.compute_loss(model, inputs), model.logp)[0]

    kl = beta * (1 - (reference - logp).exp()) / (images * TOKENS)  # d/dlogp of the estimator, the same in all losses
    for trainer.loss_type in ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo"):
        plain, weighed = gradient(), gradient(advantage_weights=weights)
        torch.testing.assert_close(weighed - kl, (plain - kl) * weights)
        both = gradient(advantage_weights=weights, kl_weights=kl_weights)
        torch.testing.assert_close(both, (plain - kl) * weights + kl * kl_weights)
        assert (plain - kl).abs().max() > 1e-3
    assert trainer.beta == beta and type(trainer.beta) is float


def rollout(trainer: ImageGRPOTrainer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The micro-batches of the first update as they come to the loss, one below the other."""
    seen: list[dict[str, Any]] = []
    compute_loss = ImageGRPOTrainer.compute_loss

    def spy(self: ImageGRPOTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        seen.append({key: value for key, value in inputs.items() if isinstance(value, Tensor) and value.dim()})
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ImageGRPOTrainer, "compute_loss", spy)
    trainer.train()
    whole = {key: torch.cat([part[key] for part in seen]) for key in seen[0]}
    order = whole["prompt_ids"][:, 0].argsort()  # TRL shuffles images, and weights have to go with them
    return {key: value[order] for key, value in whole.items()}


@pytest.mark.parametrize(
    ("method", "logprob"),
    [
        ("gcpo", "guided"),
        ("stage", "conditional"),
        ("guidance", "conditional"),
        ("guidance", "guided"),
        ("eg", "conditional"),
    ],
)
def test_a_rollout_is_weighed_as_the_definition_says(
    new_trainer: Build, policy: Policy, monkeypatch: pytest.MonkeyPatch, method: str, logprob: str
) -> None:
    base = {name: value.clone() for name, value in policy.model.state_dict().items()}
    clip = 0.5 if method == "gcpo" else 0.0
    trainer = new_trainer(
        FakeRewards(bright=brightness), steps=1, micro_batch_size=2, logprob=logprob, beta=0.1,
        tokens={"method": method, "confidence": clip},
    )  # fmt: skip
    with torch.no_grad():  # the policy has moved from its reference
        for value in policy.model.parameters():
            value.mul_(1.05)
    moved = {name: value.clone() for name, value in policy.model.state_dict().items()}
    batch = rollout(trainer, monkeypatch)
    policy.model.load_state_dict(moved)
    tokens, advantages = batch["completion_ids"], batch["advantages"]
    encoded = trainer.encoded[batch["prompt_ids"][:, 0]]
    null = Encoded(torch.full_like(encoded.condition, CLASSES))
    with torch.no_grad():
        own, none = (policy.model.logits(one, tokens) for one in (encoded, null))
    logits = none + 2 * (own - none) if logprob == "guided" else own
    every = logits.log_softmax(-1)
    entropy = -(every.exp() * every).sum(-1)
    vectors = F.normalize(policy.tokenizer.quantize.embedding.weight, dim=-1)[tokens].unflatten(0, (2, 4))
    if method == "gcpo":
        similarity = credit.mutual_similarity(vectors).repeat_interleave(4, dim=0)
        expected = credit.critical_tokens(entropy, similarity, [4]) * TOKENS / 3
        drawn = every.gather(-1, tokens[..., None])[..., 0]
        expected = expected * credit.confidence(drawn - batch["ref_per_token_logps"], clip)
        assert (drawn - batch["ref_per_token_logps"]).abs().max() > 0.01
    elif method == "stage":
        weights, kl_weights = credit.stage_weights(credit.opposed_similarity(vectors, advantages.view(2, 4)))
        expected = (weights / weights.mean()).flatten(0, 1)
        torch.testing.assert_close(batch["kl_weights"], kl_weights.flatten(0, 1))
    elif method == "guidance":
        own, none = own.log_softmax(-1), none.log_softmax(-1)
        expected = credit.rank_weights((own.exp() * (own - none)).sum(-1))
    else:
        expected = credit.entropy_weights(entropy, advantages)
    torch.testing.assert_close(batch["advantage_weights"], expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1 and tokens.max() < CODES
    assert trainer.state.log_history[0]["grad_norm"] > 0
    policy.model.load_state_dict(base)


def test_all_tokens_count_alike_unless_said_otherwise(new_trainer: Build) -> None:
    assert new_trainer().credit is None


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tokens": {"method": "eg"}, "importance": "sequence"}, "eg weighs tokens, .* set importance: token"),
        ({"tokens": {"confidence": 0.5}}, "confidence 0.5 is of tokens.method: gcpo"),
        ({"tokens": {"method": "gcpo", "confidence": 0.5}, "beta_end": 0.0}, "as long as beta is above 0; set both"),
    ],
)
def test_what_makes_no_sense_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_recipe(**keys)
