"""A run of GRPO on a GPU, stopped and continued; left out where TRL is not installed."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("trl")

from argrpo_cli.networks.weights import read_state
from argrpo_cli.recipe import load_recipe
from argrpo_cli.training import run_training
from tests.training.conftest import no_pages, policy_folder, quiet  # noqa: F401 (fixtures)
from tests.training.tiny import FakeRewards, tiny_recipe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_is_continued_ends_as_one_that_was_not_stopped(device, dtype, tmp_path, policy_folder):  # noqa: F811
    recipe = tiny_recipe(steps=4)
    tree = recipe.model_dump()
    tree["policy"] |= {"checkpoint": str(policy_folder), "device": device, "dtype": dtype}
    tree["logging"]["save_every"] = 2
    recipe = type(recipe).model_validate(tree)
    run_training(recipe, tmp_path / "whole", rewards=FakeRewards())

    stopped = FakeRewards()

    def stop(batch: int) -> None:
        if batch == 4:
            raise RuntimeError("as a machine that goes down")

    stopped.on_batch = stop
    with pytest.raises(RuntimeError, match="goes down"):
        run_training(recipe, tmp_path / "cut", rewards=stopped)
    run_training(load_recipe(tmp_path / "cut" / "recipe.yaml"), tmp_path / "cut", True, rewards=FakeRewards())
    states = [read_state(tmp_path / run / "policy" / "model.safetensors") for run in ("whole", "cut")]
    for name, weight in states[0].items():  # kernels that add up in no fixed order; an update moves a weight by 1e-3
        assert (weight - states[1][name]).abs().mean() < (1e-4 if device == "cuda" else 1e-9), name
    ratios = [json.loads(line)["ratio"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert len(ratios) == 4 and all(abs(ratio - 1) < (1e-4 if dtype == "float32" else 0.05) for ratio in ratios)
