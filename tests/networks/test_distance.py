"""Distances of pictures: LPIPS as pyiqa has it, on random weights, and the nano world's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from argrpo_cli.networks.distance import LINEAR, VGG16, WIDTHS, Vgg16, feature_distance, load_distance
from argrpo_cli.system.errors import UserError


def test_by_hand_of_one_place_with_two_channels() -> None:
    """Maps of unit vectors (1, 0) and (0.6, 0.8), after scaling: weights 2 and 3 give 2 * 0.16 + 3 * 0.64."""
    images, others = torch.zeros(1, 3, 1, 1, dtype=torch.uint8), torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)

    def maps(x: torch.Tensor):
        yield torch.where(
            x[:, :1] < 0, torch.tensor([5.0, 0.0])[:, None, None], torch.tensor([3.0, 4.0])[:, None, None]
        )

    assert feature_distance(maps, [torch.tensor([2.0, 3.0])], images, others).item() == pytest.approx(2.24)
    assert feature_distance(maps, None, images, others).item() == pytest.approx(0.8)


def pictures(seed: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_lpips_is_pyiqa_s_on_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = pytest.importorskip("pyiqa.archs.lpips_arch")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = Vgg16().features
        monkeypatch.setattr(arch.models, "vgg16", lambda weights: SimpleNamespace(features=features))
        theirs = arch.LPIPS(pretrained=False, net="vgg")
    linear = {f"lin{depth}.model.1.weight": torch.rand(1, width, 1, 1) for depth, (width, _) in enumerate(WIDTHS)}
    assert not theirs.load_state_dict(linear, strict=False).unexpected_keys
    classifier = {"pre_logits.fc1.weight": torch.zeros(2, 2)}  # of the published file, and not read
    save_file(
        {f"features.{key}": value for key, value in features.state_dict().items()} | classifier, tmp_path / VGG16.file
    )
    torch.save(linear, tmp_path / LINEAR.file)
    ours = load_distance("lpips", "cpu", folder=str(tmp_path))
    left, right = pictures(1, 32), pictures(2, 32)
    with torch.inference_mode():
        expected = theirs(left / 255, right / 255).flatten()
    torch.testing.assert_close(ours(left, right), expected, rtol=1e-4, atol=1e-6)
    assert expected.min() > 1e-3 and torch.equal(ours(left, left), torch.zeros(2))
    with pytest.raises(UserError, match=r"weights not found: .*none.*model\.safetensors"):
        load_distance("lpips", "cpu", folder=str(tmp_path / "none"))
    torch.save({key: value[:, :3] for key, value in linear.items()}, tmp_path / LINEAR.file)
    with pytest.raises(UserError, match=r"weights do not fit: LPIPS_v0.1.*wrong shape lin0\.model\.1\.weight"):
        load_distance("lpips", "cpu", folder=str(tmp_path))


def test_the_nano_distance_grows_with_what_is_changed() -> None:
    distance, image = load_distance("nano", "cpu"), pictures(3, 64)
    little, much = image.clone(), image.clone()
    little[:, :, :8, :8], much[:, :, :32] = 0, 0
    assert isinstance(distance.args[0].args[0], nn.Module)
    same, small, large = (distance(image, other) for other in (image, little, much))
    assert torch.equal(same, torch.zeros(2)) and (small > 0).all() and (small < large).all()
