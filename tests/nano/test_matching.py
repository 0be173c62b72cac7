"""The rendering match: the search equals brute force and is right about what was planted."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from argrpo_cli.nano import matching
from argrpo_cli.nano.matching import Matcher, Template, border_colour, exact_error, match_classes, resized
from argrpo_cli.nano.scenes import IMAGE_SIZE, SINGLE_SIZES, hue_matrix

LARGEST = SINGLE_SIZES[1]


def template(seed: int = 0) -> Template:
    """A lopsided two-coloured shape with a soft edge."""
    noise = torch.randn(1, 5, 9, 9, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(noise, (LARGEST, LARGEST), mode="bicubic", align_corners=True)[0]
    y, x = torch.meshgrid(torch.linspace(-1, 1, LARGEST), torch.linspace(-1, 1, LARGEST), indexing="ij")
    alpha = torch.sigmoid((0.8 - (x - 0.1).square() - 1.3 * y.square() + 0.2 * smooth[:1]) * 12)
    # Colours well inside (0, 1), so that a hue turn clips nothing and the search is exact.
    colour = 0.45 + 0.1 * smooth[1:4].clamp(-2, 2)
    return Template(colour * alpha, alpha)


def planted(shape: Template, size: int, x: int, y: int, mirror: bool, hue: float, background: Tensor) -> Tensor:
    """uint8 [3, 64, 64] with the object at one place."""
    colour, alpha = shape.placed(size, mirror, hue)
    image = background[:, None, None].expand(3, IMAGE_SIZE, IMAGE_SIZE).clone()
    window = image[:, y : y + size, x : x + size]
    image[:, y : y + size, x : x + size] = colour + (1 - alpha) * window
    return (image * 255).round().to(torch.uint8)


PASTEL = torch.tensor([0.95, 0.85, 0.75])


def test_errors_equal_brute_force():
    shape, sizes, hues = template(), (LARGEST - 1, LARGEST), (-18.0, 0.0, 9.0)
    matcher = Matcher(shape, sizes, hues)
    image = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
    background = PASTEL[None]
    errors = matcher.errors(image, background)
    for view, (size, mirror) in enumerate(matcher.views):
        both = resized(torch.cat([shape.colour, shape.alpha]), size)
        both = both.flip(-1) if mirror else both
        for k, hue in enumerate(hues):
            colour = torch.einsum("ij,jhw->ihw", torch.from_numpy(hue_matrix(hue)), both[:3])
            for y, x in itertools.product(range(IMAGE_SIZE - size + 1), repeat=2):
                rendering = background[0, :, None, None].expand(3, IMAGE_SIZE, IMAGE_SIZE).clone()
                rendering[:, y : y + size, x : x + size] *= 1 - both[3:]
                rendering[:, y : y + size, x : x + size] += colour
                truth = (image[0] - rendering).square().sum()
                torch.testing.assert_close(errors[0, view, k, y, x], truth, rtol=2e-4, atol=1e-2)
    assert errors[0, :, :, IMAGE_SIZE - sizes[0] + 1 :].isinf().all(), "places where the object would not fit"


@pytest.mark.parametrize(
    ("size", "x", "y", "mirror", "hue"),
    [
        (SINGLE_SIZES[0], 3, 17, False, 0.0),
        (47, 0, 17, True, -12.0),
        (55, 9, 1, False, 18.0),
        (LARGEST, 4, 4, True, 3.0),
    ],
)
def test_a_planted_object_is_found_where_it_is(size, x, y, mirror, hue):
    shape = template()
    image = planted(shape, size, x, y, mirror, hue, PASTEL)
    found = Matcher(shape).match(image[None])
    assert (found.size.item(), found.x.item(), found.y.item()) == (size, x, y)
    assert found.mirror.item() == mirror
    assert found.hue.item() == pytest.approx(hue)
    assert found.db.item() > 45, "only rounding to 8 bits is left"


def test_damage_lowers_the_match():
    shape = template()
    image = planted(shape, 50, 7, 7, False, 0.0, PASTEL)
    levels = []
    for hole in (0, 4, 8, 16, 24):
        broken = image.clone()
        broken[:, 20 : 20 + hole, 20 : 20 + hole] = (PASTEL * 255).to(torch.uint8)[:, None, None]
        levels.append(Matcher(shape, range(46, 55)).match(broken[None]).db.item())
    assert all(more > less for more, less in itertools.pairwise(levels)), levels


def test_the_wrong_object_matches_worse():
    image = planted(template(0), 50, 7, 7, False, 0.0, PASTEL)
    ids = torch.tensor([1, 0])
    matchers = {k: Matcher(template(k), range(48, 53)) for k in range(2)}
    found = match_classes(matchers, torch.stack([image, image]), ids)
    assert found.db[1] > found.db[0] + 10, "results come back in the order of the pictures"


def test_pictures_get_their_own_class_back_whatever_the_order():
    ids = [2, 0, 1]
    matchers = {k: Matcher(template(k), range(49, 52)) for k in range(3)}
    images = torch.stack([planted(template(k), 50, 3 + k, 7, False, 0.0, PASTEL) for k in ids])
    together = match_classes(matchers, images, torch.tensor(ids))
    for row, k in enumerate(ids):
        alone = matchers[k].match(images[row : row + 1])
        for name, value in alone._asdict().items():
            torch.testing.assert_close(getattr(together, name)[row], value[0], msg=f"{name} of row {row}")
    assert together.db.min() > 45


def test_the_match_is_the_error_per_object_pixel_and_channel_in_decibel():
    y, x = torch.meshgrid(torch.arange(LARGEST), torch.arange(LARGEST), indexing="ij")
    inside = ((y - 30).square() + (x - 24).square() < 500)[None]
    # Whole levels of 8 bits, edges without blur and no resizing: nothing but the planted error remains.
    colour = torch.stack([40 + 2 * y, 60 + x, 200 - y]) * inside
    image = torch.tensor([250, 230, 200])[:, None, None].repeat(1, IMAGE_SIZE, IMAGE_SIZE)
    wrong = 20 * (1 - 2 * ((x + y) % 2)) * (y < 30)  # a chequered half, which no place or background explains
    image[:, 3 : 3 + LARGEST, 1 : 1 + LARGEST][:, inside[0]] = (colour + wrong)[:, inside[0]]
    found = Matcher(Template(colour / 255, inside.float()), (LARGEST,), (0.0,)).match(image[None].to(torch.uint8))
    error = 3 * (inside[0] & (y < 30)).sum().item() * (20 / 255) ** 2
    mse = error / (3 * inside.sum().item())
    assert (found.x.item(), found.y.item()) == (1, 3)
    assert found.db.item() == pytest.approx(-10 * math.log10(mse), rel=1e-3)


def test_the_exact_error_decides_among_the_best(monkeypatch):
    """A frame of another colour misleads the search about the background; colours clip when the hue turns."""
    shape = template()
    shape = Template((shape.colour * 2.4 - 0.55 * shape.alpha).clamp(min=0).minimum(shape.alpha), shape.alpha)
    sizes, hues = range(56, 61), (-18.0, -9.0, 0.0, 9.0, 18.0)
    image = planted(shape, 58, 3, 2, False, 18.0, PASTEL)
    frame = torch.ones(IMAGE_SIZE, IMAGE_SIZE, dtype=torch.bool)
    frame[2:-2, 2:-2] = False
    image[:, frame] = torch.tensor([110, 110, 150], dtype=torch.uint8)[:, None]
    matcher = Matcher(shape, sizes, hues)

    def error(size: int, x: int, y: int, mirror: bool, hue: float) -> float:
        return exact_error(image / 255, *shape.placed(size, mirror, hue), y, x)[0]

    best = min(
        error(size, x, y, mirror, hue)
        for size, mirror, hue in itertools.product(sizes, (False, True), hues)
        for y, x in itertools.product(range(IMAGE_SIZE - size + 1), repeat=2)
    )
    assert error(*(one.item() for one in matcher.match(image[None])[1:])) == pytest.approx(best, rel=1e-5)
    monkeypatch.setattr(matching, "CANDIDATES", 1)
    missed = error(*(one.item() for one in matcher.match(image[None])[1:]))
    assert missed > best * 1.05, "the search alone would have missed it"


def test_the_same_relative_error_counts_alike_on_small_and_large_objects():
    shape = template()
    levels = []
    for size in SINGLE_SIZES:
        image = planted(shape, size, 2, 2, False, 0.0, PASTEL).float()
        colour, alpha = shape.placed(size, False)
        window = image[:, 2 : 2 + size, 2 : 2 + size]
        window += 25 * alpha  # every object pixel too bright by a tenth
        error, area = exact_error(image / 255, colour, alpha, 2, 2)
        levels.append(error / (3 * area))
    assert levels[0] == pytest.approx(levels[1], rel=0.05)


def test_border_colour_ignores_an_object_that_touches_an_edge():
    images = PASTEL[None, :, None, None].expand(1, 3, IMAGE_SIZE, IMAGE_SIZE).clone()
    images[:, :, 20:40, :30] = 0.1
    torch.testing.assert_close(border_colour(images)[0], PASTEL)
