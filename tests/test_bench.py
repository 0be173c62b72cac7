"""The benchmark of the sampler: its reference computes what LlamaGen does, or the ratio means nothing."""

from __future__ import annotations

import copy

import pytest
import torch

from argrpo_cli.bench import eval as bench_eval
from argrpo_cli.bench import sampler as bench_sampler
from argrpo_cli.bench import train as bench_train
from argrpo_cli.bench.__main__ import main
from argrpo_cli.policy.llamagen.geometry import SIZES
from argrpo_cli.system.errors import UserError
from tests.goldens import cases, golden_model, tensors


def sharpened(model, factor=1e5):
    """The model with logits so far apart that it draws its most likely token, whatever the noise."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight *= factor
    return model


@pytest.mark.parametrize("guided", [False, True])
def test_the_reference_draws_the_published_tokens(guided):
    data, runs = tensors("A_c2i"), cases()["A_c2i"]["greedy_runs"]
    run = next(run for run in runs if (run["cfg_scale"] > 1) == guided and run["cfg_interval"] == -1)
    model, expected = sharpened(golden_model("A_c2i")), data[f"out/greedy_ids_{run['key']}"].long()
    tokens = bench_sampler.sample_as_published(model, data["in/gen_labels"], run["cfg_scale"])
    assert torch.equal(tokens, expected)
    first = bench_sampler.sample_as_published(model, data["in/gen_labels"], run["cfg_scale"], count=3)
    assert torch.equal(first, expected[:, :3])


def test_the_table_has_the_reference_the_ratio_and_the_floor(monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "B", SIZES["B"] | {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1})
    main(["sampler", "--batch-size", "1", "--dtypes", "float32", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "reference" in printed and "floor" in printed and "float32" in printed and "MiB" in printed


def test_a_benchmark_that_is_none_is_told():
    with pytest.raises(UserError, match=r"no benchmark 'smapler'; there are nano, .*did you mean 'sampler'"):
        main(["smapler"])


def test_a_training_step_is_measured_in_every_way(tmp_path, capsys):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "extends: nano/c2i\npolicy: {dtype: float32}\nsampling: {cfg_scale: 2}\n"
        "grpo: {batch_size: 4, micro_batch_size: 2, group_size: 2, beta: 0.1, steps: 2, warmup_steps: 0}\n"
    )
    bench_train.main([str(recipe), "--steps", "1", "--micro-batch-sizes", "2", "--device", "cpu"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "2 at a time" in line]
    assert [row.split(",")[0] for row in rows] == [
        "all weights", "recomputed activations", "LoRA", "no reference model", "and no guidance", "and in bfloat16"
    ]  # fmt: skip
    for row in rows:
        rollout, reward, update, step = (float(cell) for cell in row.split("at a time")[1].replace("s", "").split()[:4])
        assert abs(rollout + reward + update - step) < 0.03 and step > 0


def test_a_published_policy_is_measured_with_random_weights(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "L", SIZES["L"] | {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1})
    from argrpo_cli.policy import load_policy
    from argrpo_cli.recipe import load_recipe

    folder = bench_train._base(load_recipe("plus/c2i_l384_cca"), tmp_path / "base")
    policy = load_policy(folder)
    assert policy.model.config.hidden_size == 64 and policy.image_size == 384
    assert policy.tokenizer.config.downsample == 16


def test_an_update_is_measured_without_what_comes_before_it():
    from argrpo_cli.recipe import load_recipe

    ways = bench_train._ways(load_recipe("plus/c2i_l384"), "other", 8)
    measured = {(way.start, way.policy.checkpoint, way.grpo.micro_batch_size) for way in ways.values()}
    assert measured == {(None, "other", 8)}


def test_precision_and_recall_are_timed_at_two_sizes(capsys):
    bench_eval.manifolds([(60, 20), (120, 40)], "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert "60 x    20" in lines[1] and "120 x    40" in lines[2]
    assert "exponent" in lines[3] and "minutes at 50000 x 10000" in lines[3]


def test_the_bench_of_inception_has_weights_that_torch_fidelity_reads(tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = bench_eval.save_random_weights(tmp_path / "random.pth")
    network = FeatureExtractorInceptionV3("test", ["2048"], feature_extractor_weights_path=str(path))
    assert network.Conv2d_1a_3x3.conv.weight.std() > 0.1
