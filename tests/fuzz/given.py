"""Files that a user brings to a benchmark or a training: prompts, evaluators, shards and codes, read or refused."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from argrpo_cli.evals.drawbench_prompts import read_prompts
from argrpo_cli.evals.fidelity import load_statistics
from argrpo_cli.evals.point_benchmarks import Task
from argrpo_cli.evals.unigenbench import UniGenBench, UniGenJudge
from argrpo_cli.evals.wise import Wise, WiseJudge
from argrpo_cli.geneval.questions import read_items
from argrpo_cli.image_labels import IDS, open_labelled
from argrpo_cli.recipe.real import RealSection
from argrpo_cli.rewards.loo_fid import read_moments
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
        "drawbench.tsv": b'Prompts\tCategory\n"a red, dog"\tColors\n"two\nlines"\tText\nc\tx\n',
        "drawbench.json": json.dumps(
            [{"conversations": [{"from": "human", "value": text}]} for text in "abc"]
        ).encode(),
        IDS: b"a.png 3\nb.png n01440764\nc.png 0\n",
        "moments.npz": _arrays(mu=np.zeros(4), sigma=np.eye(4), mu_s=np.ones(3), sigma_s=np.eye(3)),
        "classes.tar": _tar({".cls": "3"}),
        "captions.tar": _tar({".txt": "a red dog"}),
        "rows.tar": _tar({".json": json.dumps({"caption": "a dog", "label": 2, "other": [1]})}),
    }
    return made | {"policies": {"classes": tiny_policy(), "captions": tiny_caption_policy()}}


def _dims(points: list[str]) -> dict[str, list[str]]:
    return {"Testpoints": points, "Testpoint Description": [point.upper() for point in points]}


def _arrays(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


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
    if path.suffix == ".tar" or path.stem in ("classes", "captions"):
        return _images(seeds["policies"], path)
    if path.suffix == ".npz":
        return _moments(path)
    return {"geneval2": _items, "drawbench": _prompts, Path(IDS).stem: _labels}.get(
        path.stem, _evaluator if path.suffix == ".py" else _tasks
    )(path)


def _moments(path: Path) -> str:
    statistics = load_statistics(path)
    mean, deviation = read_moments(path)
    assert mean.shape == deviation.shape and mean.isfinite().all() and (deviation >= 0).all(), "no moments"
    assert statistics is None or statistics[0].mean.isfinite().all(), "no mean"
    return f"{len(mean)} features"


def _prompts(path: Path) -> str:
    prompts = read_prompts(str(path)).prompts
    assert prompts and all(isinstance(one, str) and one.strip() for one in prompts), "an empty prompt"
    return f"{len(prompts)} prompts"


def _labels(path: Path) -> str:
    for name in "abc":
        (path.parent / f"{name}.png").touch()
    labels = [item.extra["label"] for item in open_labelled(path.parent).items]
    assert all(type(one) in (int, str) for one in labels), "no label"
    return f"{len(labels)} labels"


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
