"""The benchmark of the first hour on a GPU: it runs through on a CPU, and nothing that is cut off is lost."""

from __future__ import annotations

import json
import time

import psutil
import pytest
import torch

from argrpo_cli.bench import gpu, gpu_sampling, roofline
from argrpo_cli.bench.__main__ import main
from argrpo_cli.policy.llamagen.config import LlamaGenConfig
from argrpo_cli.policy.llamagen.pretrained import LlamaGenForImageGeneration
from argrpo_cli.policy.llamagen.sample import new_cache
from argrpo_cli.system.errors import UserError


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / gpu.RESULTS).read_text().splitlines()]


def test_every_part_runs_through_at_toy_sizes(tmp_path, capfd):
    main(["gpu", "--toy", "--out", str(tmp_path), "--minutes", "60"])
    rows = lines(tmp_path)
    assert [row["part"] for row in rows if "seconds" in row] == list(gpu.PARTS)
    assert not [row for row in rows if row.keys() & {"failed", "stopped", "skipped"}]
    off = {row["row"]: row["mean_off"] for row in rows if row["part"] == "ratio" and "row" in row}
    assert off["B-256 float32 cfg 7.5"] < 1e-4 < off["B-256 bfloat16 cfg 7.5"]
    whole = next(row for row in rows if row.get("row") == "XL-384 whole step")
    pieces = [
        row["ours_s"]
        for row in rows
        if row.get("row", "").startswith("XL-384") and "authors_s" in row and "guided" not in row["row"]
    ]
    assert whole["ours_s"] == pieces[-1] == pytest.approx(sum(pieces[:-1]))
    printed = capfd.readouterr().out
    assert "published_tok_s" in printed and "XL-384 update, LoRA" in printed
    assert (tmp_path / gpu.TABLE).read_text() in printed
    main(["gpu", "--toy", "--out", str(tmp_path)])
    again = capfd.readouterr().out
    assert again.count(" already\n") == len(gpu.PARTS) and "XL-384 update, LoRA" in again
    assert lines(tmp_path) == rows


def test_a_part_that_fails_or_hangs_costs_no_other(tmp_path, monkeypatch, capfd):
    def fails(bench):
        bench.row("before", x=1.0)
        raise RuntimeError("CUDA error: device-side assert triggered")

    def hangs(bench):
        bench.row("before", x=2.0)
        time.sleep(60)

    monkeypatch.setattr(gpu_sampling, "card", fails)
    monkeypatch.setattr(gpu_sampling, "sampler", hangs)
    monkeypatch.setattr(gpu_sampling, "attention", lambda bench: bench.row("after", x=3.0))
    monkeypatch.setitem(gpu.PARTS, "sampler", gpu.PARTS["sampler"]._replace(most=0.1))
    main(["gpu", "--toy", "--out", str(tmp_path), "--parts", "card,sampler,attention"])
    rows = lines(tmp_path)
    assert [row["x"] for row in rows if "row" in row] == [1.0, 2.0, 3.0]
    (failed,), (stopped,) = ([row for row in rows if key in row] for key in ("failed", "stopped"))
    assert failed["part"] == "card" and "device-side assert triggered (test_bench_gpu.py:" in failed["failed"]
    assert stopped["part"] == "sampler" and stopped["stopped"].startswith("after 1 s")
    monkeypatch.undo()
    main(["gpu", "--toy", "--out", str(tmp_path), "--parts", "card,attention"])
    table = gpu.table(gpu.rows_of(tmp_path / gpu.RESULTS))
    assert "failed" not in table and "before" in table and "after" in table, "what has failed is run again"


def test_what_no_longer_fits_is_left_out_with_a_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "age", lambda: 7.0)  # the start of the process counts
    main(["gpu", "--toy", "--out", str(tmp_path), "--minutes", "0.2"])
    assert all("skipped" in row for row in lines(tmp_path))
    assert "  skipped: 5 s were left, and it needs 10\n" in capfd.readouterr().out


def test_a_process_knows_its_age(monkeypatch):
    monkeypatch.setattr(gpu, "LONGEST_START", 1e9)
    assert gpu.age() == pytest.approx(time.time() - psutil.Process().create_time(), abs=2)
    monkeypatch.setattr(gpu, "LONGEST_START", 1e-9)
    assert gpu.age() == 0


def test_the_table_is_made_of_whole_lines_of_the_last_attempt(tmp_path, capsys):
    (tmp_path / gpu.RESULTS).write_text(
        '{"part": "card", "started": "1"}\n{"part": "card", "row": "old", "GB_s": 1}\n'
        '{"part": "card", "started": "2"}\n{"part": "card", "row": "new", "GB_s": 4321.7, "note": null}\n{"part": "ca'
    )
    main(["gpu", "--table", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "new" in printed and "4322" in printed and "old" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x", "--parts", "atention"], "no such part; there are card, .*did you mean 'attention'"),
        ([], "give a folder"),
        (["--out", "x", "--minutes", "0"], "a time above 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        main(["gpu", *arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_toys_run(tmp_path):
    with pytest.raises(UserError, match=r"no GPU .*--toy"):
        main(["gpu", "--out", str(tmp_path)])
    assert not (tmp_path / gpu.RESULTS).exists()


# the roofline


def test_a_step_is_counted_as_the_model_has_it():
    config = LlamaGenConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, block_size=9
    )
    model = LlamaGenForImageGeneration(config)
    weights, cache, flops = roofline.step_cost(config, batch=5, rows=10, size=2)
    layers = sum(weight.numel() for weight in model.model.layers.parameters() if weight.dim() == 2)
    assert weights == 2 * (layers + model.lm_head.weight.numel())
    # Token t of 9 attends to the condition and the tokens up to its own: 1, 2, ... 9 positions, 5 on average.
    assert cache == 2 * sum(part.numel() for pair in new_cache(model, 10, length=5) for part in pair)
    attended = 10 * 3 * 4 * 8 * 5  # rows, layers, heads, width of a head, positions
    assert flops == 2 * (10 * layers + 5 * model.lm_head.weight.numel()) + 4 * attended


def test_the_table_says_what_bounds_a_step(capsys):
    main(["roofline", "--card", "slow=1000,1", "--card", "fast=1e9,100"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("XL-384") and "64" in line)
    assert row.split()[-4:] == ["196.725", "c", "1.967", "c"]
    with pytest.raises(UserError, match="--card H100=3350: give NAME=GB/s,TFLOP/s"):
        main(["roofline", "--card", "H100=3350"])
