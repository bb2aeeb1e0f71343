"""float8 and int8 are torchao's own tensors, bit for bit, however the rows are cut into blocks."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from torchao.quantization import Float8Tensor, Int8Tensor, PerRow, PerTensor

from bitroute import backends
from bitroute.backends.base import Backend, TensorSpec

SHAPE = (1037, 640)  # more rows than one block holds, and an odd number of them


def weights(kind: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator) * 0.02
    if kind == "heavy-tailed":
        weight = weight / torch.rand(SHAPE, generator=generator).clamp_min(1e-3)
    if kind == "one outlier":
        weight[5, 7] = 900.0
    if kind == "subnormal":
        weight[::2] *= 1e-30
    return weight.to(dtype)


KINDS = ("gaussian", "heavy-tailed", "one outlier")
DTYPES = (torch.bfloat16, torch.float32)


def native(backend: Backend, weight: Tensor) -> Tensor:
    """The weight as torchao's own reader rebuilds it from what we store."""
    record = backend.record(TensorSpec(tuple(weight.shape), weight.dtype))
    assert record is not None
    stored = {f"x.{record.names[suffix]}": tensor for suffix, tensor in backend.quantize(weight).items()}
    metadata = {"tensor_names": json.dumps(["x.weight"]), "x.weight": json.dumps(record.header)}
    rebuilt: Tensor = unflatten_tensor_state_dict(stored, metadata)[0]["x.weight"]
    return rebuilt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("granularity", "theirs"), [("row", PerRow()), ("tensor", PerTensor())])
def test_float8_equals_torchao(kind: str, dtype: torch.dtype, granularity: str, theirs: PerRow | PerTensor) -> None:
    weight = weights(kind, dtype)
    stored = backends.create("float8", granularity=granularity).quantize(weight)
    reference = Float8Tensor.from_hp(weight, granularity=theirs)
    assert torch.equal(stored["qdata"].view(torch.uint8), reference.qdata.view(torch.uint8))
    assert torch.equal(stored["scale"], reference.scale)


@pytest.mark.parametrize("kind", [*KINDS, "subnormal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_equals_torchao(kind: str, dtype: torch.dtype) -> None:
    weight = weights(kind, dtype)
    stored = backends.create("int8").quantize(weight)
    reference = Int8Tensor.from_hp(weight, PerRow())
    assert torch.equal(stored["qdata"], reference.qdata)
    assert torch.equal(stored["scale"], reference.scale)


def test_a_zero_row_of_float8_is_zeros_where_torchao_gives_nan_and_changes_no_other_row() -> None:
    weight = weights("gaussian", torch.bfloat16)
    weight[3] = 0
    backend = backends.create("float8")
    stored = backend.quantize(weight)
    reference = Float8Tensor.from_hp(weight, granularity=PerRow())
    assert reference.dequantize()[3].isnan().all()
    assert (backend.decode(stored, TensorSpec(SHAPE, torch.bfloat16))[3] == 0).all()
    others = torch.arange(SHAPE[0]) != 3
    assert torch.equal(stored["qdata"][others].view(torch.uint8), reference.qdata[others].view(torch.uint8))
    assert torch.equal(stored["scale"][others], reference.scale[others])


@pytest.mark.parametrize(
    ("name", "options"),
    [("float8", {}), ("float8", {"granularity": "tensor"}), ("float8", {"activations": "dynamic"}),
     ("float8", {"granularity": "tensor", "activations": "dynamic"}), ("int8", {}),
     ("int8", {"activations": "dynamic"})],
)  # fmt: skip
def test_what_torchao_reads_back_runs_as_our_layer_does(name: str, options: dict[str, str]) -> None:
    weight = weights("gaussian", torch.bfloat16)
    backend = backends.create(name, **options)
    rebuilt = native(backend, weight)
    spec = TensorSpec(SHAPE, torch.bfloat16)
    decoded = backend.decode(backend.quantize(weight), spec)
    assert torch.equal(rebuilt.dequantize(), decoded.bfloat16())
    x = torch.randn(33, SHAPE[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    x[4] = 0  # a padded prompt row must not become NaN
    theirs = functional.linear(x, rebuilt)
    ours = backend.linear(x, backend.quantize(weight), spec, None)
    assert theirs.isfinite().all()
    assert (theirs.float() - ours.float()).norm() <= 0.01 * theirs.float().norm()
