"""The summary of a GenEval run: the official numbers, and their standard errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from argrpo_cli.geneval.prompts import official_prompts
from argrpo_cli.geneval.summary import summarise, tag_scores
from argrpo_cli.system.errors import UserError
from tests.geneval import goldens

DOGS = [prompt for prompt in official_prompts() if prompt.tag == "single_object"]
PAIRS = [prompt for prompt in official_prompts() if prompt.tag == "two_object"]


def test_official_summary():
    cases = [case for case in goldens.decisions() if "line" in case and not case["thresholds"]]
    expected = goldens.summary_numbers()
    summary = summarise([(goldens.prompt_of(case), case["expected"]["correct"]) for case in cases])
    assert summary.overall.images == expected["total_images"]
    assert summary.overall.prompts == expected["total_prompts"]
    assert summary.correct_images == pytest.approx(expected["frac_correct_images"], abs=1e-12)
    assert summary.correct_prompts == pytest.approx(expected["frac_correct_prompts"], abs=1e-12)
    assert {tag: score.mean for tag, score in summary.by_tag.items()} == pytest.approx(expected["by_tag"], abs=1e-12)
    assert summary.overall.mean == pytest.approx(expected["overall"], abs=1e-12)


def test_overall_is_the_plain_mean_of_the_categories():
    outcomes = [(prompt, True) for prompt in DOGS[:30]] + [(prompt, False) for prompt in PAIRS[:10]]
    summary = summarise(outcomes)
    assert summary.overall.mean == 0.5 and summary.correct_images == 0.75


def test_a_prompt_is_correct_when_one_of_its_images_is():
    summary = summarise([(DOGS[0], False), (DOGS[0], True), (DOGS[1], False), (DOGS[1], False)])
    assert summary.correct_prompts == 0.5 and summary.correct_images == 0.25


def test_the_error_is_that_of_the_prompts_means():
    values = np.random.default_rng(0).random((12, 4)) < np.linspace(0.1, 0.9, 12)[:, None]
    outcomes = [(prompt, value) for prompt, row in zip(DOGS, values, strict=False) for value in row]
    score = summarise(outcomes).by_tag["single_object"]
    means = values.mean(1)
    assert score.error == pytest.approx(means.std(ddof=1) / math.sqrt(12), abs=1e-12)
    assert (score.images, score.prompts) == (48, 12)


def test_four_copies_of_an_image_tell_no_more_than_one():
    single = [(prompt, index % 3 == 0) for index, prompt in enumerate(DOGS[:20])]
    once, four_times = summarise(single), summarise(single * 4)
    assert four_times.overall.mean == pytest.approx(once.overall.mean, abs=1e-15)
    assert four_times.overall.error == pytest.approx(once.overall.error, abs=1e-15)


def test_the_error_of_unequal_groups_follows_the_formula():
    outcomes = [(DOGS[0], True), (DOGS[0], True), (DOGS[0], False), (DOGS[1], False)]
    # mean 1/2; residual sums 1/2 and -1/2; 2 / 1 * (1/4 + 1/4) / 16
    assert summarise(outcomes).by_tag["single_object"].error == pytest.approx(0.25)


def test_the_overall_error_comes_from_the_categories_errors():
    outcomes = [(prompt, index % 2 == 0) for group in (DOGS[:16], PAIRS[:9]) for index, prompt in enumerate(group)]
    by_tag, overall = tag_scores(outcomes)
    assert overall.error == pytest.approx(math.hypot(*(score.error for score in by_tag.values())) / 2)


def test_the_stated_error_is_the_spread_over_repeated_runs():
    rng = np.random.default_rng(1)
    means, errors = [], []
    for _ in range(300):
        chances = rng.beta(0.5, 0.5, 30)  # prompts differ much, so that images of one prompt are alike
        hits = rng.random((30, 4)) < chances[:, None]
        score = summarise([(p, hit) for p, row in zip(DOGS, hits, strict=False) for hit in row]).overall
        means.append(score.mean)
        errors.append(score.error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.12)


def test_paired_differences_have_scores_too():
    differences = [(DOGS[0], 1.0), (DOGS[1], -1.0), (DOGS[2], 0.0), (DOGS[3], 1.0)]
    by_tag, _ = tag_scores(differences)
    assert by_tag["single_object"].mean == 0.25
    assert by_tag["single_object"].error == pytest.approx(np.std([1, -1, 0, 1], ddof=1) / 2)


def test_one_prompt_has_no_error_and_no_image_no_summary():
    assert math.isnan(summarise([(DOGS[0], True)] * 4).overall.error)
    with pytest.raises(UserError, match="no images"):
        summarise([])
