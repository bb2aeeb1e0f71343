"""nf4, fp4 and bnb-int8 store what bitsandbytes stores, and bitsandbytes reads it."""

from __future__ import annotations

from typing import Any, Literal

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
)
from torch import Tensor
from torch.nn import functional

from bitroute.backends import create
from bitroute.backends._table import table
from bitroute.backends.base import Backend, TensorSpec

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPE = (73, 384)  # 28032 elements: neither the blocks of 16384 nor the rows come out even


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even these small weights are encoded in several blocks of rows."""
    monkeypatch.setattr("bitroute.backends.base.BLOCK_ELEMENTS", 2048)


def spec_of(weight: Tensor) -> TensorSpec:
    return TensorSpec(tuple(weight.shape), weight.dtype)


def weight_of(kind: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(SHAPE, generator=generator) * 0.02
    if kind == "student-t":
        weight = weight / torch.rand(SHAPE, generator=generator).clamp(min=1e-3).sqrt()
    if kind == "zeros":
        weight = torch.zeros(SHAPE)
    if kind == "zero row":
        weight[5] = 0
    if kind == "outlier":
        weight[3, 100] = 50.0
    return weight.to(dtype)


def native(backend: Backend, weight: Tensor, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    record = backend.record(spec_of(weight))
    assert record is not None
    return {record.names[suffix]: tensor for suffix, tensor in stored.items()}


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("kind", ["gaussian", "student-t", "zeros", "zero row", "outlier"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("name", "block"), [("nf4", 32), ("nf4", 64), ("nf4", 128), ("fp4", 64)])
def test_four_bits_are_those_of_bitsandbytes(
    name: str, block: int, double_quant: bool, dtype: torch.dtype, kind: str
) -> None:
    weight = weight_of(kind, dtype)
    codes, state = quantize_4bit(weight, blocksize=block, compress_statistics=double_quant, quant_type=name)
    backend = create(name, block=block, double_quant=double_quant)
    stored = backend.quantize(weight)

    expected = {"codes": codes, **state.as_dict(packed=True)}
    del expected[f"quant_state.bitsandbytes__{name}"]
    assert_same_tensors({k: v for k, v in stored.items() if k != "quant_state"}, expected)
    decoded = backend.decode(stored, spec_of(weight))
    assert torch.equal(decoded.to(dtype), dequantize_4bit(codes, state))
    assert decoded.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"scale": "mse"}, {"scale": "mse", "block": 32}], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_bitsandbytes_reads_the_padded_quant_state(name: str, double_quant: bool, options: dict[str, Any]) -> None:
    weight = weight_of("gaussian", torch.bfloat16)
    backend = create(name, double_quant=double_quant, **options)
    stored = backend.quantize(weight)
    tensors = native(backend, weight, stored)

    codes = tensors.pop("weight")
    state = QuantState.from_dict(tensors, device=torch.device("cpu"))

    assert (state.dtype, tuple(state.shape), state.nested) == (torch.bfloat16, SHAPE, double_quant)
    decoded = backend.decode(stored, spec_of(weight))
    assert torch.equal(dequantize_4bit(codes, state), decoded.bfloat16())


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_bitsandbytes_layer_has_the_same_tensors_under_the_same_names(double_quant: bool) -> None:
    weight = weight_of("gaussian", torch.bfloat16)
    layer = bnb.nn.Linear4bit(SHAPE[1], SHAPE[0], bias=False, quant_type="nf4", compress_statistics=double_quant)
    layer.weight.data = weight
    expected = layer.to("cpu").state_dict()
    backend = create("nf4", double_quant=double_quant)

    got = native(backend, weight, backend.quantize(weight))

    json_name = "weight.quant_state.bitsandbytes__nf4"
    assert bytes(got[json_name].tolist()).rstrip() == bytes(expected[json_name].tolist())
    got[json_name] = expected[json_name]
    assert_same_tensors(got, expected)


@pytest.mark.parametrize("shape", [(64, 32), (64, 96), (1, 1), (10, 1000)])
def test_rows_of_broken_blocks_are_refused(shape: tuple[int, int]) -> None:
    reason = create("nf4").refuse(TensorSpec(shape, torch.bfloat16))
    assert reason is not None
    assert f"rows of {shape[1]}" in reason


def test_blocks_of_64_take_rows_that_blocks_of_128_refuse() -> None:
    spec = TensorSpec((64, 320), torch.bfloat16)
    assert create("nf4", block=64).refuse(spec) is None
    assert create("nf4", block=128).refuse(spec) is not None


def test_double_quantization_saves_0_37_bits_per_weight() -> None:
    spec = TensorSpec((3072, 3072), torch.bfloat16)

    def bits(double_quant: bool) -> float:
        outputs = create("nf4", double_quant=double_quant).outputs(spec)
        return 8 * sum(output.size_bytes for output in outputs.values()) / spec.numel

    assert bits(True) == pytest.approx(4.127, abs=2e-3)
    assert bits(False) == pytest.approx(4.5, abs=2e-3)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_the_kernel_of_bitsandbytes_multiplies_the_decoded_weight(name: str, double_quant: bool) -> None:
    weight = weight_of("gaussian", torch.bfloat16)
    backend = create(name, double_quant=double_quant)
    stored, spec = backend.quantize(weight), spec_of(weight)
    x = torch.randn(3, SHAPE[1], generator=torch.Generator().manual_seed(1))

    state = backend.quant_state(stored, spec, torch.float32)  # type: ignore[attr-defined]
    product = bnb.matmul_4bit(x, stored["codes"], state)

    torch.testing.assert_close(product, functional.linear(x, backend.decode(stored, spec)))


def test_weights_loaded_over_others_in_place_bring_their_own_mean() -> None:
    backend = create("nf4")
    first, second = weight_of("gaussian", torch.bfloat16), weight_of("student-t", torch.bfloat16)
    layer = backend.attach(torch.nn.Linear(SHAPE[1], SHAPE[0]), backend.quantize(first))
    other, identity = backend.quantize(second), torch.eye(SHAPE[1])
    before = layer(identity)

    layer.load_state_dict({**other, "bias": torch.zeros(SHAPE[0])})

    assert not torch.equal(layer(identity), before)
    assert torch.equal(layer(identity).T, backend.decode(other, spec_of(second)))


@pytest.mark.parametrize("kind", ["gaussian", "student-t", "zeros", "zero row", "outlier"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bits_are_those_of_bitsandbytes(dtype: torch.dtype, kind: str) -> None:
    weight = weight_of(kind, dtype)
    codes, amax, _ = int8_vectorwise_quant(weight.half())
    backend = create("bnb-int8")

    stored = backend.quantize(weight)

    assert_same_tensors({k: stored[k] for k in ("codes", "SCB")}, {"codes": codes, "SCB": amax})
    decoded = backend.decode(stored, spec_of(weight))
    assert torch.equal(decoded, int8_vectorwise_dequant(codes, amax))
    assert torch.equal(decoded == 0, codes == 0)
    assert ((decoded - weight.half()).abs() <= amax[:, None] / 253).all()


def test_a_bitsandbytes_int8_layer_has_the_same_tensors_under_the_same_names() -> None:
    weight = weight_of("gaussian", torch.bfloat16)
    layer = bnb.nn.Linear8bitLt(SHAPE[1], SHAPE[0], bias=False, has_fp16_weights=False)
    layer.weight.data = weight
    backend = create("bnb-int8")

    got = native(backend, weight, backend.quantize(weight))

    assert_same_tensors(got, layer.to("cpu").state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("amax", [1e-38, 1e-20, 1e-7, 6e-5, 65520.0, 1e6, 1e30, 1e37, 3.3e38])
def test_a_row_outside_the_range_of_fp16_keeps_its_accuracy(amax: float, dtype: torch.dtype) -> None:
    weight = weight_of("gaussian", dtype)
    weight[2] *= amax / weight[2].abs().max()
    backend = create("bnb-int8")

    stored = backend.quantize(weight)

    error = (backend.decode(stored, spec_of(weight)) - weight.float()).abs().amax(dim=1)
    assert (error <= weight.float().abs().amax(dim=1) / 235).all()
    untouched = backend.quantize(weight[3:])
    assert torch.equal(stored["codes"][3:], untouched["codes"])


@pytest.mark.parametrize("amax", [2.0**-14, 65504.0])
def test_a_row_at_the_edge_of_fp16_is_that_of_bitsandbytes(amax: float) -> None:
    weight = weight_of("gaussian", torch.float32)
    weight *= amax / weight.abs().amax(dim=1, keepdim=True)
    weight[:, 0] = amax
    codes, scale, _ = int8_vectorwise_quant(weight.half())
    stored = create("bnb-int8").quantize(weight)
    assert_same_tensors({k: stored[k] for k in ("codes", "SCB")}, {"codes": codes, "SCB": scale})


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_double_quantization_of_the_largest_numbers_beside_zeros_stays_finite(name: str) -> None:
    largest = torch.finfo(torch.float32).max
    weight = weight_of("gaussian", torch.float32).sign() * largest
    weight[::9] = 0
    weight[4] *= 0.93
    backend = create(name)
    decoded = backend.decode(backend.quantize(weight), spec_of(weight))
    assert decoded.isfinite().all()
    assert (decoded / largest - weight / largest).abs().max() < 0.02


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_nearest_number_is_exact_for_every_first_half_of_a_float(quant_type: Literal["nf4", "fp4"]) -> None:
    found = table(quant_type, torch.device("cpu"))
    heads = torch.arange(1 << 16, dtype=torch.int32) << 16
    bounds = found.bounds.view(torch.int32)
    tails = (heads, heads + 1, heads | 0x7FFF, heads | 0x8000, heads | 0xFFFF, bounds - 1, bounds, bounds + 1)
    values = torch.cat(tails).view(torch.float32)
    values = values[~values.isnan()]
    assert torch.equal(found.nearest(values).long(), torch.bucketize(values, found.bounds))
