"""HPSv2 against its published code (hpsv2 1.2.0), and its network against the published checkpoints' names."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch

from argrpo_cli.networks.clip import build_open_clip
from argrpo_cli.networks.pixels import letterbox
from argrpo_cli.rewards.clip import HPSv2
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from tests.rewards.clips import DATA, golden_clip, patch_fetch, register


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The reward with the small golden network in the place of ViT-H-14, its prompts and the published results."""
    config, prompts, weights, results = golden_clip()
    register(monkeypatch, "tiny-hps", config)
    monkeypatch.setattr(HPSv2, "architecture", "tiny-hps")
    torch.save({"epoch": 1, "state_dict": weights}, tmp_path / "hps.pt")
    return tmp_path / "hps.pt", prompts, results


def test_scores_are_the_published_ones(tiny):
    path, prompts, published = tiny
    reward = HPSv2(weights=path)
    images = published["images"].permute(0, 3, 1, 2)
    scores = reward.score(images, [Condition(prompt) for prompt in prompts])
    assert scores.dtype == torch.float32 and not scores.requires_grad
    torch.testing.assert_close(scores, published["scores"], atol=2e-6, rtol=0)
    text, image = reward.clip.text_features(prompts), reward.clip.image_features(images)
    torch.testing.assert_close(text, published["text_features"], atol=2e-6, rtol=0)
    torch.testing.assert_close(image, published["image_features"], atol=2e-6, rtol=0)
    torch.testing.assert_close(image @ text.T, published["all_pairs"], atol=2e-6, rtol=0)
    half = HPSv2(weights=path, dtype="bfloat16").score(images, [Condition(prompt) for prompt in prompts])
    torch.testing.assert_close(half, published["scores"], atol=0.01, rtol=0)


def test_tokens_are_the_published_ones_also_of_long_empty_and_foreign_prompts(tiny):
    path, prompts, published = tiny
    assert torch.equal(HPSv2(weights=path).clip.tokenizer(prompts).int(), published["tokens"])
    assert any(len(prompt.split()) > 77 for prompt in prompts) and "" in prompts


@pytest.mark.parametrize("index", [0, 2, 3, 6])  # 256 x 256, 320 x 200, 150 x 260, 100 x 100
def test_pixels_are_the_published_ones(index):
    golden = np.load(DATA / "preprocess.npz")
    image = torch.from_numpy(golden[f"image_{index}"]).permute(2, 0, 1)
    ours = letterbox(torch.stack([image.flip(-1), image]))
    assert ours.shape == (2, 3, 224, 224)
    published = torch.from_numpy(golden[f"pixels_{index}"]).float()
    torch.testing.assert_close(ours[1, :, ::4, ::4], published, atol=2e-3, rtol=0)


def test_an_oblong_of_the_networks_width_is_padded_too():
    """The published code leaves it 224 x 160, which its network cannot read."""
    golden = np.load(DATA / "preprocess.npz")
    ours = letterbox(torch.from_numpy(golden["image_5"]).permute(2, 0, 1)[None])[0]
    published = torch.from_numpy(golden["pixels_5"]).float()
    torch.testing.assert_close(ours[:, 32:192:4, ::4], published, atol=2e-3, rtol=0)
    black = -torch.tensor(open_clip.OPENAI_DATASET_MEAN) / torch.tensor(open_clip.OPENAI_DATASET_STD)
    for border in (ours[:, :32], ours[:, 192:]):
        torch.testing.assert_close(border, black[:, None, None].expand_as(border))


def test_the_odd_pixel_of_a_border_is_at_the_bottom():
    ours = letterbox(torch.full((1, 3, 223, 224), 255, dtype=torch.uint8))[0, 0]
    assert (ours[:223] > 1).all() and (ours[223] < -1).all()


def test_the_longest_side_decides_also_where_the_shortest_fits():
    ours = letterbox(torch.full((1, 3, 300, 224), 255, dtype=torch.uint8))[0, 0]  # 224 x 167 and borders of 28 and 29
    assert (ours[:, 28:195] > 1).all() and (ours[:, :28] < -1).all() and (ours[:, 195:] < -1).all()


def test_the_network_has_the_names_and_sizes_of_the_published_checkpoints():
    with torch.device("meta"):
        network = build_open_clip(open_clip.get_model_config(HPSv2.architecture))
    state = network.state_dict()
    assert len(state) == 686 and sum(value.numel() for value in state.values()) == 986_109_441
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes["visual.conv1.weight"] == (1280, 3, 14, 14)
    assert shapes["visual.transformer.resblocks.31.mlp.c_fc.weight"] == (5120, 1280)
    assert shapes["transformer.resblocks.23.attn.in_proj_weight"] == (3072, 1024)
    assert shapes["text_projection"] == (1024, 1024) and shapes["logit_scale"] == ()
    assert not any("Quick" in type(module).__name__ for module in network.modules())


@pytest.mark.parametrize(("version", "file"), [("2.1", "HPS_v2.1_compressed.pt"), ("2.0", "HPS_v2_compressed.pt")])
def test_each_version_has_its_published_file(tiny, monkeypatch, version, file):
    asked = []
    patch_fetch(monkeypatch, lambda repo, name: asked.append((repo, name)) or tiny[0])
    HPSv2(version=version)
    assert asked == [("xswu/HPSv2", file)]


def test_an_unknown_version_is_named():
    with pytest.raises(UserError, match=r"version '2' is unknown; there are 2.1, 2.0"):
        HPSv2(version="2")
