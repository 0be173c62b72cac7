"""`argrpo eval geneval2`: is every atom of a prompt in its picture? (GenEval 2, Kamath et al. 2025, arXiv 2512.16853)

One picture of each prompt; a judge (`rewards/geneval2.py`) says how likely the expected answer to each question is. A
policy of the nano world is asked the nano prompts and judged by its detector, any other one the benchmark's 800, or
those of a file in their format, and Qwen3-VL judges. Of the answers p_i about a picture

    Soft-TIFA GM    the geometric mean, the headline; also by the number of atoms
    Soft-TIFA AM    the arithmetic mean; by skill of all answers together
    TIFA            the share of answers that are the judge's likeliest word
    VQAScore        of one question about the prompt as a whole

as the benchmark's code computes them, first-token rule included (`geneval.questions.Likelihood`), and beside the first
two their values with each token counted once. Beside what every benchmark writes (`benchmark.py`):

    POLICY/images/          the pictures
    POLICY/answers.jsonl    prompt, questions and answers of each
    POLICY/score_lists.json what the benchmark's soft_tifa_analysis.py reads, where no answer is missing and n is 1
    geneval2.png            Soft-TIFA by atoms and by skill
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import TypedDict

from argrpo_cli.evals.benchmark import MOST_MISSING, Benchmark, Subject
from argrpo_cli.evals.plots import draw_groups
from argrpo_cli.evals.statistics import Measure, mean_of
from argrpo_cli.geneval import questions as q
from argrpo_cli.images import file_item, read_metadata, read_runs
from argrpo_cli.kept import Rows, in_batches, kept
from argrpo_cli.nano.scenes import draws_nano_world
from argrpo_cli.rewards import RewardSet, check_options, identity, load_rewards
from argrpo_cli.rewards.geneval2 import NANO
from argrpo_cli.rewards.geneval2 import GenEval2 as Judge
from argrpo_cli.shapes import Column, Condition, Result, Shot
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import write_jsonl, write_text
from argrpo_cli.system.plain import to_json

if TYPE_CHECKING:
    from argrpo_cli.policy.protocol import Card
    from argrpo_cli.system.processes import Team

REWARD, PICTURE = Judge.name, "geneval2.png"
ALL, SKILL, ATOMS = "all prompts", "Soft-TIFA AM by skill", "Soft-TIFA GM by atoms"
HEADLINES = {"gm": "Soft-TIFA GM", "am": "Soft-TIFA AM", "tifa": "TIFA", "vqascore": "VQAScore"}
EXACT = {"gm_exact": "GM, each token once", "am_exact": "AM, each token once"}
ERRORS = "errors are clustered by prompt; differences are paired picture by picture, of skills answer by answer"
WHERE = {"local": "in this process", "server": "behind a server", NANO: ""}


class Answer(TypedDict):
    """Of one question, see `questions.Likelihood`."""

    published: float
    exact: float
    likeliest: bool


class Row(TypedDict):
    """Of one picture: None for a question without an answer; the last is VQAScore's, where the judge can be asked."""

    answers: list[Answer | None]
    reason: str
    weights: str | None


class GenEval2(Benchmark):
    """Prompts in GenEval 2's format and a judge.

    Args:
        prompts: a file, or "geneval2-nano"; by default the nano prompts for policies of that world, else the published.
        options: of the reward `geneval2` for the judge; by default the nano detector for policies of that world.
        limit: only so many prompts, from all over the list, for a trial.
        judge_batch_size: pictures in a judge of this process at a time.

    Raises:
        UserError: options of the reward that mean nothing here.
    """

    name, title, reads = "geneval2", "GenEval 2", "captions"

    def __init__(
        self,
        prompts: str | None = None,
        options: Mapping[str, Any] | None = None,
        limit: int | None = None,
        judge_batch_size: int = 8,
    ):
        self.source, self.options, self.limit = prompts, dict(options or {}), limit
        self.judge_batch_size = judge_batch_size
        check_options(REWARD, self.options)
        if own := [key for key in ("mean", "questions") if key in self.options]:
            raise UserError(f"{REWARD}.{own[0]}: every mean is measured, of the questions of --prompts; leave it out")
        self.items: Sequence[q.Item] = ()
        self.rows: dict[str, list[Row]] = {}  # policy to what is known of its pictures
        self._judge: RewardSet | None = None

    # --- before anything is drawn

    def open(self, cards: Sequence[Card], team: Team) -> None:
        """Prompts and judge by the policies' world; a judge in this process is loaded when the pictures are there.

        Raises:
            UserError: policies of two worlds, a file that is none, a judge that is not there or cannot be asked this.
        """
        nano = {card.name: draws_nano_world(card) for card in cards}
        if self.source is None and len(set(nano.values())) > 1:
            raise UserError(f"{' and '.join(nano)} draw different worlds; give another baseline, or --prompts")
        of_nano = bool(nano) and all(nano.values())
        if self.source is None:
            self.source = q.NANO if of_nano else q.URL
        if self.source == q.URL:
            team.lead(q.published_items)  # fetched by one
        sources = {q.NANO: q.nano_items, q.URL: q.published_items}
        items = sources[self.source]() if self.source in sources else q.read_items(self.source)
        most = min(self.limit or len(items), len(items))
        self.items = [items[place * len(items) // most] for place in range(most)]
        if of_nano and not {"backend", "model", "url"} & self.options.keys():
            self.options["backend"] = NANO
        if self.backend == "local":
            from argrpo_cli.rewards.judge.local import model_folder

            team.lead(lambda: model_folder(self.model))
            self.packages = ("transformers",)
        else:
            for item in self.items:
                self.judge(team.device).check_item(item)

    @property
    def backend(self) -> str:
        return self.options.get("backend", "local")

    @property
    def model(self) -> str:
        """The judge's name."""
        return "nano-detector" if self.backend == NANO else self.options.get("model") or Judge.published

    @property
    def holistic(self) -> bool:
        """Whether the judge can be asked about a prompt as a whole."""
        return self.backend != NANO

    def judge(self, device: str) -> Judge:
        """The judge, loaded once."""
        if self._judge is None:
            self._judge = load_rewards([REWARD], device, {REWARD: self.options})
        return self._judge.rewards[REWARD]

    def prompts(self) -> Sequence[str]:
        return [item.prompt for item in self.items]

    def finished(self, images: Path) -> list[Shot]:
        """Pictures whose prompts, which metadata.jsonl has, are among the benchmark's."""
        prompts, shots = set(self.prompts()), []
        for file, row in read_metadata(images).items():
            if row["prompt"] is None or row["prompt"].strip() not in prompts:
                raise UserError(f"{images}: {file} shows {row['prompt']!r}, which is no prompt of {self.source}")
            shots.append(Shot(Condition(row["prompt"].strip()), -1, file))
        if not shots:
            raise UserError(f"{images}: its metadata.jsonl lists no pictures")
        return shots

    def identity(self) -> dict[str, Any]:
        known = identity([REWARD], {REWARD: self.options})[REWARD]["options"]
        model = Path(self.model).name if Path(self.model).is_dir() else self.model
        return {"prompts": q.digest(self.items), "judge": {**known, "backend": self.backend, "model": model}}

    # --- the work

    def measure(self, subject: Subject, batch_size: int, team: Team) -> dict[str, Measure]:
        """Of the answers to all questions about all pictures; those of an earlier call stand."""
        items = self._items(subject)
        store = Rows(
            subject.folder / "answers",
            identity([REWARD], {REWARD: self.options})[REWARD],
            lambda pair: [pair[0].file, pair[1].prompt],
            complete=lambda row: None not in row["answers"],
            shape=Row,
        )
        pairs = list(zip(subject.shots, items, strict=True))
        ask = partial(self._ask, subject.pictures, team.device)
        label = f"asking about {subject.name}"
        kept(pairs, ask, store, batch_size=batch_size, label=label, team=team, whole=False)
        self.rows[subject.name] = rows = team.from_lead(lambda: store.read(pairs))
        return measures(items, [row["answers"] for row in rows])

    def _items(self, subject: Subject) -> list[q.Item]:
        by_prompt = {item.prompt: item for item in self.items}
        return [by_prompt[shot.condition.prompt] for shot in subject.shots]

    def _ask(self, folder: Path, device: str, batch: Sequence[tuple[Shot, q.Item]]) -> list[Row]:
        """The answers about each picture; neighbours of one size are looked at together."""
        judge, rows = self.judge(device), []
        weights = self._judge.identity({REWARD: self.options})[REWARD]["weights"]
        for places, pixels in read_runs([file_item(folder, shot.file) for shot, _ in batch]):
            for some in in_batches(list(zip(places, pixels, strict=True)), self.judge_batch_size):
                asked = [self._questions(batch[place][1]) for place, _ in some]
                images = torch.stack([torch.from_numpy(one) for _, one in some])
                rows += [_row_of(own, weights) for own in judge.ask(images, asked)]
        return rows

    def _questions(self, item: q.Item) -> list[q.Question]:
        return [*item.questions, *([q.holistic(item.prompt)] if self.holistic else [])]

    # --- what is told

    def columns(self) -> dict[str, Column]:
        """The means over all prompts, Soft-TIFA AM of each skill, and GM of each number of atoms."""
        names = {key: name for key, name in HEADLINES.items() if self.holistic or key != "vqascore"}
        names |= EXACT if self.backend == "local" else {}  # elsewhere each token counts once as it is
        percent = partial(Column, unit="", better="higher", digits=1, percent=True)
        return {
            **{key: percent(name, group=ALL) for key, name in names.items()},
            **{skill: percent(skill, group=SKILL, counted="questions") for skill in q.count_skills(self.items)},
            **{f"{n} atoms": percent(f"{n} atoms", group=ATOMS) for n in sorted({item.atoms for item in self.items})},
        }

    def protocol(self, subjects: Sequence[Subject]) -> dict[str, Any]:
        weights = sorted({row["weights"] for rows in self.rows.values() for row in rows if row["weights"]})
        own = self.identity()
        return {
            "prompts": {"source": self.source, "count": len(self.items), "sha256": own["prompts"]},
            "questions": q.count_skills(self.items),
            "judge": {**own["judge"], "weights": weights},
            "about": f"judge: {own['judge']['model']} {WHERE[self.backend]}".strip(),
            "errors": ERRORS,
        }

    def departures(self, subjects: Sequence[Subject]) -> list[str]:
        texts = []
        if q.digest(self.items) != q.PUBLISHED:
            texts.append(f"prompts {self.source}, {len(self.items)} of them (published: 800)")
        if self.model != Judge.published:
            texts.append(f"judge {self.identity()['judge']['model']} (published: {Judge.published})")
        if self.backend == "server":
            texts.append("tokens that are the answer, each once, of a server's 20 likeliest (published: first tokens)")
        each = {n for one in subjects for n in Counter(shot.condition.prompt for shot in one.shots).values()} - {1}
        return texts + ([f"images per prompt {' or '.join(map(str, sorted(each)))} (published: 1)"] if each else [])

    def warnings(self, subjects: Sequence[Subject]) -> list[str]:
        texts = []
        if self.source == q.NANO and any(item.atoms > 4 for item in self.items):
            texts.append("prompts of 5 atoms compose nano words as no caption did that nano policies were trained on")
        absent = len(self.items) - len({shot.condition.prompt for shot in subjects[0].shots})
        return texts + ([f"{absent} of the {len(self.items)} prompts have no image"] if absent else [])

    def late_warnings(self, subjects: Sequence[Subject]) -> list[str]:
        texts = []
        for name, rows in self.rows.items():
            missing = [row["answers"].count(None) for row in rows]
            if sum(missing):
                why = next(row["reason"] for row in reversed(rows) if row["reason"])
                of = f"{sum(missing)} of {sum(len(row['answers']) for row in rows)} questions"
                pictures = f"{sum(map(bool, missing))} of {len(rows)} pictures"
                texts.append(f"{name}: no answer to {of}, about {pictures}, whose means are missing: {why}")
        return texts

    def finish(self, result: Result, subjects: Sequence[Subject], out: Path) -> Result:
        """The result, and what is known of each picture."""
        for subject in subjects:
            rows, items = self.rows[subject.name], self._items(subject)
            write_jsonl(subject.folder / "answers.jsonl", map(self._told, subject.shots, items, rows))
            lists = [
                [answer and answer["published"] for answer in row["answers"][: len(item.questions)]]
                for row, item in zip(rows, items, strict=True)
            ]
            if self.prompts() == [item.prompt for item in items] and not any(None in own for own in lists):
                write_text(subject.folder / "score_lists.json", to_json(lists))
        draw_groups(result, (ATOMS, SKILL), out / PICTURE)
        return result

    def _told(self, shot: Shot, item: q.Item, row: Row) -> dict[str, Any]:
        questions = self._questions(item)
        answers = [{**one._asdict(), **(own or {})} for one, own in zip(questions, row["answers"], strict=True)]
        return {"file": shot.file, "prompt": item.prompt, "atoms": item.atoms, "answers": answers}


def measures(items: Sequence[q.Item], answers: Sequence[Sequence[Answer | None]]) -> dict[str, Measure]:
    """Column to measure, from the answers about pictures of these prompts; None is a missing one.

    A picture of which an answer is missing has no score; the others of its answers count by skill. There is no number
    where more than `MOST_MISSING` of what it is of are missing: it would be one of other prompts.
    """
    pictures = list(zip(items, answers, strict=True))
    prompts = [item.prompt for item in items]

    def each(mean: Callable[[Sequence[float]], float], key: str) -> list[float]:
        return [mean([_number(one, key) for one in row[: len(item.questions)]]) for item, row in pictures]

    gm = each(q.geometric_mean, "published")
    whole = [_number(row[-1], "published") for item, row in pictures if len(row) > len(item.questions)]
    columns = {
        "gm": (gm, prompts),
        "am": (each(q.arithmetic_mean, "published"), prompts),
        "tifa": (each(q.arithmetic_mean, "likeliest"), prompts),
        "vqascore": (whole, prompts),
        "gm_exact": (each(q.geometric_mean, "exact"), prompts),
        "am_exact": (each(q.arithmetic_mean, "exact"), prompts),
    }
    for value, (item, row) in zip(gm, pictures, strict=True):
        for one, answer in zip(item.questions, row, strict=False):  # the last may be VQAScore's
            _add(columns, one.skill, _number(answer, "published"), item.prompt)
        _add(columns, f"{item.atoms} atoms", value, item.prompt)
    return {name: _mean(values, own) for name, (values, own) in columns.items() if values}


def _add(columns: dict[str, tuple[list[float], list[str]]], name: str, value: float, prompt: str) -> None:
    values, prompts = columns.setdefault(name, ([], []))
    values.append(value)
    prompts.append(prompt)


def _mean(values: Sequence[float], prompts: Sequence[str]) -> Measure:
    """The mean of all pictures, or answers, clustered by prompt; none where too many are missing."""
    missing = sum(map(math.isnan, values))
    return mean_of([math.nan] * len(values) if missing > MOST_MISSING * len(values) else list(values), prompts)


def _number(answer: Answer | None, key: str) -> float:
    return math.nan if answer is None else float(answer[key])


def _row_of(answers: Sequence[q.Likelihood], weights: str | None) -> Row:
    """What is kept of the answers about a picture."""
    missing = [one.reason or "the judge's probabilities are no numbers" for one in answers if math.isnan(one.exact)]
    own = [
        None if math.isnan(one.exact) else Answer(published=one.published, exact=one.exact, likeliest=one.likeliest)
        for one in answers
    ]
    return Row(answers=own, reason=missing[0] if missing else "", weights=weights)
