"""`argrpo eval unigenbench`: UniGenBench++ (Wang et al. 2025, arXiv 2510.18701), 600 prompts with four pictures each.

Of each prompt one to five test points are judged, 27 kinds in ten dimensions. A dimension's number is the share of its
test points that are met, over all pictures; the overall number is the plain mean of the ten, as in the published
tables. Prompts and wording are Tencent's (github.com/CodeGoat24/UniGenBench, CC BY 4.0) and read from there; a file of
prompts is a .csv with `index`, `prompt_en` and `sub_dims_en`, which is JSON with "Testpoints" and "Testpoint
Description". The long English prompts (`data/test_prompts_en_long.csv`) have the same format. The rest stands in
`point_benchmarks.py`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import TypedDict

from argrpo_cli.evals.point_benchmarks import Judged, PointJudge, Published, Task, parse_evaluator, task_rows
from argrpo_cli.rewards.judge.questions import LIMIT, UnusableReply, plain
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError, shortened
from argrpo_cli.system.plain import check_shape, parse_json

if TYPE_CHECKING:
    from PIL.Image import Image

REPO, COMMIT = "CodeGoat24/UniGenBench", "49d0bcebb0b9418d975d3957c2fee10f34811d14"
LICENCE = "UniGenBench is Tencent's, under CC BY 4.0"
TEMPLATE, EXPLANATIONS = "SYSTEM_PROMPT_EN_TEMPLATE", "EXPLANATION_DICT_EN"  # in the published evaluator
DIMENSIONS = {  # in the order of the published tables, with their kinds of test points
    "Style": (),
    "World Knowledge": (),
    "Attribute": ("Quantity", "Expression", "Material", "Size", "Shape", "Color"),
    "Action": (
        "Hand (Character/Anthropomorphic)",
        "Full-body (Character/Anthropomorphic)",
        "Animal",
        "Non-contact Interaction",
        "Contact Interaction",
        "State",
    ),
    "Relationship": ("Composition", "Similarity", "Inclusion", "Comparison"),
    "Logical Reasoning": (),
    "Grammar": ("Pronoun Reference", "Consistency", "Negation"),
    "Compound": ("Imagination", "Feature Matching"),
    "Entity Layout": ("Two-Dimensional Space", "Three-Dimensional Space"),
    "Text Generation": (),
}
POINTS = {name: [f"{name} - {kind}" for kind in kinds] or [name] for name, kinds in DIMENSIONS.items()}
WHOLE = re.compile(r"-?[0-9]{1,15}", re.ASCII)
Dims = TypedDict("Dims", {"Testpoints": list[str], "Testpoint Description": list[str]})  # of a row of prompts
SCORES = re.compile(r"<score>([^<]{0,2000})</score>")


class UniGenJudge(PointJudge):
    """A model that lists a 0 or 1 for each test point of a prompt; see `PointJudge`."""

    name, published = "unigenbench", "CodeGoat24/UniGenBench-EvalModel-qwen3vl-32b-v1"

    def read_wording(self, source: str) -> None:
        constants = {}
        for node in parse_evaluator(source).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name in (TEMPLATE, EXPLANATIONS):
                    with suppress(ValueError, TypeError, RecursionError):  # no constant
                        constants[name] = ast.literal_eval(node.value)
        self.template, self.explanations = constants.get(TEMPLATE), constants.get(EXPLANATIONS)
        if not isinstance(self.template, str) or not isinstance(self.explanations, dict):
            raise UserError(f"--wording has no {TEMPLATE} and {EXPLANATIONS}; give eval/src/eval_common.py of {REPO}")
        asked = {point for task in self.tasks.values() for point in task.points}
        if unknown := sorted(asked - self.explanations.keys()):
            raise UserError(f"--prompts asks for the test point {unknown[0]!r}, which the evaluator does not explain")

    def texts(self, condition: Condition) -> tuple[str, str]:
        """All of it before the picture, as the published request to an OpenAI-compatible service."""
        task = self.tasks[condition.prompt]
        explained = "".join(f"\n{point}: {self.explanations[point]}" for point in task.points)
        described = "".join(f"\n{point}: {plain(note)}" for point, note in zip(task.points, task.notes, strict=True))
        fields = {
            "prompt": plain(task.prompt),
            "testpoint": str(list(task.points)),
            "explanation": f"Checkpoints Defination:「{explained}\n」",  # as published
            "test_explanation": f"Checkpoints Description:「{described}\n」",
        }
        return re.sub(rf"{{({'|'.join(fields)})}}", lambda match: fields[match[1]], self.template), ""

    def request(self, image: Image, condition: Condition) -> dict[str, Any]:
        return {**super().request(image, condition), "max_tokens": 4096}

    def read_reply(self, reply: str) -> list[int]:
        """The list in <score>; the analysis beside it is not looked at."""
        if len(reply) > LIMIT:
            raise UnusableReply(f"the reply is longer than {LIMIT} characters")
        lists = {tuple(re.sub(r"[\s\[\]'\"]", "", text).split(",")) for text in SCORES.findall(reply)}
        if len(lists) != 1:
            raise UnusableReply(f"the reply has {'several different lists' if lists else 'no list'} in <score>")
        (scores,) = lists
        if not all(score in ("0", "1") for score in scores):
            raise UnusableReply("a score in the reply is neither 0 nor 1")
        return list(map(int, scores))


class UniGenBench(Judged):
    """The ten dimensions of test points; see `Judged`."""

    name, title, n = "unigenbench", "UniGenBench++", 4
    judge, judged_by, points = UniGenJudge, "gemini-2.5-pro", "test points"
    prompts_file = Published(
        REPO,
        COMMIT,
        "data/test_prompts_en.csv",
        "f82e8ce854985ef963378eaaf8ce12f2e3a57dd6f53e1aea84a61fbeadfe4459",
        LICENCE,
    )
    wording_file = Published(
        REPO,
        COMMIT,
        "eval/src/eval_common.py",
        "c26c91cc65be7ed4234f07a310eed8812888c83b8b83b1934b77b1f48c463eb9",
        LICENCE,
    )
    leaderboard: ClassVar = {  # English, short prompts, as published with the commit
        "Janus": (0.5160, 0.9008, 0.7356, 0.5534, 0.5092, 0.5654, 0.2874, 0.6174, 0.4710, 0.5201, 0.0),
        "Janus-Pro": (0.6136, 0.9040, 0.8655, 0.6859, 0.6388, 0.6954, 0.3568, 0.6404, 0.6018, 0.7276, 0.0201),
        "FLUX.1-dev": (0.6097, 0.8500, 0.8750, 0.6720, 0.6226, 0.6688, 0.2977, 0.6230, 0.4575, 0.7090, 0.3218),
    }

    def read_tasks(self, path: Path) -> list[Task]:
        rows = task_rows(path, (("index",), ("prompt_en", "prompt"), ("sub_dims_en", "sub_dims")))
        known, tasks = {point for points in POINTS.values() for point in points}, []
        for number, (index, prompt, text) in enumerate(rows, 1):
            where = f"{path}, row {number}"
            dims = check_shape(text if isinstance(text, dict) else _dims(text, where), Dims, f"{where}, sub_dims")
            points, notes = tuple(dims["Testpoints"]), tuple(dims["Testpoint Description"])
            if not isinstance(prompt, str) or not WHOLE.fullmatch(str(index)):
                raise UserError(f"{where}: index {shortened(index)} is no number, or the prompt no text")
            if unknown := [point for point in points if point not in known]:
                raise UserError(f"{where}: the test point {unknown[0]!r} is none of UniGenBench's 27")
            if len(points) != len(notes) or not points:
                raise UserError(f"{where}: {len(points)} test points and {len(notes)} descriptions")
            tasks.append(Task(int(index), prompt, points, notes))
        return tasks

    def parts(self) -> dict[str, tuple[float, Sequence[str]]]:
        return {name: (1 / len(POINTS), points) for name, points in POINTS.items()}

    def details(self) -> Mapping[str, Sequence[str]]:
        return {point: [point] for points in POINTS.values() if len(points) > 1 for point in points}

    def picture(self, index: int, sample: int) -> str:
        return f"{index}_{sample}.png"


def _dims(text: Any, where: str) -> Any:
    # A row of the published long prompts lacks a comma between two test points.
    for said in (str(text), re.sub(r'"(\s+)"', r'",\1"', str(text))):
        with suppress(ValueError):
            return parse_json(said)
    raise UserError(f"{where}: its test points are no JSON")
