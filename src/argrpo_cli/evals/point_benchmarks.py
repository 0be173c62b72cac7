"""Prompt benchmarks whose pictures a model behind an OpenAI-compatible server judges, point by point.

Such a benchmark is a file of prompts, each with points that a picture is held against, and the wording of the question,
which is read from the published evaluator (neither is part of this package). A verdict is 0 or 1 for each point. Beside
what every benchmark writes (`benchmark.py`):

    POLICY/images/           the pictures, named as the published evaluator's
    POLICY/verdicts/         what was found of each picture; verdicts.jsonl: the same to read

A picture that the judge gives no verdict on, after all attempts, is missing: counted, shown, asked about again by the
same command, and in no number.
"""

from __future__ import annotations

import ast
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from argrpo_cli.captions import file_rows
from argrpo_cli.evals.benchmark import MOST_MISSING, Benchmark, Subject
from argrpo_cli.images import Item, file_item, read_runs
from argrpo_cli.kept import Rows, kept
from argrpo_cli.rewards.judge.questions import UnusableReply
from argrpo_cli.rewards.judge.server import ServerReward
from argrpo_cli.score import item_key
from argrpo_cli.shapes import Column, Condition, Result, Shot
from argrpo_cli.system.download import fetch_url
from argrpo_cli.system.errors import UserError, first_line
from argrpo_cli.system.files import expanded, read_text, write_jsonl
from argrpo_cli.system.plain import to_json

if TYPE_CHECKING:
    from argrpo_cli.evals.statistics import Measure
    from argrpo_cli.system.processes import Team

OVERALL = "overall"


class Task(NamedTuple):
    """A prompt, its number in the benchmark's file, and the points a picture of it is held against.

    Attributes:
        points: the name of each, which says what column it counts for.
        notes: what the judge is told of each.
    """

    index: int
    prompt: str
    points: tuple[str, ...]
    notes: tuple[str, ...]


class Published(NamedTuple):
    """A file of a benchmark's repository, at a fixed commit."""

    repo: str
    commit: str
    path: str
    sha256: str
    licence: str

    def file(self, given: str | Path | None, option: str) -> Path:
        """The local file that was given, or the published one, fetched once; UserError where there is none."""
        if given is None:
            url = f"https://raw.githubusercontent.com/{self.repo}/{self.commit}/{self.path}"
            return fetch_url(url, option, self.sha256, self.licence, f"{self.commit[:12]}-{Path(self.path).name}")
        if not (path := expanded(given)).is_file():
            raise UserError(f"{option} {given}: no such file; give {Path(self.path).name} of github.com/{self.repo}")
        return path


class PointJudge(ServerReward):
    """A model that gives a verdict, 0 or 1, on every point of a picture's task; options as of `ServerReward`, of which
    the timeout is 300 s. It is no reward: the name is the benchmark's.

    Args:
        tasks: by prompt.
        source: of the published evaluator, whose wording is put to the model.
    """

    def __init__(self, tasks: Mapping[str, Task], source: str, device: str = "cpu", **options: Any):
        self.tasks = tasks
        self.read_wording(source)
        super().__init__(device, **{"timeout": 300.0, **options})

    def read_wording(self, source: str) -> None:
        """Take the wording out of the published evaluator, which is read and never run; UserError where it is not."""
        raise NotImplementedError

    def read(self, response: Any, condition: Condition) -> list[int]:
        """The verdict on each point; UnusableReply where there are more or fewer."""
        verdicts, points = super().read(response, condition), self.tasks[condition.prompt].points
        if len(verdicts) != len(points):
            raise UnusableReply(f"the reply has {len(verdicts)} verdicts on {len(points)} points")
        return verdicts


class Judged(Benchmark):
    """A file of tasks and a judge of points.

    Args:
        prompts, wording: local files in the place of the published ones.
        options: of the judge: url, model, and what else `ServerReward` has.
        limit: only so many prompts, for a trial.

    Raises:
        UserError: files that are absent, cannot be fetched, or are no such; a server that is not there.
    """

    reads = "captions"
    judge: ClassVar[type[PointJudge]]
    judged_by: ClassVar[str]  # in the published figures
    points: ClassVar[str] = "images"  # what verdicts are counted by
    prompts_file: ClassVar[Published]
    wording_file: ClassVar[Published]
    leaderboard: ClassVar[Mapping[str, Sequence[float]]]  # published figures of the columns below

    def __init__(
        self,
        prompts: str | Path | None = None,
        wording: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
        limit: int | None = None,
    ):
        self.judge.check_options(options or {})
        self.judge.check_url((options or {}).get("url"))  # before anything is fetched
        path = self.prompts_file.file(prompts, "--prompts")
        self.source, self.tasks = str(prompts or f"{self.prompts_file.repo}, {path.name}"), self.read_tasks(path)
        for what, key in (
            ("prompt", [task.prompt for task in self.tasks]),
            ("number", [task.index for task in self.tasks]),
        ):
            if len(set(key)) < len(key):  # of a prompt the judge's task, of a number the picture's name
                raise UserError(f"{path}: a {what} is in it twice; give each once")
        self.published = _digest(path.read_bytes()) == self.prompts_file.sha256 and limit is None
        self.tasks = self.tasks[:limit]
        text = read_text(self.wording_file.file(wording, "--wording"))
        self.sha256 = {"prompts": _digest(to_json(self.tasks).encode()), "wording": _digest(text.encode())}
        self.asked = self.judge({task.prompt: task for task in self.tasks}, text, **(options or {}))
        self.rows: dict[str, list[list[int] | None]] = {}
        self.why = ""  # the latest verdict that is missing is

    def read_tasks(self, path: Path) -> list[Task]:
        """The tasks of a file; UserError for one of another format."""
        raise NotImplementedError

    def parts(self) -> dict[str, tuple[float, Sequence[str]]]:
        """Column to its share of the overall number, and the points that count for it; in the published order."""
        raise NotImplementedError

    def details(self) -> dict[str, Sequence[str]]:
        """Further columns, of points by name."""
        return {}

    # --- before anything is drawn

    def prompts(self) -> Sequence[str]:
        return [task.prompt for task in self.tasks]

    def picture(self, index: int, sample: int) -> str:
        """The published evaluator's name of a picture."""
        raise NotImplementedError

    def file(self, prompt: int, sample: int) -> str:
        return self.picture(self.tasks[prompt].index, sample)

    def finished(self, images: Path) -> list[Shot]:
        shots = []
        for task in self.tasks:
            sample = 0
            while (images / (name := self.picture(task.index, sample))).is_file():
                shots.append(Shot(Condition(task.prompt), -1, name))
                sample += 1
        if not shots:
            name = self.picture(self.tasks[0].index, 0)
            raise UserError(f"{images} has no pictures of {self.title}'s prompts, which are called {name} and so on")
        return shots

    def identity(self) -> dict[str, Any]:
        return {"prompts": self.sha256["prompts"]}

    # --- the work

    def measure(self, subject: Subject, batch_size: int, team: Team) -> dict[str, Measure]:
        """Verdicts on all pictures, those of an earlier call included, and their shares."""
        items = [file_item(subject.pictures, shot.file, shot.condition) for shot in subject.shots]
        identity = {"judge": self.asked.model, "wording": self.sha256["wording"]}
        store = Rows(subject.folder / "verdicts", identity, item_key, shape=list[int])
        label = f"judging {subject.name}"
        kept(items, self._ask, store, batch_size=batch_size, label=label, team=team, whole=False)
        self.rows[subject.name] = rows = team.from_lead(lambda: store.read(items))
        self.why = next(filter(None, team.exchange(self.asked.last_error)), "the judge said no more")
        tasks = [self.asked.tasks[shot.condition.prompt] for shot in subject.shots]
        return self.shares(tasks, rows)

    def _ask(self, batch: Sequence[Item]) -> list[list[int] | None]:
        import torch

        rows: list[list[int] | None] = [None] * len(batch)
        for places, pixels in read_runs(batch):
            answers = self.asked.answers(torch.from_numpy(pixels), [batch[place].condition for place in places])
            for place, answer in zip(places, answers, strict=True):
                rows[place] = None if answer.reason else answer.score
                self.asked.last_error = answer.reason or self.asked.last_error
        return rows

    def shares(self, tasks: Sequence[Task], rows: Sequence[Sequence[int] | None]) -> dict[str, Measure]:
        """Column to the share of its points that are met, of pictures' tasks and verdicts, None for a missing one.

        "overall", the parts' weighted mean, is there where all parts are. There is no number where more than
        `MOST_MISSING` of the pictures have no verdict.
        """
        from argrpo_cli.evals.statistics import mean_of, weighted

        few = rows.count(None) <= MOST_MISSING * len(rows)
        places = {task.prompt: place for place, task in enumerate(self.tasks)}
        values: dict[str, list[float]] = {}
        prompts: dict[str, list[int]] = {}
        for task, row in zip(tasks, rows, strict=True):
            for number, point in enumerate(task.points):
                values.setdefault(point, []).append(math.nan if row is None or not few else float(row[number]))
                prompts.setdefault(point, []).append(places[task.prompt])

        def share(points: Sequence[str]) -> Measure | None:
            import torch

            there = [point for point in points if point in values]
            clusters = torch.tensor([place for point in there for place in prompts[point]], dtype=torch.int64)
            return mean_of([one for point in there for one in values[point]], clusters) if there else None

        parts = {name: share(points) for name, (_, points) in self.parts().items()}
        known = {name: one for name, one in (parts | {k: share(v) for k, v in self.details().items()}).items() if one}
        if None in parts.values():
            return known
        weights = [weight for weight, _ in self.parts().values()]
        return {OVERALL: weighted(list(parts.values()), weights, len(self.tasks)), **known}

    # --- what is told

    def columns(self) -> dict[str, Column]:
        points = {point for task in self.tasks for point in task.points}
        parts = {name: own for name, (_, own) in self.parts().items() if points & set(own)}
        names = [*([OVERALL] if len(parts) == len(self.parts()) else []), *parts]
        columns = {name: Column(name, "", "higher", 2, True, counted=self.points) for name in names}
        return columns | {
            name: Column(name, "", "higher", 2, True, "in detail", self.points)
            for name, own in self.details().items()
            if points & set(own)
        }

    def paper(self, subjects: Sequence[Subject]) -> dict[str, dict[str, float]]:
        if not self.published:
            return {}
        columns = [OVERALL, *self.parts()]
        return {name: dict(zip(columns, row, strict=True)) for name, row in self.leaderboard.items()}

    def protocol(self, subjects: Sequence[Subject]) -> dict[str, Any]:
        return {
            "prompts": {"source": self.source, "count": len(self.tasks), "sha256": self.sha256["prompts"]},
            "judge": {"model": self.asked.model, "wording": self.sha256["wording"]},
            "about": f"judge: {self.asked.model}; published figures: {self.judged_by}, {self.prompts_file.repo}",
            "errors": "standard errors clustered by prompt",
        }

    def departures(self, subjects: Sequence[Subject]) -> list[str]:
        counts = {len(one.shots) / len(self.tasks) for one in subjects}
        texts = [f"images per prompt {count:g} (published {self.n})" for count in sorted(counts - {self.n})]
        texts += [] if self.published else [f"prompts of {self.source} (published: {self.prompts_file.path})"]
        texts += [] if self.sha256["wording"] == self.wording_file.sha256 else ["another wording of the question"]
        judge = self.asked.model.rpartition("/")[2]
        return texts + ([] if judge == self.judged_by else [f"judge {judge} (published figures {self.judged_by})"])

    def warnings(self, subjects: Sequence[Subject]) -> list[str]:
        absent = len(self.tasks) - len({shot.condition for shot in subjects[0].shots})
        return [f"{absent} of {len(self.tasks)} prompts have no picture"] if absent else []

    def late_warnings(self, subjects: Sequence[Subject]) -> list[str]:
        texts = []
        for name, rows in self.rows.items():
            if missing := rows.count(None):
                texts.append(f"the judge gave no verdict on {missing} of {len(rows)} pictures of {name}: {self.why}")
        return texts

    def finish(self, result: Result, subjects: Sequence[Subject], out: Path) -> Result:
        """The result, and the verdicts to read."""
        for one in subjects:
            tasks = [self.asked.tasks[shot.condition.prompt] for shot in one.shots]
            lines = [
                {"file": shot.file, "prompt": task.prompt, "verdicts": row and dict(zip(task.points, row, strict=True))}
                for shot, task, row in zip(one.shots, tasks, self.rows[one.name], strict=True)
            ]
            write_jsonl(one.folder / "verdicts" / "verdicts.jsonl", lines)
        return result


def task_rows(path: Path, columns: Sequence[Sequence[str]]) -> list[list[Any]]:
    """What stands in each row of a file under the first of several names, for each of `columns`; UserError without."""
    rows = []
    for number, row in enumerate(file_rows(path), 1):
        own = row if isinstance(row, dict) else {}
        cells = [next((own[name] for name in names if own.get(name) is not None), None) for names in columns]
        if None in cells:
            names = " or ".join(columns[cells.index(None)])
            raise UserError(f"{path}, row {number}: no {names}; give a file in the benchmark's format")
        rows.append(cells)
    if not rows:
        raise UserError(f"{path} holds no prompts")
    return rows


def parse_evaluator(source: str) -> ast.Module:
    """The syntax of a published evaluator; UserError for a text that is no Python."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"--wording is not the published evaluator: {first_line(error)}") from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
