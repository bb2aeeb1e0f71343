"""nvfp4 is torchao's two-level arithmetic bit for bit, or finds better scales; torchao reads both."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

from bitroute.backends import create
from bitroute.backends.base import Statistics, TensorSpec

SCALES = ["absmax", "mse", "four-over-six"]


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def power(low: int, high: int, *shape: int) -> Tensor:
        return torch.exp2(torch.randint(low, high, shape, generator=generator).float())

    half_steps = torch.randint(-24, 25, (32, 128), generator=generator) * 0.25
    half_steps[:, ::16] = 6
    return {
        "gaussian": normal(33, 272) * 0.02,
        "student-t": normal(33, 272) / torch.rand((33, 272), generator=generator).clamp(min=1e-4).sqrt(),
        "powers of two": power(-20, 20, 16, 128) * torch.sign(normal(16, 128)),
        "ties": half_steps,
        "mixed in a block": normal(32, 256) * power(-15, 15, 32, 256),
        "mixed between rows": normal(32, 256) * power(-15, 15, 32, 1),
        "an empty row": torch.cat([normal(4, 64), torch.zeros(1, 64)]),
        "huge": normal(8, 128) * power(60, 120, 8, 128),
    }


def spec_of(weight: Tensor) -> TensorSpec:
    return TensorSpec(tuple(weight.shape), weight.dtype)


def decoded(weight: Tensor, scale: str, statistics: Statistics | None = None) -> Tensor:
    backend = create("nvfp4", scale=scale)
    return backend.decode(backend.quantize(weight, statistics or Statistics()), spec_of(weight))


def block_errors(weight: Tensor, stand_in: Tensor, importance: Tensor | float = 1.0) -> Tensor:
    error = (stand_in.double() - weight.double()).square() * importance
    return error.reshape(len(error), -1, 16).sum(-1)


def torchao_tensor(weight: Tensor) -> NVFP4Tensor:
    return NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().amax()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", weights())
def test_codes_scales_and_values_are_those_of_torchao(kind: str, dtype: torch.dtype) -> None:
    weight = weights()[kind].to(dtype)
    expected = torchao_tensor(weight)
    stored = create("nvfp4").quantize(weight)
    assert torch.equal(stored["qdata"], expected.qdata)
    assert torch.equal(stored["scale"].view(torch.uint8), expected.scale.view(torch.uint8))
    assert torch.equal(stored["per_tensor_scale"], expected.per_tensor_scale)
    assert torch.equal(decoded(weight, "absmax"), expected.dequantize(torch.float32))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("amax", [0.0, 1e-39])
def test_a_weight_too_small_for_torchao_decodes_to_zeros(amax: float, scale: str) -> None:
    weight = torch.zeros(3, 32)
    weight[0, 3] = amax
    assert not torch.allclose(torchao_tensor(weight).dequantize(torch.float32), weight, rtol=0.1, atol=0)
    assert torch.equal(decoded(weight, scale), torch.zeros(3, 32))


@pytest.mark.parametrize("kind", sorted(weights().keys() - {"huge"}))
def test_the_search_is_in_no_block_worse_than_absmax(kind: str) -> None:
    weight = weights()[kind]
    searched, plain = (block_errors(weight, decoded(weight, scale)) for scale in ("mse", "absmax"))
    assert (searched <= plain * (1 + 1e-5)).all()


def test_the_search_follows_the_second_moment_of_the_input() -> None:
    weight = weights()["gaussian"]
    second_moment = torch.exp2(torch.randn(272, generator=torch.Generator().manual_seed(1)) * 3)
    informed = block_errors(weight, decoded(weight, "mse", Statistics(second_moment)), second_moment)
    uninformed = block_errors(weight, decoded(weight, "mse"), second_moment)
    assert (informed <= uninformed * (1 + 1e-5)).all()
    assert informed.sum() < 0.95 * uninformed.sum()


def test_four_over_six_takes_the_better_of_two_scales() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :16] = torch.tensor([1.0, 0.75] * 8)  # on the grid that ends at 4, not on the one that ends at 6
    weight[0, 16:] = torch.tensor([1.0, 0.5] * 8)  # on both, but 6 is the plain choice
    backend = create("nvfp4", scale="four-over-six")
    stored = backend.quantize(weight)
    assert stored["per_tensor_scale"] == torch.tensor(1.0 / (256 * 6))
    assert stored["scale"].float().tolist() == [[384.0, 256.0]]
    assert torch.allclose(backend.decode(stored, spec_of(weight)), weight, rtol=1e-6)


def test_the_even_element_is_in_the_low_nibble() -> None:
    weight = torch.tensor([[0.5, -6.0] + [0.0] * 14])
    assert create("nvfp4").quantize(weight)["qdata"].tolist() == [[0xF1] + [0] * 7]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(37, 96), (48, 48), (1, 16)])
def test_torchao_reads_the_record_and_multiplies_the_same(shape: tuple[int, int], scale: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) * 0.05).bfloat16()
    x = torch.randn(2, 5, shape[1], generator=generator).bfloat16()
    bias = torch.randn(shape[0], generator=generator).bfloat16()
    backend = create("nvfp4", scale=scale)
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


def test_the_record_with_activations_asks_torchao_to_quantize_them() -> None:
    backend = create("nvfp4", activations="nvfp4")
    record = backend.record(TensorSpec((48, 96), torch.bfloat16))
    assert record is not None
    assert record.header is not None
    assert record.header["_data"]["act_quant_kwargs"]["_data"]["use_dynamic_per_tensor_scale"] is True
    assert record.config["_type"] == "NVFP4DynamicActivationNVFP4WeightConfig"
    assert "10.0" in backend.gpu_to_compute()


@pytest.mark.parametrize("shape", [(37, 96), (48, 48)])
def test_a_shape_that_the_fp4_product_refuses_has_no_record_with_activations(shape: tuple[int, int]) -> None:
    assert create("nvfp4", activations="nvfp4").record(TensorSpec(shape, torch.bfloat16)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_emulated_activations_are_torchaos(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[0, 1] = 0
    before = x.clone()
    x.requires_grad_()
    backend, eye = create("nvfp4", activations="nvfp4"), torch.eye(64)
    result = backend.linear(x, backend.quantize(eye), spec_of(eye), None)
    expected = torchao_tensor(before.reshape(-1, 64)).dequantize(dtype).reshape(x.shape)
    assert torch.allclose(result, expected, rtol=1e-6)
    assert torch.equal(x, before)


def test_an_input_of_zeros_gives_the_bias() -> None:
    backend, weight, bias = create("nvfp4", activations="nvfp4"), torch.ones(4, 32), torch.arange(4.0)
    result = backend.linear(torch.zeros(2, 32), backend.quantize(weight), spec_of(weight), bias)
    assert torch.equal(result, bias.expand(2, 4))
