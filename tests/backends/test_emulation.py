"""Emulated products are those of the decoded operands: exact, whatever torch is told to do with float32."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from torchao.quantization import Float8Tensor, Int8Tensor, PerRow, PerTensor

from bitroute.backends import create
from bitroute.backends.base import Backend, Statistics, TensorSpec
from bitroute.backends.float8 import Float8
from bitroute.errors import BackendError

SPEC = TensorSpec((48, 1536), torch.bfloat16)
CPU = torch.device("cpu")


def nvfp4(x: Tensor) -> Tensor:
    return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().amax())).dequantize(torch.float32)


def mx(element: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: MXTensor.to_mx(x, element, scaling_mode=ScaleCalculationMode.RCEIL).dequantize(torch.float32)


def float8(granularity: PerRow | PerTensor) -> Callable[[Tensor], Tensor]:
    return lambda x: Float8Tensor.from_hp(x, granularity=granularity).dequantize(torch.float32)


def int8(x: Tensor) -> Tensor:
    found = Int8Tensor.from_hp(x, PerRow())
    return found.qdata.float() * found.scale


Case = tuple[str, dict[str, str], Callable[[Tensor], Tensor]]  # options, and what torchao makes of the activations
EMULATED: list[Case] = [
    ("int4", {"activations": "int8"}, int8),
    ("int4", {"activations": "int8", "zero": "minmax"}, int8),
    ("nvfp4", {"activations": "nvfp4"}, nvfp4),
    ("nvfp4", {"activations": "nvfp4", "scale": "mse"}, nvfp4),
    ("mxfp4", {"activations": "mxfp4"}, mx(torch.float4_e2m1fn_x2)),
    ("mxfp4", {"activations": "mxfp8"}, mx(torch.float8_e4m3fn)),
    ("mxfp6", {"activations": "mxfp8"}, mx(torch.float8_e4m3fn)),
    ("mxfp8", {"activations": "mxfp8"}, mx(torch.float8_e4m3fn)),
]
FLOAT8: list[Case] = [
    ("float8", {"activations": "dynamic"}, float8(PerRow())),
    ("float8", {"activations": "dynamic", "granularity": "tensor"}, float8(PerTensor())),
]
each_emulated = pytest.mark.parametrize("case", EMULATED, ids=lambda case: f"{case[0]} {case[1]}")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def weight() -> Tensor:
    return (normal(*SPEC.shape) * 0.02).bfloat16()


def products(backend: Backend, x: Tensor, theirs: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """What the backend answers, and the float64 product of what it decodes with what torchao makes of the input."""
    stored, bias = backend.quantize(weight()), normal(SPEC.shape[0])
    expected = theirs(x).double() @ backend.decode(stored, SPEC).double().T + bias.double()
    return backend.linear(x, stored, SPEC, bias), expected


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """As near as the dtype of the result allows; before it is rounded, 1e-6 of the norm."""
    rounded = expected.to(found.dtype).double()
    assert (found.double() - rounded).norm() <= max(1e-6, torch.finfo(found.dtype).eps / 10) * rounded.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_emulated
def test_the_output_is_the_exact_product_of_decoded_operands(case: Case, dtype: torch.dtype) -> None:
    name, options, theirs = case
    found, expected = products(create(name, **options), normal(5, SPEC.shape[1]).to(dtype), theirs)
    assert found.dtype == dtype
    assert_equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", FLOAT8, ids=lambda case: f"{case[0]} {case[1]}")
def test_float8_is_exact_where_the_device_multiplies_it_and_where_it_is_emulated(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options, theirs = case
    x, backend = normal(5, SPEC.shape[1]).to(dtype), create(name, **options)
    assert not backend.emulates(CPU)
    assert_equal(*products(backend, x, theirs))
    monkeypatch.setattr(Float8, "emulates", lambda self, device: True)
    assert_equal(*products(backend, x, theirs))
    batched = backend.linear(x.reshape(5, 1, -1), backend.quantize(weight()), SPEC, None)
    assert batched.shape == (5, 1, SPEC.shape[0])


@pytest.fixture
def hasty() -> Iterator[None]:
    """torch multiplies float32 in bf16 or TF32 where it can."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@each_emulated
def test_the_precision_that_torch_is_set_to_and_autocast_change_nothing(case: Case, hasty: None) -> None:
    backend, x, bias = create(case[0], **case[1]), normal(5, SPEC.shape[1]), normal(SPEC.shape[0])
    stored = backend.quantize(weight())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = backend.linear(x, stored, SPEC, bias)
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, backend.linear(x, stored, SPEC, bias))


def test_a_token_of_zeros_gives_the_bias_and_others_do_not_change_it() -> None:
    backend, x = create("int4", activations="int8"), normal(2, 3, SPEC.shape[1])
    x[1, 2] = 0
    stored, bias = backend.quantize(normal(*SPEC.shape)), normal(SPEC.shape[0])
    found = backend.linear(x, stored, SPEC, bias)
    assert torch.equal(found[1, 2], bias)
    alone = backend.linear(x[:1, :1] * 1000, stored, SPEC, None)
    assert torch.allclose(alone, 1000 * (found[:1, :1] - bias), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", ["float8", "nvfp4"])
def test_static_activations_have_the_scale_of_the_largest_input_in_calibration(name: str) -> None:
    backend, x = create(name, activations="static"), normal(5, SPEC.shape[1])
    statistics = Statistics(absmax=x.abs().amax(0))
    stored = backend.quantize(weight(), statistics)
    assert backend.measured == {"absmax"} and backend.emulates(CPU)
    assert {suffix: (tensor.shape, tensor.dtype) for suffix, tensor in stored.items()} == {
        suffix: (spec.shape, spec.dtype) for suffix, spec in backend.outputs(SPEC).items()
    }
    theirs = {"float8": float8(PerTensor()), "nvfp4": nvfp4}[name]
    whole = theirs(x)  # the same amax as in calibration, so the same as with a scale from the input
    decoded = backend.decode(stored, SPEC).double()
    assert_equal(backend.linear(x, stored, SPEC, None), whole.double() @ decoded.T)
    assert_equal(backend.linear(x[2:3], stored, SPEC, None), whole[2:3].double() @ decoded.T)
    assert backend.linear(x * 100, stored, SPEC, None).isfinite().all()  # saturates
    with pytest.raises(BackendError, match="static activations has no statistics to go by"):
        backend.quantize(weight())


def test_torchao_reads_the_static_scale_of_nvfp4_and_float8_has_no_native_form() -> None:
    backend = create("nvfp4", activations="static")
    stored, record = (
        backend.quantize(weight(), Statistics(absmax=torch.full((SPEC.shape[1],), 3.0))),
        backend.record(SPEC),
    )
    assert record is not None
    tensors, left_over = unflatten_tensor_state_dict(
        {f"layer.{record.names[suffix]}": tensor for suffix, tensor in stored.items()},
        {"tensor_names": json.dumps(["layer.weight"]), "layer.weight": json.dumps(record.header)},
    )
    native = tensors["layer.weight"]
    assert not left_over
    assert native.act_per_tensor_scale == per_tensor_amax_to_scale(torch.tensor(3.0))
    assert not native.act_quant_kwargs.use_dynamic_per_tensor_scale
    assert create("float8", activations="static").record(SPEC) is None


def test_a_compiled_layer_is_one_graph() -> None:
    backend, layer = create("nvfp4", activations="nvfp4"), torch.nn.Linear(64, 32)
    found = backend.attach(layer, backend.quantize(layer.weight.detach()))
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(normal(3, 64)), found(normal(3, 64)), rtol=1e-5, atol=1e-6)


def test_only_what_the_device_does_not_multiply_is_said_to_be_emulated() -> None:
    others = torch.device("mps")
    assert create("float8", activations="dynamic").emulates(others)
    assert not create("int8", activations="dynamic").emulates(others)
    assert all(create(name, **options).emulates(CPU) for name, options, _ in EMULATED)
    assert not any(create(name).emulates(others) for name in ("int4", "nvfp4", "mxfp4", "mxfp6", "mxfp8", "float8"))
