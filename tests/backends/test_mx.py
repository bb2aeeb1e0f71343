"""mxfp4, mxfp6 and mxfp8 are torchao's arithmetic bit for bit, and torchao multiplies by what they store."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

from bitroute.backends import create
from bitroute.backends._elements import E2M1, E2M3, E3M2, E4M3, E5M2, Element
from bitroute.backends._mx import MX
from bitroute.backends.base import Statistics, TensorSpec

RULES = {"absmax": "FLOOR", "even": "EVEN", "ceil": "CEIL", "rceil": "RCEIL"}
ELEMENTS = [E2M1, E2M3, E3M2, E4M3, E5M2]
TORCHAO: dict[str, tuple[str, Any]] = {
    "e2m1": ("mxfp4", torch.float4_e2m1fn_x2),
    "e2m3": ("mxfp6", "fp6_e2m3"),
    "e3m2": ("mxfp6", "fp6_e3m2"),
    "e4m3": ("mxfp8", torch.float8_e4m3fn),
    "e5m2": ("mxfp8", torch.float8_e5m2),
}
WITH_ACTIVATIONS: list[tuple[str, dict[str, str]]] = [
    ("mxfp4", {"activations": "mxfp4"}),
    ("mxfp4", {"activations": "mxfp8", "scale": "mse"}),
    ("mxfp8", {"activations": "mxfp8"}),
    ("mxfp8", {"activations": "mxfp8", "element": "e5m2"}),
]


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def power(low: int, high: int, *shape: int) -> Tensor:
        return torch.exp2(torch.randint(low, high, shape, generator=generator).float())

    quarters = torch.randint(-32, 33, (32, 128), generator=generator) * 0.25
    return {
        "gaussian": normal(33, 256) * 0.02,
        "student-t": normal(33, 256) / torch.rand((33, 256), generator=generator).clamp(min=1e-4).sqrt(),
        "zeros": torch.zeros(3, 64),
        "powers of two": power(-20, 20, 16, 128) * torch.sign(normal(16, 128)),
        "ties": quarters * power(-3, 3, 32, 1),
        "fine ties": (torch.arange(-2048, 2048) / 64).reshape(64, 64)[:, torch.randperm(64)],
        "mixed in a block": normal(32, 256) * power(-30, 30, 32, 256),
        "mixed between rows": normal(32, 256) * power(-30, 30, 32, 1),
        "subnormal": normal(8, 128) * 1e-39,
        "tiny": normal(8, 128) * power(-140, -100, 8, 128),
        "huge": normal(8, 128) * power(60, 125, 8, 128),
    }


def mx(element: Element, scale: str) -> MX:
    name = TORCHAO[element.name][0]
    options = {} if name == "mxfp4" else {"element": element.name}
    backend = create(name, scale=scale, **options)
    assert isinstance(backend, MX)
    return backend


def spec_of(weight: Tensor) -> TensorSpec:
    return TensorSpec(tuple(weight.shape), weight.dtype)


def block_errors(backend: MX, weight: Tensor, statistics: Statistics) -> Tensor:
    """Squared error per block of 32, weighted as `statistics` say, of the weight as the backend stores it."""
    decoded = backend.decode(backend.quantize(weight, statistics), spec_of(weight))
    error = (decoded.double() - weight.double()).square()
    if statistics.second_moment is not None:
        error *= statistics.second_moment
    return error.reshape(len(error), -1, 32).sum(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", RULES)
@pytest.mark.parametrize("element", ELEMENTS, ids=lambda element: element.name)
def test_codes_scales_and_values_are_those_of_torchao(element: Element, scale: str, dtype: torch.dtype) -> None:
    backend = mx(element, scale)
    for kind, weight in weights().items():
        weight = weight.to(dtype)
        expected = MXTensor.to_mx(weight, TORCHAO[element.name][1], scaling_mode=ScaleCalculationMode[RULES[scale]])
        stored = backend.quantize(weight)
        qdata = element.codes(stored["qdata"]) if element.bits == 6 else stored["qdata"]
        assert torch.equal(qdata.view(torch.uint8), expected.qdata.view(torch.uint8)), kind
        assert torch.equal(stored["scale"].view(torch.uint8), expected.scale.view(torch.uint8)), kind
        decoded = backend.decode(stored, spec_of(weight))
        assert torch.equal(decoded, expected.dequantize(torch.float32)), kind
        assert torch.equal(decoded.bfloat16(), expected.dequantize(torch.bfloat16)), kind


def top_of_float32() -> Tensor:
    """Blocks whose largest magnitude is 2^127 times 1, 1 + 1/64, … 2 - 1/64, and the largest number of all."""
    mantissas = torch.cat([1 + torch.arange(64) / 64, torch.tensor([2 - 2.0**-23])])
    shares = torch.rand(65, 32, generator=torch.Generator().manual_seed(6)) * 2 - 1
    shares[:, 5] = 1
    return shares * mantissas[:, None] * 2.0**127


@pytest.mark.parametrize("scale", RULES)
@pytest.mark.parametrize("element", ELEMENTS, ids=lambda element: element.name)
def test_the_largest_numbers_are_those_of_torchao_or_saturate_where_it_overflows(element: Element, scale: str) -> None:
    weight = top_of_float32()
    theirs = MXTensor.to_mx(weight, TORCHAO[element.name][1], scaling_mode=ScaleCalculationMode[RULES[scale]])
    expected = theirs.dequantize(torch.float32)
    backend = mx(element, scale)
    decoded = backend.decode(backend.quantize(weight), spec_of(weight))
    overflows = expected.isinf().any(dim=1)
    assert overflows.any() == (scale != "absmax")
    assert torch.equal(decoded[~overflows], expected[~overflows])
    largest = element.max * 2.0 ** (127 - element.max_exponent)
    assert (decoded[overflows].abs().amax(dim=1) == largest).all()
    plain = mx(element, "absmax")
    assert torch.equal(decoded[overflows], plain.decode(plain.quantize(weight), spec_of(weight))[overflows])


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda element: element.name)
def test_the_search_never_chooses_a_scale_that_overflows(element: Element) -> None:
    weight = top_of_float32()
    searched, plain = (block_errors(mx(element, scale), weight, Statistics()) for scale in ("mse", "absmax"))
    assert (searched <= plain * (1 + 1e-5)).all()


def packed(codes: list[int], element: Element) -> Tensor:
    """The documented layout: a byte or three hold a little-endian number, the first code lowest."""
    width = {4: 1, 6: 3, 8: 1}[element.bits]
    per_number = width * 8 // element.bits
    numbers = [
        sum(code << element.bits * place for place, code in enumerate(codes[start : start + per_number]))
        for start in range(0, len(codes), per_number)
    ]
    return torch.tensor([byte for number in numbers for byte in number.to_bytes(width, "little")], dtype=torch.uint8)


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda element: element.name)
def test_every_finite_code_survives_decoding_and_encoding(element: Element) -> None:
    codes = list(range(2**element.bits))
    if element.bits == 8:
        finite = torch.tensor(codes, dtype=torch.uint8).view(element.dtype).float().isfinite().tolist()
        codes = [code for code in codes if finite[code]]
    stored = packed(codes, element)
    assert element.codes(stored).tolist() == codes
    assert torch.equal(element.store(element.load(stored)).view(torch.uint8), stored)


def test_mxfp4_stores_the_even_element_in_the_low_nibble() -> None:
    weight = torch.tensor([[0.5, -6.0] + [0.0] * 30])
    stored = create("mxfp4").quantize(weight)
    assert stored["qdata"][0].tolist() == [0xF1] + [0] * 15
    assert stored["scale"].view(torch.uint8).tolist() == [[127]]


@pytest.mark.parametrize("scale", [*RULES, "mse"])
def test_an_all_zero_block_has_scale_byte_0(scale: str) -> None:
    weight = torch.ones(2, 64)
    weight[1, 32:] = 0
    stored = create("mxfp4", scale=scale).quantize(weight)
    assert stored["scale"].view(torch.uint8)[1, 1] == 0
    assert stored["qdata"][1, 16:].count_nonzero() == 0


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda element: element.name)
def test_the_search_is_in_no_block_worse_than_another_rule(element: Element) -> None:
    for kind, weight in weights().items():
        searched = block_errors(mx(element, "mse"), weight, Statistics())
        # below 2^-124 the search keeps absmax, whose reciprocal is not that of rceil
        for rule in ["absmax"] if kind in {"subnormal", "tiny"} else RULES:
            assert (searched <= block_errors(mx(element, rule), weight, Statistics()) * (1 + 1e-5)).all(), (
                kind,
                rule,
            )


def test_the_search_follows_the_second_moment_of_the_input() -> None:
    weight = weights()["gaussian"]
    second_moment = torch.exp2(torch.randn(256, generator=torch.Generator().manual_seed(1)) * 3)
    backend = mx(E2M1, "mse")
    informed = block_errors(backend, weight, Statistics(second_moment))
    decoded = backend.decode(backend.quantize(weight), spec_of(weight))
    uninformed = ((decoded - weight).square() * second_moment).reshape(len(weight), -1, 32).sum(-1)
    assert (informed <= uninformed * (1 + 1e-5)).all()
    assert informed.sum() < 0.99 * uninformed.sum()


@pytest.mark.parametrize(("name", "options"), WITH_ACTIVATIONS)
def test_torchao_reads_the_record_and_multiplies_the_same(name: str, options: dict[str, str]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(37, 96, generator=generator) * 0.05).bfloat16()
    x, bias = torch.randn(2, 5, 96, generator=generator).bfloat16(), torch.ones(37, dtype=torch.bfloat16)
    x[0, 0] = 0
    backend = create(name, **options)
    stored, record = backend.quantize(weight), backend.record(spec_of(weight))
    assert record is not None
    tensors, left_over = unflatten_tensor_state_dict(
        {f"layer.{record.names[suffix]}": tensor for suffix, tensor in stored.items()},
        {"tensor_names": json.dumps(["layer.weight"]), "layer.weight": json.dumps(record.header)},
    )
    native = tensors["layer.weight"]
    assert not left_over
    assert torch.equal(native.dequantize(torch.bfloat16), backend.decode(stored, spec_of(weight)).bfloat16())
    result = backend.linear(x, stored, spec_of(weight), bias)
    assert torch.equal(result, functional.linear(x, native, bias))
    assert torch.equal(result[0, 0], bias)


def test_only_torchaos_own_pairs_of_elements_have_a_config() -> None:
    spec = TensorSpec((16, 64), torch.bfloat16)
    records = [create(name, **options).record(spec) for name, options in WITH_ACTIVATIONS]
    assert [record.config.get("_type") for record in records if record] == [
        "MXDynamicActivationMXWeightConfig",
        None,
        "MXDynamicActivationMXWeightConfig",
        None,
    ]


def test_what_torchao_cannot_run_has_no_record() -> None:
    spec = TensorSpec((16, 64), torch.bfloat16)
    assert create("mxfp4").record(spec) is None
    assert create("mxfp8").record(spec) is None
    assert create("mxfp6", activations="mxfp8").record(spec) is None
    assert create("mxfp4", activations="mxfp4").record(TensorSpec((1, 64), torch.bfloat16)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantized_activations_leave_the_input_as_it_was(dtype: torch.dtype) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    before, spec = x.detach().clone(), TensorSpec((4, 64), dtype)
    backend = create("mxfp4", activations="mxfp8")
    result = backend.linear(x, backend.quantize(torch.ones(4, 64)), spec, None)
    assert torch.equal(x, before)
    assert result.dtype == dtype
    assert not torch.equal(result, functional.linear(x, torch.ones(4, 64, dtype=dtype)))
