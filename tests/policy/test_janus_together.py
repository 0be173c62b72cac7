"""Janus shared out over two processes: the same training as on one."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from argrpo_cli.policy import load_policy
from argrpo_cli.training import job, run_training
from tests.policy.tiny_janus import PROMPTS, tiny_janus
from tests.together import forked
from tests.training.test_together import environment_of, numbers
from tests.training.tiny import FakeRewards, tiny_recipe
from tests.training.together_worker import accelerate_shards_on_cpus


def train(folder: Path, out: Path, environment: Mapping[str, str] | None = None) -> int:
    os.environ |= environment or {}
    job.refresh_report = lambda *args, **keys: None  # which takes its time
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        accelerate_shards_on_cpus()
    recipe = tiny_recipe(
        folder,
        conditions={"source": "captions", "captions": list(PROMPTS)},
        logprob="guided",
        beta=0.01,
        micro_batch_size=2,
        steps=2,
        condition_dropout=0.2,
    )
    run_training(recipe, out, rewards=FakeRewards(), console=Console(file=io.StringIO()))
    return 0


def test_two_processes_that_share_out_its_weights_train_as_one_does(tmp_path: Path) -> None:
    """The image tokenizer, which is none of what is shared out, still decodes."""
    tiny_janus().save(tmp_path / "policy")
    environment = {"ACCELERATE_USE_CPU": "true"} | environment_of("fsdp2")
    done = forked(partial(train, tmp_path / "policy", tmp_path / "two", environment), tmp_path / "printed")
    assert done.codes == [0, 0], done.err[-4000:]
    train(tmp_path / "policy", tmp_path / "one")
    shared, alone = (load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("two", "one"))
    assert shared.keys() - alone.keys() <= {"lm_head.weight"}, (
        "FSDP2 saves what is tied to the embeddings a second time"
    )
    for name, expected in alone.items():
        torch.testing.assert_close(shared[name], expected, rtol=1e-4, atol=1e-5)
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("two", "one")]
    for two, one in zip(*rows, strict=True):
        left, right = numbers(json.loads(two)), numbers(json.loads(one))
        for key in ("gradient_signal", "gradient_noise"):
            left.pop(key, None), right.pop(key, None)
        assert left == pytest.approx(right, rel=1e-3, abs=2e-5)
    assert load_policy(tmp_path / "two").fingerprint() != load_policy(tmp_path / "policy").fingerprint()
