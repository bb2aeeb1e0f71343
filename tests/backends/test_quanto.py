"""quanto-int8, quanto-int4 and quanto-float8 store what optimum-quanto stores."""

from __future__ import annotations

import optimum.quanto
import pytest
import torch
from optimum.quanto import MaxOptimizer, qint4, quantize_weight
from torch import Tensor

from bitroute.backends import create
from bitroute.backends.base import Backend, TensorSpec
from bitroute.errors import BackendError

QTYPES = {
    "quanto-int8": optimum.quanto.qint8,
    "quanto-float8": optimum.quanto.qfloat8,
    "quanto-int4": optimum.quanto.qint4,
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even these small weights are encoded in several blocks of rows."""
    monkeypatch.setattr("bitroute.backends.base.BLOCK_ELEMENTS", 2048)


def spec_of(weight: Tensor) -> TensorSpec:
    return TensorSpec(tuple(weight.shape), weight.dtype)


def weight_of(kind: str, dtype: torch.dtype, shape: tuple[int, int] = (73, 192)) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(shape, generator=generator) * 0.02
    if kind == "student-t":
        weight = weight / torch.rand(shape, generator=generator).clamp(min=1e-3).sqrt()
    if kind == "outlier":
        weight[3, 100] = 50.0
    return weight.to(dtype)


def frozen(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors of a layer that quanto itself quantized in bf16."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    layer.weight.data = weight.bfloat16()
    model = torch.nn.Sequential(layer)
    optimum.quanto.quantize(model, weights=QTYPES[name])
    optimum.quanto.freeze(model)
    return {key.removeprefix("0."): tensor for key, tensor in model.state_dict().items()}


def native(backend: Backend, weight: Tensor, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    record = backend.record(spec_of(weight))
    assert record is not None
    return {record.names[suffix]: tensor for suffix, tensor in stored.items()}


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got[name].float(), tensor.float()), name


@pytest.mark.parametrize("kind", ["gaussian", "student-t", "outlier"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", QTYPES)
def test_a_layer_that_quanto_froze_has_the_same_tensors_under_the_same_names(
    name: str, dtype: torch.dtype, kind: str
) -> None:
    weight = weight_of(kind, dtype)
    backend = create(name)
    stored = backend.quantize(weight)
    assert_same_tensors(native(backend, weight, stored), frozen(name, weight))


@pytest.mark.parametrize("columns", [32, 128, 130, 160, 192, 288, 1000])
def test_int4_groups_are_those_of_quanto(columns: int) -> None:
    weight = weight_of("gaussian", torch.bfloat16, (7, max(columns, 101)))[:, :columns].contiguous()
    backend = create("quanto-int4")
    stored = backend.quantize(weight)
    assert_same_tensors(native(backend, weight, stored), frozen("quanto-int4", weight))


def test_int4_groups_of_128_are_those_of_quanto_before_it_packs_them_for_a_kernel() -> None:
    weight = weight_of("gaussian", torch.bfloat16, (48, 384))
    scale, shift = MaxOptimizer()(weight, qint4, axis=0, group_size=128)
    expected = quantize_weight(weight, qtype=qint4, axis=0, scale=scale, shift=shift, group_size=128, optimized=False)
    stored = create("quanto-int4").quantize(weight)
    assert torch.equal(stored["data"], expected._data._data)
    assert torch.equal(stored["scale"], scale)
    assert torch.equal(stored["shift"], shift)


@pytest.mark.parametrize("name", ["quanto-int8", "quanto-float8"])
def test_eight_bits_decode_as_quanto_dequantizes(name: str) -> None:
    weight = weight_of("student-t", torch.bfloat16)
    backend = create(name)
    stored = backend.quantize(weight)
    scale = stored["scale"]
    expected = quantize_weight(weight, qtype=QTYPES[name], axis=0, scale=scale, optimized=False).dequantize()
    assert torch.equal(backend.decode(stored, spec_of(weight)).bfloat16(), expected)


@pytest.mark.parametrize("shape", [(7, 101), (9, 160), (48, 384)])
def test_int4_errs_by_half_a_step_and_the_rounding_of_bf16(shape: tuple[int, int]) -> None:
    weight = weight_of("student-t", torch.bfloat16, shape)
    backend = create("quanto-int4")
    stored = backend.quantize(weight)
    error = (backend.decode(stored, spec_of(weight)) - weight.float()).abs()
    groups = error.reshape(len(stored["scale"]), -1)
    assert (groups <= 0.6 * stored["scale"].float()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", QTYPES)
def test_zero_rows_and_constant_rows_survive(name: str, dtype: torch.dtype) -> None:
    weight = weight_of("gaussian", dtype)
    weight[5] = 0
    weight[6] = 0.5
    backend = create(name)
    decoded = backend.decode(backend.quantize(weight), spec_of(weight))
    assert torch.equal(decoded[5], torch.zeros(192))
    torch.testing.assert_close(decoded[6], torch.full((192,), 0.5), rtol=2**-8, atol=0)
    assert decoded.isfinite().all()


def test_int4_refuses_groups_of_128_in_rows_that_the_kernel_cannot_take() -> None:
    backend = create("quanto-int4")
    assert "sixteens" in str(backend.refuse(TensorSpec((40, 256), torch.bfloat16)))
    assert backend.refuse(TensorSpec((48, 256), torch.bfloat16)) is None
    assert backend.refuse(TensorSpec((40, 128), torch.bfloat16)) is None
    with pytest.raises(RuntimeError, match="16"):
        frozen("quanto-int4", torch.randn(40, 256))


@pytest.mark.parametrize("name", QTYPES)
def test_a_layer_with_one_output_is_refused(name: str) -> None:
    assert "one output" in str(create(name).refuse(TensorSpec((1, 64), torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int4_refuses_a_group_whose_range_overflows(dtype: torch.dtype) -> None:
    backend, weight = create("quanto-int4"), weight_of("gaussian", dtype)
    weight[3, :2] = torch.tensor([3.3e38, -3.3e38])
    with pytest.raises(BackendError, match="values too large for quanto-int4"):
        backend.quantize(weight)
    weight[3, 1] = 0
    assert backend.decode(backend.quantize(weight), spec_of(weight)).isfinite().all()
