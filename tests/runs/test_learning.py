"""What the records of a run say of why it learned, against cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from argrpo_cli.runs.learning import Gain, NoiseScale, conclusions, estimate, gain, kl_efficiency
from tests.runs.records import record


def flat(step: int, **changes: object) -> dict[str, object]:
    """An update whose reward is 1 but for noise of deviation 0.05; its spread within groups is 0.25."""
    return record(step, **{"reward": 1.0 + 0.05 * (-1) ** step, "kl": None} | changes)


def run(count: int = 40, rise: float = 0.0, **changes: object) -> list[dict[str, object]]:
    """A run whose reward rises by `rise` deviations from the first to the last ten of its updates."""
    slope = rise * 0.25 / max(1, count - 10)
    return [flat(step, reward=1.0 + slope * step + 0.05 * (-1) ** step, **changes) for step in range(1, count + 1)]


def test_squared_norms_are_split_into_signal_and_noise() -> None:
    # Four images with gradients 1, 3, 5, 7: in blocks of two their means are 2 and 6, of all 4.
    signal, noise = estimate((2**2 + 6**2) / 2, 4**2, few=2, many=4)
    assert signal == pytest.approx(2 * 6)  # the product of the blocks
    assert noise == pytest.approx(2 * ((2 - 4) ** 2 + (6 - 4) ** 2))  # a block's sample variance, times its images


@pytest.mark.parametrize("whole_groups", [True, False])
def test_blocks_of_whole_groups_give_the_noise_of_grpo(whole_groups: bool) -> None:
    """Advantages times scores of groups whose conditions have gradients of their own; shuffled images mislead."""
    draw, groups, size, width = np.random.default_rng(0), 160_000, 4, 8
    direction = 0.15 + 0.4 * draw.normal(size=(groups, 1, width))  # of what the reward likes, a condition's own
    score = draw.normal(size=(groups, size, width))
    reward = (score * direction).sum(-1) + draw.normal(size=(groups, size))
    advantage = (reward - reward.mean(1, keepdims=True)) / (reward.std(1, ddof=1, keepdims=True) + 1e-4)
    gradient = advantage[..., None] * score
    group = gradient.mean(1)
    true_signal, true_noise = (group.mean(0) ** 2).sum(), size * group.var(0, ddof=1).sum()
    batches = gradient.reshape(-1, 8 * size, width)  # 8 groups an update
    if not whole_groups:
        batches = batches[:, draw.permutation(8 * size)]
    blocks = batches.reshape(len(batches), 4, 2 * size, width).mean(2)
    small, big = (blocks**2).sum(-1).mean(), (batches.mean(1) ** 2).sum(-1).mean()
    signal, noise = estimate(small, big, few=2 * size, many=8 * size)
    if whole_groups:
        assert signal == pytest.approx(true_signal, rel=0.05)
        assert noise == pytest.approx(true_noise, rel=0.03)
    else:
        assert signal > 1.3 * true_signal


def test_the_noise_scale_is_a_ratio_of_means_and_waits_for_its_signal() -> None:
    scale = NoiseScale()
    for signal in [3.0, 1.0] * 4:
        scale.add(signal, 100.0)
    assert scale.value is scale.least is None  # too few updates
    scale.add(None, None)
    scale.add(2.0, 100.0)
    scale.add(2.0, 100.0)
    assert scale.value == pytest.approx(50.0)
    assert scale.least == pytest.approx(100 / (2 + 2 * math.sqrt(0.8 / 9)))
    lost = NoiseScale()
    for signal in [3.0, -3.0] * 5:
        lost.add(signal, 100.0)
    assert lost.value is None
    assert lost.least == pytest.approx(100 / (2 * math.sqrt(9 / 9)))


def test_gain_is_in_deviations_within_conditions_with_the_error_of_two_means() -> None:
    found = gain(run(40, rise=2.0))
    assert found.value == pytest.approx(2.0, abs=0.01)
    assert found.updates == 10
    assert found.error == pytest.approx(math.sqrt(2 / 10) * 0.05 / 0.25, rel=0.05)
    assert gain(run(19)) is None
    assert gain([{"step": step, "kl": 0.1} for step in range(50)]) is None  # a run without rewards


def test_an_ideal_tilt_has_efficiency_1() -> None:
    """p exp(r / b), normalised, is the policy of its mean reward that is nearest to p."""
    draw = np.random.default_rng(0)
    start, reward = draw.dirichlet(np.ones(1000)), draw.normal(size=1000)
    tilted = start * np.exp(reward / 50)
    tilted /= tilted.sum()
    kl = (tilted * np.log(tilted / start)).sum()
    mean = start @ reward
    spread = math.sqrt(start @ (reward - mean) ** 2)
    gained = Gain((tilted @ reward - mean) / spread, 0.0, 10)
    assert kl_efficiency(gained, kl / 16, tokens=16) == pytest.approx(1, abs=0.03)
    assert kl_efficiency(Gain(0.5, 0.3, 10), 0.01, tokens=16) == pytest.approx((0.25 - 0.09) / 2 / 0.16)
    assert kl_efficiency(Gain(0.2, 0.3, 10), 0.01, tokens=16) == 0
    assert kl_efficiency(gained, 0.0, tokens=16) is kl_efficiency(None, 1.0, tokens=16) is None


NOTES = {"tokens": 64}


def said(records: list[dict[str, object]], **notes: object) -> str:
    return " ".join(conclusions(records, 48, NOTES | notes))


def test_a_run_that_learns_says_how_much_and_what_it_paid() -> None:
    text = said(
        run(60, rise=2.0, kl_start=0.25),
        transfer=[
            {"name": "as trained", "gain": 1.5, "error": 0.1}, {"name": "guided at 4", "gain": -0.2, "error": 0.11},
        ],
    )  # fmt: skip
    assert "rose by 2.00 ± 0.09 sd" in text
    assert "as trained +1.50 ± 0.10 sd, guided at 4 -0.20 ± 0.11 sd" in text
    assert "16 nats an image (0.25 a token); an ideal policy needs 2 for this gain, so the efficiency is 12%" in text
    assert "still rising" in text
    assert "Limited" not in text


def test_a_run_without_change_or_rewards_says_so_or_nothing() -> None:
    assert "did not change beyond its error" in said(run(40))
    assert "fell by" in said(run(40, rise=-2.0))
    assert said(run(10)) == said([{"step": step} for step in range(99)]) == ""


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"noise_scale": 4000.0}, "Limited by noise: the gradient noise scale is 4,000 images, an update has 48"),
        ({"noise_scale_least": 900.0}, "Limited by noise: the gradient noise scale is 900 images at least"),
        ({"kl_start": 0.25}, "Limited by noise, by its symptom"),  # nothing for 16 nats
        ({"groups_without_spread": 0.7}, "Limited by saturation: 30% of the last groups have spread"),
        ({"kl": 0.1}, "Limited by the KL term"),
        ({"noise_scale": 50.0}, ""),
    ],
)
def test_each_limit_has_its_sign(changes: dict[str, float], limit: str) -> None:
    text = said(run(60, **changes))
    assert limit in text
    assert text.count("Limited") == bool(limit)


def test_flat_reward_and_growing_kl_are_noise() -> None:
    assert "by its symptom" in said([one | {"kl": 0.001 * one["step"]} for one in run(60)])


def test_a_spread_that_shrinks_is_saturation() -> None:
    records = [one | {"within_group_std": 0.25 if one["step"] < 30 else 0.1} for one in run(60)]
    assert "is 40% of what it was" in said(records).replace("which ", "")
