"""keep copies a weight, casts it on request, and never loses a number silently."""

from __future__ import annotations

import pytest
import torch

from bitroute.backends import create
from bitroute.backends.base import TensorSpec
from bitroute.errors import BackendError


@pytest.mark.parametrize(
    ("dtype", "source", "value"),
    [
        ("float16", torch.float32, 1e5),
        ("float16", torch.bfloat16, -1e5),
        ("bfloat16", torch.float32, 3.4e38),
        ("float32", torch.float64, 1e60),
    ],
)
def test_a_finite_number_that_a_cast_makes_infinite_is_refused(dtype: str, source: torch.dtype, value: float) -> None:
    weight = torch.zeros(4, 8, dtype=source)
    weight[1, 2], weight[0, 0] = value, torch.inf
    with pytest.raises(BackendError) as error:
        create("keep", dtype=dtype).quantize(weight)
    assert f"{weight[1, 2].item():g} does not fit {dtype}" in str(error.value)
    assert "source" in error.value.problems[0].next_step


def test_what_is_no_finite_number_in_the_source_stays_so() -> None:
    weight = torch.tensor([[torch.inf, -torch.inf, torch.nan, 65504.0]])
    stored = create("keep", dtype="float16").quantize(weight)["weight"]
    assert torch.equal(stored.view(torch.int16), weight.half().view(torch.int16))


@pytest.mark.parametrize("source", [torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "source"])
def test_only_floats_are_cast(dtype: str, source: torch.dtype) -> None:
    weight = torch.tensor([[0, 1], [200, 100_000]]).to(source)
    backend = create("keep", dtype=dtype)
    stored = backend.quantize(weight)["weight"]
    assert stored.dtype == source
    assert torch.equal(stored, weight)
    assert backend.outputs(TensorSpec((2, 2), source)) == {"weight": TensorSpec((2, 2), source)}


def test_float64_is_kept_as_it_is() -> None:
    weight = torch.tensor([[1e300, 1 + 2.0**-50]], dtype=torch.float64)
    assert torch.equal(create("keep").quantize(weight)["weight"], weight)
