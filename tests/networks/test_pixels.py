"""Preprocessing of batches: what large pictures need less memory for is the same."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from argrpo_cli.networks import pixels


@pytest.mark.parametrize(
    "made", [pixels.to_unit, pixels.letterbox, pixels.Preprocess(), partial(pixels.resize, height=9, width=70)]
)
def test_channel_by_channel_a_picture_becomes_the_same(made, monkeypatch) -> None:
    images = torch.randint(0, 256, (2, 3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = made(images)
    monkeypatch.setattr(pixels, "LARGE", 1)
    assert torch.equal(made(images), whole)
