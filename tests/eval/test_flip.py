from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitroute.errors import JobError
from bitroute.eval.flip import flip

# The pair (drawing, change of it) → mean error by NVIDIA's flip-evaluator 1.7, LDR, its default parameters
PUBLISHED = {
    ("64x64", "faint noise"): 0.050931,
    ("64x64", "strong noise"): 0.229231,
    ("64x64", "blur"): 0.258232,
    ("64x64", "shift"): 0.433538,
    ("64x64", "negative"): 0.915218,
    ("97x80", "faint noise"): 0.050955,
    ("97x80", "strong noise"): 0.233798,
    ("97x80", "blur"): 0.229288,
    ("97x80", "shift"): 0.390820,
    ("97x80", "negative"): 0.914858,
    ("40x24", "blur"): 0.268389,
}
# (row, column) → error in the map of the blurred 97x80 drawing, by the same program
PUBLISHED_PIXELS = {
    (0, 0): 0.62892,
    (10, 10): 0.08853,
    (48, 12): 0.40100,
    (60, 75): 0.07616,
    (96, 79): 0.67921,
}


def drawing(height: int, width: int) -> Tensor:
    """A disc, stripes and a gradient, in integers only, so that every machine draws the same bytes."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    disc = (2 * y - height) ** 2 + (2 * x - width) ** 2 < min(height, width) ** 2 // 2
    stripes = (x + 2 * y) // 6 % 2
    red = torch.where(disc, 220, 40 + 100 * x // width)
    green = torch.where(disc, 60 + 80 * stripes, 160 * y // height + 40)
    blue = torch.where(disc, 30, 90 + 120 * ((x // 8 + y // 8) % 2))
    return torch.stack([red, green, blue]).to(torch.uint8)


def noisy(picture: Tensor, strength: int) -> Tensor:
    """Every value moved by at most `strength`, by a fixed integer hash of its place."""
    place = torch.arange(picture.numel()).reshape(picture.shape)
    mixed = (place * 2654435761 + 12345) % 2**32
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) % 2**32
    moved = picture.int() + (mixed >> 13) % (2 * strength + 1) - strength
    return moved.clamp(0, 255).to(torch.uint8)


def blurred(picture: Tensor) -> Tensor:
    """The mean of 5x5 pixels, rounded down; the edges wrap."""
    moved = [picture.int().roll((dy, dx), (1, 2)) for dy in range(-2, 3) for dx in range(-2, 3)]
    return (torch.stack(moved).sum(dim=0) // 25).to(torch.uint8)


def changed(picture: Tensor, change: str) -> Tensor:
    match change:
        case "faint noise":
            return noisy(picture, 8)
        case "strong noise":
            return noisy(picture, 60)
        case "blur":
            return blurred(picture)
        case "shift":
            return picture.roll((2, 3), (1, 2))
    return 255 - picture


@pytest.mark.parametrize(("size", "change"), PUBLISHED)
def test_the_mean_error_equals_that_of_flip_evaluator(size: str, change: str) -> None:
    picture = drawing(*map(int, size.split("x")))
    measured = flip(picture, changed(picture, change))
    assert measured.mean == pytest.approx(PUBLISHED[size, change], abs=2e-5)
    assert measured.mean == pytest.approx(float(measured.error.double().mean()), abs=1e-7)


def test_the_error_map_equals_that_of_flip_evaluator_in_corners_and_inside() -> None:
    error = flip(drawing(97, 80), blurred(drawing(97, 80))).error
    assert (error.shape, error.dtype) == ((97, 80), torch.float32)
    assert {place: float(error[place]) for place in PUBLISHED_PIXELS} == pytest.approx(PUBLISHED_PIXELS, abs=2e-5)


def test_pictures_of_one_colour_each_have_the_published_error() -> None:
    plain = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    black, white, green, blue = plain
    white.fill_(255)
    green[1], blue[2] = 255, 255
    assert flip(black, white).mean == pytest.approx(0.967391, abs=2e-5)
    assert flip(green, blue).mean == pytest.approx(1.0, abs=2e-5)


def test_identical_pictures_have_no_error_anywhere() -> None:
    measured = flip(drawing(20, 30), drawing(20, 30))
    assert measured.mean == 0.0
    assert not measured.error.any()


def test_the_order_of_the_pictures_does_not_matter() -> None:
    first, second = drawing(40, 40), noisy(drawing(40, 40), 30)
    assert torch.equal(flip(first, second).error, flip(second, first).error)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 2)])
def test_pictures_smaller_than_the_filters_have_an_error_map(size: tuple[int, int]) -> None:
    error = flip(drawing(*size), 255 - drawing(*size)).error
    assert error.shape == size
    assert bool(((error >= 0) & (error <= 1)).all())


def test_pictures_of_two_sizes_are_refused() -> None:
    with pytest.raises(JobError, match="64x64 and 96x64"):
        flip(drawing(64, 64), drawing(64, 96))
