from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from bitroute.errors import JobError
from bitroute.eval.metrics import (
    SCALE_WEIGHTS,
    MsSsim,
    format_db,
    ms_ssim,
    pixels,
    psnr_db,
    scales_for,
    ssim,
)

SIZES = [(64, 64), (97, 80), (11, 30), (160, 192)]
STRENGTHS = [2, 20, 90]


def drawing(height: int, width: int) -> Tensor:
    """A disc and a chequered gradient, in integers only, so that every machine draws the same bytes."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    disc = (2 * y - height) ** 2 + (2 * x - width) ** 2 < min(height, width) ** 2 // 2
    planes = [torch.where(disc, 220, 100 * x // width), 160 * y // height + 40, 120 * ((x // 8 + y // 8) % 2)]
    return torch.stack(planes).to(torch.uint8)


def noisy(picture: Tensor, strength: int) -> Tensor:
    """Every value moved by at most `strength`, by a fixed integer hash of its place."""
    place = torch.arange(picture.numel()).reshape(picture.shape)
    mixed = (place * 2654435761 + 12345) % 2**32
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) % 2**32
    return (picture.int() + (mixed >> 13) % (2 * strength + 1) - strength).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_psnr_and_ssim_equal_those_of_scikit_image(size: tuple[int, int], strength: int) -> None:
    first = drawing(*size)
    second = noisy(first, strength)
    expected = structural_similarity(
        first.numpy(), second.numpy(), channel_axis=0, data_range=255, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False,
    )  # fmt: skip
    assert ssim(first, second) == pytest.approx(expected, abs=1e-9)
    assert psnr_db(first, second) == pytest.approx(peak_signal_noise_ratio(first.numpy(), second.numpy()), abs=1e-9)


def _reference_ms_ssim(first: Tensor, second: Tensor, scales: int) -> float:
    """The formula of Wang et al. 2003 with scipy's Gaussian, a channel at a time."""
    return float(
        np.mean(
            [_reference_channel(one.numpy(), other.numpy(), scales) for one, other in zip(first, second, strict=True)]
        )
    )


def _reference_channel(first: NDArray[np.uint8], second: NDArray[np.uint8], scales: int) -> float:
    x, y, value = first.astype(float), second.astype(float), 1.0
    weights = np.array(SCALE_WEIGHTS[:scales]) * sum(SCALE_WEIGHTS) / sum(SCALE_WEIGHTS[:scales])
    for scale, weight in enumerate(weights, 1):
        mx, my, xx, yy, xy = (
            gaussian_filter(plane, 1.5, radius=5)[5:-5, 5:-5] for plane in (x, y, x * x, y * y, x * y)
        )
        similarity = (2 * (xy - mx * my) + 58.5225) / (xx - mx * mx + yy - my * my + 58.5225)
        if scale == scales:
            similarity *= (2 * mx * my + 6.5025) / (mx * mx + my * my + 6.5025)
        value *= max(similarity.mean(), 0) ** weight
        x, y = _halved(x), _halved(y)
    return value


def _halved(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    even = np.pad(plane, [(0, side % 2) for side in plane.shape], mode="symmetric")
    return (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4


@pytest.mark.parametrize(("size", "scales"), [((21, 40), 2), ((64, 64), 3), ((97, 81), 4), ((161, 175), 5)])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_ms_ssim_equals_its_formula_at_every_number_of_scales(
    size: tuple[int, int], scales: int, strength: int
) -> None:
    first = drawing(*size)
    second = noisy(first, strength)
    measured = ms_ssim(first, second)
    assert measured.scales == scales
    assert measured.value == pytest.approx(_reference_ms_ssim(first, second, scales), abs=1e-9)


@pytest.mark.parametrize(("strength", "published"), [(2, 0.997718), (20, 0.899275), (90, 0.607803)])
def test_ms_ssim_of_five_scales_equals_the_published_package(strength: int, published: float) -> None:
    """By pytorch-msssim 1.0.0, data_range=255, in float64 with its float32 window."""
    first = drawing(176, 192)
    assert ms_ssim(first, noisy(first, strength)).value == pytest.approx(published, abs=1e-5)


@pytest.mark.parametrize(
    ("side", "scales"),
    [(10, 0), (11, 1), (20, 1), (21, 2), (41, 3), (64, 3), (81, 4), (160, 4), (161, 5), (4096, 5)],
)
def test_the_number_of_scales_follows_the_shorter_side(side: int, scales: int) -> None:
    assert scales_for(side, 4096) == scales_for(4096, side) == scales


def test_identical_pictures_are_identical_to_every_metric() -> None:
    picture = drawing(64, 64)
    assert psnr_db(picture, picture) == math.inf
    assert format_db(psnr_db(picture, picture)) == "identical"
    assert ssim(picture, picture) == pytest.approx(1, abs=1e-12)
    assert ms_ssim(picture, picture) == MsSsim(pytest.approx(1, abs=1e-12), 3)


def test_opposite_pictures_have_the_lowest_values() -> None:
    black, white = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.full((3, 64, 64), 255, dtype=torch.uint8)
    assert psnr_db(black, white) == 0.0
    assert ssim(black, white) == pytest.approx(1e-4, abs=1e-6)
    negative = ms_ssim(drawing(64, 64), 255 - drawing(64, 64))
    assert 0 <= negative.value < 0.5


def test_decibels_are_written_with_one_digit() -> None:
    assert format_db(31.249) == "31.2 dB"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_every_kind_of_picture_becomes_rgb_with_height_first(mode: str) -> None:
    image = Image.new("RGB", (7, 5), (0, 0, 0))
    image.putpixel((6, 1), (255, 255, 255))
    data = pixels(image.convert(mode))
    assert (data.shape, data.dtype) == ((3, 5, 7), torch.uint8)
    assert data[:, 1, 6].tolist() == [255, 255, 255]
    assert data.sum() == 3 * 255


def test_pictures_too_small_for_the_window_are_refused() -> None:
    with pytest.raises(JobError, match="11 px"):
        ssim(drawing(10, 64), drawing(10, 64))
    with pytest.raises(JobError, match="21 px"):
        ms_ssim(drawing(64, 20), drawing(64, 20))


@pytest.mark.parametrize("metric", [psnr_db, ssim, ms_ssim])
def test_what_is_not_a_pair_of_pictures_is_refused(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(JobError, match="64x64 and 64x96"):
        metric(drawing(64, 64), drawing(96, 64))
    with pytest.raises(JobError, match=r"float64 \[3, 64, 64\]"):
        metric(drawing(64, 64).double(), drawing(64, 64).double())
    with pytest.raises(JobError, match=r"uint8 \[64, 64\]"):
        metric(drawing(64, 64)[0], drawing(64, 64)[0])
