"""Grids put every image where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from argrpo_cli.system.grids import before_after, image_grid


def _flat(colours, size=16):
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, size, size).contiguous()


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (200, 100, 0)]


def test_images_are_laid_out_row_by_row():
    grid = image_grid(_flat(COLOURS), columns=2, pad=2)
    assert grid.size == (2 * 20, 3 * 20)
    centres = [grid.getpixel((10 + 20 * (index % 2), 10 + 20 * (index // 2))) for index in range(5)]
    assert centres == COLOURS
    assert grid.getpixel((30, 50)) == (255, 255, 255)


def test_scale_repeats_pixels_and_arrays_do_as_well_as_tensors():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 4, 4), dtype=np.uint8)
    grid = np.asarray(image_grid(pixels, 1, pad=0, scale=3))
    np.testing.assert_array_equal(grid, pixels[0].transpose(1, 2, 0).repeat(3, 0).repeat(3, 1))


@pytest.mark.parametrize("labels", [["one", "two", "three"], ["a", "b", "c", "d", "a very long label"]])
def test_labels_per_row_or_per_image_take_room_of_their_own(labels):
    grid = np.asarray(image_grid(_flat(COLOURS, 64), 2, labels))
    plain = np.asarray(image_grid(_flat(COLOURS, 64), 2))
    assert grid.shape[1] == plain.shape[1] and grid.shape[0] > plain.shape[0]
    for colour in COLOURS:
        assert (grid == colour).all(-1).sum() == (plain == colour).all(-1).sum() == 64 * 64


def test_wrong_shapes_and_counts_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        image_grid(torch.zeros(1, 3, 4, 4), 1)
    with pytest.raises(ValueError, match="labels"):
        image_grid(_flat(COLOURS), 2, ["x"])
    with pytest.raises(ValueError, match="at least one"):
        image_grid(_flat(COLOURS)[:0], 2)


def test_before_stands_left_of_after_and_a_base_left_of_both(tmp_path):
    before, after = _flat([(255, 0, 0)] * 4), _flat([(0, 0, 255)] * 4)
    sheet = np.asarray(before_after(before, after, columns=2))
    red, blue = ((sheet == colour).all(-1) for colour in ((255, 0, 0), (0, 0, 255)))
    assert red.sum() == blue.sum() == 4 * 32 * 32
    middle = sheet.shape[1] // 2
    assert not red[:, middle:].any() and not blue[:, :middle].any()
    image_grid(_flat([(0, 255, 0)] * 4), 2, scale=2).save(tmp_path / "base.png")
    three = np.asarray(before_after(before, after, columns=2, base=tmp_path / "base.png"))
    places = [np.flatnonzero((three == colour).all(-1).any(0)) for colour in ((0, 255, 0), (255, 0, 0), (0, 0, 255))]
    assert places[0].max() < places[1].min() and places[1].max() < places[2].min()
    image_grid(_flat([(0, 255, 0)] * 2), 2, scale=2).save(tmp_path / "base.png")  # of fewer pictures
    assert np.array_equal(before_after(before, after, columns=2, base=tmp_path / "base.png"), sheet)
    with pytest.raises(ValueError, match="same conditions"):
        before_after(before, after[:1], columns=2)


def test_captions_stand_below_the_images_of_labelled_rows():
    images = np.full((4, 3, 64, 64), 128, np.uint8)
    plain = image_grid(images, 2, ["first", "second"], scale=2)
    told = image_grid(images, 2, ["first", "second"], scale=2, captions=["0.5 a dog", "", "0.1 " + "a cat " * 9, "x"])
    assert told.width == plain.width and told.height > plain.height + 2 * 2 * 10, "up to three lines in each row"
    rows, pixels = told.height // 2, np.asarray(told)
    assert (pixels[rows - 50 : rows, : told.width // 2] < 100).any(), "ink below the first"
    assert (pixels[rows - 50 : rows, told.width // 2 :] == 255).all(), "and none below the second"
