"""Files that a user brings to a benchmark or a training: prompts, evaluators, shards and codes, read or refused."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from argrpo_cli.evals.point_benchmarks import Task
from argrpo_cli.evals.unigenbench import UniGenBench, UniGenJudge
from argrpo_cli.evals.wise import Wise, WiseJudge
from argrpo_cli.geneval.questions import read_items
from argrpo_cli.recipe.real import RealSection
from argrpo_cli.system.files import read_text
from argrpo_cli.training.real import open_images
from tests.evals.judges import unigen_files, wise_files
from tests.fuzz.mutate import Damage, damaged, damaged_json, damaged_jsonl, damaged_text
from tests.training.reals import save_codes
from tests.training.tiny import CODES, TOKENS, tiny_caption_policy, tiny_policy

ITEMS = [
    {
        "prompt": f"two red {name}",
        "atom_count": 3,
        "vqa_list": [[f"How many {name} are there?", "two"], ["Are they red?", "Yes"]],
        "skills": ["count", "attribute"],
    }
    for name in ("cars", "dogs", "cups")
]
TASKS = [(f"a tower {number}", ["Style", "World Knowledge"]) for number in range(3)]
PYTHON = [
    "(" * 3000, "'''", "\0", "lambda: (yield)", "f'{x!z}'", "x = " + "-" * 5000 + "1", "\ud800", "9" * 5000, "0777",
    "é = 1", "# coding: nosuch\n", "\tx", "return", "*a, *b = c",
]  # fmt: skip


def seeds(folder: Path) -> dict[str, Any]:
    """Files of each kind, and policies that read them."""
    unigen_files(folder, TASKS)
    wise_files(folder, [(prompt, "Cultural knowledge") for prompt, _ in TASKS])
    save_codes(folder / "classes.npz", count=6)
    save_codes(folder / "captions.npz", count=6, prompts=["a red dog", "a blue cat"])
    files = ("prompts.csv", "eval_common.py", "merge.json", "vllm_eval.py", "classes.npz", "captions.npz")
    made: dict[str, Any] = {name: (folder / name).read_bytes() for name in files}
    rows = [
        {"index": place, "prompt": prompt, "sub_dims": _dims(points)} for place, (prompt, points) in enumerate(TASKS)
    ]
    made |= {
        "prompts.json": json.dumps(rows).encode(),
        "geneval2.jsonl": "".join(json.dumps(item) + "\n" for item in ITEMS).encode(),
        "classes.tar": _tar({".cls": "3"}),
        "captions.tar": _tar({".txt": "a red dog"}),
        "rows.tar": _tar({".json": json.dumps({"caption": "a dog", "label": 2, "other": [1]})}),
    }
    return made | {"policies": {"classes": tiny_policy(), "captions": tiny_caption_policy()}}


def _dims(points: list[str]) -> dict[str, list[str]]:
    return {"Testpoints": points, "Testpoint Description": [point.upper() for point in points]}


def _tar(beside: dict[str, str]) -> bytes:
    """Three pictures, each with such files beside it."""
    picture, file = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (9, 8), "red").save(picture, "png")
    contents = {".png": picture.getvalue(), **{ending: text.encode() for ending, text in beside.items()}}
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number in range(3):
            for ending, content in contents.items():
                member = tarfile.TarInfo(f"{number:04}{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def case(seeds: dict[str, Any], rng: Damage, folder: Path) -> str:
    """A file of one of the kinds."""
    name = rng.choice(sorted(set(seeds) - {"policies"}))
    path, content = folder / name, seeds[name]
    if path.suffix == ".json":
        path.write_bytes(damaged_json(content, rng))
    elif path.suffix == ".jsonl":
        path.write_bytes(damaged_jsonl(content, rng))
    elif path.suffix == ".py":
        path.write_bytes(damaged_text(content.decode(), rng, PYTHON).encode("utf-8", "surrogatepass"))
    else:
        path.write_bytes(damaged(content, rng))
    if path.suffix in (".tar", ".npz"):
        return _images(seeds["policies"], path)
    return {".jsonl": _items, ".py": _evaluator}.get(path.suffix, _tasks)(path)


def _items(path: Path) -> str:
    items = read_items(path)
    assert all(item.prompt.strip() and item.questions for item in items), "an item without a prompt or a question"
    assert all(type(item.atoms) is int for item in items), "a number of atoms that is none"
    return f"{len(items)} items"


def _tasks(path: Path) -> str:
    benchmark = object.__new__(UniGenBench if path.stem == "prompts" else Wise)
    tasks = benchmark.read_tasks(path)
    known = {point for _, points in benchmark.parts().values() for point in points}
    for task in tasks:
        assert type(task.index) is int and isinstance(task.prompt, str), "an index or a prompt of another kind"
        assert task.points and set(task.points) <= known and len(task.notes) == len(task.points), "other points"
        assert all(isinstance(note, str) for note in task.notes), "a note that is no text"
        assert "/" not in benchmark.picture(task.index, 0), "a picture elsewhere"
    return f"{len(tasks)} tasks"


def _evaluator(path: Path) -> str:
    task = Task(1, "a tower", ("Style",), ("a sketch",))
    judge = object.__new__(UniGenJudge if path.stem == "eval_common" else WiseJudge)
    judge.tasks = {task.prompt: task}
    judge.read_wording(read_text(path))
    return "read"


def _images(policies: dict[str, Any], path: Path) -> str:
    reads = "classes" if path.stem == "classes" else "captions"
    section = RealSection(path=str(path), column="caption")
    real = open_images(section, policies[reads])
    rows = range(len(real.conditions))
    if path.suffix == ".npz":
        codes = real.tokens(rows)
        assert codes.shape == (len(rows), TOKENS) and codes.min() >= 0 and codes.max() < CODES, "other codes"
    else:
        pixels = np.stack([item.read() for item in real.images.items])
        assert pixels.shape[1] == 3 and pixels.dtype == np.uint8, "no pictures"
    return f"{len(rows)} images"
