"""Who judges GenEval's pictures: a real Mask2Former and CLIP, tiny, from their files to the figures."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Mask2FormerForUniversalSegmentation

from argrpo_cli.cli.app import run
from argrpo_cli.evals.geneval import GenEval
from argrpo_cli.geneval import detector
from argrpo_cli.geneval.prompts import COLORS
from argrpo_cli.shapes import Result
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_jsonl
from argrpo_cli.system.processes import ALONE
from tests.geneval.test_clip_colors import clip  # noqa: F401
from tests.geneval.test_detector import tiny_config
from tests.geneval.test_mmdet_weights import tiny_network, tiny_state


def open_observer(detector, *settings):
    """The observer of `argrpo eval geneval --images`."""
    benchmark = GenEval(str(detector), *settings)
    benchmark.open([], ALONE)
    return benchmark.observer


PROMPTS = ("a photo of a bench", "a photo of a red car and a blue dog")


@pytest.fixture(autouse=True)
def small(monkeypatch, clip):  # noqa: F811
    """Colours by a tiny CLIP, and a quick input."""
    monkeypatch.setattr("argrpo_cli.networks.clip.load_open_clip", lambda *given: clip)
    monkeypatch.setattr(detector, "SHORT_EDGE", 64)


@pytest.fixture
def folder(tmp_path):
    """A Mask2Former that is sure of much."""
    torch.manual_seed(0)
    network = Mask2FormerForUniversalSegmentation(tiny_config())
    with torch.no_grad():
        network.class_predictor.bias[[2, 16]] += 9  # cars and dogs
        network.class_predictor.weight[[2, 16]] *= 30  # some queries the one, some the other
        network.model.transformer_module.decoder.mask_predictor.mask_embedder.get_submodule(
            "2.0"
        ).bias += 1  # masks that are sure
    network.save_pretrained(tmp_path / "detector")
    return tmp_path / "detector"


def test_rendered_scenes_are_judged_end_to_end_and_again_alike(folder, tmp_path, capsys):
    images = tmp_path / "scenes"
    for number, text in enumerate(PROMPTS):
        for sample in range(3):
            path = images / f"{number:05d}" / "samples" / f"{sample:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parents[1] / "metadata.jsonl").write_text(json.dumps({"prompt": text}))
            noise = np.random.default_rng([number, sample]).integers(0, 256, (48, 64 - 16 * (sample == 2), 3), np.uint8)
            Image.fromarray(noise).save(path)
    command = ["eval", "geneval", "--images", str(images), "--detector", str(folder), "--device", "cpu"]
    assert run([*command, "--out", str(tmp_path / "a"), "--batch-size", "4"]) == 0
    assert run([*command, "--out", str(tmp_path / "b"), "--detector-batch-size", "1"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "detector: Mask2Former Swin-S, detector (not the benchmark's own weights)" in told
    a, b = (read_jsonl(tmp_path / name / "scenes" / "results.jsonl") for name in "ab")
    assert [row["correct"] for row in a] == [row["correct"] for row in b]
    objects = [one for row in a for one in row["objects"]]
    assert {one["class"] for one in objects} >= {"car", "dog"}
    named = [one["color"] for row in a for one in row["objects"] if row["index"] != 0]
    assert any(color in COLORS for color in named) and None in named, "colours of those that the prompt asks them of"
    versions = Result.load(tmp_path / "a" / "summary.json").protocol["versions"]
    assert {"transformers", "open_clip_torch"} <= set(versions)


def test_the_benchmarks_own_file_is_known_by_its_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(detector, "build_mask2former", tiny_network)
    path = tmp_path / "mask2former_swin-s.pth"
    torch.save({"state_dict": tiny_state()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    label = open_observer(path).label
    assert (label["source"], label["sha256"], label["benchmarks_own"]) == (path.name, digest, False)
    monkeypatch.setattr("argrpo_cli.geneval.observers.BENCHMARKS_OWN", digest[:8])
    observer = open_observer(path, None, 3)
    assert observer.label["benchmarks_own"] and observer.detector.batch_size == 3
    assert observer.label["weights"] == label["weights"] != observer.label["colors"]["weights"]


def test_an_unknown_detector_is_told_with_those_there_are(tmp_path):
    with pytest.raises(UserError, match=r"--detector maskformer: no such file or folder; give nano, mask2former"):
        open_observer("maskformer")
    with pytest.raises(UserError, match=r"--colors x\.pt: the detector nano names colours itself"):
        open_observer("nano", "x.pt")
    with pytest.raises(UserError, match=r"weights not found: .*config\.json"):
        open_observer(tmp_path)
