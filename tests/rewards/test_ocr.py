"""ocr: which text a prompt quotes, how texts are compared, and what the real reader reads in drawn pictures."""

from __future__ import annotations

import importlib.util
import socket

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from argrpo_cli.rewards.ocr import Ocr, comparable, edit_distance, quoted_texts, reading_order, text_similarity
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError


def picture(texts, size=(256, 256), font=28):
    """uint8 [3, H, W] with `texts` [(x, y, text)] in black on white."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for x, y, text in texts:
        draw.text((x, y), text, font=ImageFont.load_default(size=font), fill="black")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def box(x0, y0, x1, y1):
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


@pytest.fixture(scope="module")
def ocr():
    """The reader with its real weights, opened and used without a network."""

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield Ocr(threads=2)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a sign that says "Fresh Bread"', ["Fresh Bread"]),
        ("a sign that says 'Fresh Bread'", ["Fresh Bread"]),
        ("a sign that says “Fresh Bread”", ["Fresh Bread"]),
        ("ein Schild mit „Frisches Brot“", ["Frisches Brot"]),
        ("une affiche « Pain frais »", ["Pain frais"]),
        ("a sign that says ‘Fresh Bread’", ["Fresh Bread"]),
        ('"Open" above "Closed" and \'Later\'', ["Open", "Closed", "Later"]),
        ("a dog's bowl and the dogs' beds", []),
        ("the baker's sign: 'Don't panic', in red", ["Don't panic"]),
        ("a sign ‘it’s open’", ["it’s open"]),
        ("a poster \"the dogs' 'best' friend\"", ["the dogs' 'best' friend"]),
        ('nothing in "" or " ", but "x"', ["x"]),
        ('a 5" ruler', []),
        ("a plain picture", []),
    ],
)
def test_what_a_prompt_quotes(prompt, texts):
    assert quoted_texts(prompt) == texts


def test_case_spaces_and_the_shape_of_quotes_and_widths_do_not_count():
    assert comparable("It’s  OPEN\n— Straße！") == comparable("it's open-STRASSE!")
    assert comparable("open") != comparable("0pen")


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_similarity_is_one_less_the_distance_over_the_longer_text():
    assert text_similarity("Open Now", "open now") == 1
    assert text_similarity("open", "opens") == pytest.approx(1 - 1 / 5)  # too much costs
    assert text_similarity("open", "ope") == pytest.approx(1 - 1 / 4)
    assert text_similarity("open", "open all day and all night") == pytest.approx(4 / 21)
    assert text_similarity("open", "") == 0
    assert text_similarity("open", "xyz") == 0


def test_reading_goes_by_lines_and_within_a_line_from_left_to_right():
    boxes = [
        box(200, 12, 260, 40),  # the first line leans down to the right
        box(10, 70, 90, 95),
        box(10, 5, 90, 30),
        box(100, 8, 190, 36),
        box(100, 66, 190, 96),
    ]
    assert reading_order(np.array(boxes)) == [2, 3, 0, 1, 4]


def test_a_small_box_beside_a_tall_one_is_on_its_line_only_when_the_middles_are_near():
    tall = box(0, 0, 100, 100)
    assert reading_order(np.array([box(120, 45, 150, 65), tall])) == [1, 0]
    assert reading_order(np.array([tall, box(120, 75, 150, 95), box(120, 5, 150, 25)])) == [2, 0, 1]


def test_right_text_scores_high_wrong_text_low_and_a_blank_picture_nothing(ocr):
    images = torch.stack(
        [
            picture([(20, 40, "Fresh Bread")]),
            picture([(20, 40, "Fish & Chips")]),
            picture([]),
            picture([(20, 20, "Fresh"), (20, 70, "Bread")]),
            picture([(20, 20, "Fresh Bread"), (20, 70, "every morning")]),
        ]
    )
    right, wrong, blank, lines, more = ocr.score(images, [Condition('a sign, "Fresh Bread"')] * 5).tolist()
    assert right == 1 and lines == 1
    assert wrong == pytest.approx(text_similarity("Fresh Bread", "Fish & Chips"), abs=0.1) and wrong < 0.4
    assert blank == 0
    assert more == pytest.approx(10 / 22, abs=0.05)


def test_several_quoted_texts_are_wanted_in_order(ocr):
    image = picture([(20, 20, "HELLO"), (20, 70, "WORLD")])[None]
    scores = [ocr.score(image, [Condition(prompt)]).item() for prompt in ("'hello' and 'world'", "'world' and 'hello'")]
    assert scores[0] == 1 and scores[1] < 0.5


def test_small_pictures_are_read(ocr):
    image = picture([(4, 20, "STOP now")], size=(64, 64), font=12)[None]
    scores = ocr.score(image, [Condition('"stop now"')])
    assert scores.dtype == torch.float32 and scores.tolist() == [1]
    assert ocr.read(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)) == [[]]


def test_a_score_does_not_depend_on_the_pictures_beside_it(ocr):
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 256, 256), np.uint8))
    images = torch.stack([noise, picture([(20, 40, "Closed")]), picture([(8, 40, "We are open today")])])
    together = ocr.read(images)
    assert together == [ocr.read(image[None])[0] for image in images]
    assert together[1:] == [["Closed"], ["We are open today"]]


def test_red_and_blue_are_not_mixed_up():
    seen = []
    reader = Ocr.__new__(Ocr)
    reader.threads, reader._read = 1, lambda picture: seen.append(picture) or []
    reader.read(torch.tensor([255, 128, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 5))
    assert seen[0].shape == (2, 5, 3) and seen[0][0, 0].tolist() == [0, 128, 255]  # OpenCV's order


def test_a_prompt_without_quotes_is_refused_by_name(ocr):
    with pytest.raises(UserError, match="no text is quoted in the prompt 'a plain dog'"):
        ocr.check([Condition('"fine"'), Condition("a plain dog")])
    with pytest.raises(UserError, match="a plain dog"):
        ocr.score(picture([])[None], [Condition("a plain dog")])


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_a_missing_package_is_named_with_its_command(monkeypatch, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "argrpo_cli.rewards.ocr.find_spec", lambda name, *rest: None if name == package else real(name, *rest)
    )
    with pytest.raises(UserError, match=f"needs {package}; pip install rapidocr onnxruntime"):
        Ocr()


def test_model_files_that_are_missing_or_damaged_are_named(monkeypatch, tmp_path):
    import rapidocr

    monkeypatch.setattr(rapidocr, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(UserError, match=r"no file \*_det_\*.onnx in .*models"):
        Ocr()
    (tmp_path / "models").mkdir()
    for part in ("det", "rec"):
        (tmp_path / "models" / f"PP-OCR_{part}_small.onnx").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"models cannot be used .*force-reinstall rapidocr"):
        Ocr()
