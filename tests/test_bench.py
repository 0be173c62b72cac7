"""The benchmark of the sampler: its reference computes what LlamaGen does, or the ratio means nothing."""

from __future__ import annotations

import copy

import torch

from argrpo_cli import bench_sampler
from argrpo_cli.policy.config import SIZES
from tests.goldens import cases, golden_model, tensors


def sharpened(model, factor=1e5):
    """The model with logits so far apart that it draws its most likely token, whatever the noise."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight *= factor
    return model


def test_the_reference_draws_the_published_tokens():
    data = tensors("A_c2i")
    run = next(run for run in cases()["A_c2i"]["greedy_runs"] if run["cfg_scale"] > 1 and run["cfg_interval"] == -1)
    model = sharpened(golden_model("A_c2i"))
    tokens = bench_sampler.sample_as_published(model, data["in/gen_labels"], run["cfg_scale"])
    assert torch.equal(tokens, data[f"out/greedy_ids_{run['key']}"].long())


def test_the_table_has_the_reference_the_ratio_and_the_floor(monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "B", SIZES["B"] | {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1})
    bench_sampler.main(["--batch-size", "1", "--dtypes", "float32", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "reference" in printed and "floor" in printed and "float32" in printed and "MiB" in printed
