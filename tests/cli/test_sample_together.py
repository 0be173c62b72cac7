"""`argrpo sample` by two processes, killed in the middle and started again: the same files, byte for byte."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from argrpo_cli.cli.app import run
from argrpo_cli.draw import draw_batch
from argrpo_cli.system.processes import join_team
from tests.together import start, together
from tests.torchrun import torchrun
from tests.training.tiny import CLASSES, IMAGE_SIZE, save_tiny_policy

N, BATCH = 8, 5  # images per class; a batch crosses classes


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy") / "tiny")


def arguments(policy, out):
    where = ["sample", "--policy", str(policy), "--out", str(out), "--per-class", str(N)]
    return [*where, "--batch-size", str(BATCH), "--npz", "--device", "cpu"]


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "samples.npz"}


@pytest.fixture(scope="module")
def alone(policy, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "images"
    assert run(arguments(policy, out)) == 0
    return out


def test_two_processes_write_what_one_does(policy, alone, tmp_path):
    done = together(arguments(policy, tmp_path / "images"), tmp_path / "printed")
    assert done.codes == [0, 0], done.err
    assert contents(tmp_path / "images") == contents(alone)
    np.testing.assert_array_equal(
        np.load(tmp_path / "images" / "samples.npz")["arr_0"], np.load(alone / "samples.npz")["arr_0"]
    )
    assert done.out.count(f"{CLASSES * N} images") == 1, "one of them reports"


def test_without_a_device_of_its_own_a_team_is_one_of_the_cpu(monkeypatch):
    """`--device auto` on a machine without a GPU: the two must know of each other."""
    chosen = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("argrpo_cli.system.processes.resolve_device", lambda name: "cpu")
    monkeypatch.setattr("accelerate.PartialState", lambda cpu, timeout: chosen.append(cpu) or State())
    assert join_team("auto").count == 2 and chosen == [True]


class State:
    """What join_team reads of accelerate's."""

    device, process_index, num_processes = torch.device("cpu"), 0, 2


def test_a_fault_of_the_first_is_told_once_and_stops_both(policy, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    done = torchrun(["-m", "argrpo_cli", *arguments(policy, tmp_path)])
    assert done.returncode != 0
    assert done.stderr.count("is not empty; choose another --out") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_killed_job_is_completed_to_the_same_bytes(policy, alone, tmp_path):
    out = tmp_path / "images"

    def some(*args):  # of the batches, and then wait to be killed
        while len(list(out.glob("[0-9]*-*.png"))) >= 6:
            time.sleep(0.05)
        return draw_batch(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("argrpo_cli.draw.draw_batch", some)
        (job,) = start(partial(run, arguments(policy, out)), tmp_path / "printed", processes=1)
    while len(list(out.glob("[0-9]*-*.png"))) < 6:
        assert job.is_alive()
        time.sleep(0.05)
    job.kill()
    job.join()
    drawn = sorted(out.glob("[0-9]*-*.png"))
    assert 6 <= len(drawn) < CLASSES * N and not (out / "metadata.jsonl").exists()
    drawn[2].write_bytes(drawn[2].read_bytes()[:-20])  # torn, as by a power cut
    assert run([*arguments(policy, out)[:-4], "7", *arguments(policy, out)[-3:]]) == 0  # the folder keeps its batches
    left = {name: data for name, data in contents(out).items() if not name.startswith(".tmp-")}
    assert left == contents(alone)


def test_resize_is_part_of_the_settings(policy, alone, tmp_path, capsys):
    out, side = tmp_path / "images", IMAGE_SIZE // 2
    assert run([*arguments(policy, out), "--resize", str(side)]) == 0
    name = next(path.name for path in alone.glob("*-*.png"))
    with Image.open(out / name) as small:
        assert small.size == (side, side)
    assert np.load(out / "samples.npz")["arr_0"].shape == (CLASSES * N, side, side, 3)
    assert run(arguments(policy, out)) == 2
    assert "other settings" in capsys.readouterr().err
