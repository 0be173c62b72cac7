"""Benchmarks of verdicts without the published files: stand-ins of the same form in our own words, and pictures of one
grey each, which the fake server knows them by."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import nn

from argrpo_cli.policy import load_policy
from tests.rewards.judge.fake_server import FakeServer
from tests.training.tiny import tiny_caption_policy

PROMPTS = [
    f"{one} {other}"
    for one in ("a", "a red", "a blue", "red", "blue")
    for other in ("dog", "cat", "dog dog", "cat cat")
]
UNIGEN_WORDING = """
import not_installed
EXPLANATION_DICT_EN = {explanations}
SYSTEM_PROMPT_EN_TEMPLATE = '''Prompt {{prompt}}; points {{testpoint}}.
{{explanation}}
{{test_explanation}}
Again {{prompt}}'''
raise SystemExit("this file is read, not run")
"""
WISE_WORDING = '''
import not_installed
def build_evaluation_messages(prompt_data, image):
    return [{"role": "system", "content": [{"type": "text", "text": "Be strict."}]},
            {"role": "user", "content": [{"type": "text", "text": f"""Judge {{it}}.
PROMPT: "{prompt_data['Prompt']}" EXPLANATION: "{prompt_data['Explanation']}" """},
            {"type": "image_url", "image_url": {"url": f"data:{image}"}}]}]
raise SystemExit("this file is read, not run")
'''


def unigen_files(folder: Path, tasks: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """--prompts and --wording of prompts with test points; each point's description is its name in capitals."""
    explanations = {point: f"about {point}" for _, points in tasks for point in points}
    (folder / "eval_common.py").write_text(UNIGEN_WORDING.format(explanations=explanations))
    with open(folder / "prompts.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "prompt_en", "sub_dims_en"])
        for index, (prompt, points) in enumerate(tasks):
            dims = {"Testpoints": list(points), "Testpoint Description": [point.upper() for point in points]}
            writer.writerow([index, prompt, json.dumps(dims)])
    return ["--prompts", str(folder / "prompts.csv"), "--wording", str(folder / "eval_common.py")]


def wise_files(folder: Path, tasks: Sequence[tuple[str, str]]) -> list[str]:
    """--prompts and --wording of prompts with categories."""
    rows = [
        {"prompt_id": index, "Prompt": prompt, "Explanation": f"shows {prompt}", "Category": category}
        for index, (prompt, category) in enumerate(tasks, 1)
    ]
    (folder / "merge.json").write_text(json.dumps(rows))
    (folder / "vllm_eval.py").write_text(WISE_WORDING)
    return ["--prompts", str(folder / "merge.json"), "--wording", str(folder / "vllm_eval.py")]


def chat_server(judge, reply) -> FakeServer:
    """A server that has a judge's published model."""
    return FakeServer(reply, {"data": [{"id": judge.published}]})


LOADED_ONCE = cache(load_policy)


def draw_greys(monkeypatch) -> None:
    """Let every policy, which is loaded once, draw the picture number i of its seeds in the grey i."""

    def draw_batch(policy, shots, sampling, size=None):
        greys = torch.tensor([shot.seed % 100 for shot in shots], dtype=torch.uint8)
        return None, greys[:, None, None, None].expand(-1, 3, 16, 16)

    monkeypatch.setattr("argrpo_cli.draw.draw_batch", draw_batch)
    monkeypatch.setattr("argrpo_cli.policy.load_policy", LOADED_ONCE)


def save_two_policies(folder: Path) -> list[str]:
    policy = tiny_caption_policy()
    policy.save(folder / "one")
    nn.init.normal_(policy.model.lm_head.weight, std=0.3)
    policy.save(folder / "two")
    return [str(folder / "one"), str(folder / "two")]
