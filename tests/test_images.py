"""Pictures of every kind, as the uint8 arrays that rewards and metrics take."""

from __future__ import annotations

import numpy as np
from PIL import Image

from argrpo_cli.images import read_image


def test_odd_kinds_of_pictures_are_what_a_viewer_shows(tmp_path):
    wide = Image.new("RGB", (8, 4), (200, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    wide.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 8, 4)

    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    red = read_image(tmp_path / "print.jpg").mean((1, 2))
    assert red[0] > 200 and red[1] < 60 and red[2] < 60

    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    assert np.unique(read_image(tmp_path / "deep.png")).tolist() == [round(40_000 / 257)]
    Image.fromarray(np.full((4, 4), 65_535, np.uint16)).save(tmp_path / "white.png")
    assert np.unique(read_image(tmp_path / "white.png")).tolist() == [255]

    frames = [Image.new("RGB", (4, 4), (shade,) * 3) for shade in (10, 250)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "moving.gif").max() <= 12, "the first frame"

    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").min() == 255
