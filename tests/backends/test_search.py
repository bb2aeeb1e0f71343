"""The searched scales: as good as the format can, never worse than the plain ones in any block, and fast to find."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitroute.backends import create
from bitroute.backends._elements import E2M1, E4M3
from bitroute.backends.base import NONE, Backend, Statistics, TensorSpec

COLUMNS = 512
SEARCHES: list[tuple[str, int, dict[str, Any]]] = [
    ("nvfp4", 16, {}),
    ("mxfp4", 32, {}),
    ("mxfp6", 32, {"element": "e2m3"}),
    ("mxfp6", 32, {"element": "e3m2"}),
    ("mxfp8", 32, {"element": "e4m3"}),
    ("mxfp8", 32, {"element": "e5m2"}),
    ("nf4", 64, {}),
    ("nf4", 32, {"block": 32}),
    ("nf4", 128, {"block": 128}),
    ("nf4", 64, {"double_quant": False}),
    ("fp4", 64, {}),
    ("fp4", 64, {"double_quant": False}),
    ("int4", 64, {}),
    ("int4", 32, {"group": 32, "zero": "hqq"}),
    ("int6", 64, {"zero": "minmax"}),
    ("int8-group", 128, {}),
]
each_search = pytest.mark.parametrize(("name", "size", "options"), SEARCHES, ids=str)


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)

    def normal(rows: int = 24) -> Tensor:
        return torch.randn((rows, COLUMNS), generator=generator)

    def uniform(rows: int = 24) -> Tensor:
        return torch.rand((rows, COLUMNS), generator=generator)

    outliers = normal()
    outliers[:, ::32] *= 40
    zeros_among = normal()
    zeros_among[3] = 0
    zeros_among[4, :256] = 1e-7
    chi_squared = torch.randn((5, 24, COLUMNS), generator=generator).square().sum(0)
    return {
        "gaussian": normal(),
        "laplace": (uniform() - 0.5).sign() * uniform().clamp(min=1e-9).log(),
        "student-t": normal() / (chi_squared / 5).sqrt(),
        "one outlier in a block": outliers,
        "one outlier in all": normal().index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(3e4)),
        "zeros among others": zeros_among,
        "zeros": torch.zeros(2, COLUMNS),
        "constant": torch.full((3, COLUMNS), 0.3),
        "two magnitudes": torch.where(uniform() < 0.5, 1.0, uniform()[:, :1]),
        "rows of all sizes": normal() * torch.exp2(torch.arange(24.0) - 12)[:, None],
        "denormal": normal(4) * 1e-39,
        "small": normal(4) * 1e-33,
        "huge": normal(8) / 8 * torch.finfo(torch.float32).max / 4,
    }


def spec_of(weight: Tensor) -> TensorSpec:
    return TensorSpec(tuple(weight.shape), weight.dtype)


def block_errors(backend: Backend, weight: Tensor, size: int, statistics: Statistics = NONE) -> Tensor:
    """Σ h · (w - ŵ)² of each block of what is stored, [blocks], float64."""
    decoded = backend.decode(backend.quantize(weight, statistics), spec_of(weight))
    error = (decoded.double() - weight.double()).square()
    if statistics.second_moment is not None:
        error *= statistics.second_moment
    return error.reshape(-1, size).sum(1)


def moments(spread: float) -> Statistics:
    generator = torch.Generator().manual_seed(1)
    return Statistics(torch.exp(torch.randn(COLUMNS, generator=generator) * spread))


@pytest.mark.parametrize("kind", weights())
@each_search
def test_no_block_is_worse_than_with_its_plain_scale(name: str, size: int, options: dict[str, Any], kind: str) -> None:
    weight = weights()[kind]
    for statistics in (NONE, moments(3)):
        searched = block_errors(create(name, scale="mse", **options), weight, size, statistics)
        plain = block_errors(create(name, **options), weight, size, statistics)
        rounding = 1e-3 if kind == "denormal" else 1e-5  # of float32, which has few digits left down there
        assert (searched <= plain * (1 + rounding)).all()


@each_search
def test_a_search_that_weighs_all_inputs_alike_finds_what_one_without_weights_does(
    name: str, size: int, options: dict[str, Any]
) -> None:
    backend, weight = create(name, scale="mse", **options), weights()["gaussian"]
    weighted, unweighted = backend.quantize(weight, moments(0)), backend.quantize(weight)
    assert torch.equal(backend.decode(weighted, spec_of(weight)), backend.decode(unweighted, spec_of(weight)))


@each_search
def test_weights_lower_the_weighted_error(name: str, size: int, options: dict[str, Any]) -> None:
    backend, weight, statistics = create(name, scale="mse", **options), weights()["gaussian"], moments(3)
    importance = statistics.second_moment
    assert importance is not None
    decoded = backend.decode(backend.quantize(weight), spec_of(weight))
    unweighted = ((decoded - weight).square() * importance).sum()
    weighted = block_errors(backend, weight, size, statistics).sum()
    assert weighted < unweighted * {"mxfp6": 1 + 1e-6, "mxfp8": 1 + 1e-6, "mxfp4": 0.99}.get(name, 0.75)


def test_no_other_e4m3_scale_is_better_in_any_block_of_nvfp4() -> None:
    backend = create("nvfp4", scale="mse")
    scales = torch.arange(8, 127, dtype=torch.uint8).view(E4M3.dtype).float()  # all that are normal and positive
    for kind in ("gaussian", "laplace", "student-t", "one outlier in a block", "constant", "two magnitudes"):
        weight = weights()[kind]
        blocks = weight.double().reshape(-1, 16)
        tensor_scale = backend.quantize(weight)["per_tensor_scale"].double()
        least = torch.full((len(blocks),), torch.inf, dtype=torch.float64)
        for scale in (scales.double() * tensor_scale).tolist():
            nearest = E2M1.nearest((blocks / scale).float()).double() * scale
            least = torch.minimum(least, (nearest - blocks).square().sum(1))
        found = block_errors(backend, weight, 16)
        assert (found <= least * (1 + 1e-5) + 1e-14 * blocks.square().sum(1)).all(), kind


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6", "mxfp8"])
def test_no_other_power_of_two_is_better_in_any_block_of_mx(name: str) -> None:
    backend = create(name, scale="mse")
    element: Any = backend
    for kind in ("gaussian", "laplace", "student-t", "one outlier in a block", "constant", "two magnitudes"):
        weight = weights()[kind]
        blocks = weight.double().reshape(-1, 32)
        least = torch.full((len(blocks),), torch.inf, dtype=torch.float64)
        for scale in (2.0**exponent for exponent in range(-30, 16)):
            nearest = element.weight_element.nearest((blocks / scale).float()).double() * scale
            least = torch.minimum(least, (nearest - blocks).square().sum(1))
        assert (block_errors(backend, weight, 32) <= least * (1 + 1e-5)).all(), kind


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_the_best_factor_of_the_largest_magnitude_gains_next_to_nothing_more(name: str, double_quant: bool) -> None:
    weight = weights()["gaussian"]
    plain = create(name, double_quant=False).quantize(weight)
    numbers = plain["quant_map"].sort().values
    blocks = weight.reshape(-1, 64)
    bounds = (numbers[1:] + numbers[:-1]) / 2
    least = torch.full((len(blocks),), torch.inf)
    for factor in torch.arange(0.5, 2, 0.01).tolist():
        scales = plain["absmax"][:, None] * factor
        nearest = numbers[torch.bucketize(blocks / scales, bounds)] * scales
        least = torch.minimum(least, (nearest - blocks).square().sum(1))
    found = block_errors(create(name, scale="mse", double_quant=double_quant), weight, 64)
    assert found.sum() < 1.004 * least.sum()
