"""`argrpo eval wise`: WISE-Verified (Niu et al. 2025, arXiv 2503.07265, release of April 2026), 1,000 prompts.

A prompt wants knowledge of culture, time, space, biology, physics or chemistry to be drawn; the judge, which is told
the answer, says 1 or 0. The overall number weighs culture by 0.4, the others by 0.12 each, as published. Prompts and
wording come from github.com/PKU-YuanGroup/WISE, which states no licence; a file of prompts is a .json list of objects
with `prompt_id`, `Prompt`, `Explanation` and `Category`. See `point_benchmarks.py`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from argrpo_cli.evals.point_benchmarks import Judged, PointJudge, Published, Task, parse_evaluator, task_rows
from argrpo_cli.rewards.judge.questions import LIMIT, UnusableReply, plain
from argrpo_cli.rewards.judge.server import data_url
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

REPO, COMMIT = "PKU-YuanGroup/WISE", "eb51174483a5de2e34e8614cf9dfb3319ee7fcd0"
LICENCE = "WISE's repository states no licence"
CATEGORIES = {  # as the file calls them; the published tables' names and weights
    "Cultural knowledge": ("Culture", 0.40),
    "time": ("Time", 0.12),
    "Space": ("Space", 0.12),
    "Biology": ("Biology", 0.12),
    "Physical Knowledge": ("Physics", 0.12),
    "Chemistry": ("Chemistry", 0.12),
}
FIELDS = ("Prompt", "Explanation")  # of the wording
SCORE = re.compile(  # and no scale: "Score (0 or 1)", "Score: 0/1" say nothing
    r"score\W{0,9}([01])(?![.\d])(?! ?(?:or|to) ?[01]\b)(?!(?<=0)(?: ?[/|] ?|[-–])1\b)", re.IGNORECASE
)
BARE = re.compile(r"^\W{0,9}([01])\W{0,9}$", re.MULTILINE)
THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)


class WiseJudge(PointJudge):
    """A model that says `Score: 0` or `Score: 1` of a picture; see `PointJudge`.

    Args:
        thinking: "off" asks the server's chat template not to think, as published; "default" leaves it to the model,
            for servers that refuse `chat_template_kwargs`.
    """

    name, published = "wise", "Qwen3.5-35B-A3B"

    def __init__(self, *given: Any, thinking: Literal["off", "default"] = "off", **options: Any):
        self.thinking = thinking
        super().__init__(*given, **options)

    def read_wording(self, source: str) -> None:
        """The texts of the messages: of the system's, and of the user's with a slot for each of `FIELDS`."""
        tree = parse_evaluator(source)
        messages = [
            value
            for node in ast.walk(tree)
            if isinstance(node, ast.Dict)
            for key, value in zip(node.keys, node.values, strict=True)
            if isinstance(key, ast.Constant) and key.value == "text" and isinstance(value, ast.Constant | ast.JoinedStr)
        ]
        texts = [_slots(one) for one in messages]
        if [sum(part in FIELDS for part, slot in text if slot) for text in texts] != [0, len(FIELDS)]:
            raise UserError(f"--wording has no messages with {' and '.join(FIELDS)}; give vllm_eval.py of {REPO}")
        self.system, self.user = texts

    def request(self, image: Image, condition: Condition) -> dict[str, Any]:
        """The published request: text, then picture; 500 tokens."""
        task = self.tasks[condition.prompt]
        fields = dict(zip(FIELDS, (plain(task.prompt), plain(task.notes[0])), strict=True))
        text = "".join(fields[part] if slot else part for part, slot in self.user)
        picture = {"type": "image_url", "image_url": {"url": data_url(image, self.image_format)}}
        content = [{"type": "text", "text": text}, picture]
        system = [{"type": "text", "text": "".join(part for part, _ in self.system)}]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        thinking = {"chat_template_kwargs": {"enable_thinking": False}} if self.thinking == "off" else {}
        return {"messages": messages, "max_tokens": 500 if thinking else 4096, **thinking}

    def read_reply(self, reply: str) -> list[int]:
        """The 0 or 1 after "Score", or alone on a line; what was thought before is not looked at."""
        if len(reply) > LIMIT:
            raise UnusableReply(f"the reply is longer than {LIMIT} characters")
        said = THOUGHT.sub("", reply).rpartition("</think>")[2]
        scores = set(SCORE.findall(said) or BARE.findall(said))
        if len(scores) != 1:
            raise UnusableReply(f"the reply has {'two different scores' if scores else 'no score of 0 or 1'}")
        return [int(scores.pop())]


class Wise(Judged):
    """The six categories of knowledge; see `Judged`."""

    name, title, n = "wise", "WISE-Verified", 1
    judge, judged_by = WiseJudge, "Qwen3.5-35B-A3B"
    prompts_file = Published(
        REPO,
        COMMIT,
        "data_verified/merge.json",
        "10f2690624ed8f03f21bd3e9c535e26f791da8bab67ac857903bede65985b82d",
        LICENCE,
    )
    wording_file = Published(
        REPO, COMMIT, "vllm_eval.py", "e6c51c2ae81e4eb0465755b248cbcefeef3fb8340e281bb3ac43ea9689e32192", LICENCE
    )
    leaderboard: ClassVar = {
        "Janus-Pro-1B": (0.2650, 0.3050, 0.2333, 0.2333, 0.2167, 0.3083, 0.2000),
        "Janus-Pro-7B": (0.3340, 0.3700, 0.3500, 0.2833, 0.2833, 0.4000, 0.2333),
        "FLUX.1-dev": (0.4160, 0.5225, 0.4000, 0.5333, 0.1750, 0.3750, 0.2417),
    }

    def read_tasks(self, path: Path) -> list[Task]:
        tasks = []
        for number, row in enumerate(task_rows(path, (("prompt_id",), ("Category",), *((one,) for one in FIELDS))), 1):
            index, category, prompt, explanation = row
            if type(index) is not int or not all(isinstance(one, str) for one in (category, prompt, explanation)):
                raise UserError(
                    f"{path}, row {number}: prompt_id is no number, or Category, Prompt or Explanation no text"
                )
            if category not in CATEGORIES:
                raise UserError(f"{path}, row {number}: no category {category!r}; there are {', '.join(CATEGORIES)}")
            tasks.append(Task(index, prompt, (CATEGORIES[category][0],), (explanation,)))
        return sorted(tasks)

    def parts(self) -> dict[str, tuple[float, Sequence[str]]]:
        return {name: (weight, [name]) for name, weight in CATEGORIES.values()}

    def picture(self, index: int, sample: int) -> str:
        return f"{index}.png" if sample == 0 else f"{index}_{sample}.png"


def _slots(node: ast.Constant | ast.JoinedStr) -> list[tuple[str, bool]]:
    """The parts of a text in order, those of `prompt_data['Prompt']` by their key, with whether they are such."""
    parts: list[tuple[str, bool]] = []
    for value in [node] if isinstance(node, ast.Constant) else node.values:
        if isinstance(value, ast.Constant):
            parts.append((str(value.value), False))
        else:
            inner = getattr(getattr(value.value, "slice", None), "value", None)
            parts.append((str(inner), True))
    return parts
