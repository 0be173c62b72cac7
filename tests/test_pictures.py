"""One picture file: every mode by its rule or refused, whatever a decoder raises, the turn of EXIF, the memory."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from argrpo_cli import pictures
from argrpo_cli.pictures import formats, read_image, suffixes
from argrpo_cli.system.errors import BadPicture

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def colours(path) -> list[tuple[int, ...]]:
    """The distinct colours of a picture, as it is read."""
    pixels = read_image(path)
    assert pixels.dtype == np.uint8 and len(pixels) == 3 and pixels.flags.c_contiguous
    return sorted(map(tuple, np.unique(pixels.reshape(3, -1), axis=1).T.tolist()))


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


def tiff(bits: int, numbers: bytes, white_is_zero: bool = False, sample_format: int = 1) -> bytes:
    """A grey TIFF of 4 x 4 pixels without compression."""
    tags = {256: 4, 257: 4, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 8, 277: 1, 278: 4}
    tags |= {279: len(numbers), 339: sample_format}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (
        struct.pack("<2sHI", b"II", 42, 8 + len(numbers)) + numbers + struct.pack("<H", len(tags)) + fields + bytes(4)
    )


def png(kind: int, rows: list[bytes], *chunks: tuple[bytes, bytes], depth: int = 8) -> bytes:
    """A PNG of the rows' bytes, as wide as there are rows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", len(rows), len(rows), depth, kind, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in body)


@pytest.mark.parametrize(
    ("content", "colour"),
    [
        (tiff(16, b"\xff\xff" * 16), WHITE),
        (tiff(16, b"\0\0" * 16, white_is_zero=True), WHITE),
        (tiff(12, b"\xff\xff\xff" * 8), WHITE),
        (b"P5 2 2 1023\n" + struct.pack(">H", 1023) * 4, WHITE),
        (b"P5 2 2 65535\n" + struct.pack(">H", 257 * 9) * 4, (9, 9, 9)),
        (png(0, [b"\x12\x34" * 2] * 2, (b"tRNS", b"\x12\x34"), depth=16), WHITE),
        (png(3, [b"\1\1"] * 2, (b"PLTE", bytes([9, 9, 9, 1, 2, 3]))), (1, 2, 3)),
    ],
)
def test_white_is_what_the_file_calls_white(content, colour, tmp_path):
    (tmp_path / "x.png").write_bytes(content)
    assert colours(tmp_path / "x.png") == [colour]


@pytest.mark.parametrize("number", [0.5, float("nan"), float("inf"), 200.0])
def test_numbers_of_which_nothing_says_what_is_white_are_refused(number, tmp_path):
    Image.new("F", (4, 4), number).save(tmp_path / "x.tif")
    with pytest.raises(BadPicture, match=r"x\.tif: nothing says which number is white in its pixels \(F\)"):
        read_image(tmp_path / "x.tif")
    for bits, kind in ((32, 1), (16, 2), (8, 2)):
        (tmp_path / "y.tif").write_bytes(tiff(bits, b"\x7f" * (2 * bits), sample_format=kind))
        with pytest.raises(BadPicture, match="nothing says which number is white"):
            read_image(tmp_path / "y.tif")


@pytest.mark.parametrize(("palette", "entries"), [((), 0), (((b"PLTE", bytes(6)),), 2)])
def test_a_pixel_without_a_colour_in_the_palette_is_refused(palette, entries, tmp_path):
    (tmp_path / "x.png").write_bytes(png(3, [bytes([0, 1, 2]), bytes(3), bytes(3)], *palette))
    with pytest.raises(BadPicture, match=rf"colours that are not among the {entries} of its palette"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "PA"])
def test_every_mode_that_is_read_is_what_pillow_makes_of_it(mode, tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    whole = Image.fromarray(noise)
    picture = whole.convert("L").convert(mode) if mode in ("LA", "PA", "1", "I;16") else whole.convert(mode)
    monkeypatch.setattr(pictures, "opened_image", lambda path, opener: picture)
    expected = np.asarray(picture.convert("RGB"))
    if mode == "I;16":
        expected = np.rint(np.asarray(picture)[..., None] / 257).repeat(3, 2)
    monkeypatch.setattr(pictures, "STRIP", 14)  # two rows at a time
    assert np.array_equal(read_image(tmp_path / "x"), expected.transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_turn_of_exif_is_made_whatever_else_is_wrong_with_it(orientation, tmp_path, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 3, 3), dtype=np.uint8))
    fields = struct.pack("<HHHI4s", 2, 0x0112, 3, 1, struct.pack("<HH", orientation, 0))
    fields += struct.pack("<HHII", 0x8769, 2, 2**30, 2**30)  # of text that is not there
    exif = b"Exif\0\0" + struct.pack("<2sHI", b"II", 42, 8) + fields + bytes(4)
    noise.save(tmp_path / "x.png", exif=exif)
    monkeypatch.setattr(pictures, "STRIP", 6)
    tag = Image.Exif()
    tag[0x0112] = orientation
    turned = io.BytesIO()
    noise.save(turned, "PNG", exif=tag)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(turned))).transpose(2, 0, 1)
    assert np.array_equal(read_image(tmp_path / "x.png"), upright)
    assert np.array_equal(read_image(tmp_path / "x.png", upright=False), np.asarray(noise).transpose(2, 0, 1))


ERRORS = [ValueError, struct.error, SyntaxError, KeyError, RecursionError, MemoryError, OverflowError, AssertionError]


@pytest.mark.parametrize("error", [*ERRORS, AttributeError, StopIteration, Image.DecompressionBombError, SystemError])
def test_whatever_a_decoder_raises_is_a_bad_picture(error, tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")

    def load(self):
        raise error("deep inside")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(BadPicture, match=r"^cannot read the image .*x\.png: "):
        read_image(tmp_path / "x.png")


def test_a_picture_that_unpacks_to_far_too_much_is_not_unpacked(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", most=64 * 64 - 1) is None
    assert read_image(tmp_path / "x.png", most=64 * 64).shape == (3, 64, 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadPicture, match=r"x\.png: it unpacks to more than 2,000 pixels"):
        read_image(tmp_path / "x.png")


def test_no_other_program_is_started_and_only_what_can_be_decoded_counts(tmp_path):
    assert {".png", ".jpeg", ".avif", ".webp", ".tiff", ".bmp", ".gif", ".jp2", ".mpo", ".tga"} <= suffixes()
    assert not {".eps", ".ps", ".mpg", ".h5", ".grib", ".wmf", ".pdf"} & suffixes()
    assert "EPS" not in formats()
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(BadPicture, match="it is not an image"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize(
    "ending", ["png", "jpg", "webp", "bmp", "gif", "tiff", "jp2", "avif", "ppm", "tga", "ico", "qoi"]
)
def test_a_torn_picture_is_read_whole_or_not_at_all(ending, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    path = tmp_path / f"x.{ending}"
    noise.save(path)
    assert read_image(path).shape == (3, 32, 32)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadPicture, match=f"x.{ending}"):
        read_image(path)


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg", "tiff_adobe_deflate"])
def test_a_damaged_tiff_writes_no_lines_of_its_own(compression, tmp_path, capfd):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    noise.save(tmp_path / "x.tif", compression=compression)
    whole = (tmp_path / "x.tif").read_bytes()
    assert read_image(tmp_path / "x.tif").shape == (3, 32, 32)
    (tmp_path / "x.tif").write_bytes(whole[:8] + bytes(400) + whole[408:])
    with pytest.raises(BadPicture):
        read_image(tmp_path / "x.tif")
    os.write(2, b"and then it is heard again")
    assert capfd.readouterr().err == "and then it is heard again"


def test_the_first_of_several_frames_is_taken_and_that_is_said(tmp_path, capsys):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (BLACK, WHITE)]
    for ending in ("gif", "tiff", "webp"):
        frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:])
        assert colours(tmp_path / f"x.{ending}") == [BLACK]
    assert capsys.readouterr().err == (
        f"{tmp_path / 'x.gif'} holds several frames or pages; of such files the first one is taken\n"
    ), "once for a folder"


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(BadPicture, match=r"x\.png: it is a pipe, not a file"):
        read_image(tmp_path / "x.png")
    (tmp_path / "y.png").symlink_to("/dev/zero")
    with pytest.raises(BadPicture, match=r"y\.png: it is a device, not a file"):
        read_image(tmp_path / "y.png")
    (tmp_path / "z.png").symlink_to("nowhere")
    with pytest.raises(BadPicture, match="there is no image"):
        read_image(tmp_path / "z.png")
