"""Every backend with every option keeps the contract of backends/base.py; a new one is found by its file."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bitroute.backends import available, create, find
from bitroute.backends.base import Backend, TensorSpec
from bitroute.errors import BackendError

SHAPE = (48, 384)  # every backend takes it
SPEC = TensorSpec(SHAPE, torch.bfloat16)
FLOATS = [torch.bfloat16, torch.float16, torch.float32]

# ||w - ŵ|| / ||w|| in percent of Gaussian weights of standard deviation 0.02, [4096, 3072] in bf16
ERROR_PERCENT = {
    "bnb-int8": 0.85,
    "float8": 2.65,
    "float8 granularity=tensor": 2.65,
    "fp4": 12.19,
    "fp4 scale=mse": 11.26,
    "int4": 10.77,
    "int4 group=32": 9.71,
    "int4 group=128": 11.74,
    "int4 scale=mse": 9.00,
    "int4 zero=hqq": 8.59,
    "int4 zero=minmax": 8.98,
    "int6": 2.43,
    "int6 scale=mse": 2.28,
    "int8": 0.85,
    "int8-group": 0.65,
    "mxfp4": 11.39,
    "mxfp4 scale=ceil": 13.67,
    "mxfp4 scale=even": 11.21,
    "mxfp4 scale=mse": 11.14,
    "mxfp4 scale=rceil": 11.85,
    "mxfp6": 2.81,
    "mxfp6 element=e3m2": 5.38,
    "mxfp6 scale=even": 2.80,
    "mxfp6 scale=mse": 2.80,
    "mxfp8": 2.92,
    "mxfp8 element=e5m2": 5.38,
    "mxfp8 scale=rceil": 2.66,
    "nf4": 9.20,
    "nf4 block=32": 8.73,
    "nf4 scale=mse": 8.49,
    "nvfp4": 9.51,
    "nvfp4 scale=four-over-six": 8.70,
    "nvfp4 scale=mse": 8.13,
    "quanto-float8": 2.65,
    "quanto-int4": 9.99,
    "quanto-int8": 0.90,  # 0.86 in float32; quanto divides in bf16
}


def options_of(backend: type[Backend]) -> list[dict[str, Any]]:
    """The defaults, then each other value of each option that has a list of them."""
    hints = get_type_hints(backend)
    found: list[dict[str, Any]] = [{}]
    for option in dataclasses.fields(backend):  # type: ignore[arg-type]
        hint = hints[option.name]
        values = get_args(hint) if get_origin(hint) is Literal else (True, False) if hint is bool else ()
        found += [{option.name: value} for value in values if value != option.default]
    return found


def label(backend: Backend) -> str:
    return " ".join([backend.name, *(f"{option}={value}" for option, value in backend.options.items())])


CREATED = [create(name, **options) for name in available() for options in options_of(find(name))]
BACKENDS = [backend for backend in CREATED if not backend.measured]  # those that need no statistics
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=label)
every_quantizing_backend = pytest.mark.parametrize(
    "backend", [backend for backend in BACKENDS if "weight" not in backend.outputs(SPEC)], ids=label
)


def gaussian(shape: tuple[int, int] = SHAPE, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(11)) * 0.02).to(dtype)


def spec_of(weight: Tensor) -> TensorSpec:
    return TensorSpec(tuple(weight.shape), weight.dtype)


def roundtrip(backend: Backend, weight: Tensor) -> Tensor:
    return backend.decode(backend.quantize(weight), spec_of(weight))


def error_percent(backend: Backend, weight: Tensor) -> float:
    return 100 * float((roundtrip(backend, weight) - weight.float()).norm() / weight.float().norm())


def attached(backend: Backend, bias: bool = True) -> Any:
    """The layer that runs after loading; a backend that stores a plain weight leaves the layer as it is."""
    layer = nn.Linear(SHAPE[1], SHAPE[0], bias=bias, dtype=torch.bfloat16)
    layer.weight.data = gaussian()
    stored = backend.quantize(layer.weight.detach())
    if "weight" in stored:
        layer.weight.data = stored["weight"]
        return layer.to(stored["weight"].dtype)
    return backend.attach(layer, stored)


@every_backend
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [SHAPE, (37, 384), (5, 96), (1, 64), (7, 100), (3, 33), (48, 1)])
def test_a_shape_is_stored_as_planned_or_refused_by_name(
    backend: Backend, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = gaussian(shape, dtype)
    sentence = backend.refuse(spec_of(weight))
    if sentence is not None:
        named = [*map(str, shape), *(["one"] if 1 in shape else [])]
        assert shape != SHAPE
        assert any(number in sentence.split() or f"{number}," in sentence.split() for number in named), sentence
        with pytest.raises(BackendError, match=re.escape(sentence)):
            backend.quantize(weight)
        return
    planned, stored = backend.outputs(spec_of(weight)), backend.quantize(weight)
    assert {suffix: spec_of(tensor) for suffix, tensor in stored.items()} == planned
    decoded = backend.decode(stored, spec_of(weight))
    assert spec_of(decoded) == TensorSpec(shape, torch.float32)


@every_backend
@pytest.mark.parametrize("shape", [(0, 384), (48, 0)])
def test_an_empty_weight_is_kept_or_refused_in_words(backend: Backend, shape: tuple[int, int]) -> None:
    weight = torch.empty(shape, dtype=torch.bfloat16)
    if backend.name == "keep":
        assert backend.quantize(weight)["weight"].shape == shape
        return
    with pytest.raises(BackendError, match=re.escape(f"its weight is empty, {list(shape)}")):
        backend.quantize(weight)


@every_quantizing_backend
def test_a_float64_weight_is_stored_as_its_float32(backend: Backend) -> None:
    weight = gaussian(dtype=torch.float32)
    assert_same(backend.quantize(weight.double()), backend.quantize(weight))
    with pytest.raises(BackendError, match=r"1e\+60 does not fit float32"):
        backend.quantize(torch.full(SHAPE, 1e60, dtype=torch.float64))


@every_backend
def test_a_transposed_weight_with_a_gradient_is_stored_like_any_other(backend: Backend) -> None:
    weight = gaussian()
    stored = backend.quantize(nn.Parameter(weight.t().contiguous()).t())
    assert_same(stored, backend.quantize(weight))
    assert not any(tensor.requires_grad for tensor in stored.values())


@every_backend
@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_no_input_gives_no_output(backend: Backend, batch: tuple[int, ...]) -> None:
    x = torch.empty(*batch, SHAPE[1], dtype=torch.bfloat16)
    result = backend.linear(x, backend.quantize(gaussian()), SPEC, None)
    assert result.shape == (*batch, SHAPE[0])


@every_backend
def test_blocks_of_rows_encode_to_the_same_bytes_as_the_whole(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = gaussian()
    monkeypatch.setattr("bitroute.backends.base.BLOCK_ELEMENTS", weight.numel())
    whole = backend.quantize(weight)
    monkeypatch.setattr("bitroute.backends.base.BLOCK_ELEMENTS", 5 * weight.shape[1])
    assert len(list(backend.block_bounds(spec_of(weight)))) > 1
    blockwise = backend.quantize(weight)
    assert_same(blockwise, whole)
    assert torch.equal(backend.decode(whole, spec_of(weight)), backend.decode(blockwise, spec_of(weight)))


def assert_same(stored: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert stored.keys() == expected.keys()
    for suffix, tensor in expected.items():
        assert torch.equal(_bytes(stored[suffix]), _bytes(tensor)), suffix


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@every_backend
@pytest.mark.parametrize("dtype", FLOATS)
def test_an_all_zero_row_decodes_to_zeros(backend: Backend, dtype: torch.dtype) -> None:
    weight = gaussian(dtype=dtype)
    weight[5] = 0
    decoded = roundtrip(backend, weight)
    assert decoded.isfinite().all()
    assert decoded[5].count_nonzero() == 0


@every_backend
def test_an_all_zero_weight_decodes_to_zeros(backend: Backend) -> None:
    stored = backend.quantize(torch.zeros(SHAPE, dtype=torch.bfloat16))
    assert all(tensor.float().isfinite().all() for tensor in stored.values())
    decoded = backend.decode(stored, SPEC)
    assert torch.equal(decoded, torch.zeros(SHAPE))


@every_backend
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["outlier", "subnormal", "student-t"])
def test_harsh_weights_stay_finite(backend: Backend, kind: str, dtype: torch.dtype) -> None:
    weight = gaussian(dtype=torch.float32)
    if kind == "outlier":
        weight[7, 19] = 3e4
    elif kind == "subnormal":
        weight *= 2e-4 if dtype == torch.float16 else 1e-37
    else:
        degrees = torch.rand(SHAPE, generator=torch.Generator().manual_seed(2))
        weight /= degrees.clamp(min=1e-6).sqrt()
    decoded = roundtrip(backend, weight.to(dtype))
    assert decoded.isfinite().all()
    assert decoded.abs().max() <= 1.5 * weight.abs().max() + 1e-7


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["a tenth", "a few", "only"])
def test_the_largest_numbers_decode_to_finite_ones_or_are_refused(
    backend: Backend, kind: str, dtype: torch.dtype
) -> None:
    weight = gaussian(dtype=torch.float64)
    weight /= weight.abs().max() * (10 if kind == "a tenth" else 1)
    weight = ((weight.sign() if kind == "only" else weight) * torch.finfo(dtype).max).to(dtype)
    try:
        stored = backend.quantize(weight)
    except BackendError as error:
        assert kind != "a tenth" or backend.options == {"dtype": "float16"}
        assert "does not fit" in str(error) or "too large" in str(error)
        return
    decoded = backend.decode(stored, spec_of(weight))
    assert decoded.isfinite().all()
    assert float((decoded.double() - weight.double()).norm() / weight.double().norm()) < 0.3


@every_backend
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_gaussian_weight_decodes_well_above_the_backends_floor(backend: Backend, dtype: torch.dtype) -> None:
    error = error_percent(backend, gaussian(dtype=dtype)) / 100
    assert -20 * math.log10(max(error, 1e-9)) > backend.lowest_sqnr_db + 2


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if label(backend) in ERROR_PERCENT], ids=label)
def test_the_error_on_gaussian_weights_is_the_measured_one(backend: Backend) -> None:
    assert error_percent(backend, gaussian((64, 3072))) == pytest.approx(ERROR_PERCENT[label(backend)], rel=0.03)


@every_backend
def test_the_attached_layer_multiplies_by_the_decoded_weight(backend: Backend) -> None:
    layer = attached(backend)
    x = torch.randn(2, 3, SHAPE[1], generator=torch.Generator().manual_seed(4)).to(layer.weight.dtype)
    x[0, 0] = 0
    with torch.no_grad():
        result = layer(x)
        expected = functional.linear(x.float(), roundtrip(backend, gaussian()), layer.bias.float())
    plain = backend.options.get("activations", "none") == "none"
    assert result.dtype == x.dtype
    assert result.isfinite().all()
    assert float((result.float() - expected).norm() / expected.norm()) < (0.01 if plain else 0.25)


@every_backend
@pytest.mark.parametrize("bias", [True, False])
def test_the_attached_layer_has_exactly_the_stored_tensors(backend: Backend, bias: bool) -> None:
    suffixes = set(backend.outputs(SPEC))
    assert set(attached(backend, bias).state_dict()) == suffixes | ({"bias"} if bias else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@every_quantizing_backend
def test_casting_the_attached_layer_leaves_what_is_stored(backend: Backend, dtype: torch.dtype) -> None:
    layer = attached(backend)
    before = {suffix: tensor.clone() for suffix, tensor in layer.state_dict().items() if suffix != "bias"}
    layer.to(dtype)
    after = layer.state_dict()
    for suffix, tensor in before.items():
        assert after[suffix].dtype == tensor.dtype, suffix
        assert torch.equal(_bytes(after[suffix]), _bytes(tensor)), suffix
    assert layer.bias.dtype == dtype


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.record(SPEC)], ids=label)
def test_the_native_record_names_every_output_once(backend: Backend) -> None:
    record = backend.record(SPEC)
    assert record is not None
    assert record.names.keys() == backend.outputs(SPEC).keys()
    assert len(set(record.names.values())) == len(record.names)


def test_an_option_may_have_any_name() -> None:
    with pytest.raises(BackendError, match="has no option 'name'"):
        create("int8", name="nf4")
