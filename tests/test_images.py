"""Pictures of every kind, and sets of them from folders and .npz files, as uint8 arrays."""

from __future__ import annotations

import io
import os
import threading
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from argrpo_cli.images import Item, open_images, read_ahead, read_metadata
from argrpo_cli.kept import in_batches
from argrpo_cli.pictures import LARGE
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.npz import HEAD

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)  # 7 images, 6 high and 5 wide


@pytest.fixture
def folder(tmp_path):
    for index in (3, 0, 6, 1, 5, 2, 4):  # not in the order of their names
        Image.fromarray(PIXELS[index]).save(tmp_path / f"{index:02d}.png")
    return tmp_path


def expected() -> torch.Tensor:
    return torch.from_numpy(PIXELS).permute(0, 3, 1, 2)


def read(path) -> torch.Tensor:
    images = open_images(path)
    return torch.cat([images.read(batch) for batch in in_batches(images.items, 3)])


def test_a_folder_is_read_in_the_order_of_names_without_its_grid(folder):
    Image.new("RGB", (50, 50)).save(folder / "grid.png")
    Image.new("RGB", (50, 50)).save(folder / ".hidden.png")
    (folder / "metadata.jsonl").write_text("")
    found = open_images(folder)
    assert (found.count, found.size) == (7, (6, 5))
    batch = found.read(found.items[2:5])
    assert batch.dtype == torch.uint8 and batch.is_contiguous()
    assert torch.equal(batch, expected()[2:5]) and torch.equal(read(folder), expected())
    assert found.name(4) == str(folder / "04.png")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_holds_the_same_images(save, tmp_path):
    save(tmp_path / "set.npz", arr_0=PIXELS, arr_1=np.arange(7))
    found = open_images(tmp_path / "set.npz")
    assert (found.count, found.size) == (7, (6, 5))
    assert torch.equal(read(tmp_path / "set.npz"), expected())
    assert torch.equal(found.read(found.items[5:] + found.items[:2]), expected()[[5, 6, 0, 1]]), "in any order"
    assert "image 4" in found.name(4)
    save(tmp_path / "set.npz", labels=np.arange(7), pictures=PIXELS)
    assert torch.equal(read(tmp_path / "set.npz"), expected()), "the first array of images, whatever it is called"


def test_an_npz_is_never_read_as_a_whole(tmp_path, monkeypatch):
    pixels = np.tile(PIXELS, (100, 1, 1, 1))
    np.savez(tmp_path / "set.npz", arr_0=pixels)
    asked, plain = [], zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: asked.append(n) or plain(self, n))
    assert torch.equal(read(tmp_path / "set.npz"), expected().repeat(100, 1, 1, 1))
    assert 0 < max(asked) <= HEAD < pixels.nbytes / 5 and min(asked) >= 0


def test_grey_and_transparent_pictures_become_rgb_as_everywhere_else(tmp_path):
    Image.new("L", (4, 4), 90).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "b.png")
    images = read(tmp_path)
    assert (images[0] == 90).all() and (images[1] == 255).all()


def test_sub_folders_count_and_what_is_skipped_is_remarked(tmp_path):
    files = ("2.png", "10.png", "b/1.jpg", "b/3/10.WEBP", "b/3/9.avif", ".hidden/4.png")
    others = ("notes.txt", "b/film.mpg", "b/grid.png", "model.h5", "c.heicx")
    for file in (*files, *others, "b/.5.png", "scores.jsonl"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    found = open_images(tmp_path)
    assert [item.file for item in found.items] == ["2.png", "10.png", "b/1.jpg", "b/3/9.avif", "b/3/10.WEBP"]
    assert found.remarks == [
        f"3 of the 5 images of {tmp_path} lie in sub-folders: b, b/3",
        f"left out of {tmp_path}, as no images of the set (5): b/film.mpg, b/grid.png, c.heicx and 2 more",
    ]


@pytest.mark.parametrize("name", ["x.png", "x.npz", "metadata.jsonl"])
def test_a_pipe_a_socket_and_a_device_are_never_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    opened = {"x.png": lambda: read(tmp_path), "x.npz": lambda: read(tmp_path / name)}
    opened = opened.get(name, lambda: read_metadata(tmp_path))
    with pytest.raises(UserError, match="is a pipe, not a file"):
        opened()
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is a device, not a file"):
        opened()


def test_a_large_picture_is_read_alone_and_when_its_turn_comes(tmp_path):
    events, lock = [], threading.Lock()

    def image(name: str, pixels: int) -> Item:
        def read(most=None):
            with lock:
                if most is not None and pixels > most:
                    return None
                events.append((name, most is None))
                return np.full((3, 1, 1), pixels % 7, np.uint8)

        return Item(name, name, read)

    items = [image("small", 4), image("large", LARGE + 1), image("last", LARGE), image("second large", LARGE + 1)]
    arrays = read_ahead(items)
    assert next(arrays).max() == 4 and ("large", True) not in events
    next(arrays)
    assert ("large", True) in events and ("second large", True) not in events
    assert len(list(arrays)) == 2 and [name for name, alone in events if alone] == ["large", "second large"]


def test_a_set_of_large_pictures_is_looked_at_in_small_batches(folder):
    images = open_images(folder)
    assert images.at_once(64) == 64
    large = replace(images.items[0], read=lambda: np.broadcast_to(np.uint8(0), (3, 2**12, 2**13)))
    assert replace(images, items=[large]).at_once(64) == 2


def test_mixed_sizes_are_named(folder):
    Image.new("RGB", (9, 8)).save(folder / "04.png")
    with pytest.raises(UserError, match=r"one size: .*00\.png is 5x6, .*04\.png 9x8"):
        read(folder)


def test_a_broken_picture_is_named(folder):
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"05\.png"):
        read(folder)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(7), "labels": np.arange(7)}, "holds mu, labels; expected arr_0, uint8 images"),
        ({}, "holds nothing; expected arr_0"),
        ({"arr_0": PIXELS / 255}, r"arr_0 is float64 \[7, 6, 5, 3\]; expected arr_0, uint8 images \[N, H, W, 3\]"),
        ({"arr_0": PIXELS.transpose(0, 3, 1, 2).copy()}, r"arr_0 is uint8 \[7, 3, 6, 5\]; expected"),
        ({"arr_0": PIXELS[0]}, r"arr_0 is uint8 \[6, 5, 3\]; expected"),
        ({"arr_0": PIXELS[:0]}, "holds no images"),
        ({"arr_0": np.asfortranarray(PIXELS)}, "Fortran order"),
        ({"arr_0": np.array([{}], dtype=object)}, r"arr_0 is object \[1\]; expected"),
    ],
)
def test_an_npz_of_something_else_is_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_images(tmp_path / "set.npz")


def test_what_is_no_set_of_images_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no folder or \.npz file"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images in"):
        open_images(tmp_path)
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(UserError, match=r"neither a folder nor an \.npz file"):
        open_images(tmp_path / "text.npz")
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"no header")
    with pytest.raises(UserError, match="it is damaged"):
        open_images(tmp_path / "odd.npz")


def test_a_damaged_archive_is_told(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, arr_0=PIXELS)
    whole = bytearray(path.read_bytes())
    whole[400] ^= 255  # a pixel: only the checksum can tell
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"set\.npz: it is .*damaged"):
        read(path)
    buffer = io.BytesIO()
    np.save(buffer, PIXELS)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue()[:-40])
    with pytest.raises(UserError, match=r"set\.npz: it is .*damaged"):
        read(path)
