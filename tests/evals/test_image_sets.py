"""Sets of images from folders and .npz files, and files of reference statistics."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from argrpo_cli.evals.fidelity import Statistics
from argrpo_cli.evals.image_sets import load_statistics, open_images, save_statistics
from argrpo_cli.system.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)  # 7 images, 6 high and 5 wide


@pytest.fixture
def folder(tmp_path):
    for index in (3, 0, 6, 1, 5, 2, 4):  # not in the order of their names
        Image.fromarray(PIXELS[index]).save(tmp_path / f"{index:02d}.png")
    return tmp_path


def expected() -> torch.Tensor:
    return torch.from_numpy(PIXELS).permute(0, 3, 1, 2)


def read(path, batch_size: int = 3) -> torch.Tensor:
    return torch.cat(list(open_images(path).batches(batch_size)))


def test_a_folder_is_read_in_the_order_of_names_without_its_grid(folder):
    Image.new("RGB", (50, 50)).save(folder / "grid.png")
    Image.new("RGB", (50, 50)).save(folder / ".hidden.png")
    (folder / "metadata.jsonl").write_text("")
    found = open_images(folder)
    assert (found.count, found.size) == (7, (6, 5))
    batches = list(found.batches(3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert all(batch.dtype == torch.uint8 and batch.is_contiguous() for batch in batches)
    assert torch.equal(torch.cat(batches), expected())
    assert found.name(4) == str(folder / "04.png")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_holds_the_same_images(save, tmp_path):
    save(tmp_path / "set.npz", arr_0=PIXELS, arr_1=np.arange(7))
    found = open_images(tmp_path / "set.npz")
    assert (found.count, found.size) == (7, (6, 5))
    assert torch.equal(read(tmp_path / "set.npz", 3), expected())
    assert torch.equal(read(tmp_path / "set.npz", 7), expected())
    assert "image 4" in found.name(4)


def test_an_npz_is_never_read_as_a_whole(tmp_path, monkeypatch):
    np.savez(tmp_path / "set.npz", arr_0=PIXELS)
    asked, plain = [], zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: asked.append(n) or plain(self, n))
    assert torch.equal(read(tmp_path / "set.npz", 2), expected())
    assert 0 < max(asked) <= 2 * PIXELS[0].size and min(asked) >= 0


def test_grey_and_transparent_pictures_become_rgb_as_everywhere_else(tmp_path):
    Image.new("L", (4, 4), 90).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "b.png")
    images = read(tmp_path)
    assert (images[0] == 90).all() and (images[1] == 255).all()


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
        ({"images": PIXELS, "labels": np.arange(7)}, "holds images, labels; expected arr_0, uint8 images"),
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
    with pytest.raises(UserError, match="a damaged one"):
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


def statistics(width: int, seed: int) -> Statistics:
    return Statistics.of(torch.randn(30, width, generator=torch.Generator().manual_seed(seed)))


def test_statistics_come_back_as_they_were_and_as_adm_names_them(tmp_path):
    pool, spatial = statistics(5, 0), statistics(3, 1)
    save_statistics(tmp_path / "reference", pool, spatial)  # the name as given, with or without .npz
    assert [path.name for path in tmp_path.iterdir()] == ["reference"]
    for saved, loaded in zip((pool, spatial), load_statistics(tmp_path / "reference"), strict=True):
        assert torch.equal(saved.mean, loaded.mean) and torch.equal(saved.covariance, loaded.covariance)
        assert loaded.mean.dtype == torch.float32 and loaded.covariance.dtype == torch.float64
    with np.load(tmp_path / "reference") as held:
        assert {key: held[key].shape for key in held.files} == {
            "mu": (5,), "sigma": (5, 5), "mu_s": (3,), "sigma_s": (3, 3)
        }  # fmt: skip


def test_statistics_beside_images_are_found(tmp_path):
    pool, spatial = statistics(5, 0), statistics(3, 1)
    held = {"mu": pool.mean, "sigma": pool.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
    np.savez(tmp_path / "ref.npz", arr_0=PIXELS, **{key: value.numpy() for key, value in held.items()})
    assert torch.equal(load_statistics(tmp_path / "ref.npz")[1].mean, spatial.mean)
    assert open_images(tmp_path / "ref.npz").count == 7


def test_statistics_that_do_not_fit_are_refused(tmp_path):
    path, good = (
        tmp_path / "ref.npz",
        {"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(3), "sigma_s": np.eye(3)},
    )
    for change, message in (
        ({"sigma": np.eye(3)}, r"mu, sigma have the shapes \[2\], \[3, 3\]; expected \[D\], \[D, D\]"),
        ({"sigma_s": np.full((3, 3), np.nan)}, "mu_s, sigma_s are not finite"),
        ({"mu": np.array(["a", "b"])}, "not an .npz file of numbers"),
        ({"mu": np.array([{}, {}], dtype=object)}, "not an .npz file of numbers"),
    ):
        np.savez(path, **{**good, **change})
        with pytest.raises(UserError, match=message):
            load_statistics(path)
    np.savez(path, mu=good["mu"], sigma=good["sigma"])
    with pytest.raises(UserError, match="holds mu, sigma; expected mu, sigma, mu_s, sigma_s"):
        load_statistics(path)
    np.save(tmp_path / "one.npy", np.eye(2))
    with pytest.raises(UserError, match=r"not an \.npz file"):
        load_statistics(tmp_path / "one.npy")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="cannot read"):
        load_statistics(path)
    with pytest.raises(UserError, match="there is no file"):
        load_statistics(tmp_path / "nowhere.npz")
