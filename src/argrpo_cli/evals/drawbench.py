"""`argrpo eval drawbench`: table 4 of the paper, seven reward models over 200 prompts with five pictures each.

A column can be added later to the same pictures. Beside what every benchmark writes (`benchmark.py`):

    POLICY/images/          the pictures and metadata.jsonl, as `argrpo score` reads them
    POLICY/scores/          what is known of each picture by each reward; scores.jsonl: the same to read
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Len

from argrpo_cli import paper_numbers
from argrpo_cli.evals.benchmark import MOST_MISSING, SUMMARY, Benchmark, Subject
from argrpo_cli.evals.drawbench_prompts import PromptList
from argrpo_cli.images import Item, file_item
from argrpo_cli.kept import Rows, kept
from argrpo_cli.listing import METADATA
from argrpo_cli.rewards import (
    REWARDS,
    RewardSet,
    check_options,
    check_reward,
    identity,
    load_rewards,
    refuse_comparing,
)
from argrpo_cli.sample import file_name
from argrpo_cli.score import ScoredRow, item_key, row_of, score_rows
from argrpo_cli.shapes import Column, Result
from argrpo_cli.system.errors import UserError, first_line
from argrpo_cli.system.files import read_jsonl, write_jsonl

if TYPE_CHECKING:
    from argrpo_cli.evals.statistics import Measure
    from argrpo_cli.policy.protocol import Policy
    from argrpo_cli.system.processes import Team

WeightedScore = Annotated[list[float | str | None], Len(2, 2)]  # a score, and the fingerprint of what gave it
PAPER_SIZE = 256  # pixels, of LlamaGen-XL in table 4

TABLE_4 = ("clip", "hpsv2", "aesthetic", "deqa", "imagereward", "pickscore", "unified-reward")  # its columns


class DrawBench(Benchmark):
    """Prompts and reward models.

    Args:
        rewards: names of `argrpo_cli.rewards`; those of table 4 come in its units, others raw.
        options: name of a reward to options of its own.

    Raises:
        UserError: no such reward or option, one named twice, or none.
    """

    name, title, reads, n = "drawbench", "DrawBench", "captions", 5
    of_paper = True
    packages = ("transformers", "open_clip_torch", "pyiqa")  # that the rewards compute with

    def __init__(
        self,
        prompts: PromptList,
        rewards: Sequence[str] = TABLE_4,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self.prompt_list, self.rewards, self.options = prompts, list(rewards), dict(options or {})
        if not rewards:
            raise UserError("--columns is empty; name at least one reward")
        refuse_comparing(rewards)
        for reward in rewards:
            if self.rewards.count(reward) > 1:
                raise UserError(f"--columns names {reward!r} twice")
            if reward in REWARDS:
                check_options(reward, self.options.get(reward, {}))
        self.scores: dict[str, Scores] = {}

    def prompts(self) -> Sequence[str]:
        return self.prompt_list.prompts

    def file(self, prompt: int, sample: int) -> str:
        return file_name(prompt, self.prompt_list.prompts[prompt], sample)

    def identity(self) -> dict[str, Any]:
        return {"prompts": self.prompt_list.sha256}

    def gather(self, policy: Policy, subject: Subject, batch_size: int, team: Team) -> None:
        """The pictures, and then metadata.jsonl: its presence means that they are complete."""
        super().gather(policy, subject, batch_size, team)
        rows = [
            {"file": one.file, "prompt": one.condition.prompt, "seed": one.seed, "policy": subject.path}
            | asdict(subject.sampling)
            for one in subject.shots
        ]
        team.lead(lambda: write_jsonl(subject.pictures / METADATA, rows))

    def measure_all(self, subjects: Sequence[Subject], batch_size: int, team: Team) -> dict[str, dict[str, Measure]]:
        """One reward in memory at a time; a number only where nearly every picture has a score."""
        self.scores = {reward: self._scores(reward, subjects, batch_size, team) for reward in self.rewards}
        places = {prompt: place for place, prompt in enumerate(self.prompt_list.prompts)}
        means: dict[str, dict[str, Measure]] = {}
        for one in subjects:
            prompts = [places[shot.condition.prompt] for shot in one.shots]
            means[one.name] = {
                reward: own.mean(one.name, prompts, check_reward(reward).divisor) for reward, own in self.scores.items()
            }
        return means

    def _scores(self, reward: str, subjects: Sequence[Subject], batch_size: int, team: Team) -> Scores:
        """The scores of one reward, of all pictures; those of an earlier call stand, where the same weights gave them.

        A reward that cannot be loaded, or fails on the way, gives a `fault` and no error.
        """
        options = {reward: self.options.get(reward, {})}
        question = {"reward": reward, **identity([reward], options)[reward]}
        items = [_items(one) for one in subjects]

        def open_stores() -> list[Rows]:
            return [Rows(one.folder / "scores", question, item_key, shape=WeightedScore) for one in subjects]

        def read() -> list[list[tuple[float, str | None] | None]]:
            return [store.read(own) for store, own in zip(stores, items, strict=True)]

        stores, fault, missing = open_stores(), "", ""
        rows = team.from_lead(read)
        weights = {None if row is None else (row[1],) for part in rows for row in part}  # None: not scored
        if None in weights or len(weights) > 1:
            scorer = Scorer(reward, options, team.device)
            if not any(team.exchange(scorer.fault)) and weights - {None, (scorer.weights,)}:
                team.lead(lambda: [store.remove() for store in stores])
                stores = open_stores()
            for store, one, own in zip(stores, subjects, items, strict=True):
                label = f"{reward} of {one.name}"
                kept(own, scorer.score, store, batch_size=batch_size, label=label, team=team, whole=False)
            rows = team.from_lead(read)
            reports = team.exchange((scorer.fault, scorer.missing))
            fault, missing = (next(filter(None, texts), "") for texts in zip(*reports, strict=True))
        hashes = [row[1] for part in rows for row in part if row is not None]
        values = {
            one.name: [math.nan if row is None else row[0] for row in part]
            for one, part in zip(subjects, rows, strict=True)
        }
        return Scores(values, hashes[0] if hashes else None, fault, missing)

    def columns(self) -> dict[str, Column]:
        facts = {reward: check_reward(reward) for reward in self.rewards}
        return {
            reward: Column(one.label, one.unit, "higher") if one.label else Column(reward)
            for reward, one in facts.items()
        }

    def paper(self, subjects: Sequence[Subject]) -> dict[str, dict[str, float]]:
        rows = paper_numbers.before_and_after(4)
        columns = [reward for reward in self.rewards if reward in TABLE_4]
        return {name: {reward: row[reward] for reward in columns} for name, row in rows.items()} if columns else {}

    def protocol(self, subjects: Sequence[Subject]) -> dict[str, Any]:
        prompts = self.prompt_list
        return {
            "prompts": {
                "source": prompts.source,
                "count": len(prompts.prompts),
                "sha256": prompts.sha256,
                "of_drawbench": prompts.matching,
            },
            "rewards": {
                reward: {"weights": own.weights, "options": dict(self.options.get(reward, {}))}
                for reward, own in self.scores.items()
            },
            "errors": "standard errors clustered by prompt; differences paired picture by picture",
        }

    def departures(self, subjects: Sequence[Subject]) -> list[str]:
        sizes = dict.fromkeys(one.card.image_size for one in subjects)
        return [f"pictures of {size} pixels (paper {PAPER_SIZE})" for size in sizes if size != PAPER_SIZE] + [
            f"{reward} with {key}={value}; the paper's column has it as it comes"
            for reward, own in identity([one for one in self.rewards if one in TABLE_4], self.options).items()
            for key, value in own["options"].items()
        ]

    def warnings(self, subjects: Sequence[Subject]) -> list[str]:
        return [text for text in (self.prompt_list.remark(),) if text]

    def late_warnings(self, subjects: Sequence[Subject]) -> list[str]:
        return [text for reward, own in self.scores.items() for text in own.warnings(reward)]

    def finish(self, result: Result, subjects: Sequence[Subject], out: Path) -> Result:
        """The result with the columns that an earlier call measured of the same pictures before its own."""
        for one in subjects:
            _write_scores(one, {reward: own.values[one.name] for reward, own in self.scores.items()})
        return _with_earlier(result, Result.load(out / SUMMARY)) if (out / SUMMARY).is_file() else result


@dataclass
class Scores:
    """Of one reward: policy to the raw score of each picture, NaN where there is none.

    Attributes:
        weights: hash of the reward's networks, None where it has none here (a server).
        fault: why it did not finish, or "".
        missing: why the latest of the pictures without a score has none, or "".
    """

    values: dict[str, list[float]]
    weights: str | None = None
    fault: str = ""
    missing: str = ""

    def lacking(self, name: str) -> int:
        """How many pictures of a policy have no score."""
        return sum(map(math.isnan, self.values[name]))

    def mean(self, name: str, prompts: Sequence[int], divisor: float = 1.0) -> Measure:
        """Of a policy, by the prompt of each picture; no number where too many scores are missing."""
        from argrpo_cli.evals.statistics import mean_of

        values, lacking = self.values[name], self.lacking(name)
        enough = not lacking or (not self.fault and lacking <= MOST_MISSING * len(values))
        return mean_of([value / divisor if enough else math.nan for value in values], prompts)

    def warnings(self, reward: str) -> list[str]:
        """Which scores are missing, and why."""
        why, texts = self.fault or self.missing or "it said no more", []
        for name, values in self.values.items():
            if lacking := self.lacking(name):
                texts.append(f"{reward} has no score for {lacking} of {len(values)} pictures of {name}: {why}")
        pairs = [not any(map(math.isnan, pair)) for pair in zip(*self.values.values(), strict=True)]
        if len(self.values) == 2 and 0 < sum(pairs) < len(pairs):
            texts.append(f"{reward} of the difference: of the {sum(pairs)} of {len(pairs)} pairs that have both scores")
        return texts


class Scorer:
    """One reward as `kept` asks it; an error goes into `fault`, and nothing is asked after it."""

    def __init__(self, reward: str, options: Mapping[str, Mapping[str, Any]], device: str):
        self.reward, self.fault, self.weights = reward, "", None
        self._rewards: RewardSet | None = None
        with self._noted():
            self._rewards = load_rewards([reward], device, options)
            self.weights = self._rewards.identity(options)[reward]["weights"]

    @property
    def missing(self) -> str:
        """Why the latest picture without a score has none, or ""."""
        return "" if self._rewards is None else self._rewards.last_error.get(self.reward, "")

    def score(self, batch: Sequence[Item]) -> list[tuple[float, str | None] | None]:
        """Of each picture its score and the hash of the weights; None where there is no score."""
        scores: list[float | None] = [None] * len(batch)
        with self._noted():
            if not self.fault:
                self._rewards.check([item.condition for item in batch])
                scores = [row[self.reward] for row in score_rows(self._rewards, batch)]
        return [None if score is None else (score, self.weights) for score in scores]

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.fault = str(error)
        except RuntimeError as error:  # memory that does not suffice for a network, for instance
            self.fault = f"{type(error).__name__}: {first_line(error)}"


def _items(subject: Subject) -> list[Item]:
    return [file_item(subject.pictures, shot.file, shot.condition, seed=shot.seed) for shot in subject.shots]


def _write_scores(subject: Subject, scores: Mapping[str, Sequence[float]]) -> None:
    """scores.jsonl, as `argrpo score` writes it: raw, from this call and earlier ones."""
    path = subject.folder / "scores" / "scores.jsonl"
    earlier = {row["file"]: row["scores"] for row in read_jsonl(path, ScoredRow)} if path.is_file() else {}
    rows = []
    for item, *values in zip(_items(subject), *scores.values(), strict=True):
        own = [None if math.isnan(value) else value for value in values]
        rows.append(row_of(item, earlier.get(item.file, {}) | dict(zip(scores, own, strict=True))))
    write_jsonl(path, rows)


def _with_earlier(result: Result, earlier: Result) -> Result:
    """The result, and before its columns those of an earlier one of the same pictures."""
    if any(earlier.protocol.get(key) != result.protocol[key] for key in ("prompts", "measured", "versions")):
        return result
    own = tuple(f"{reward} " for reward in result.columns)

    def both(texts: Sequence[str], others: Sequence[str]) -> list[str]:
        return list(dict.fromkeys([*texts, *(text for text in others if not text.startswith(own))]))

    def merged(rows: Mapping[str, Mapping], others: Mapping[str, Mapping]) -> dict[str, dict]:
        return {row: {**others.get(row, {}), **rows.get(row, {})} for row in {**others, **rows}}

    return replace(
        result,
        columns={**earlier.columns, **result.columns},
        rows=merged(result.rows, earlier.rows),
        difference={**earlier.difference, **result.difference},
        paper=merged(result.paper, earlier.paper),
        protocol={
            **{key: one for key, one in earlier.protocol.items() if key == "diversity"},
            **result.protocol,
            "rewards": {**earlier.protocol["rewards"], **result.protocol["rewards"]},
        },
        departures=both(result.departures, earlier.departures),
        warnings=both(result.warnings, earlier.warnings),
    )
