"""int4, int6 and int8-group: grouped integers whose searched and fitted scales keep their promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import bitroute
from bitroute.backends import create, suggest
from bitroute.backends._rounded import Rounded
from bitroute.backends.base import Backend, Statistics, TensorSpec

NAMES = ["int4", "int6", "int8-group"]
BITS = {"int4": 4, "int6": 6, "int8-group": 8}
OPTIONS: list[dict[str, Any]] = [
    {"zero": zero, "scale": scale} for zero in ("none", "minmax", "hqq") for scale in ("absmax", "mse")
]
TRANSFORMER = Path(bitroute.__file__).parent / "recipes/tiny-flux/transformer/diffusion_pytorch_model.safetensors"


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def heavy_tailed(*shape: int) -> Tensor:
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(4))
    return normal(*shape).sign() * uniform.clamp(min=1e-9).log()


def student_t(*shape: int) -> Tensor:
    squares = torch.randn((5, *shape), generator=torch.Generator().manual_seed(5)).square()
    return normal(*shape) / (squares.sum(0) / 5).sqrt()


def decoded(backend: Backend, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
    spec = TensorSpec(tuple(weight.shape), weight.dtype)
    return backend.decode(backend.quantize(weight, statistics or Statistics()), spec)


def error_percent(backend: Backend, weight: Tensor) -> float:
    return 100 * float((decoded(backend, weight) - weight.float()).norm() / weight.float().norm())


def group_errors(backend: Backend, weight: Tensor, group: int) -> Tensor:
    return (decoded(backend, weight).double() - weight.double()).square().reshape(-1, group).sum(1)


@pytest.mark.parametrize(
    ("name", "options", "ceiling", "bits"),
    [
        ("int4", {"scale": "mse"}, 9.1, 4.25),
        ("int4", {"zero": "minmax"}, 9.11, 4.5),
        ("int4", {"zero": "hqq"}, 8.62, 4.5),
        ("int4", {"zero": "minmax", "scale": "mse"}, 8.3, 4.5),
        ("int4", {"zero": "hqq", "scale": "mse"}, 8.3, 4.5),
        ("int4", {"group": 128, "zero": "minmax", "scale": "mse"}, 9.18, 4.25),
        ("int6", {"scale": "mse"}, 2.3, 6.25),
        ("int8-group", {}, 0.65, 8.125),
    ],
    ids=str,
)
def test_gaussian_weights_are_below_their_ceiling(
    name: str, options: dict[str, Any], ceiling: float, bits: float
) -> None:
    backend, weight = create(name, **options), (normal(192, 3072) * 0.02).bfloat16()
    stored = backend.quantize(weight)
    assert 8 * sum(tensor.nbytes for tensor in stored.values()) == bits * weight.numel()
    assert error_percent(backend, weight) < ceiling


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_no_group_of_heavy_tailed_or_trained_weights_is_worse_than_plain(name: str, options: dict[str, Any]) -> None:
    layer = "transformer_blocks.0.attn.to_q.weight"
    trained = load_file(TRANSFORMER)[layer]
    plain = {} if options["zero"] == "none" else {"zero": "minmax"}
    for weight in (heavy_tailed(16, 512), student_t(16, 512), trained):
        found = group_errors(create(name, group=32, **options), weight, 32)
        assert (found <= group_errors(create(name, group=32, **plain), weight, 32) * (1 + 1e-5)).all()


def test_a_fine_grid_of_both_ends_of_the_range_finds_little_more() -> None:
    weight = normal(8, 64)
    least = torch.full((8,), torch.inf)
    top, bottom = weight.amax(1), weight.amin(1)
    for low in torch.arange(0.5, 1.1, 0.02).tolist():
        for high in torch.arange(0.5, 1.1, 0.02).tolist():
            scale = ((top * high - bottom * low) / 15).unsqueeze(1)
            zero = (bottom * low).unsqueeze(1)
            nearest = ((weight - zero) / scale).round().clamp(0, 15) * scale + zero
            least = torch.minimum(least, (nearest - weight).square().sum(1))
    found = group_errors(create("int4", zero="minmax", scale="mse"), weight, 64)
    assert found.sum() < 1.05 * least.sum()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_size_of_the_weights_plays_no_part(name: str, options: dict[str, Any]) -> None:
    backend, weight = create(name, **options), normal(4, 128)
    for power in (-100, 100):
        factor = 2.0**power
        assert torch.equal(decoded(backend, weight * factor), decoded(backend, weight) * factor)


@pytest.mark.parametrize("name", NAMES)
def test_a_group_far_from_zero_keeps_its_precision_with_a_zero_of_its_own(name: str) -> None:
    weight = 100 + normal(4, 128) * 0.01
    assert group_errors(create(name), weight, 32).sum() > 1
    spread = (weight - weight.mean()).norm()
    error = (decoded(create(name, zero="minmax"), weight) - weight).norm()
    assert error < 2.0 ** -(BITS[name] - 4) * spread
    constant = torch.full((2, 128), 0.3)
    assert torch.allclose(decoded(create(name, zero="minmax"), constant), constant, rtol=1e-3)


@pytest.mark.parametrize("zero", ["none", "minmax", "hqq"])
@pytest.mark.parametrize("name", NAMES)
def test_an_all_zero_group_among_others_decodes_to_zeros(name: str, zero: str) -> None:
    weight = normal(3, 384)
    weight[1, 128:256] = 0
    for scale in ("absmax", "mse"):
        found = decoded(create(name, zero=zero, scale=scale), weight)
        assert found[1, 128:256].count_nonzero() == 0
        assert found[1, :128].count_nonzero() > 0


def test_the_even_code_is_in_the_low_nibble_and_eight_is_zero() -> None:
    stored = create("int4", group=32).quantize(torch.tensor([[1.0, -7.0, *[0.0] * 30]]))
    assert stored["codes"].tolist() == [[0x19] + [0x88] * 15]
    assert stored["scale"].float().tolist() == [[1.0]]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_nearest_under_chosen_scales_is_what_is_read_back(name: str, options: dict[str, Any]) -> None:
    backend, weight = create(name, **options), student_t(5, 256)
    assert isinstance(backend, Rounded)
    survey = backend.survey((), TensorSpec((5, 256), weight.dtype))
    scales = backend.scales(weight, survey)
    each = tuple(values.repeat_interleave(256 // values.shape[1], 1) for values in scales)
    assert torch.equal(backend.nearest(weight, each, survey), decoded(backend, weight))
    column = backend.nearest(weight[:, 70:71], tuple(values[:, 70:71] for values in each), survey)
    assert torch.equal(column, decoded(backend, weight)[:, 70:71])


@pytest.mark.parametrize("zero", ["none", "minmax", "hqq"])
def test_the_search_follows_the_second_moment_of_the_input(zero: str) -> None:
    weight, moment = normal(16, 256), torch.exp2(normal(256) * 3)
    backend = create("int4", zero=zero, scale="mse")

    def weighted(found: Tensor) -> float:
        return float(((found - weight).square() * moment).sum())

    informed = weighted(decoded(backend, weight, Statistics(second_moment=moment)))
    assert informed < 0.75 * weighted(decoded(backend, weight))


def test_a_convolution_runs_from_its_rows() -> None:
    layer, x = nn.Conv2d(32, 8, 3, padding=1), normal(2, 32, 5, 4)
    backend = create("int6", group=32)
    found: Any = backend.attach(layer, backend.quantize(layer.weight.detach().flatten(1)))
    with torch.no_grad():
        assert (found(x) - layer(x)).norm() < 0.05 * layer(x).norm()
    assert found.decoded().shape == layer.weight.shape


def test_a_row_that_is_not_whole_groups_is_refused() -> None:
    sentence = "96 input features are not a multiple of 64"
    assert create("int4").refuse(TensorSpec((4, 96), torch.bfloat16)) == sentence
    assert create("int4", group=32).refuse(TensorSpec((4, 96), torch.bfloat16)) is None


def test_what_others_call_four_bit_weights_is_int4() -> None:
    assert suggest("w4a16") == "did you mean 'int4'?"
