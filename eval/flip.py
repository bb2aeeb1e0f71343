"""LDR-FLIP (Andersson et al. 2020): where a viewer who flips between two pictures sees them differ.

Constants are those of the paper. Equals NVIDIA's flip-evaluator at its default viewing distance, to float32 rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bitroute.eval.metrics import check_pair, correlate

PIXELS_PER_DEGREE = 3840 * math.pi / 180  # a 0.7 m wide screen of 3840 pixels seen from 0.7 m
# Contrast sensitivity in YCxCz: terms a·sqrt(π/b)·exp(-π²·degrees²/b) as (a, b), table 1 of the paper
SENSITIVITY = (((1.0, 0.0047),), ((1.0, 0.0053),), ((34.1, 0.04), (13.5, 0.025)))
WIDEST = 0.04  # the largest b; the filters reach three of its standard deviations
FEATURE_DEGREES = 0.082
COLOR_POWER, COLOR_SHARE, COLOR_KNEE = 0.7, 0.4, 0.95  # q_c, p_c, p_t
FEATURE_POWER = 0.5  # q_f
TO_XYZ = (
    (10135552 / 24577794, 8788810 / 24577794, 4435075 / 24577794),
    (2613072 / 12288897, 8788810 / 12288897, 887015 / 12288897),
    (1425312 / 73733382, 8788810 / 73733382, 70074185 / 73733382),
)  # linear sRGB, D65


@dataclass(frozen=True)
class Flip:
    """error: float32 [H, W] from 0 (no difference is seen) to 1; mean: of the whole map."""

    error: Tensor
    mean: float


def flip(first: Tensor, second: Tensor) -> Flip:
    """Of two uint8 RGB pictures [3, H, W]; their order does not matter.

    Raises:
        JobError: the two are not pictures of one size.
    """
    check_pair(first, second)
    one, other = _opponent(_linear(first)), _opponent(_linear(second))
    color = _color_difference(_seen(one), _seen(other))
    features = _feature_difference((one[0] + 16) / 116, (other[0] + 16) / 116)
    error = color ** (1 - features)
    return Flip(error.float(), float(error.mean(dim=1).mean()))


def _linear(picture: Tensor) -> Tensor:
    """sRGB bytes as linear float64 [3, H, W]."""
    x = picture.double() / 255
    return torch.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)


def _relative_xyz(linear: Tensor) -> Tensor:
    """XYZ of linear RGB [3, H, W], as a share of the white point's."""
    matrix = torch.tensor(TO_XYZ, dtype=torch.float64)
    return torch.einsum("xc,chw->xhw", matrix / matrix.sum(dim=1, keepdim=True), linear)


def _opponent(linear: Tensor) -> Tensor:
    """YCxCz [3, H, W]: CIELAB without its cube root."""
    x, y, z = _relative_xyz(linear)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def _from_opponent(planes: Tensor) -> Tensor:
    """Linear RGB [3, H, W], cut to what a screen can show."""
    y = (planes[0] + 16) / 116
    relative = torch.stack([y + planes[1] / 500, y, y - planes[2] / 200])
    matrix = torch.tensor(TO_XYZ, dtype=torch.float64)
    inverse = torch.linalg.inv(matrix / matrix.sum(dim=1, keepdim=True))
    return torch.einsum("cx,xhw->chw", inverse, relative).clamp(0, 1)


def _seen(opponent: Tensor) -> Tensor:
    """YCxCz as the eye resolves it, in Hunt-adjusted CIELAB [3, H, W]."""
    radius = math.ceil(3 * math.sqrt(WIDEST / (2 * math.pi**2)) * PIXELS_PER_DEGREE)
    degrees = torch.arange(-radius, radius + 1, dtype=torch.float64) / PIXELS_PER_DEGREE
    planes = [_sensed(plane, terms, degrees) for plane, terms in zip(opponent, SENSITIVITY, strict=True)]
    return _hunt_lab(_from_opponent(torch.stack(planes)))


def _sensed(plane: Tensor, terms: tuple[tuple[float, float], ...], degrees: Tensor) -> Tensor:
    """One plane [H, W] filtered by a sum of Gaussians whose weights sum to 1."""
    kernels = [torch.exp(-(math.pi**2) * degrees.square() / b) for _, b in terms]
    sizes = [a * math.sqrt(math.pi / b) for a, b in terms]
    total = sum(size * float(kernel.sum()) ** 2 for size, kernel in zip(sizes, kernels, strict=True))
    parts = [size / total * _filter(plane, k, k) for size, k in zip(sizes, kernels, strict=True)]
    return torch.stack(parts).sum(dim=0)


def _filter(plane: Tensor, along_x: Tensor, along_y: Tensor) -> Tensor:
    """A separable filter of odd length over [H, W]; the border pixels repeat outwards."""
    radius = len(along_x) // 2
    padded = functional.pad(plane.unsqueeze(0), (radius,) * 4, mode="replicate").squeeze(0)
    return correlate(correlate(padded, along_x, -1), along_y, -2)


def _hunt_lab(linear: Tensor) -> Tensor:
    """CIELAB with a* and b* scaled by lightness: colours of dark places differ less (Hunt)."""
    relative, delta = _relative_xyz(linear), 6 / 29
    x, y, z = torch.where(relative > delta**3, relative.clamp(min=0) ** (1 / 3), relative / (3 * delta**2) + 4 / 29)
    lightness = 116 * y - 16
    return torch.stack([lightness, 5 * lightness * (x - y), 2 * lightness * (y - z)])


def _hyab(first: Tensor, second: Tensor) -> Tensor:
    """Abasi et al. 2020: city-block in lightness, Euclidean in chroma: [H, W]."""
    difference = first - second
    return difference[0].abs() + torch.hypot(difference[1], difference[2])


def _color_difference(first: Tensor, second: Tensor) -> Tensor:
    """HyAB distances [H, W] compressed to 0 … 1; green against blue is the largest."""
    green, blue = (_hunt_lab(torch.tensor(c, dtype=torch.float64).reshape(3, 1, 1)) for c in ((0, 1, 0), (0, 0, 1)))
    largest = float(_hyab(green, blue)) ** COLOR_POWER
    distance, knee = _hyab(first, second) ** COLOR_POWER, COLOR_SHARE * largest
    above = COLOR_KNEE + (distance - knee) / (largest - knee) * (1 - COLOR_KNEE)
    return torch.where(distance < knee, distance * COLOR_KNEE / knee, above)


def _feature_difference(first: Tensor, second: Tensor) -> Tensor:
    """How much edges or points of the achromatic planes [H, W] in 0 … 1 differ: 0 … 1."""
    deviation = 0.5 * FEATURE_DEGREES * PIXELS_PER_DEGREE
    radius = math.ceil(3 * deviation)
    x = torch.arange(-radius, radius + 1, dtype=torch.float64)
    gaussian = torch.exp(-x.square() / (2 * deviation**2))
    differences = []
    for detector in (-x * gaussian, (x.square() / deviation**2 - 1) * gaussian):
        one, other = (_strength(plane, _balanced(detector), gaussian / gaussian.sum()) for plane in (first, second))
        differences.append((one - other).abs())
    return (torch.maximum(*differences) / math.sqrt(2)) ** FEATURE_POWER


def _strength(plane: Tensor, detector: Tensor, gaussian: Tensor) -> Tensor:
    return torch.hypot(_filter(plane, detector, gaussian), _filter(plane, gaussian, detector))


def _balanced(kernel: Tensor) -> Tensor:
    """Positive weights sum to 1, negative ones to -1."""
    return kernel.clamp(min=0) / kernel.clamp(min=0).sum() - kernel.clamp(max=0) / kernel.clamp(max=0).sum()
