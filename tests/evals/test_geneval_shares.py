"""GenEval's figures from verdicts: the official numbers, and their standard errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from argrpo_cli.evals.geneval import TOTALS, shares
from argrpo_cli.geneval.prompts import official_prompts
from argrpo_cli.system.errors import UserError
from tests.geneval import goldens

DOGS = [prompt for prompt in official_prompts() if prompt.tag == "single_object"]
PAIRS = [prompt for prompt in official_prompts() if prompt.tag == "two_object"]


IMAGES, PROMPTS = TOTALS


def test_official_summary():
    cases = [case for case in goldens.decisions() if "line" in case and not case["thresholds"]]
    expected = goldens.summary_numbers()
    figures = shares([(goldens.prompt_of(case), case["expected"]["correct"]) for case in cases])
    assert figures["overall"].count == figures[IMAGES].count == expected["total_images"]
    assert figures[PROMPTS].count == expected["total_prompts"]
    assert figures[IMAGES].value == pytest.approx(expected["frac_correct_images"], abs=1e-12)
    assert figures[PROMPTS].value == pytest.approx(expected["frac_correct_prompts"], abs=1e-12)
    assert {tag: figures[tag].value for tag in expected["by_tag"]} == pytest.approx(expected["by_tag"], abs=1e-12)
    assert set(figures) == {*expected["by_tag"], "overall", *TOTALS}
    assert figures["overall"].value == pytest.approx(expected["overall"], abs=1e-12)


def test_overall_is_the_plain_mean_of_the_categories():
    figures = shares([(prompt, True) for prompt in DOGS[:30]] + [(prompt, False) for prompt in PAIRS[:10]])
    assert figures["overall"].value == 0.5 and figures[IMAGES].value == 0.75


def test_a_prompt_is_correct_when_one_of_its_images_is():
    figures = shares([(DOGS[0], False), (DOGS[0], True), (DOGS[1], False), (DOGS[1], False)])
    assert figures[PROMPTS].value == 0.5 and figures[IMAGES].value == 0.25


def test_the_error_is_that_of_the_prompts_means():
    values = np.random.default_rng(0).random((12, 4)) < np.linspace(0.1, 0.9, 12)[:, None]
    outcomes = [(prompt, value) for prompt, row in zip(DOGS, values, strict=False) for value in row]
    one = shares(outcomes)["single_object"]
    means = values.mean(1)
    assert one.error == pytest.approx(means.std(ddof=1) / math.sqrt(12), abs=1e-12)
    assert one.count == 48 and len(one.strata[0]) == 12


def test_four_copies_of_an_image_tell_no_more_than_one():
    single = [(prompt, index % 3 == 0) for index, prompt in enumerate(DOGS[:20])]
    once, four_times = shares(single)["overall"], shares(single * 4)["overall"]
    assert four_times.value == pytest.approx(once.value, abs=1e-15)
    assert four_times.error == pytest.approx(once.error, abs=1e-15)


def test_the_error_of_unequal_groups_follows_the_formula():
    outcomes = [(DOGS[0], True), (DOGS[0], True), (DOGS[0], False), (DOGS[1], False)]
    # mean 1/2; residual sums 1/2 and -1/2; 2 / 1 * (1/4 + 1/4) / 16
    assert shares(outcomes)["single_object"].error == pytest.approx(0.25)


def test_the_overall_error_comes_from_the_categories_errors():
    figures = shares([(prompt, i % 2 == 0) for group in (DOGS[:16], PAIRS[:9]) for i, prompt in enumerate(group)])
    errors = [figures[tag].error for tag in ("single_object", "two_object")]
    assert figures["overall"].error == pytest.approx(math.hypot(*errors) / 2)


def test_the_stated_error_is_the_spread_over_repeated_runs():
    rng = np.random.default_rng(1)
    means, errors = [], []
    for _ in range(300):
        chances = rng.beta(0.5, 0.5, 30)  # prompts differ much, so that images of one prompt are alike
        hits = rng.random((30, 4)) < chances[:, None]
        one = shares([(p, hit) for p, row in zip(DOGS, hits, strict=False) for hit in row])["overall"]
        means.append(one.value)
        errors.append(one.error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.12)


def test_paired_differences_have_errors_of_the_pairs():
    """Two images a prompt: category by category, and of their mean."""
    rng = np.random.default_rng(2)
    asked = [prompt for prompt in (*DOGS[:6], *PAIRS[:4]) for _ in range(2)]
    first, second = (rng.random(len(asked)) < 0.5 for _ in range(2))
    both = [shares(list(zip(asked, values, strict=True))) for values in (first, second)]
    alone = shares([(prompt, float(x) - float(y)) for prompt, x, y in zip(asked, first, second, strict=True)])
    for tag in ("single_object", "two_object", "overall", IMAGES):
        difference = both[0][tag].minus(both[1][tag])
        assert difference.value == pytest.approx(alone[tag].value, abs=1e-15)
        assert difference.error == pytest.approx(alone[tag].error, abs=1e-15)


def test_one_prompt_has_no_error_and_no_image_no_figures():
    assert math.isnan(shares([(DOGS[0], True)] * 4)["overall"].error)
    with pytest.raises(UserError, match="no images"):
        shares([])
