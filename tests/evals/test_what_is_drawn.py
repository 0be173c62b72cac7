"""What each picture of a benchmark was drawn with, asked on the command line with every setting off its default."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from argrpo_cli.cli.app import run
from argrpo_cli.evals import drawbench, geneval
from argrpo_cli.evals.statistics import mean_of
from argrpo_cli.geneval import prompts as prompt_sets
from argrpo_cli.geneval.observers import Observer
from argrpo_cli.geneval.prompts import official_prompts
from argrpo_cli.images import read_image
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.llamagen.policy import LlamaGen
from argrpo_cli.policy.protocol import Drawn
from argrpo_cli.system.files import read_jsonl
from tests.evals.stub_inception import StubInception, install
from tests.training.tiny import CLASSES, IMAGE_SIZE, TOKENS, save_tiny_policy, tiny_caption_policy

COMMON = ["--cfg-scale", "3.5", "--temperature", "0.7", "--seed", "4", "--dtype", "bfloat16", "--batch-size", "4"]
CUT = ["--top-k", "5", "--top-p", "0.8"]
CUT_SETTINGS = {"top_k": 5, "top_p": 0.8}


@pytest.fixture
def drawn(monkeypatch):
    """What the sampler got for each picture; the place in this list is the colour of the picture."""
    pictures = []

    def sample(self, conditions, sampling=None, seeds=None, **older):
        how = sampling or SimpleNamespace(cfg_interval=-1, **older)
        settings = {name: getattr(how, name) for name in ("cfg_scale", "temperature", "top_k", "top_p", "cfg_interval")}
        first = len(pictures)
        for condition, seed in zip(conditions, seeds, strict=True):
            shown = condition.prompt if condition.class_id is None else condition.class_id
            pictures.append({"shown": shown, "seed": seed, **settings, "dtype": self.model.dtype})
        tokens = torch.arange(first, len(pictures))[:, None].expand(-1, TOKENS)
        return tokens if older else Drawn(tokens, None)

    def decode(self, tokens, size=None):
        side = size or self.image_size
        return tokens[:, 0].to(torch.uint8)[:, None, None, None].expand(-1, 3, side, side)

    monkeypatch.setattr(LlamaGen, "encode", lambda self, conditions: conditions)
    monkeypatch.setattr(LlamaGen, "sample", sample)
    monkeypatch.setattr(LlamaGen, "decode", decode)
    return pictures


def behind(drawn, path):
    """What the picture in a file was drawn with."""
    (number,) = np.unique(read_image(path))
    return drawn[number]


def expected(shown, seed, cut):
    common = {"cfg_scale": 3.5, "temperature": 0.7, "cfg_interval": -1, "dtype": torch.bfloat16}
    return {"shown": shown, "seed": seed, **common, **cut}


def test_drawbench_draws_each_file_as_asked(drawn, tmp_path, monkeypatch):
    measured = {"clip": mean_of([0.5, 0.5])}
    monkeypatch.setattr(
        drawbench.DrawBench, "measure_all", lambda self, subjects, *rest: {one.name: measured for one in subjects}
    )
    monkeypatch.setattr(drawbench.DrawBench, "finish", lambda self, result, *rest: result)
    monkeypatch.setattr("argrpo_cli.rewards.check_weights", lambda name, options: None)  # nothing is scored
    tiny_caption_policy().save(tmp_path / "policy")
    prompts, out = ["a red dog", "a blue cat", "a dog"], tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    asked = ["--policy", str(tmp_path / "policy"), "--prompts", str(tmp_path / "prompts.txt"), "--per-prompt", "2"]
    asked += ["--columns", "clip", "--device", "cpu", "--out", str(out)]
    assert run(["eval", "drawbench", *asked, *COMMON, *CUT]) == 0
    (metadata,) = out.glob("*/images/metadata.jsonl")
    rows = read_jsonl(metadata)
    assert [row["prompt"] for row in rows] == [text for text in prompts for _ in range(2)]
    assert [row["seed"] for row in rows] == list(range(1_500_400_000, 1_500_400_006))
    assert len(drawn) == 6
    for row in rows:
        assert behind(drawn, metadata.parent / row["file"]) == expected(row["prompt"], row["seed"], CUT_SETTINGS), row[
            "file"
        ]


def test_geneval_draws_each_file_as_asked(drawn, tmp_path, monkeypatch):
    def load(path, *rest):
        policy = load_policy(path, *rest)
        policy.text_encoder.words = None  # what it does not know it takes for one word
        return policy

    blind = Observer()
    blind.label, blind.observe = {"name": "blind"}, lambda images, prompts: [({}, None)] * len(images)
    few = official_prompts()[50:500:90]
    monkeypatch.setattr("argrpo_cli.policy.load_policy", load)
    monkeypatch.setattr(geneval, "load_observer", lambda *given: blind)
    monkeypatch.setitem(prompt_sets.SETS, "geneval", lambda: few)
    tiny_caption_policy().save(tmp_path / "policy")
    monkeypatch.chdir(tmp_path)
    asked = ["--policy", "policy", "--per-prompt", "2", "--device", "cpu", "--out", "out"]
    assert run(["eval", "geneval", *asked, *COMMON, *CUT]) == 0
    assert len(drawn) == 2 * len(few) == 10
    for place, prompt in enumerate(few):
        for sample in range(2):
            file = f"{prompt.index:05d}/samples/{sample:05d}.png"
            wanted = expected(prompt.text, 400_400_000 + 2 * place + sample, CUT_SETTINGS)
            assert behind(drawn, tmp_path / "out" / "policy" / file) == wanted, file


def test_imagenet_draws_each_image_as_asked(drawn, tmp_path, monkeypatch):
    """As Inception sees them, in order, and as they are kept."""
    network, seen = StubInception(), []
    install(network, monkeypatch.setattr)
    features = network.features
    monkeypatch.setattr(
        network, "features", lambda images: seen.extend(images[:, 0, 0, 0].tolist()) or features(images)
    )
    policy = save_tiny_policy(tmp_path / "policy")
    pixels = np.random.default_rng(0).integers(0, 256, (8, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=pixels)
    asked = ["--policy", str(policy), "--total", "10", "--reference", str(tmp_path / "reference.npz")]
    asked += ["--keep-images", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert run(["eval", "imagenet", *asked, *COMMON, *CUT]) == 0
    wanted = [expected(index % CLASSES, 2_000_400_000 + index, CUT_SETTINGS) for index in range(10)]
    assert [drawn[number] for number in seen[:10]] == wanted, "the reference comes after"
    files = sorted((tmp_path / "out").glob("*/images/*.png"), key=lambda path: path.stem[-10:])
    assert [behind(drawn, path) for path in files] == wanted
    assert [path.name[:8] for path in files[:5]] == ["000-ant-", "001-bee-", "002-cat-", "003-dog-", "000-ant-"]
