"""Rewards that compare images: those of a group, or all of an update whichever process has drawn them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from argrpo_cli.draw import draw_batch
from argrpo_cli.rewards import Reward, RewardSet
from argrpo_cli.rewards.custom import reward_of
from argrpo_cli.shapes import Condition, Sampling, Shot
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.processes import join_team
from argrpo_cli.training.instruments import total_rewards
from argrpo_cli.training.rollout import Stopwatch
from argrpo_cli.training.scorer import BatchScorer
from tests.together import forked
from tests.training.tiny import tiny_policy

DOG, CAT = Condition("a photo of a dog", 0), Condition("a photo of a cat", 1)
LEVELS = [0, 10, 20, 60, 100, 100, 130, 250]  # of two groups of four


class Distance(Reward):
    """How far an image's first pixel is from the mean of the group or batch; it counts the updates that it saw."""

    def __init__(self, scope: str) -> None:
        self.scope, self.updates, self.looked, self.compared = scope, torch.zeros(1), [], []

    def look(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        self.looked.append(len(images))
        return images[:, 0, :1, 0].float()

    def compare(self, seen: Tensor, conditions: Sequence[Condition]) -> Tensor:
        self.compared.append([condition.class_id for condition in conditions])
        return (seen - seen.mean()).abs()[:, 0]

    def advance(self, seen: Tensor) -> None:
        self.updates += 1

    def state(self) -> dict[str, Tensor]:
        return {"updates": self.updates}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.updates = state["updates"]


class First(Reward):
    """An image's first pixel."""

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return images[:, 0, 0, 0].float()


def images(levels: Sequence[int] = LEVELS) -> Tensor:
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()


def rewards() -> RewardSet:
    """Under names that there are: a reward for each scope."""
    return RewardSet({"imagereward": First(), "maniqa": Distance("group"), "aesthetic": Distance("batch")})


def distances(levels: Sequence[float]) -> list[float]:
    mean = sum(levels) / len(levels)
    return [abs(one - mean) for one in levels]


EXPECTED = {
    "imagereward": [float(level) for level in LEVELS],
    "maniqa": distances(LEVELS[:4]) + distances(LEVELS[4:]),
    "aesthetic": distances(LEVELS),
}


def ask(scorer: BatchScorer, pictures: list[Tensor], conditions: list[Condition]) -> dict[str, list[float | None]]:
    options = {"images": pictures, "conditions": conditions, "log_metric": lambda name, value: None}
    return {function.__name__: function(**options) for function in scorer.functions()}


def scorer_of(some: RewardSet, **options: object) -> BatchScorer:
    return BatchScorer(some, dict.fromkeys(some.names, 1.0), 4, Stopwatch(), **options)


def test_images_are_compared_within_their_group_or_all_together() -> None:
    """Both groups show the same, and are two nevertheless."""
    some = rewards()
    scorer = scorer_of(some)
    assert ask(scorer, list(images()), [DOG] * 8) == EXPECTED
    assert some.rewards["aesthetic"].updates == some.rewards["maniqa"].updates == 1
    assert len(some.rewards["maniqa"].compared) == 2 and len(some.rewards["aesthetic"].compared) == 1


def test_by_themselves_images_with_one_condition_are_a_group() -> None:
    """And the set is the batch, however many images are looked at together."""
    some = rewards()
    mixed = [DOG, CAT] * 4
    scores = some.score(images(), mixed, batch_size=3)
    assert scores["maniqa"][::2].tolist() == distances(LEVELS[::2])
    assert scores["maniqa"][1::2].tolist() == distances(LEVELS[1::2])
    assert scores["aesthetic"].tolist() == EXPECTED["aesthetic"]
    assert some.rewards["aesthetic"].looked == [3, 3, 2] and some.rewards["aesthetic"].updates == 0
    assert sorted(some.rewards["maniqa"].compared) == [[0] * 4, [1] * 4]


def test_what_is_drawn_in_the_place_of_others_is_compared_and_an_update_is_taken_up_once() -> None:
    some = rewards()
    scorer = scorer_of(some)
    first = scorer.measure(list(images([7] * 8)), [DOG] * 8)
    assert scorer.spreads(first).tolist() == [0, 0]
    fresh = list(images())
    first.put([4, 5, 6, 7, 0, 1, 2, 3], scorer.measure(fresh[4:] + fresh[:4], [CAT] * 8))
    assert (scorer.spreads(first) > 0).all() and some.rewards["aesthetic"].updates == 0
    scorer.remember(fresh, first, {})
    assert ask(scorer, fresh, [CAT] * 8) == EXPECTED
    assert some.rewards["aesthetic"].updates == 1 and some.rewards["aesthetic"].compared[-1] == [1] * 8


def test_what_a_reward_remembers_goes_into_a_checkpoint_and_out_of_it(tmp_path: Path) -> None:
    scorer, again = scorer_of(rewards()), scorer_of(rewards())
    for _ in range(3):
        ask(scorer, list(images()), [DOG] * 8)
    scorer.save(tmp_path)
    again.load(tmp_path)
    assert again.rewards.rewards["aesthetic"].updates == again.rewards.rewards["maniqa"].updates == 3
    nothing = scorer_of(RewardSet({"imagereward": First()}))
    (tmp_path / "none").mkdir()
    nothing.save(tmp_path / "none")
    assert not list((tmp_path / "none").iterdir())


def brightest(images: Tensor, conditions: Sequence[Condition]) -> Tensor:
    level = images.float().mean((1, 2, 3))
    return (level == level.max()).float()


def test_ones_own_function_has_any_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    for scope, expected in (
        ("image", [1.0] * 8), ("group", [0, 0, 0, 1, 0, 0, 0, 1]), ("batch", [0] * 7 + [1])
    ):  # fmt: skip
        monkeypatch.setattr(brightest, "scope", scope, raising=False)
        some = RewardSet({"imagereward": reward_of("own:brightest", brightest)()})
        if scope == "image":
            expected = [0.0] * 7 + [1.0]  # of the images it is given, which here are all
        assert ask(scorer_of(some), list(images()), [DOG] * 8) == {"imagereward": expected}
    monkeypatch.setattr(brightest, "scope", "update")
    with pytest.raises(UserError, match="scope 'update' is unknown; there are image, group, batch"):
        reward_of("own:brightest", brightest)


@pytest.mark.parametrize("place", ["look", "compare"])
def test_a_reward_that_fails_leaves_its_own_column_out(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Reward, *arguments: object) -> Tensor:
        raise UserError("no more")

    monkeypatch.setattr(Distance, place, fail)
    some = RewardSet({"imagereward": First(), "maniqa": Distance("group")})
    failures: list[str] = []
    scores = ask(scorer_of(some, fail=failures.append), list(images()), [DOG] * 8)
    assert scores["maniqa"] == [None] * 8 and failures == ["reward maniqa failed: no more"]
    some.tolerated = {"maniqa"}
    scorer = BatchScorer(some, {"imagereward": 1.0, "maniqa": 0.0}, 4, Stopwatch(), fail=failures.append)
    assert ask(scorer, list(images()), [DOG] * 8) == {"imagereward": EXPECTED["imagereward"], "maniqa": [None] * 8}
    assert len(failures) == 1 and some.last_error["maniqa"] == "reward maniqa failed: no more"


class Coin(Reward):
    """As one's own function may: numbers that are others in each process."""

    scope = "batch"

    def compare(self, seen: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return torch.rand(len(seen)) + join_team("cpu").index


def half(out: Path) -> int:
    """One of two processes, each with an own part of the batch; a group lies on both."""
    team = join_team("cpu")
    part = slice(0, 4) if team.first else slice(4, 8)
    some = rewards()
    some = RewardSet({**some.rewards, "pickscore": Coin()})
    scorer = BatchScorer(some, dict.fromkeys(some.names, 1.0), 8, Stopwatch(), team=team)
    ask(scorer, list(images()[part]), [DOG] * 4)
    torch.save(scorer.table, out / f"{team.index}.pt")
    return 0


def test_two_processes_compare_what_both_have_drawn(tmp_path: Path) -> None:
    done = forked(partial(half, tmp_path), tmp_path)
    assert done.codes == [0, 0], done.err
    tables = [torch.load(tmp_path / f"{index}.pt") for index in (0, 1)]
    assert torch.equal(*tables), "also where a function draws numbers"
    assert tables[0][:, 1].tolist() == tables[0][:, 2].tolist() == distances(LEVELS)
    assert (tables[0][:, 3] < 1).all()


def test_what_samplings_are_compared_by_leaves_out_rewards_that_compare_images() -> None:
    """Of one image by itself they say nothing; where no other counts, nothing is known."""
    policy, sampling = tiny_policy(), Sampling(cfg_scale=1.0)
    shots = [Shot(condition, seed) for seed, condition in enumerate(policy.conditions([0, 1, 0]))]
    some = rewards()
    weights = {"imagereward": 2.0, "maniqa": 1.0, "aesthetic": 1.0}
    expected = 2.0 * draw_batch(policy, shots, sampling)[1][:, 0, 0, 0].double()
    assert torch.equal(total_rewards(policy, shots, sampling, some, weights), expected)
    nothing = total_rewards(policy, shots, sampling, some, weights | {"imagereward": 0.0})
    assert nothing.shape == (3,) and nothing.isnan().all()
