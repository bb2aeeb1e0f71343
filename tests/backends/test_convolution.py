"""Convolutions run from stored rows [out, in·kernel]: the rows are torchao's, the layer is torch's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Float8Tensor, Int8Tensor, PerRow

from bitroute.backends import available, create, load
from bitroute.backends.layers import QuantizedConvolution, is_convolution

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {  # a convolution, and the size of a picture for it
    "1d": (lambda: nn.Conv1d(6, 10, 5, stride=2, padding=3), (17,)),
    "1×1": (lambda: nn.Conv2d(6, 10, 1), (5, 4)),
    "3×3": (lambda: nn.Conv2d(6, 10, 3, padding=1), (7, 8)),
    "without bias": (lambda: nn.Conv2d(6, 10, 3, bias=False), (7, 8)),
    "strided": (lambda: nn.Conv2d(6, 10, (3, 2), stride=(2, 3), padding=(0, 2)), (7, 8)),
    "dilated": (lambda: nn.Conv2d(6, 10, 3, dilation=2, padding="same"), (7, 8)),
    "3d": (lambda: nn.Conv3d(6, 10, (1, 3, 3), padding=(0, 1, 1)), (3, 5, 4)),
}
HOLD = ("float8", "int8")


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, size = LAYERS[request.param]
    return make().to(torch.bfloat16), torch.randn(2, 6, *size, dtype=torch.bfloat16)


def attach(backend: str, layer: Any) -> QuantizedConvolution:
    made = create(backend)
    found = made.attach(layer, made.quantize(layer.weight.flatten(1)))
    assert isinstance(found, QuantizedConvolution)
    return found


@pytest.mark.parametrize("backend", HOLD)
def test_the_output_is_that_of_the_layer_with_the_decoded_weight(backend: str, case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    found = attach(backend, layer)
    plain: Any = copy.deepcopy(layer)
    plain.weight.data = found.decoded()
    assert found.decoded().shape == layer.weight.shape
    assert not torch.equal(found.decoded(), layer.weight)
    assert torch.equal(found(x), plain(x))
    assert (found(x) - layer(x)).norm() < 0.05 * layer(x).norm()


def test_int8_rows_are_torchaos_of_the_weight_seen_as_rows(case: tuple[Any, Tensor]) -> None:
    rows = case[0].weight.detach().flatten(1)
    stored, theirs = create("int8").quantize(rows), Int8Tensor.from_hp(rows, PerRow())
    assert stored["scale"].shape == (len(rows), 1)  # one for each output channel
    assert torch.equal(stored["qdata"], theirs.qdata) and torch.equal(stored["scale"], theirs.scale)
    assert torch.equal(attach("int8", case[0]).decoded().flatten(1), theirs.dequantize())


def test_float8_rows_are_torchaos_of_the_weight_seen_as_rows(case: tuple[Any, Tensor]) -> None:
    rows = case[0].weight.detach().flatten(1)
    stored, theirs = create("float8").quantize(rows), Float8Tensor.from_hp(rows, granularity=PerRow())
    assert stored["scale"].shape == (len(rows), 1)
    assert torch.equal(stored["qdata"].view(torch.uint8), theirs.qdata.view(torch.uint8))
    assert torch.equal(stored["scale"], theirs.scale)
    assert torch.equal(attach("float8", case[0]).decoded().flatten(1), theirs.dequantize())


def test_a_row_of_zeros_gives_the_bias() -> None:
    layer = nn.Conv2d(3, 4, 3).to(torch.bfloat16)
    layer.weight.data[1] = 0
    found = attach("int8", layer)(torch.randn(1, 3, 5, 5, dtype=torch.bfloat16))
    assert layer.bias is not None and torch.equal(found[:, 1], layer.bias[1].expand(1, 3, 3))


def test_a_cast_leaves_codes_and_scales_alone(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    found = attach("int8", layer)
    before = {name: tensor.clone() for name, tensor in found.stored.items()}
    found.to(torch.float32)
    assert all(torch.equal(found.stored[name], tensor) for name, tensor in before.items())
    assert found.weight.dtype == torch.float32 and found.weight.shape == layer.weight.shape
    assert found(x.float()).dtype == torch.float32


def test_a_dequantized_model_has_its_own_layers_back(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    model = nn.Sequential(attach("float8", layer))
    expected = model(x)
    load.dequantize(model)
    assert type(model[0]) is type(layer) and repr(model[0]) == repr(layer)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
     nn.Linear(4, 4)],
    ids=["depthwise", "transposed", "reflecting", "linear"],
)  # fmt: skip
def test_other_layers_are_not_taken_for_convolutions(layer: nn.Module) -> None:
    assert not is_convolution(layer)


def test_only_formats_of_rows_hold_convolutions() -> None:
    refused = {name: create(name).refuse_convolution() for name in available()}
    held = {name for name, why in refused.items() if why is None}
    assert held >= {"float8", "int4", "int6", "int8", "int8-group", "keep"}
    assert held.isdisjoint({"nvfp4", "mxfp4", "fp4", "bnb-int8", "quanto-int8"})
    assert refused["nf4"] == "nf4 holds linear layers only"


@pytest.mark.parametrize("backend", HOLD)
def test_dynamic_activations_are_refused(backend: str) -> None:
    assert "the activations cannot" in (create(backend, activations="dynamic").refuse_convolution() or "")
