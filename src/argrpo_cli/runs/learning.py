"""Why a run learns or does not: what its records say of noise, of KL and of saturation, in numbers and in plain words.

Everything here reads the records of metrics.jsonl (training/metrics.py writes them, training/instruments.py measures
what goes in) and needs no policy, so a report can be made again at any time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from argrpo_cli.runs.curves import DEGREE, LEAST, SHARE, Record, inflation, residuals, trend

FEWEST = 10  # updates in a window, and in a mean of gradients' squares, below which nothing is said
ERRORS = 2.0  # standard errors from which on something counts as seen
NOISY = 2.0  # noise scale over batch size from which on an update is mostly noise
SATURATED = 0.5  # share of effective groups, and of the spread at the start, below which a run runs dry
OTHERS = (  # what methods without rewards lower: its key, what it is, and its unit
    ("divergence", "The divergence to the guided teacher", " nats a token"),
    ("contrast", "The loss of the contrast", ""),
)
ALONG_IMAGES = ("reward", "The reward of what is drawn along real images", "")
WASTEFUL = 0.1  # KL efficiency below which most of the KL was spent on noise


@dataclass
class NoiseScale:
    """The gradient noise scale S / |G|² in images (McCandlish et al. 2018, appendix A.1), from sums over updates.

    |G|² is the squared norm of the true gradient, S / B the variance (the trace of the covariance) of the gradient of B
    images. Far above the noise scale a larger batch hardly helps; far below it progress is proportional to the images.
    Single updates estimate |G|² with an error larger than itself, so both are averaged first and divided then.

    A batch means B images in whole groups of the recipe's size, of conditions as the run draws them. The images of a
    group share a condition and a baseline, so they are no independent samples, and groups are what is compared here
    (`estimate`): S counts what differs between conditions, too. Runs pass through their conditions in permutations;
    where there are few (n), the groups of a batch are of different ones, and |G|² comes out smaller than it is by
    (E|G_c|² - |G|²) / (n - 1), G_c being the gradient of one condition: nothing for captions, some for 24 classes.
    """

    count: int = 0
    signal: float = 0.0
    signal_squared: float = 0.0
    noise: float = 0.0

    def add(self, signal: float | None, noise: float | None) -> None:
        """Count `gradient_signal` and `gradient_noise` of an update."""
        if signal is not None and noise is not None:
            self.count += 1
            self.signal += signal
            self.signal_squared += signal**2
            self.noise += noise

    @property
    def error(self) -> float:
        """Standard error of the mean |G|²."""
        if self.count < 2:
            return math.inf
        mean = self.signal / self.count
        return math.sqrt(max(0.0, self.signal_squared / self.count - mean**2) / (self.count - 1))

    @property
    def value(self) -> float | None:
        """The noise scale; None until |G|² stands `ERRORS` standard errors above nothing."""
        known = self.count >= FEWEST and self.signal / self.count > ERRORS * self.error
        return max(0.0, self.noise) / self.signal if known else None

    @property
    def least(self) -> float | None:
        """What the noise scale is at least: with |G|² as large as `ERRORS` standard errors allow."""
        if self.count < FEWEST:
            return None
        most = max(0.0, self.signal / self.count) + ERRORS * self.error
        return max(0.0, self.noise / self.count) / most if most else None


def estimate(small: float, big: float, few: int, many: int) -> tuple[float, float]:
    """Unbiased |G|² and S from the squared norms of the mean gradients of `few` and of `many` images (A.1).

    Unbiased also when the few are among the many, as here, if the batch is made of independent blocks of `few`:
    E|g_n|² = |G|² + S/n for both sizes. GRPO's groups are independent, images of one are not: blocks are whole groups.
    With the mean of |g|² over all blocks of the batch for `small`, |G|² is the mean product of two blocks' gradients.
    """
    signal = (many * big - few * small) / (many - few)
    noise = (small - big) / (1 / few - 1 / many)
    return signal, noise


class Gain(NamedTuple):
    """How far the mean reward rose, in standard deviations of the reward within conditions at the start."""

    value: float
    error: float
    updates: int  # in each of the two windows


def gain(records: Sequence[Record]) -> Gain | None:
    """The mean reward of the last updates minus that of the first, over the spread within groups of the first.

    The windows are a tenth of the updates, `FEWEST` at least; None where they would overlap, or without rewards. The
    error is that of two means of n updates that scatter as the run does about its trend (a line; in runs of `LEAST`
    updates a cubic), times `inflation`.
    """
    known = [one["reward"] for one in records if one.get("reward") is not None]
    n = max(FEWEST, round(SHARE * len(known)))
    if len(known) < 2 * n:
        return None
    rewards = np.array(known, dtype=float)
    spread = spread_at_start(records, n)
    if not spread:
        return None
    degree = DEGREE if len(rewards) >= LEAST else 1
    noise = residuals(rewards, degree)
    error = math.sqrt(2 / n * (noise @ noise) / (len(rewards) - degree - 1) * inflation(noise))
    return Gain(float(rewards[-n:].mean() - rewards[:n].mean()) / spread, error / spread, n)


def spread_at_start(records: Sequence[Record], updates: int = FEWEST) -> float | None:
    """Mean standard deviation of the reward within groups in the first `updates`; None where it was never measured."""
    known = [one["within_group_std"] for one in records if one.get("within_group_std") is not None]
    return float(np.mean(known[:updates])) if known else None


def kl_efficiency(gained: Gain | None, kl: float | None, tokens: int) -> float | None:
    """The KL that the gain needs at least, over the KL that was spent.

    Among all policies whose mean reward is g standard deviations above the start's, the tilt of the start by
    exp(reward / b) is nearest to it; for a reward of Gaussian spread its KL is g²/2. So 1 is ideal, and what moves the
    policy without raising the reward lowers it. The square of the measured gain is larger than that of the true one by
    the square of its error, which is taken off.

    Args:
        kl: to the start, nats per token; of a sequence it is `tokens` times as much.
    """
    if gained is None or not kl or kl <= 0:
        return None
    return max(0.0, gained.value**2 - gained.error**2) / 2 / (kl * tokens)


def last(records: Sequence[Record], key: str) -> Any:
    """The latest measured value of a key of the records; None where there is none."""
    return next((one[key] for one in reversed(records) if one.get(key) is not None), None)


def conclusions(records: Sequence[Record], batch_size: int, notes: Mapping[str, Any]) -> list[str]:
    """What a run came to, in sentences for its last lines and its report; empty with few updates. Of methods without
    rewards that is how far fell what they lower.

    The rules, in the order in which they are said:

    - reward: the gain with its error; it rose or fell where it is more than `ERRORS` errors from 0.
    - transfer: what is left of the gain with and without guidance, from the samples drawn at the end.
    - KL: what was spent on the sequence, what the gain needed, and the efficiency.
    - saturation: in the last window fewer than `SATURATED` of the groups have spread, or the mean spread within groups
      is less than that share of what it was in the first window. There is little left to compare.
    - noise: the noise scale, or what it is at least, is more than `NOISY` times the batch. Also, where it is unknown,
      its symptom: the reward does not rise and the KL does (over the second half of the run), or an efficiency below
      `WASTEFUL`.
    - KL term: in the second half neither reward nor KL rises although there is a KL term that pulls back.
    - otherwise still rising: the reward of the second half rises by more than its errors.

    Args:
        batch_size: images of an update.
        notes: of run.json: `tokens` of an image, and `transfer`, the rows of `training.instruments.transfer`.
    """
    gained = gain(records)
    along = any("cross_entropy" in one for one in records)  # rewards of images that differ much more than draws of one
    for key, what, unit in (*OTHERS, *([ALONG_IMAGES] if along else [])):
        values = [one[key] for one in records if one.get(key) is not None]
        if len(values) >= 2 * FEWEST:
            n = max(FEWEST, round(SHARE * len(values)))
            went = f"{np.mean(values[:n]):.3g} to {np.mean(values[-n:]):.3g}{unit}"
            return [f"{what} went from {went} (first and last {n} updates)."]
    return [] if gained is None else list(_conclusions(gained, records, batch_size, notes))


def _conclusions(gained: Gain, records: Sequence[Record], batch_size: int, notes: Mapping[str, Any]) -> Iterator[str]:
    yield _reward_sentence(gained)
    transfer, tokens = notes.get("transfer"), notes.get("tokens", 0)
    if transfer:
        yield (
            "On the same conditions and seeds: "
            + ", ".join(f"{row['name']} {row['gain']:+.2f} ± {row['error']:.2f} sd" for row in transfer)
            + "."
        )
    kl = last(records, "kl_start")
    efficiency = kl_efficiency(gained, kl, tokens) if tokens else None
    if efficiency is not None:
        spent = f"KL spent: {kl * tokens:.3g} nats an image ({kl:.2g} a token)"
        needed = f"an ideal policy needs {efficiency * kl * tokens:.2g} for this gain, so the efficiency is"
        yield f"{spent}; {needed} {efficiency:.0%}." if efficiency else f"{spent}, for no gain beyond its error."
    limits = list(_limits(records, gained, efficiency, batch_size))
    if limits:
        yield from limits
    elif _rises(_second_half(records, "reward")):
        yield "The reward was still rising at the end: more updates would gain more."


def _reward_sentence(gained: Gain) -> str:
    change = f"{abs(gained.value):.2f} ± {gained.error:.2f} sd of one condition's images"
    between = f"(last {gained.updates} updates against the first)"
    if abs(gained.value) <= ERRORS * gained.error:
        return f"The reward did not change beyond its error: {gained.value:+.2f} ± {gained.error:.2f} sd {between}."
    return f"The reward {'rose' if gained.value > 0 else 'fell'} by {change} {between}."


def _limits(records: Sequence[Record], gained: Gain, efficiency: float | None, batch_size: int) -> Iterator[str]:
    batches = [one for one in records if one.get("reward") is not None]
    n = gained.updates
    effective = 1 - _mean(batches[-n:], "groups_without_spread", 0.0)
    shrunk = _mean(batches[-n:], "within_group_std", math.nan) / _mean(batches[:n], "within_group_std", math.nan)
    if effective < SATURATED or shrunk < SATURATED:
        yield (
            f"Limited by saturation: {effective:.0%} of the last groups have spread, which is {shrunk:.0%} of what it "
            "was. Take harder conditions, larger groups, or a reward that still tells images apart."
        )
    scale, least = last(records, "noise_scale"), last(records, "noise_scale_least")
    rising, spending = _rises(_second_half(records, "reward")), _rises(_second_half(records, "kl"))
    if (scale or least or 0) > NOISY * batch_size:
        size = f"{scale:,.0f} images" if scale else f"{least:,.0f} images at least"
        yield (
            f"Limited by noise: the gradient noise scale is {size}, an update has {batch_size}. More images an update, "
            "or a lower learning rate for longer: for one number of images it costs less KL for the same gain."
        )
    elif scale is None and ((spending and not rising) or (efficiency is not None and efficiency < WASTEFUL)):
        yield (
            "Limited by noise, by its symptom: the policy moves and the reward hardly follows. More images an update, "
            "or a lower learning rate for longer."
        )
    kl = _second_half(records, "kl")
    if len(kl) > FEWEST and not rising and not spending:
        yield "Limited by the KL term: neither reward nor KL rises any more. A lower grpo.beta would let it go on."


def _mean(records: Sequence[Record], key: str, default: float) -> float:
    known = [one[key] for one in records if one.get(key) is not None]
    return float(np.mean(known)) if known else default


def _second_half(records: Sequence[Record], key: str) -> np.ndarray:
    known = [one[key] for one in records if one.get(key) is not None]
    return np.array(known[len(known) // 2 :], dtype=float)


def _rises(values: np.ndarray) -> bool:
    """Whether a straight line through the values goes up by more than `ERRORS` of its errors."""
    if len(values) < FEWEST:
        return False
    rise, error = trend(values)
    return rise > ERRORS * error
