"""How far a picture is from the original: PSNR, SSIM and MS-SSIM of uint8 RGB pictures [3, H, W].

SSIM and MS-SSIM are the means of the three colour channels' values, each channel taken alone, computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from bitroute.errors import JobError, Problem

WINDOW, SIGMA = 11, 1.5  # pixels; Wang et al. 2004
STABILIZERS = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # C1 and C2 of the same paper
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, finest scale first
FEWEST_SCALES = 2


@dataclass(frozen=True)
class MsSsim:
    """value: at most 1. scales: how many the pictures were large enough for; five is the published measure."""

    value: float
    scales: int


def pixels(image: Image.Image) -> Tensor:
    """The picture as uint8 RGB [3, H, W]; transparency is dropped."""
    data = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return data.reshape(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def check_pair(first: Tensor, second: Tensor) -> None:
    """Refuses what cannot be compared.

    Raises:
        JobError: not uint8 [3, H, W], or the sizes differ.
    """
    for picture in (first, second):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3 or not picture.numel():
            got = f"{picture.dtype} {list(picture.shape)}"
            raise JobError(Problem("this is not a picture", got=got, expected="uint8 RGB [3, height, width]"))
    if first.shape != second.shape:
        sizes = [f"{width}x{height}" for _, height, width in (first.shape, second.shape)]
        raise JobError(
            Problem(
                "pictures of two sizes cannot be compared", got=" and ".join(sizes), expected="equal sizes",
                next_step="draw both with the same height and width",
            )
        )  # fmt: skip


def frames(picture: Tensor) -> Sequence[Tensor]:
    """Of a video [f, 3, H, W], or the picture [3, H, W] itself as the only one."""
    return picture.unbind() if picture.ndim == 4 else [picture]


def mse(first: Tensor, second: Tensor) -> float:
    """Mean squared difference in units of 1/255.

    Raises:
        JobError: the two are not pictures of one size.
    """
    check_pair(first, second)
    squared = (first.int() - second.int()).square().sum(dtype=torch.int64)
    return int(squared) / first.numel()


def psnr_db(first: Tensor, second: Tensor) -> float:
    """10·log10(255² / mean squared difference); math.inf when the pictures are identical.

    Raises:
        JobError: the two are not pictures of one size.
    """
    return mse_to_db(mse(first, second))


def mse_to_db(mse: float) -> float:
    """PSNR of a mean squared difference in units of 1/255; math.inf for 0."""
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def format_db(value: float) -> str:
    return "identical" if math.isinf(value) else f"{value:.1f} dB"


def ssim(first: Tensor, second: Tensor) -> float:
    """Structural similarity, Wang et al. 2004: Gaussian window, population covariance, without the 5 px border.

    Equals scikit-image's structural_similarity with channel_axis=0, gaussian_weights=True, sigma=1.5 and
    use_sample_covariance=False.

    Raises:
        JobError: the two are not pictures of one size, or a side is below 11 px.
    """
    check_pair(first, second)
    if min(first.shape[1:]) < WINDOW:
        raise _too_small(first, WINDOW)
    luminance, contrast = _maps(first.double(), second.double())
    return float(_mean(luminance * contrast).mean())


def ms_ssim(first: Tensor, second: Tensor) -> MsSsim:
    """Multi-scale structural similarity, Wang et al. 2003; a negative mean contrast counts as 0.

    Below 161 px there are fewer scales, and the published weights that remain are stretched to the same sum.

    Raises:
        JobError: the two are not pictures of one size, or a side is below 21 px.
    """
    check_pair(first, second)
    scales = scales_for(*first.shape[1:])
    if scales < FEWEST_SCALES:
        raise _too_small(first, 2 * WINDOW - 1)
    weights = SCALE_WEIGHTS[:scales]
    stretch = sum(SCALE_WEIGHTS) / sum(weights)
    original, other = first.double(), second.double()
    value = torch.ones(3, dtype=torch.float64)
    for scale, weight in enumerate(weights, 1):
        luminance, contrast = _maps(original, other)
        similarity = contrast if scale < scales else luminance * contrast
        value *= _mean(similarity).clamp(min=0) ** (weight * stretch)
        original, other = _half(original), _half(other)
    return MsSsim(float(value.mean()), scales)


def scales_for(height: int, width: int) -> int:
    """How many of the five scales fit: the window must fit in the coarsest picture."""
    side = min(height, width)
    return sum(math.ceil(side / 2**scale) >= WINDOW for scale in range(len(SCALE_WEIGHTS)))


def _maps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance and contrast·structure where the whole window fits: float64 [3, H-10, W-10] each."""
    blurred = _blur(torch.stack([first, second, first.square(), second.square(), first * second]))
    mean_1, mean_2, square_1, square_2, product = blurred
    c1, c2 = STABILIZERS
    luminance = (2 * mean_1 * mean_2 + c1) / (mean_1.square() + mean_2.square() + c1)
    variances = square_1 - mean_1.square() + square_2 - mean_2.square()
    return luminance, (2 * (product - mean_1 * mean_2) + c2) / (variances + c2)


def _blur(planes: Tensor) -> Tensor:
    """The Gaussian window along both axes, where the whole of it fits."""
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    kernel = torch.exp(-offsets.square() / (2 * SIGMA**2))
    kernel /= kernel.sum()
    return correlate(correlate(planes, kernel, -1), kernel, -2)


def correlate(planes: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """Along one axis, shorter by the kernel's length - 1. Shifted sums: torch has no fast float64 convolution."""
    length = planes.shape[axis] - len(kernel) + 1
    total = torch.zeros_like(planes.narrow(axis, 0, length))
    for start, weight in enumerate(kernel.tolist()):
        total.add_(planes.narrow(axis, start, length), alpha=weight)
    return total


def _mean(maps: Tensor) -> Tensor:
    """Of each channel [3, H, W] → [3]; rows first, so that the digits do not depend on the thread count."""
    return maps.mean(dim=2).mean(dim=1)


def _half(planes: Tensor) -> Tensor:
    """Means of 2x2 pixels; the last row or column of an odd size stands for its missing neighbour."""
    height, width = planes.shape[1:]
    padded = functional.pad(planes, (0, width % 2, 0, height % 2), mode="replicate")
    return functional.avg_pool2d(padded, 2)


def _too_small(picture: Tensor, fewest: int) -> JobError:
    height, width = picture.shape[1:]
    return JobError(
        Problem(
            "the pictures are too small for this measure",
            got=f"{width}x{height}",
            expected=f"at least {fewest} px a side",
        )
    )
