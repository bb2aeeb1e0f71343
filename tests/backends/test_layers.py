"""A quantized layer among the tools that handle layers: they move, write and list tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitroute.backends import create
from bitroute.backends._adapters import StateDict, answer_for_weights
from bitroute.backends.layers import QuantizedLayer
from bitroute.backends.load import attach
from bitroute.errors import BackendError


@pytest.fixture
def layer() -> Any:
    torch.manual_seed(0)
    backend, plain = create("float8"), nn.Linear(64, 32, dtype=torch.bfloat16)
    return backend.attach(plain, backend.quantize(plain.weight))


def add_in_place(layer: Any) -> None:
    layer.weight.data += 1


def assign_data(layer: Any) -> None:
    layer.weight.data = torch.zeros(32, 64)


def fill(layer: Any) -> None:
    nn.init.normal_(layer.weight)


def assign_an_entry(layer: Any) -> None:
    layer.weight[0, 0] = 1


def replace(layer: Any) -> None:
    layer.weight = nn.Parameter(torch.zeros(32, 64))


@pytest.mark.parametrize("write", [add_in_place, assign_data, fill, assign_an_entry, replace])
def test_a_write_to_the_weight_is_refused_because_it_would_be_lost(layer: Any, write: Any) -> None:
    with pytest.raises(BackendError, match="cannot be changed"):
        write(layer)


def test_what_only_reads_the_weight_is_not_taken_for_a_write(layer: Any) -> None:
    decoded = layer.decoded()
    assert torch.equal(~layer.weight.isnan(), ~decoded.isnan())
    assert torch.equal(layer.weight.data.clone().add_(1), decoded + 1)
    assert torch.equal(torch.zeros(32, 64).add_(layer.weight), decoded.float())
    assert not layer.weight.requires_grad
    assert not layer.weight.requires_grad_(False).requires_grad


def test_stored_tensors_are_parameters_that_are_never_trained(layer: Any) -> None:
    """Of a layer's tensors the libraries offload parameters."""
    assert list(dict(layer.named_parameters())) == ["bias", "qdata", "scale"]
    assert [name for name, tensor in layer.named_parameters() if tensor.requires_grad] == ["bias"]


@pytest.mark.parametrize("hidden", [False, True])
def test_a_cast_reaches_the_bias_and_no_stored_tensor(layer: Any, hidden: bool) -> None:
    before = {suffix: tensor.clone() for suffix, tensor in layer.stored.items()}
    if hidden:
        layer.hide()
    moved = copy.deepcopy(layer).to(torch.float16).float()
    assert moved.bias.dtype == moved.weight.dtype == torch.float32
    assert all(torch.equal(moved.stored[suffix], tensor) for suffix, tensor in before.items())
    assert {suffix: tensor.dtype for suffix, tensor in moved.stored.items()} == {
        suffix: tensor.dtype for suffix, tensor in before.items()
    }


def test_a_stored_tensor_never_tells_the_dtype_of_a_model() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False), nn.Linear(64, 64))
    attach(model.to(torch.float16), {"0": create("float8"), "1": create("int8"), "2": create("float8")})
    assert [name for name, _ in model.named_parameters()] == ["2.bias", "2.qdata", "2.scale"]
    assert next(model.parameters()).dtype == torch.float16
    scale, first = torch.ones(64, 1), model.get_submodule("0")
    assert isinstance(first, QuantizedLayer)
    first.put("scale", scale)  # as the loader does
    assert first.get_buffer("scale") is scale
    assert list(model.state_dict())[:2] == ["0.qdata", "0.scale"]


def test_a_state_dict_answers_for_the_weights_and_copies_as_a_plain_one(layer: Any) -> None:
    model = nn.ModuleDict({"inner": nn.Sequential(layer)})
    answer_for_weights(model)
    state: Any = model.state_dict()
    assert isinstance(state, StateDict)
    assert "inner.0.weight" not in state and sorted(state) == ["inner.0.bias", "inner.0.qdata", "inner.0.scale"]
    asked: Tensor = state["inner.0.weight"]
    assert asked.shape == (32, 64) and torch.equal(asked, layer.decoded())
    with pytest.raises(KeyError, match=r"inner\.1\.weight"):
        state["inner.1.weight"]
    assert type(copy.deepcopy(state)) is OrderedDict
    assert copy.deepcopy(state)._metadata == state._metadata
