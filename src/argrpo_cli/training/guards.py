"""Guard rails: what in the records of a run (lines of metrics.jsonl) means trouble, how to say it in one line, and what
is done about it: a warning that run.json remembers, a stop, a gradient that is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from rich.text import Text
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from argrpo_cli.recipe.sections import Action
from argrpo_cli.runs.curves import ROUNDING, trend
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.processes import ALONE, Team

if TYPE_CHECKING:
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.runs.run import RunDirectory
    from argrpo_cli.training.display import RunDisplay
    from argrpo_cli.training.metrics import MetricsCallback, StopRequest

Record = dict[str, Any]
Sighting = tuple[str, str]  # what was seen, and the line about it

# A single token that the policy has made very unlikely can lift the KL estimate of one update by itself, since it grows
# as pi_ref / pi_theta; a policy that has left its base stays there.
KL_UPDATES = 2
# Growth: tenfold the median of the ten updates before. Every run does that while it leaves zero, hence the floor.
KL_GROWTH, KL_RECENT, KL_FLOOR = 10, 10, 1 / 20  # the floor in parts of the limit

COLLAPSED = 0.01  # of the spread that the reward had when the run began

# Held-out rewards are compared over several windows: the last `batches`, twice as many, ..., and the whole run. The
# optimised one is expected to rise, so it needs to be only this many standard errors above nothing.
RISING_ERRORS = 2.0
LOOKS = 4  # per window of `batches`: each look is a chance to be wrong

STILL = 3  # updates in a row without any advantage, or without gradient
SPARSE = 0.5  # share of groups without spread, on average, above which most of the images are drawn for nothing

SKIPPED_IN_A_ROW = 10  # updates left out before a run that skips them stops all the same
REARM = 10  # batches without trouble before the same warning is given again


@dataclass(frozen=True)
class Finding:
    """Something a guard saw.

    Attributes:
        guard: its name, a key of the recipe's guards section or `images_left_out`.
        text: one line: what was seen, what it usually means, what to do.
    """

    step: int
    guard: str
    text: str
    action: Literal["stop", "warn"]


class Guards:
    """Looks at the records of a run, one after the other.

    A warning is given once, and again only when the trouble was away in between; a finding that stops the run is
    returned for as long as the trouble lasts.

    Args:
        recipe: `guards`, and what the guards' limits depend on.
        weights: what each raw reward counts; 0 for a held-out one.
    """

    def __init__(self, recipe: Recipe, weights: Mapping[str, float]) -> None:
        self.recipe, self.section = recipe, recipe.guards
        self.counting = [name for name, weight in weights.items() if weight]
        self.held_out = [name for name, weight in weights.items() if not weight]
        self._records: list[Record] = []  # of all updates
        self._batches: list[Record] = []  # of those that drew images which have a reward
        self._last_seen: dict[tuple[str, str], int] = {}  # guard and what it saw -> number of batches then

    def look(self, record: Record) -> list[Finding]:
        """What there is to say about the latest record; the records before it were looked at in order."""
        self._records.append(record)
        section, constant, held_out = self.section, self.section.constant_reward, self.section.held_out
        growth: Action = "ignore" if section.kl.action == "ignore" else "warn"  # too uncertain a sign to stop for
        told: Action = "ignore" if section.constant_reward.action == "ignore" else "warn"
        looks = [  # guard, what it does, how it looks, and batches without trouble before it warns of the same again
            ("ratio", section.ratio.action, self._ratio, REARM),
            ("kl", section.kl.action, self._kl_beyond, REARM),
            ("kl", growth, self._kl_growth, REARM),
            ("images_left_out", "warn", self._images_left_out, math.inf),
            ("constant_reward", told, self._nothing_learnt, constant.batches),
        ]
        if record.get("reward") is not None:
            self._batches.append(record)
            looks.append(("constant_reward", constant.action, self._constant_rewards, constant.batches))
            looks.append(("constant_reward", told, self._sparse_groups, constant.batches))
            if len(self._batches) % max(1, held_out.batches // LOOKS) == 0:
                looks.append(("held_out", held_out.action, self._falling_rewards, held_out.batches))
        findings, now = [], len(self._batches)
        for guard, action, sightings, rearm in looks:
            if action == "ignore":
                continue
            for what, text in sightings():
                before = self._last_seen.get((guard, what))
                self._last_seen[guard, what] = now
                if action == "stop" or before is None or now - before > rearm:
                    findings.append(Finding(record["step"], guard, text, action))
        return findings

    def _ratio(self) -> Iterator[Sighting]:
        """The ratio on an on-policy update, the first of each batch. Off-policy ones are meant to move it."""
        record = self._records[-1]
        deviation = record.get("ratio_deviation_mean")
        if deviation is None or (record["step"] - 1) % self.recipe.optim.updates_per_batch:
            return
        limit = getattr(self.section.ratio.limit, self.recipe.policy.dtype)
        if deviation > limit:
            text = (
                f"mean |ratio - 1| to the sampler is {deviation:.2g} on an on-policy update (limit {limit:g}): the "
                "images were drawn from another distribution than the one that is trained, or numbers are too coarse; "
                "see sampling.top_k and top_p, try policy.dtype: float32, or raise guards.ratio.limit"
            )
            yield "", text

    def _images_left_out(self) -> Iterator[Sighting]:
        left_out = self._records[-1].get("images_left_out")
        if left_out:
            text = (
                f"{left_out:g} of {self.recipe.grpo.batch_size} images were left out of the update: a reward that "
                "counts gave them no score or one that is not a finite number; said once, see images_left_out in "
                f"metrics.jsonl (the run stops beyond rewards.max_missing: {self.recipe.rewards.max_missing:g})"
            )
            yield "", text

    def _kl_beyond(self) -> Iterator[Sighting]:
        """A KL estimate (nats per token) above the limit in the last `KL_UPDATES` that were made."""
        limit = self.section.kl.limit
        # Without a KL term to the base there is what is measured now and then.
        to_base = self._records[-1].get("kl") is not None and self.recipe.grpo.reference_decay == 1
        key = "kl" if to_base else "kl_start"
        if self._records[-1].get(key) is None:
            return
        measured = (one[key] for one in reversed(self._records) if one.get(key) is not None)
        latest = list(islice(measured, KL_UPDATES))
        if len(latest) == KL_UPDATES and min(latest) > limit:
            text = (
                f"the KL to the base policy is {latest[0]:.3g} nats per token (limit {limit:g}): the policy has left "
                "its base, and its images are usually ruined; raise grpo.beta or lower grpo.learning_rate in a new "
                "run, or raise guards.kl.limit"
            )
            yield "limit", text

    def _kl_growth(self) -> Iterator[Sighting]:
        """A KL estimate `KL_GROWTH` times the median of the updates just before."""
        *recent, latest = [record.get("kl") for record in self._records[-KL_RECENT - 1 :]]
        known = [kl for kl in recent if kl is not None]
        if latest is None or len(known) < KL_RECENT or latest <= KL_FLOOR * self.section.kl.limit:
            return
        usual = median(known)
        if latest > KL_GROWTH * usual:
            text = (
                f"the KL to the base policy jumped to {latest:.3g} nats per token, from {usual:.2g} in the {KL_RECENT} "
                "updates before: training may be about to diverge; lower grpo.learning_rate or raise grpo.beta"
            )
            yield "growth", text

    def _constant_rewards(self) -> Iterator[Sighting]:
        """Rewards that told no two images of a group apart in the last `guards.constant_reward.batches`.

        That is a spread within groups of what float32 leaves of equal scores, or of a hundredth of what it was in as
        many batches at the start.
        """
        count = self.section.constant_reward.batches
        total = [record.get("groups_without_spread") for record in self._batches[-count:]]
        if len(total) == count and all(share == 1 for share in total):
            text = (
                f"in the last {count} batches all images of every group had the same total reward, so there is no "
                "policy gradient: the rewards are broken, or the policy draws the same image every time; look at the "
                "grids, and at `argrpo score` on some images (guards.constant_reward)"
            )
            yield "", text
            return
        for name in self.counting:
            first, latest = (_means_and_spreads(part, name) for part in (self._batches[:count], self._batches[-count:]))
            if len(latest) < count:  # a batch without scores of this reward says nothing
                continue
            start = median(spread for _, spread in first) if first else 0.0
            if all(spread <= max(ROUNDING * abs(mean), COLLAPSED * start) for mean, spread in latest):
                mean, spread = latest[-1]
                text = (
                    f"reward {name} has collapsed to {mean:.4g} (its spread within groups is {spread:.2g}, and was "
                    f"{start:.2g} in the first {count} batches): it teaches nothing, being broken or saturated; look "
                    "at `argrpo score` on some images, or give it weight 0 in a new run (guards.constant_reward)"
                )
                yield name, text

    def _nothing_learnt(self) -> Iterator[Sighting]:
        """Advantages, or the whole gradient, that were exactly 0 in the last `STILL` updates that were measured."""
        for key, what in (("advantage_std", "every advantage"), ("grad_norm", "the gradient")):
            measured = (one[key] for one in reversed(self._records) if one.get(key) is not None)
            if self._records[-1].get(key) == 0 and list(islice(measured, STILL)) == [0] * STILL:
                text = (
                    f"{what} was exactly 0 in the last {STILL} updates, so nothing was learnt from their images: in no "
                    "group did two of them have different scores; look at the grids, and at `argrpo score` on some "
                    "images (guards.constant_reward)"
                )
                yield "", text
                return

    def _sparse_groups(self) -> Iterator[Sighting]:
        """More groups without spread than with, on average over the last `guards.constant_reward.batches`."""
        count = self.section.constant_reward.batches
        shares = [one.get("groups_without_spread") for one in self._batches[-count:]]
        known = [share for share in shares if share is not None]
        if len(known) == count and SPARSE < sum(known) / count < 1:
            text = (
                f"in the last {count} batches {sum(known) / count:.0%} of the groups had no spread: all their images "
                "scored alike and teach nothing; take harder or easier conditions, larger groups, a reward of finer "
                "steps, or grpo.dynamic_sampling in a new run (guards.constant_reward)"
            )
            yield "groups", text

    def _falling_rewards(self) -> Iterator[Sighting]:
        """Held-out rewards that fall while the optimised one rises, by straight lines through the batches' means.

        Looked at are the last `guards.held_out.batches`, twice as many, four times ..., and all: a short window sees a
        late turn, a long one a slow drift.

        Every look may be wrong, and there are many. Simulated: a held-out reward without a trend, beside an optimised
        one that rises for certain, 300 batches, 40 batches and 4 errors. A warning comes in 0.3% of the runs when
        batches are independent (as those of the nano runs are: the residuals of their curves are not correlated), in 4%
        for AR(1) noise of correlation 0.3 and in 16% for 0.6; with one window of 20 batches and 3 errors it would be
        27%, 69% and 94%. A fall by two standard deviations of a batch's mean within 140 batches is found in 99% of the
        runs, one by 1.2 in half of them.
        """
        for name in self.held_out:
            both = [(record["reward"], record["rewards"].get(name, {}).get("mean")) for record in self._batches]
            pairs = np.array([pair for pair in both if None not in pair], dtype=float).reshape(-1, 2)
            for size in _windows(len(pairs), self.section.held_out.batches):
                rise, rise_error = trend(pairs[-size:, 0])
                change, change_error = trend(pairs[-size:, 1])
                if rise > RISING_ERRORS * rise_error and -change > self.section.held_out.errors * change_error:
                    text = (
                        f"over the last {size} batches the optimised reward rose by {rise:.3g} ± {rise_error:.1g} and "
                        f"the held-out {name} fell by {-change:.3g} ± {change_error:.1g}: the policy probably games "
                        "its rewards; look at the grids, take an earlier checkpoint, or in a new run raise grpo.beta "
                        f"or let {name} count (guards.held_out)"
                    )
                    yield name, text
                    break


def _means_and_spreads(batches: Sequence[Record], name: str) -> list[tuple[float, float]]:
    """Mean and within-group standard deviation of a reward, in those batches that have both."""
    scores = [record["rewards"].get(name, {}) for record in batches]
    both = [(one.get("mean"), one.get("within_group_std")) for one in scores]
    return [(mean, spread) for mean, spread in both if mean is not None and spread is not None]


def _windows(known: int, count: int) -> list[int]:
    """count, 2 count, 4 count, ... below `known`, and `known` itself; none when fewer than count are known."""
    sizes = [] if known < count else [known]
    while count < known:
        sizes.append(count)
        count *= 2
    return sorted(sizes)


def bad_gradient(step: int, choice: Literal["stop", "skip"], in_a_row: int, method: str = "grpo") -> Finding:
    """What to say, and to do, about an update left out because its gradient is not a number.

    Args:
        choice: `guards.not_a_number`.
        in_a_row: how many updates were left out up to this one, without a good one between.
    """
    meaning = f"usually training has diverged, so start again with a lower {method}.learning_rate"
    text = "the gradient is not a number; the update was left out"
    if choice == "stop":
        text += (
            f" and the weights are those before it: {meaning}, or pass over a single bad update with --set "
            "guards.not_a_number=skip"
        )
    elif in_a_row < SKIPPED_IN_A_ROW:
        text += f" ({in_a_row} in a row, {SKIPPED_IN_A_ROW} stop the run): {meaning} if this goes on"
        return Finding(step, "not_a_number", text, "warn")
    else:
        text = f"the gradients of {in_a_row} updates in a row are not numbers; they were left out: {meaning}"
    return Finding(step, "not_a_number", text, "stop")


def check_weights(model: nn.Module, checkpoint: str) -> None:
    """Refuse a policy that cannot be trained.

    Raises:
        UserError: a parameter holds something that is not a finite number.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(
                f"policy.checkpoint {checkpoint}: {name} is not made of finite numbers, so nothing can be trained; "
                "take an earlier checkpoint, or the published file again"
            )


@dataclass(eq=False)
class GuardCallback(TrainerCallback):
    """Stands after MetricsCallback, whose record it reads, and before the checkpoint is written.

    The weights that are saved are always finite numbers: an update with a gradient that is none is left out, and
    weights that are none are not saved. Left out is also an update without gradient (exactly 0: neither advantages nor
    a KL term or bonus have one), and one of a batch in which nothing could be compared because scores are missing. What
    is left out changes neither weights nor moments nor running mean; it counts as an update, so the learning rate goes
    on by its schedule. All processes decide alike: gradients and scores are those of the whole batch in each. With
    DeepSpeed, whose engine has made its step before a callback can look, nothing can be left out.

    Attributes:
        weights: what each raw reward counts.
        blank: whether in the latest batch nothing could be compared.
    """

    recipe: Recipe
    weights: Mapping[str, float]
    run: RunDirectory
    display: RunDisplay
    request: StopRequest
    metrics: MetricsCallback
    team: Team = ALONE
    blank: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        self.guards = Guards(self.recipe, self.weights)
        self._in_a_row = 0  # updates left out because their gradient was not a number
        self._left_out = False  # the latest was
        self._warnings: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A resumed run goes through its past first: what was said then is not said again."""
        if not state.is_world_process_zero:
            return
        known = self.run.notes().get("warnings", [])
        self._warnings = [warning for warning in known if warning["step"] <= state.global_step]
        if self._warnings != known:
            self._write()  # the others belong to updates that are done again
        said = {(warning["step"], warning["guard"]) for warning in self._warnings}
        for record in self.run.metrics():
            for finding in self.guards.look(record):
                if finding.action == "warn" and (finding.step, finding.guard) not in said:
                    self._act(finding, True)  # of a guard that was set to a lower limit since

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Gradients are clipped by now, by a norm that is not a number if one of them is not.
        parameters = [one for one in kwargs["model"].parameters() if one.grad is not None]
        norm = _norm([one.grad for one in parameters]) if parameters else 1.0  # an engine that has made its step
        self._left_out = not math.isfinite(norm)
        if parameters and (self._left_out or norm == 0 or self.blank()):
            self.metrics.left_out += 1
            for parameter in parameters:
                parameter.grad = None  # not a zero, which momentum and weight decay would still act on
        if not self._left_out:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        choice, method = self.recipe.guards.not_a_number, self.recipe.method
        finding = bad_gradient(state.global_step + 1, choice, self._in_a_row, method)
        self._act(finding, state.is_world_process_zero)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # the trainer's summary at its end
            return
        step, norm = state.global_step, logs.get("grad_norm")
        key = f"{self.recipe.method}.learning_rate"
        restart = f"start again with a lower {key}; --resume {self.run.root} has the last checkpoint"
        if norm is not None and not math.isfinite(norm) and not self._left_out:
            # Too large for its norm to be a number, or an engine that makes its step before anyone can look.
            self.team.fail(f"the gradient of step {step} is not a finite number and could not be left out: {restart}")
        if state.is_world_process_zero:
            for finding in self.guards.look(self.metrics.record):
                self._act(finding, True)
        # Asked at the end of a step, a stop would come one update late. Several processes have to agree on it there.
        batch_done = step % self.recipe.optim.updates_per_batch == 0
        if self.request.failure is not None and args.world_size == 1 and batch_done:
            control.should_training_stop = control.should_save = True
        if control.should_save and not math.isfinite(_norm([one.detach() for one in kwargs["model"].parameters()])):
            self.team.fail(f"the weights after step {step} are not finite numbers and are not saved: {restart}")

    def _act(self, finding: Finding, first: bool) -> None:
        """Stop or warn; the first process alone shows and remembers it."""
        if finding.action == "stop":
            self.request.fail(finding.text)
        if not first:
            return
        if finding.action == "warn":
            self.display.note(Text.assemble(("warning:", "yellow"), f" step {finding.step}: {finding.text}"))
        self._warnings.append({"step": finding.step, "guard": finding.guard, "text": finding.text})
        self._write()

    def _write(self) -> None:
        """All of them each time, so what a full disk did not take is there with the next."""
        self.run.spare("warnings in run.json", lambda: self.run.note(warnings=self._warnings))


def _norm(tensors: list[Tensor]) -> float:
    """Of all numbers in them; where they are sharded, of all processes together."""
    from torch.distributed.tensor import DTensor

    norm = torch.nn.utils.get_total_norm(tensors)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
