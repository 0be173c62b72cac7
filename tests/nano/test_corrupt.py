"""Broken scenes: the damage is the truth, and grows with what was broken."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from argrpo_cli.nano.judge import load_judge
from argrpo_cli.nano.make import corrupt as c
from argrpo_cli.nano.make.policies import proposer
from argrpo_cli.nano.scenes import IMAGE_SIZE
from argrpo_cli.system.files import WEIGHTS


@pytest.fixture(scope="module")
def vq():
    return load_judge().tokenizer


@pytest.fixture(scope="module")
def pool(vq) -> c.Pool:
    """Clean scenes without the font: reference tokens; the object is taken to be what differs from the border.

    Two of each class, side by side: siblings in class, if not in colour.
    """
    judge = load_judge()
    rows = torch.cat([(judge.reference_classes == one).nonzero()[:2, 0] for one in range(24)])
    tokens, ids = judge.reference_tokens[rows], judge.reference_classes[rows]
    images = c.decode(vq, tokens)
    border = images[:, :, 0, :].float().median(-1).values
    differs = (images.float() - border[:, :, None, None]).abs().amax(1, keepdim=True) > 25
    proposals = proposer(WEIGHTS / "nano-c2i", seed=0)(tokens, ids.tolist())
    return c.Pool(
        tokens=tokens,
        images=images,
        coverage=differs.float(),
        backgrounds=border / 255,
        class_ids=ids,
        proposals=proposals,
    )


@pytest.mark.parametrize("kind", list(c.MIXTURE_WITH_PROPOSALS))
def test_every_kind_damages_and_stays_in_range(pool, vq, kind):
    rows = torch.arange(24)
    broken = c.corrupt(pool, rows, vq, np.random.default_rng(0), {kind: 1.0})
    assert broken.images.shape == (24, 3, IMAGE_SIZE, IMAGE_SIZE) and broken.images.dtype == torch.uint8
    assert broken.kind == [kind] * 24
    assert broken.damage.min() >= 0 and broken.own.max() < 1
    assert broken.damage.mean() > 0.03
    assert (broken.own >= broken.damage - 1e-6).all()


def test_likely_tokens_are_the_policys_and_only_where_the_mask_is(pool):
    rows = torch.arange(48).flip(0)[:30]
    tokens, own = c._likely(pool, rows, np.random.default_rng(3), codes=1024)
    assert torch.equal(own, rows)
    changed = tokens != pool.tokens[rows]
    assert torch.equal(tokens[changed], pool.proposals[rows][changed])
    assert 0.05 < changed.float().mean() < 0.6
    agreed = (pool.proposals == pool.tokens).float().mean()
    assert 0.1 < agreed < 0.9, "a policy that knows the scenes guesses many tokens, and not all"


def test_without_proposals_the_mixture_leaves_likely_out(pool, vq):
    bare = dataclasses.replace(pool, proposals=None)
    broken = c.corrupt(bare, torch.arange(48), vq, np.random.default_rng(4))
    assert "likely" not in broken.kind and len(set(broken.kind)) > 5


def test_damage_grows_with_the_share_of_wrong_tokens(pool, vq):
    rows = torch.arange(48)
    means = []
    for share in (0.0, 0.05, 0.15, 0.4, 0.8):
        rng = np.random.default_rng(1)
        mask = rng.uniform(size=pool.tokens.shape) < share
        tokens = c._replace(pool, rows, mask, rng, vq.config.codebook_size)
        area = pool.coverage.flatten(1).sum(1)
        means.append(c.damage_of(c.colour_error(c.decode(vq, tokens), pool.images, area)).mean().item())
    assert means[0] == 0.0
    assert means == sorted(means) and means[1] > 0.05 and means[-1] > 0.6


def test_damage_is_the_colour_error_per_object_pixel():
    clean = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    broken = clean.clone()
    broken[1, :, :4, :4] += 51  # a fifth too bright on 16 pixels
    error = c.colour_error(broken, clean, torch.tensor([32.0, 32.0]))
    torch.testing.assert_close(error, torch.tensor([0.0, (0.2**2 * 16 / 32) ** 0.5]))
    torch.testing.assert_close(c.damage_of(torch.tensor([0.0, c.TAU])), torch.tensor([0.0, 1 - np.exp(-1)]).float())


def against_own_row(pool, rows, images):
    return c.damage_of(c.colour_error(images, pool.images[rows], pool.coverage[rows].flatten(1).sum(1)))


def test_a_picture_that_drifts_to_its_sibling_is_measured_against_the_nearer_of_the_two(pool, vq):
    rows = torch.arange(48)
    broken = c.corrupt(pool, rows, vq, np.random.default_rng(2), {"drift": 1.0})
    assert torch.equal(broken.own, broken.damage), "the sibling is of its class"
    nearest = torch.minimum(*(against_own_row(pool, to, broken.images) for to in (rows, rows ^ 1)))
    torch.testing.assert_close(broken.damage, nearest)
    torch.testing.assert_close(against_own_row(pool, broken.nearest, broken.images), broken.damage)
    assert (broken.nearest != rows).any()
    assert (against_own_row(pool, rows, broken.images) > nearest + 0.05).any()


def test_a_picture_that_strays_to_another_class_is_worse_as_its_own(pool, vq):
    rows = torch.arange(48)
    broken = c.corrupt(pool, rows, vq, np.random.default_rng(2), {"stray": 1.0})
    assert (broken.damage < broken.own - 0.05).any()
    torch.testing.assert_close(broken.own, against_own_row(pool, rows, broken.images))
    torch.testing.assert_close(against_own_row(pool, broken.nearest, broken.images), broken.damage)


def test_the_same_seed_breaks_the_same_way(pool, vq):
    rows = torch.arange(24)
    first, again = (c.corrupt(pool, rows, vq, np.random.default_rng(3)) for _ in range(2))
    assert first.kind == again.kind
    assert torch.equal(first.images, again.images)
