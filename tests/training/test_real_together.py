"""Methods that learn from real images: every family, and two processes that train as one does."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from argrpo_cli.policy import load_policy
from argrpo_cli.shapes import Sampling
from argrpo_cli.training import job, run_training
from tests.policy.test_var_training import CODES as VAR_CODES
from tests.policy.test_var_training import SCALES, tiny_var
from tests.policy.tiny_janus import PROMPTS, tiny_janus
from tests.together import forked
from tests.training.reals import real_recipe, save_codes
from tests.training.test_together import numbers

FAMILIES = {
    "var": (tiny_var, {"tokens": sum(side**2 for side in SCALES), "codes": VAR_CODES}, None),
    "janus": (tiny_janus, {"prompts": PROMPTS}, PROMPTS),
}
SHARED = [("var", "cca"), ("janus", "pixel")]  # by two processes
ALONE = [("var", "pixel"), ("janus", "cca")]


def work(
    folder: Path, out: Path, cases: Sequence[tuple[str, str]], steps: int, environment: dict[str, str] | None = None
) -> int:
    """Train some cases, one after the other."""
    os.environ |= environment or {}
    job.refresh_report = lambda *args, **keys: None  # which takes its time
    for family, method in cases:
        captions = FAMILIES[family][2]
        conditions = {} if captions is None else {"source": "captions", "captions": list(captions)}
        own: dict[str, Any] = {"condition_dropout": 0.3} if method == "cca" else {"noise": 0.4}
        recipe = real_recipe(
            method,
            folder / family,
            folder / f"{family}.npz",
            steps=steps,
            micro_batch_size=2,
            conditions=conditions,
            **own,
        )
        run_training(recipe, out / f"{family}-{method}", console=Console(file=io.StringIO()))
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policies and images, the runs of one process in `one` and those of two in `two`."""
    folder = tmp_path_factory.mktemp("families")
    for family, (policy, images, _) in FAMILIES.items():
        policy().save(folder / family)
        save_codes(folder / f"{family}.npz", **images)
    done = forked(partial(work, folder, folder / "two", SHARED, 2, {"ACCELERATE_USE_CPU": "true"}), folder / "printed")
    assert done.codes == [0, 0], done.err[-4000:]
    report = job.refresh_report
    work(folder, folder / "one", SHARED, 2)
    work(folder, folder / "one", ALONE, 1)
    job.refresh_report = report
    return folder


@pytest.mark.parametrize(("family", "method"), SHARED)
def test_two_processes_learn_from_the_same_images_as_one(folder: Path, family: str, method: str) -> None:
    runs = [folder / part / f"{family}-{method}" for part in ("one", "two")]
    base = load_policy(folder / family).model.state_dict()
    one, two = (load_policy(run / "policy").model.state_dict() for run in runs)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    assert moved(base, one) > 8, "so that equality says something"
    records = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    for left, right in zip(*records, strict=True):
        assert numbers(right) == pytest.approx(numbers(left), rel=1e-3, abs=2e-5)
        assert left["grad_norm"] > 0
    assert len(records[0]) == 2


@pytest.mark.parametrize(("family", "method"), ALONE)
def test_every_family_learns_by_every_method(folder: Path, family: str, method: str) -> None:
    run = folder / "one" / f"{family}-{method}"
    base, trained = (load_policy(one).model.state_dict() for one in (folder / family, run / "policy"))
    (record,) = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert moved(base, trained) > 8 and record["grad_norm"] > 0
    assert record["entropy"] > 0 and math.isfinite(record["loss"])


def moved(base: dict[str, torch.Tensor], trained: dict[str, torch.Tensor]) -> int:
    """How many parameters have changed by as much as the learning rate."""
    return sum((value - base[name]).abs().max().item() > 5e-4 for name, value in trained.items())


def test_what_draws_scale_by_scale_is_noisy_scale_by_scale(folder: Path) -> None:
    """VAR's context is the image so far: a code replaced in a scale changes what the later ones are drawn from."""
    policy = load_policy(folder / "var")
    encoded = policy.encode(policy.conditions([1]))
    tokens = torch.zeros(1, policy.card.tokens, dtype=torch.int64)
    noisy = tokens.clone()
    noisy[0, 2] = 7  # of the second scale, of 1, 4 and 16 places
    with torch.no_grad():
        plain, other = (
            policy.model.distribution(encoded, one, Sampling(cfg_scale=1.0))(slice(0, 21)) for one in (tokens, noisy)
        )
    changed = (plain - other).abs().amax(-1) > 1e-6
    assert not changed[:5].any() and changed[5:].any()
