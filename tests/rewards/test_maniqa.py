"""MANIQA: the published numbers (formula weights), the crops, and what the score depends on.

`tests/data/maniqa` holds outputs of the published code and of pyiqa 0.1.16.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from argrpo_cli.networks import weights
from argrpo_cli.rewards import check_options, maniqa
from argrpo_cli.rewards.maniqa import CROP, Maniqa, enlarged, grid_corners, pooled, random_corners
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError

DATA = Path(__file__).parents[1] / "data" / "maniqa"
GOLDEN = json.loads((DATA / "maniqa.json").read_text())
NEAR_ZERO = ("pos_embed", "cls_token", "relative_position_bias_table")


def formula_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the golden outputs. Of the ViT what comes after block 9 is not read; it stays as it is."""
    state = network.state_dict()
    for name, value in state.items():
        unread = name.startswith(("vit.blocks.10.", "vit.blocks.11.", "vit.norm.", "vit.head."))
        if not value.is_floating_point() or name.endswith("attn_mask") or unread:
            continue
        r = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(value.shape), dtype=np.float32)
        if value.ndim == 1:
            r = 1 + np.float32(0.05) * r if name.endswith("weight") else np.float32(0.05) * r
        elif any(part in name for part in NEAR_ZERO):
            r *= np.float32(0.02)
        else:
            r *= np.float32((0.2 if name.startswith("tablock") else 1) / math.sqrt(math.prod(value.shape[1:])))
        value.copy_(torch.from_numpy(r))
    state["fc_score.3.bias"].fill_(0.6)
    state["fc_score.3.weight"].mul_(0.1)
    state["fc_weight.3.weight"].mul_(0.3)
    return state


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """pyiqa's network at its real size, for which nothing is to be fetched."""
    maniqa_arch = pytest.importorskip("pyiqa.archs.maniqa_arch")
    timm, fetched = maniqa_arch.timm, []
    create_model = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, pretrained: fetched.append(pretrained) or create_model(name))
        network = maniqa.build_network()
    assert fetched == [False]
    assert maniqa_arch.timm is timm
    return network


def test_real_network_gives_the_published_score(network, monkeypatch, tmp_path):
    state = formula_state(network)
    assert len(state) == 316
    monkeypatch.setattr(maniqa, "build_network", lambda: network)
    monkeypatch.setattr(weights, "read_state", lambda path, wrappers: state)
    (tmp_path / "ckpt_koniq10k.pt").touch()
    reward = Maniqa(weights=tmp_path / "ckpt_koniq10k.pt")
    image = torch.from_numpy(np.array(Image.open(DATA / "image_256.png"))).permute(2, 0, 1)[None]
    published = GOLDEN["formula_weight_scores"]
    score = reward.crop_scores(image / 255, [[tuple(published["corners_top_left"][0])]]).item()
    assert score == pytest.approx(published["per_crop"][0], abs=1e-5)


@pytest.mark.parametrize("case", GOLDEN["pooling"], ids=lambda case: case["file"])
def test_pooling_is_the_published_one(case):
    with np.load(DATA / case["file"]) as maps:
        per_crop = pooled(*(torch.from_numpy(maps[name].astype(np.float64)) for name in ("score", "weight")))
    assert per_crop.tolist() == pytest.approx(case["per_crop"], abs=1e-9)
    assert per_crop.mean().item() == pytest.approx(case["mean_of_crops"], abs=1e-9)
    assert abs(per_crop.mean().item() - case["joint_over_crops_pyiqa"]) > 1e-6


@pytest.mark.parametrize("case", GOLDEN["crop_draws"], ids=lambda c: f"{c['seed']}-{c['width']}x{c['height']}")
def test_random_crops_are_the_published_draws(case):
    corners = random_corners(np.random.RandomState(case["seed"]), case["height"], case["width"])
    assert [list(corner) for corner in corners] == case["corners_top_left"]


def test_a_side_of_224_needs_no_draw():
    assert random_corners(np.random.RandomState(0), CROP, CROP) == [(0, 0)]
    corners = random_corners(np.random.RandomState(0), CROP, 300)
    assert len(corners) == 20
    assert {top for top, _ in corners} == {0}
    assert max(left for _, left in corners) < 300 - CROP


def test_grid_of_256_is_that_of_pyiqa():
    assert [list(corner) for corner in grid_corners(256, 256)] == GOLDEN["pyiqa_comparison"]["uniform20_positions"]


@pytest.mark.parametrize(
    "size, count", [((224, 224), 1), ((227, 226), 1), ((224, 300), 5), ((300, 224), 4), ((228, 512), 20)]
)
def test_grid_stays_inside_and_has_no_crop_twice(size, count):
    corners = grid_corners(*size)
    assert len(set(corners)) == len(corners) == count
    assert all(0 <= start <= side - CROP for corner in corners for start, side in zip(corner, size, strict=True))


class Fake:
    """A Maniqa whose patches are the crop's red and green pixels: quality and weight. It keeps the batch sizes."""

    def __init__(self, monkeypatch, tmp_path):
        self.batches, self.fails, self.weights = [], False, tmp_path / "ckpt_koniq10k.pt"
        self.weights.touch()
        monkeypatch.setattr(maniqa, "build_network", nn.Identity)
        monkeypatch.setattr(weights, "read_state", lambda path, wrappers: {})
        monkeypatch.setattr(maniqa, "patch_maps", self.patch_maps)

    def patch_maps(self, network, crops):
        if self.fails:
            raise torch.OutOfMemoryError("out of memory")
        assert crops.shape[1:] == (3, CROP, CROP)
        self.batches.append((len(crops), crops.dtype))
        return crops[:, 0].flatten(1).float(), crops[:, 1].flatten(1).float()

    def __call__(self, **options) -> Maniqa:
        return Maniqa(weights=self.weights, **options)


@pytest.fixture
def fake(monkeypatch, tmp_path) -> Fake:
    return Fake(monkeypatch, tmp_path)


def pictures(count: int, height: int = 256, width: int = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def by_hand(image: torch.Tensor, corners) -> float:
    """Score of one uint8 image: the mean over its crops of red's mean weighted by green."""
    crops = [image[:, y : y + CROP, x : x + CROP].double() / 255 for y, x in corners]
    return float(np.mean([((crop[0] * crop[1]).sum() / crop[1].sum()).item() for crop in crops]))


def score(reward: Maniqa, images: torch.Tensor) -> list[float]:
    return reward.score(images, [Condition("")] * len(images)).tolist()


def test_score_is_the_mean_over_the_grid_in_batches_of_bounded_size(fake):
    images = pictures(3)
    scores = score(fake(crop_batch=7), images)
    assert scores == pytest.approx([by_hand(image, grid_corners(256, 300)) for image in images], abs=1e-6)
    assert [size for size, _ in fake.batches] == [7] * 8 + [4]
    assert len(score(fake(), images[:0])) == 0


def test_random_crops_follow_the_seed_and_the_pixels_alone(fake):
    images = pictures(3)
    seeds = [5 + zlib.crc32(image.numpy().tobytes()) for image in images]
    corners = [random_corners(np.random.RandomState(seed % 2**32), 256, 300) for seed in seeds]
    expected = [by_hand(image, places) for image, places in zip(images, corners, strict=True)]
    assert score(fake(crops="random", seed=5), images) == pytest.approx(expected, abs=1e-6)
    reward = fake(crops="random", seed=5, crop_batch=3)
    assert score(reward, images.flip(0)) == pytest.approx(expected[::-1], abs=1e-6), "whatever was scored before"
    assert score(fake(crops="random", seed=6), images) != pytest.approx(expected, abs=1e-6)


def test_half_as_many_crops_at_a_time_where_memory_ends(fake, monkeypatch):
    images, expected = pictures(2), score(fake(), pictures(2))
    patch_maps = maniqa.patch_maps

    def narrow(network, crops):
        if len(crops) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return patch_maps(network, crops)

    monkeypatch.setattr(maniqa, "patch_maps", narrow)
    reward = fake()
    assert score(reward, images) == pytest.approx(expected, abs=1e-6) and reward.crop_batch == 5
    fake.fails = True
    with pytest.raises(torch.OutOfMemoryError):
        score(reward, images)


def test_small_images_are_enlarged_to_one_crop_or_more(fake):
    assert enlarged(torch.zeros(1, 3, 64, 96)).shape[-2:] == (224, 336)
    assert enlarged(torch.zeros(1, 3, 512, 100)).shape[-2:] == (1147, 224)
    same = torch.rand(1, 3, 224, 300)
    assert enlarged(same) is same
    grey = torch.full((2, 3, 64, 64), 51, dtype=torch.uint8)
    for crops in ("grid", "random"):
        fake.batches.clear()
        assert score(fake(crops=crops), grey) == pytest.approx([0.2, 0.2], abs=1e-5)
        assert [size for size, _ in fake.batches] == [2]


def test_network_runs_in_the_dtype_and_scores_are_float32(fake):
    reward = fake(dtype="bfloat16")
    assert reward.score(pictures(1), [Condition("")]).dtype == torch.float32
    assert {dtype for _, dtype in fake.batches} == {torch.bfloat16}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"crops": "centre"}, "crops 'centre' is unknown; there are grid, random"),
        ({"dtype": "float16"}, "dtype 'float16' is unknown; there are float32, bfloat16"),
        ({"crop_batch": 0}, "crop_batch is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_options_are_told(options, message):
    with pytest.raises(UserError, match=message):
        check_options("maniqa", options)


def test_weights_that_are_absent_or_of_something_else_are_told(network, monkeypatch, tmp_path):
    monkeypatch.setattr(maniqa, "build_network", lambda: network)
    with pytest.raises(UserError, match=r"weights not found: .*none\.pt; give the file ckpt_koniq10k\.pt"):
        Maniqa(weights=tmp_path / "none.pt")
    torch.save({"params": {"conv1.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt \(missing .* and 312 more; wrong shape conv1\.weight is \[2\]"):
        Maniqa(weights=tmp_path / "other.pt")


def test_without_pyiqa_the_command_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa.archs", None)
    with pytest.raises(UserError, match="pip install pyiqa"):
        maniqa.build_network()
