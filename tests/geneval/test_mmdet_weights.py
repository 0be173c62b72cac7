"""The benchmark's own detector file in transformers' network: each key has its place, mmdet's outputs come out.

`mmdet.json.gz`: keys and shapes of mmdet 2.28.2's model of the benchmark's configuration (`swin_s`), and of a `tiny`
one. `mmdet.npz`: what mmdet's code, run on a CPU, gives for the tiny one with formula weights on formula pixels.
"""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from argrpo_cli.geneval import detector
from argrpo_cli.geneval.detector import COMPUTED, NOT_NEEDED, build_mask2former, from_mmdet, load_mmdet, merged_pixels
from argrpo_cli.system.errors import UserError
from tests.formula import formula_tensor, formula_weights
from tests.geneval.goldens import DATA


def keys(name):
    with gzip.open(DATA / "mmdet.json.gz", "rt") as file:
        return json.load(file)[name]


def tiny_state():
    return formula_weights({key: shape for key, shape in keys("tiny").items() if not key.endswith(COMPUTED)})


def tiny_network():
    swin = SwinConfig(
        embed_dim=16,
        depths=[2, 2, 1, 2],
        num_heads=[1, 2, 2, 4],
        window_size=4,
        image_size=64,
        out_features=[f"stage{number}" for number in range(1, 5)],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=2,
        decoder_layers=5,  # one of them is only the heads
        num_attention_heads=2,
        num_queries=7,
        num_labels=80,
    )
    return Mask2FormerForUniversalSegmentation(config).eval()


def test_the_files_keys_are_the_networks_one_to_one_in_equal_shapes():
    with torch.device("meta"):
        own = {key: value.shape for key, value in build_mask2former().state_dict().items()}
        mapped = from_mmdet({key: torch.zeros(shape) for key, shape in keys("swin_s").items()})
    without = {key for key in own if key.endswith(NOT_NEEDED) or key.startswith("criterion.")}
    assert {key: value.shape for key, value in mapped.items()} == {k: v for k, v in own.items() if k not in without}
    assert len(without) == 3, "Swin's last norm, which mmdet lacks, and a weight of the loss"


def test_the_network_gives_what_mmdets_own_code_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(detector, "build_mask2former", tiny_network)
    torch.save({"state_dict": tiny_state()}, tmp_path / "file.pth")
    network = load_mmdet(tmp_path / "file.pth")
    with torch.no_grad():
        found = network(pixel_values=10 * formula_tensor("pixels", (1, 3, 96, 160)))
    with np.load(DATA / "mmdet.npz") as official:
        np.testing.assert_allclose(found.class_queries_logits, official["class_logits"], atol=2e-5)
        np.testing.assert_allclose(found.masks_queries_logits, official["mask_logits"], atol=2e-4)
        assert official["class_logits"].std() > 0.3 and official["mask_logits"].std() > 1


def test_four_pixels_are_merged_alike():
    height, width, channels = 6, 8, 16
    own = next(module for key, module in tiny_network().named_modules() if key.endswith(".0.downsample"))
    features = torch.randn(2, height, width, channels)
    scale, shift, matrix = torch.randn(4 * channels), torch.randn(4 * channels), torch.randn(32, 4 * channels)
    taken = F.unfold(features.permute(0, 3, 1, 2), kernel_size=2, stride=2).transpose(1, 2)  # as mmdet takes them
    theirs = F.layer_norm(taken, (4 * channels,), scale, shift) @ matrix.T
    own.norm.load_state_dict({"weight": merged_pixels(scale), "bias": merged_pixels(shift)})
    own.reduction.load_state_dict({"weight": merged_pixels(matrix)})
    with torch.no_grad():
        merged = own(features.flatten(1, 2), (height, width))
    torch.testing.assert_close(merged, theirs)


def test_the_indices_that_are_left_out_are_the_networks_own():
    network, side = tiny_network(), 4
    (index, *_) = (value for key, value in network.named_buffers() if key.endswith(COMPUTED))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    place = (y * (2 * side - 1) + x).flatten()
    assert torch.equal(index.view(side**2, -1), place[:, None] + place.flip(0)[None])  # as mmdet computes them


def test_a_file_is_read_whole_and_nothing_else_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(detector, "build_mask2former", tiny_network)
    state, path = tiny_state(), tmp_path / "mask2former.pth"
    torch.save({"meta": {"CLASSES": ("person", "bicycle"), "iter": 368750}, "state_dict": state}, path)
    loaded = load_mmdet(path).state_dict()
    assert torch.equal(loaded["class_predictor.weight"], state["panoptic_head.cls_embed.weight"])
    key = "panoptic_head.query_feat.weight"
    torch.save({"state_dict": {k: v for k, v in state.items() if k != key}}, path)
    with pytest.raises(UserError, match=r"missing model\.transformer_module\.queries_features\.weight"):
        load_mmdet(path)
    torch.save({"state_dict": {**state, "backbone.more": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match=r"unexpected backbone\.more"):
        load_mmdet(path)
    torch.save({"state_dict": {**state, key: torch.zeros(9, 32)}}, path)
    with pytest.raises(UserError, match=r"queries_features\.weight is \[9, 32\], expected \[7, 32\]"):
        load_mmdet(path)
    torch.save({"state_dict": {"backbone.conv1.weight": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match=r"is no Mask2Former of mmdet 2\.x; give the benchmark's own file"):
        load_mmdet(path)
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="not a readable file of weights"):
        load_mmdet(path)
