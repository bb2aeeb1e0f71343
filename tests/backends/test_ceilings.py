"""How far a weight may be from what a format stores of it, at most, with the best scales that it finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitroute.backends import create
from bitroute.backends.base import Backend, TensorSpec

SHAPE = (256, 2048)
MSE: dict[str, Any] = {"scale": "mse"}

# format, options, bits per weight of a large matrix, percent of Gaussian weights of standard deviation 0.02
CEILINGS: list[tuple[str, dict[str, Any], float, float]] = [
    ("int8-group", {}, 8.125, 0.65),
    ("int8-group", MSE, 8.125, 0.65),
    ("float8", {}, 8.02, 2.65),
    ("mxfp8", MSE, 8.25, 2.67),
    ("int6", MSE, 6.25, 2.35),
    ("mxfp6", MSE, 6.25, 2.83),
    ("codebook4", {}, 4.5, 6.65),
    ("nvfp4", MSE, 4.5, 8.15),
    ("codebook4", {"block": 32}, 4.25, 7.6),
    ("nf4", {**MSE, "block": 32}, 4.26, 7.9),
    ("int4", MSE, 4.25, 9.1),
    ("int4", {**MSE, "zero": "minmax"}, 4.5, 8.4),
    ("mxfp4", MSE, 4.25, 11.15),
    ("codebook4", {"block": 64}, 4.125, 8.3),
    ("nf4", MSE, 4.13, 8.6),
    ("fp4", MSE, 4.13, 11.4),
]
ROTATED = {"scale": "mse", "method": {"rotate": 32}}
PLAIN_AND_SEARCHED: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("nvfp4", "mxfp4", "mxfp6", "mxfp8", "nf4", "fp4", "int6", "int8-group")),
    *(("int4", {"group": group, "zero": zero}) for group in (32, 64, 128) for zero in ("none", "minmax", "hqq")),
]


def heavy(shape: tuple[int, int] = SHAPE) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    signs = torch.rand(shape, generator=generator) - 0.5
    laplace = signs.sign() * (2 * signs.abs()).clamp(min=1e-9).log()
    chi_squared = sum(torch.randn(shape, generator=generator).square() for _ in range(5))
    return {"laplace": laplace, "student-t": torch.randn(shape, generator=generator) / (chi_squared / 5).sqrt()}


def error_percent(backend: Backend, weight: Tensor) -> float:
    decoded = backend.decode(backend.quantize(weight), TensorSpec(tuple(weight.shape), weight.dtype))
    return 100 * float((decoded - weight).norm() / weight.norm())


@pytest.mark.parametrize(("name", "options", "bits", "ceiling"), CEILINGS, ids=str)
def test_the_error_of_gaussian_weights_is_below_its_ceiling_at_these_bits(
    name: str, options: dict[str, Any], bits: float, ceiling: float
) -> None:
    """Of half a million weights, which stand for all others within 0.5 % of the error."""
    backend, large = create(name, **options), TensorSpec((4096, 3072), torch.bfloat16)
    assert 8 * sum(spec.size_bytes for spec in backend.outputs(large).values()) <= (bits + 0.001) * large.numel
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)) * 0.02
    assert error_percent(backend, weight) < ceiling


@pytest.mark.parametrize("kind", ["laplace", "student-t"])
def test_rotation_brings_integers_of_heavy_tails_near_those_of_gaussian_weights(kind: str) -> None:
    weight = heavy()[kind]
    assert error_percent(create("int4", **ROTATED), weight) < 9.6
    assert error_percent(create("int4", **MSE), weight) > 11


@pytest.mark.parametrize("kind", ["laplace", "student-t"])
@pytest.mark.parametrize("block", [16, 32])
def test_a_learned_book_fits_heavy_tails(block: int, kind: str) -> None:
    assert error_percent(create("codebook4", block=block), heavy()[kind]) < (7.02 if block == 16 else 8.28)


@pytest.mark.parametrize("kind", ["laplace", "student-t"])
@pytest.mark.parametrize(("name", "options"), PLAIN_AND_SEARCHED, ids=str)
def test_a_search_never_loses_to_the_plain_scales(name: str, options: dict[str, Any], kind: str) -> None:
    weight = heavy((32, 2048))[kind]
    searched, plain = (error_percent(create(name, **options, scale=scale), weight) for scale in ("mse", "absmax"))
    assert searched < plain
