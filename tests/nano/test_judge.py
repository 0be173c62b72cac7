"""The bundled judge: it reads real scenes as real, and damage as damage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from argrpo_cli.nano import judge as j
from argrpo_cli.nano import scenes
from argrpo_cli.nano.matching import Match
from argrpo_cli.nano.tokens import decode, encode
from argrpo_cli.system.errors import UserError
from tests.nano.test_scenes import needs_font


@pytest.fixture(scope="module")
def judge():
    return j.load_judge()


def test_reference_scenes_match_and_are_recognised(judge):
    images, ids = judge.reference_images[:96], judge.reference_classes[:96]
    match = judge.match(images, ids)
    assert match.db.mean() > 23
    assert (judge.probabilities(judge.features(images)).argmax(1) == ids).float().mean() > 0.97


def test_a_scene_matches_its_own_class_better_than_another(judge):
    images, ids = judge.reference_images[:48], judge.reference_classes[:48]
    own = judge.match(images, ids).db
    other = judge.match(images, (ids + 7) % len(scenes.CLASS_NAMES)).db
    assert (own > other).float().mean() > 0.97
    assert (own - other).mean() > 8


def test_wrong_tokens_lower_the_match_the_more_the_worse(judge):
    tokens, ids = judge.reference_tokens[:48], judge.reference_classes[:48]
    generator = torch.Generator().manual_seed(0)
    means = []
    for share in (0.0, 0.1, 0.3, 0.7):
        wrong = torch.randint(0, judge.tokenizer.config.codebook_size, tokens.shape, generator=generator)
        mask = torch.rand(tokens.shape, generator=generator) < share
        images = decode(judge.tokenizer, torch.where(mask, wrong, tokens))
        means.append(judge.match(images, ids).db.mean().item())
    assert means == sorted(means, reverse=True)
    assert means[0] - means[1] > 2


def test_the_expected_match_is_fitted_on_class_size_and_its_square():
    count = 240
    ids, size = torch.arange(count) % 3, torch.arange(count) % 21 + 40
    truth = lambda i, s: torch.tensor([20.0, 25.0, 23.0])[i] + 0.3 * (s - 50) - 0.02 * (s - 50) ** 2  # noqa: E731
    fitted = j.Judge([None] * 3, None, None, torch.zeros(count, 1), ids)
    zeros = torch.zeros(count)
    fitted.__dict__["reference_match"] = Match(truth(ids, size), size, zeros, zeros, zeros, zeros)
    asked = torch.tensor([2, 0, 1, 1]), torch.tensor([40, 60, 55, 44])
    torch.testing.assert_close(fitted.expected_db(*asked), truth(*asked), atol=1e-4, rtol=0)


def test_drawing_larger_gains_nothing_at_the_expected_match(judge):
    match = judge.reference_match
    rest = match.db - judge.expected_db(judge.reference_classes[: j.FITTED], match.size)
    small, large = match.size < 45, match.size > 55
    assert match.db[large].mean() - match.db[small].mean() > 1.5
    assert abs(rest[large].mean() - rest[small].mean()) < 0.3
    assert abs(rest.mean()) < 1e-3 and rest.std() < 0.6 * match.db.std()


def test_canonical_scenes_lie_inside_the_picture():
    layout = j.canonical_layout()
    assert len(set(layout)) == len(layout) == 36
    assert all(0 <= v <= scenes.IMAGE_SIZE - j.LARGEST for x, y, _ in layout for v in (x, y))


def test_colour_and_alpha_are_solved_exactly_from_exact_pictures():
    generator = torch.Generator().manual_seed(1)
    alpha = (torch.rand(1, j.LARGEST, j.LARGEST, generator=generator) * 1.4 - 0.2).clamp(0, 1).round()
    colour = torch.rand(3, j.LARGEST, j.LARGEST, generator=generator) * alpha
    images = []
    for x, y, background in j.canonical_layout():
        image = torch.tensor(background)[:, None, None].expand(3, scenes.IMAGE_SIZE, scenes.IMAGE_SIZE).clone()
        window = image[:, y : y + j.LARGEST, x : x + j.LARGEST]
        window.mul_(1 - alpha).add_(colour)
        images.append((image * 255).round().to(torch.uint8))
    solved = j.solve_template(torch.stack(images))
    torch.testing.assert_close(solved.alpha, alpha, atol=0.02, rtol=0)
    torch.testing.assert_close(solved.colour, colour, atol=0.06, rtol=0)


@needs_font
def test_the_truth_of_fresh_scenes_is_found(judge):
    rng = np.random.default_rng(7)
    drawn = [scenes.class_scene(rng, i) for i in range(len(scenes.CLASS_NAMES))]
    raw = torch.from_numpy(np.stack([scenes.render(s) for s in drawn]).transpose(0, 3, 1, 2).copy())
    images = decode(judge.tokenizer, encode(judge.tokenizer, raw))
    match = judge.match(images, torch.arange(len(drawn)))
    truth = [s.objects[0] for s in drawn]
    assert np.mean([abs(a - b.size) <= 1 for a, b in zip(match.size.tolist(), truth, strict=True)]) > 0.9
    assert np.mean([a == b.mirror for a, b in zip(match.mirror.tolist(), truth, strict=True)]) > 0.9
    assert np.mean([abs(a - b.x) <= 1 for a, b in zip(match.x.tolist(), truth, strict=True)]) > 0.9


def test_the_moments_beside_the_judge_are_those_of_its_reference(judge):
    """Of a fifth of it, up to what so many scenes tell."""
    mean, deviation = j.reference_moments()
    features = judge.features(judge.reference_images[:240]).double()
    assert ((features.mean(0) - mean) / deviation * 240**0.5).abs().max() < 4
    assert (features.std(0) / deviation).log().abs().max() < 0.25


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"moments\.safetensors is missing"):
        j.reference_moments(tmp_path)
    with pytest.raises(UserError, match=r"tokens\.safetensors"):
        j.load_judge(tmp_path)
