"""The weight of a quantized layer is there for code that reads it, and decoded only for code that needs it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bitroute.backends.base import TensorSpec
from bitroute.backends.int8 import Int8

decodes: list[TensorSpec] = []


class Counting(Int8):
    """INT8 that notes every time it decodes."""

    def decode_rows(self, stored: Mapping[str, Tensor], weight: TensorSpec, start: int, stop: int) -> Tensor:
        decodes.append(weight)
        return super().decode_rows(stored, weight, start, stop)


class Careful(nn.Module):
    """Casts its input to the dtype of its layer, as transformers' T5 does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.wo: Any = layer

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.wo.weight, Tensor) and x.dtype != self.wo.weight.dtype:
            x = x.to(self.wo.weight.dtype)
        result: Tensor = self.wo(x)
        return result


@pytest.fixture
def layer() -> Any:
    torch.manual_seed(0)
    plain, backend = nn.Linear(96, 48, dtype=torch.bfloat16), Counting()
    attached = backend.attach(plain, backend.quantize(plain.weight))
    decodes.clear()
    return attached


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(1))


def test_shape_dtype_and_device_are_told_without_decoding(layer: Any) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    assert (weight.shape, weight.dtype, weight.device) == ((48, 96), torch.bfloat16, torch.device("cpu"))
    assert (weight.size(0), weight.dim()) == (48, 2)
    assert decodes == []


def test_a_forward_that_looks_at_the_dtype_decodes_once(layer: Any, x: Tensor) -> None:
    assert Careful(layer)(x).dtype == torch.bfloat16
    assert len(decodes) == 1


def test_everything_else_sees_the_decoded_weight(layer: Any, x: Tensor) -> None:
    decoded = layer.decoded()
    assert torch.equal(layer.weight, decoded)
    assert torch.equal(torch.cat([layer.weight, layer.weight]), torch.cat([decoded, decoded]))
    assert torch.equal(functional.linear(x.bfloat16(), layer.weight, layer.bias), layer(x.bfloat16()))
    assert layer.weight.tolist() == decoded.tolist()
    assert type(copy.deepcopy(layer.weight)) is Tensor
    assert layer.to(torch.float32).weight.numpy().shape == (48, 96)


def test_a_gradient_passes_through_the_weight(layer: Any, x: Tensor) -> None:
    x = x.bfloat16().requires_grad_()
    total: Any = functional.linear(x, layer.weight).sum()
    total.backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0, 0].float(), layer.decoded().float().sum(0), rtol=0.01, atol=0.01)


def test_a_copied_and_cast_model_runs_and_keeps_its_tensors(layer: Any, x: Tensor) -> None:
    model = Careful(layer)
    copied = copy.deepcopy(model).to(torch.float32)
    assert copied.wo.weight.dtype == torch.float32
    assert copied(x).dtype == torch.float32
    assert list(copied.state_dict()) == ["wo.bias", "wo.qdata", "wo.scale", "wo.zero_point"]
    assert copied.to("meta").wo.weight.device == torch.device("meta")


def test_a_compiled_model_is_one_graph_with_the_same_result(layer: Any, x: Tensor) -> None:
    model = Careful(layer)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
