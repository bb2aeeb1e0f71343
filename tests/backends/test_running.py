"""A layer runs from its stored weight: some rows at a time, exactly as the whole is decoded, eager or compiled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitroute.backends import available, base, create
from bitroute.backends._elements import E2M1, E2M3, E3M2, E4M3, E5M2, new_float32
from bitroute.backends.base import Backend, Statistics, TensorSpec

SHAPE = (80, 384)
SPEC = TensorSpec(SHAPE, torch.bfloat16)
STATISTICS = Statistics(absmax=torch.linspace(0.5, 3, SHAPE[1]))
OPTIONS: list[tuple[str, dict[str, Any]]] = [  # that are decoded or multiplied in another way than by default
    ("codebook4", {"block": 64}),
    ("float8", {"granularity": "tensor"}),
    ("float8", {"activations": "dynamic"}),
    ("float8", {"activations": "static"}),
    ("int4", {"activations": "int8"}),
    ("int6", {"zero": "minmax"}),
    ("int8", {"activations": "dynamic"}),
    ("mxfp4", {"activations": "mxfp4"}),
    ("mxfp6", {"element": "e3m2"}),
    ("mxfp8", {"element": "e5m2"}),
    ("nf4", {"double_quant": False}),
    ("nvfp4", {"activations": "nvfp4"}),
    ("nvfp4", {"method": {"rotate": 32}}),
    ("nvfp4", {"method": {"smooth": 0.5}}),
    ("nvfp4", {"method": {"low_rank": 4}}),
]
DEFAULTS = [create(name) for name in available() if name != "keep"]
FORMATS = [*DEFAULTS, *(create(name, **options) for name, options in OPTIONS)]
EMULATED = [backend for backend in FORMATS if backend.emulates(torch.device("cpu"))]
each_format = pytest.mark.parametrize("backend", FORMATS, ids=str)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that was made in between."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, tensor.numel())
        return made


class SideBySide(nn.ModuleList):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def stored_by(backend: Backend) -> Mapping[str, Tensor]:
    return backend.quantize((normal(*SHAPE) * 0.02).bfloat16(), STATISTICS)


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows are decoded, and 21 multiplied at a time."""
    monkeypatch.setattr(base, "DECODED_ELEMENTS", 7 * SHAPE[1])
    monkeypatch.setattr(base, "PART_ELEMENTS", 21 * SHAPE[1])


@each_format
@pytest.mark.usefixtures("few_rows")
def test_rows_decode_alike_in_any_number_and_dtype(backend: Backend) -> None:
    stored = stored_by(backend)
    whole = backend.decode_rows(stored, SPEC, 0, SHAPE[0])
    assert whole.dtype == torch.float32
    exact = "low_rank" not in str(backend) and "rotate" not in str(backend)  # products of float32
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        decoded = backend.decode(stored, SPEC, dtype)
        torch.testing.assert_close(decoded, whole.to(dtype), rtol=0 if exact else 1e-2, atol=0 if exact else 1e-8)
        assert torch.equal(backend.decode(stored, SPEC, dtype, (21, 49)), decoded[21:49])


@pytest.mark.parametrize("backend", DEFAULTS + EMULATED, ids=str)
@pytest.mark.usefixtures("few_rows")
def test_a_product_in_parts_is_that_of_the_whole_weight(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, bias = stored_by(backend), normal(SHAPE[0])
    x = normal(2, 3, SHAPE[1]).requires_grad_()
    parts = backend.linear(x, stored, SPEC, bias)
    monkeypatch.setattr(base, "PART_ELEMENTS", 2**20)
    torch.testing.assert_close(parts, backend.linear(x, stored, SPEC, bias), rtol=1e-5, atol=1e-6)
    if backend not in EMULATED:  # these round their input, which has no gradient
        parts.sum().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        torch.testing.assert_close(x.grad[1, 2], backend.decode(stored, SPEC).sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", DEFAULTS + EMULATED, ids=str)
@pytest.mark.usefixtures("few_rows")
def test_a_forward_never_holds_more_of_the_weight_than_a_part(backend: Backend) -> None:
    stored, x = stored_by(backend), normal(1, SHAPE[1])
    with torch.no_grad(), Largest() as largest:
        backend.linear(x, stored, SPEC, None)
    assert 0 < largest.elements <= 21 * SHAPE[1]


def test_a_compiled_model_of_all_formats_is_one_graph_with_the_same_results() -> None:
    layer = nn.Linear(SHAPE[1], SHAPE[0], dtype=torch.bfloat16)
    model = SideBySide([backend.attach(layer, stored_by(backend)) for backend in FORMATS])
    x = normal(3, SHAPE[1]).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        assert [
            str(backend) for backend, *pair in zip(FORMATS, compiled, model(x), strict=True) if not torch.equal(*pair)
        ] == []


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_every_byte_is_the_number_that_torch_makes_of_it(dtype: torch.dtype) -> None:
    stored = torch.arange(256, dtype=torch.uint8).view(dtype)
    torch.testing.assert_close(new_float32(stored), stored.float(), rtol=0, atol=0, equal_nan=True)
    finite = stored[stored.float().isfinite()]
    assert torch.equal(new_float32(finite).view(torch.int32), finite.float().view(torch.int32))


@pytest.mark.parametrize("element", [E4M3, E5M2])
def test_an_element_of_a_byte_reads_as_torch_does(element: Any) -> None:
    stored = torch.arange(256, dtype=torch.uint8).view(element.dtype)
    finite = stored.float().isfinite()
    assert torch.equal(element.load(stored)[finite].view(torch.int32), stored[finite].float().view(torch.int32))


@pytest.mark.parametrize("element", [E2M1, E2M3, E3M2])
def test_what_is_stored_of_an_element_reads_as_what_it_was(element: Any) -> None:
    values = element.read(torch.arange(1 << element.bits, dtype=torch.uint8))
    assert len(values.abs().unique()) == 1 << (element.bits - 1)
    many = values.repeat(96).view(3, -1)
    assert torch.equal(element.load(element.store(many)).view(torch.int32), many.view(torch.int32))


def test_a_layer_of_no_rows_of_input_runs() -> None:
    backend = create("nvfp4")
    assert backend.linear(normal(0, SHAPE[1]), stored_by(backend), SPEC, None).shape == (0, SHAPE[0])
    assert functional.linear(normal(0, SHAPE[1]), normal(*SHAPE)).shape == (0, SHAPE[0])
