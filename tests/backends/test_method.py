"""Methods in front of the formats: what they promise of any weight and any input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.linalg import hadamard as reference_hadamard
from torch import Tensor, nn

from bitroute.backends import create
from bitroute.backends._compensation import DAMP, compensated, factor, order, output_error
from bitroute.backends._low_rank import split
from bitroute.backends._method import Transformed
from bitroute.backends._rotation import hadamard, rotate, rotate_hessian, rotate_second_moment
from bitroute.backends.base import Backend, Statistics, TensorSpec
from bitroute.errors import BackendError

OUT, IN = 48, 256
METHODS: list[dict[str, Any]] = [
    {"rotate": 64}, {"smooth": 0.5}, {"low_rank": 4}, {"gptq": True},
    {"rotate": 32, "smooth": 0.5, "low_rank": 4, "gptq": True},
]  # fmt: skip
ROUNDED = [("nvfp4", {"scale": "mse"}), ("mxfp4", {"scale": "mse"}), ("mxfp6", {}), ("nf4", {"scale": "mse"})]


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    """[512, IN]: correlated channels, a few of them large."""
    random = torch.Generator().manual_seed(1)
    mixed = torch.randn(512, 24, generator=random) @ torch.randn(24, IN, generator=random)
    x = 0.5 * mixed + torch.randn(512, IN, generator=random)
    x[:, ::40] *= 10
    return x


@pytest.fixture(scope="module")
def weight() -> Tensor:
    random = torch.Generator().manual_seed(2)
    branch = torch.randn(OUT, 4, generator=random) @ torch.randn(4, IN, generator=random)
    return (0.02 * (torch.randn(OUT, IN, generator=random) + branch)).bfloat16()


@pytest.fixture(scope="module")
def statistics(inputs: Tensor) -> Statistics:
    hessian = inputs.T @ inputs / len(inputs)
    return Statistics(hessian.diagonal().clone(), inputs.abs().amax(0), hessian[None], inputs[:64].bfloat16())


def spec_of(weight: Tensor) -> TensorSpec:
    return TensorSpec(tuple(weight.shape), weight.dtype)


def through(backend: Backend, weight: Tensor, statistics: Statistics) -> Tensor:
    return backend.decode(backend.quantize(weight, statistics), spec_of(weight))


def output_error_of(backend: Backend, weight: Tensor, statistics: Statistics) -> float:
    assert statistics.hessian is not None
    error = through(backend, weight, statistics) - weight.float()
    return output_error(error, statistics.hessian[0]).sum().item()


def test_the_matrix_is_hadamards() -> None:
    for size in (16, 32, 64, 128):
        assert torch.equal(hadamard(size, torch.device("cpu")), torch.tensor(reference_hadamard(size)).float())


def test_rotating_twice_gives_the_values_back(weight: Tensor) -> None:
    torch.testing.assert_close(rotate(rotate(weight, 32), 32), weight.float(), atol=1e-7, rtol=1e-5)


def test_rotated_statistics_are_those_of_rotated_inputs(inputs: Tensor, statistics: Statistics) -> None:
    rotated = rotate(inputs, 32)
    assert statistics.hessian is not None
    expected = rotated.T @ rotated / len(rotated)
    torch.testing.assert_close(rotate_hessian(statistics.hessian, 32)[0], expected, atol=2e-3, rtol=1e-4)
    alone = torch.linspace(1, 3, IN)  # channels that are not correlated
    diagonal = rotate_hessian(alone.diag()[None], 32)[0].diagonal()
    torch.testing.assert_close(rotate_second_moment(alone, 32), diagonal)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(("name", "options"), ROUNDED, ids=[name for name, _ in ROUNDED])
def test_the_layer_computes_with_the_decoded_weight(
    name: str, options: dict[str, Any], method: dict[str, Any], weight: Tensor, inputs: Tensor, statistics: Statistics
) -> None:
    backend = create(name, **options, method=method)
    stored = backend.quantize(weight, statistics)
    assert {suffix: spec_of(tensor) for suffix, tensor in stored.items()} == backend.outputs(spec_of(weight))
    layer = nn.Linear(IN, OUT)
    attached = backend.attach(layer, stored)
    expected = inputs[:8] @ backend.decode(stored, spec_of(weight)).T + layer.bias
    torch.testing.assert_close(attached(inputs[:8]), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["int8", "float8", "bnb-int8"])
def test_formats_of_libraries_take_rotation_smoothing_and_low_rank(
    name: str, weight: Tensor, statistics: Statistics
) -> None:
    method = create(name, method={"rotate": 16, "smooth": 0.5, "low_rank": 4})
    error = (through(method, weight, statistics) - weight.float()).norm() / weight.float().norm()
    assert error < 0.12


@pytest.mark.parametrize(("name", "options"), ROUNDED, ids=[name for name, _ in ROUNDED])
def test_gptq_lowers_the_output_error_by_half(
    name: str, options: dict[str, Any], weight: Tensor, statistics: Statistics
) -> None:
    plain, moved = (create(name, **options, **method) for method in ({}, {"method": {"gptq": True}}))
    assert output_error_of(moved, weight, statistics) < 0.5 * output_error_of(plain, weight, statistics)


def test_gptq_does_not_depend_on_blocks_of_rows(
    weight: Tensor, statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = create("nvfp4", scale="mse", method={"gptq": True, "low_rank": 2})
    whole = backend.quantize(weight, statistics)
    monkeypatch.setattr("bitroute.backends._method.COMPENSATED_ELEMENTS", 7 * IN)
    parts = backend.quantize(weight, statistics)
    assert all(torch.equal(whole[suffix], parts[suffix]) for suffix in whole)


def test_compensation_is_the_best_answer_to_each_rounding() -> None:
    """In float64 by its definition: what is still free moves so that the output error is least."""
    random = torch.Generator().manual_seed(3)
    x, rows = torch.randn(99, 12, generator=random), torch.randn(5, 12, generator=random)
    hessian = (x.T @ x / 99)[None]
    channels = order(hessian)

    def nearest(weights: Tensor, _: Tensor) -> Tensor:
        return weights.round()

    found = compensated(rows, hessian, channels, factor(hessian, channels), nearest)
    exact, free = hessian[0].double(), rows.double().clone()
    exact += DAMP * exact.diagonal().mean() * torch.eye(12)
    for place, channel in enumerate(channels[0]):
        rest = channels[0][place + 1 :]
        rounded = free[:, channel].round()
        error = rounded - free[:, channel]
        free[:, channel] = rounded
        free[:, rest] -= error[:, None] * torch.linalg.solve(exact[rest][:, rest], exact[rest, channel])[None]
    plain_error = output_error(rows.round() - rows, hessian[0])
    better = output_error(free.float() - rows, hessian[0]) < plain_error
    assert better.any()
    assert torch.equal(found[better], free[better].float())
    assert torch.equal(found[~better], rows[~better].round())


def test_a_block_diagonal_hessian_compensates_within_its_blocks(weight: Tensor, statistics: Statistics) -> None:
    assert statistics.hessian is not None
    blocks = statistics.hessian[0].reshape(2, 128, 2, 128).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    backend = create("mxfp4", scale="mse", method={"gptq": True})
    found = backend.quantize(weight, Statistics(statistics.second_moment, None, blocks))
    halves = [
        backend.quantize(weight[:, half].contiguous(), Statistics(None, None, blocks[index : index + 1]))
        for index, half in enumerate((slice(0, 128), slice(128, 256)))
    ]
    assert torch.equal(found["qdata"], torch.cat([half["qdata"] for half in halves], 1))


def test_dead_and_equal_inputs_have_a_factor(weight: Tensor) -> None:
    for hessian in (torch.zeros(1, IN, IN), torch.ones(1, IN, IN), 1e30 * torch.ones(1, IN, IN)):
        backend = create("nvfp4", method={"gptq": True})
        assert through(backend, weight, Statistics(hessian=hessian)).isfinite().all()


def test_low_rank_starts_from_the_best_branch() -> None:
    random = torch.Generator().manual_seed(4)
    weight = torch.randn(64, 3, generator=random) @ torch.randn(3, 96, generator=random)
    up, down = split(weight, 3, None, torch.zeros_like)
    assert (weight - up.float() @ down.float()).norm() / weight.norm() < 0.01  # of bf16


def test_a_large_matrix_has_the_branch_of_the_exact_decomposition() -> None:
    random = torch.Generator().manual_seed(5)
    weight = torch.randn(128, 160, generator=random) @ torch.diag(0.9 ** torch.arange(160.0))
    up, down = split(weight, 6, None, torch.zeros_like)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    best = (left[:, :6] * values[:6]) @ right[:6]
    assert (weight - up.float() @ down.float()).norm() < 1.01 * (weight - best).norm()


def test_low_rank_takes_up_what_inputs_see_most(weight: Tensor, statistics: Statistics) -> None:
    plain, moved = (create("mxfp4", **options) for options in ({}, {"method": {"low_rank": 4}}))
    assert output_error_of(moved, weight, statistics) < 0.8 * output_error_of(plain, weight, statistics)


def test_smoothing_leaves_less_to_lose_to_activations_of_8_bits(
    weight: Tensor, inputs: Tensor, statistics: Statistics
) -> None:
    errors = []
    for options in ({}, {"method": {"smooth": 0.5}}):
        backend = create("int8", activations="dynamic", **options)
        found = backend.linear(inputs.bfloat16(), backend.quantize(weight, statistics), spec_of(weight), None)
        errors.append((found.float() - inputs.bfloat16().float() @ weight.float().T).norm())
    assert errors[1] < 0.8 * errors[0]


def test_gptq_alone_is_stored_and_recorded_as_the_format_itself(weight: Tensor) -> None:
    plain, moved = create("nvfp4"), create("nvfp4", method={"gptq": True})
    spec = spec_of(weight)
    assert (moved.record(spec), moved.outputs(spec)) == (plain.record(spec), plain.outputs(spec))
    assert create("nvfp4", method={"rotate": 16}).record(spec) is None


def test_a_backend_with_a_method_is_made_again_from_its_options() -> None:
    made = create("nf4", scale="mse", method={"rotate": 32, "gptq": True})
    assert isinstance(made, Transformed)
    assert str(made) == "nf4 (scale mse, rotate 32, gptq)"
    assert made.options == {"scale": "mse", "method": {"rotate": 32, "gptq": True}}
    assert create(made.name, **made.options) == made
    assert create("nf4", method={"gptq": False}) == create("nf4")


def test_shapes_that_a_method_cannot_hold_are_refused() -> None:
    narrow = TensorSpec((8, 48), torch.bfloat16)
    assert create("int8", method={"rotate": 32}).refuse(narrow) == (
        "48 input features are not a multiple of 32, the block to rotate"
    )
    assert create("int8", method={"low_rank": 9}).refuse(narrow) == "its rank is at most 8, not 9"


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("nvfp4", {"rotate": 33}, "16, 32, 64 or 128"),
        ("nvfp4", {"low_rank": 0}, "greater than or equal to 1"),
        ("nvfp4", {"low_rank": True}, "valid integer"),
        ("nvfp4", {"gptq": "yes"}, "valid boolean"),
        ("nvfp4", {"spin": 1}, "rotate, smooth, low_rank, gptq"),
        ("nvfp4", ["gptq"], "a mapping"),
        ("nf4", {"gptq": True}, "say `scale: mse`"),
        ("int8", {"gptq": True}, "rounds weight by weight"),
        ("keep", {"rotate": 16}, "takes no method"),
    ],
)
def test_a_method_that_cannot_be_is_refused(name: str, method: object, words: str) -> None:
    with pytest.raises(BackendError) as refusal:
        create(name, method=method)
    assert words in str(refusal.value)


def test_a_method_without_its_statistics_says_how_to_get_them(weight: Tensor) -> None:
    with pytest.raises(BackendError) as refusal:
        create("nvfp4", method={"gptq": True, "smooth": 0.5}).quantize(weight)
    assert "no absmax, hessian" in str(refusal.value)
    assert "quantize calibrate" in str(refusal.value)


@pytest.mark.parametrize("method", [{"rotate": 32}, {"smooth": 1.0}, {"low_rank": 4}])
def test_a_method_whose_numbers_leave_float32_says_so(method: dict[str, Any], statistics: Statistics) -> None:
    weight = torch.full((4, IN), torch.finfo(torch.float32).max)
    with pytest.raises(BackendError, match=r"does not fit float32|do not fit float32"):
        create("int4", method=method).quantize(weight, statistics)


@pytest.mark.parametrize("name", ["nf4", "codebook4", "nvfp4"])
def test_a_branch_that_overflows_says_so(name: str, statistics: Statistics) -> None:
    weight = torch.randn(16, IN, generator=torch.Generator().manual_seed(0)) * 1e37
    options = {"scale": "mse"} if name == "nf4" else {}
    with pytest.raises(BackendError, match="does not fit float32"):
        create(name, **options, method={"rotate": 32, "smooth": 0.5, "low_rank": 4}).quantize(weight, statistics)


def test_compensation_whose_errors_overflow_leaves_the_plain_rounding(statistics: Statistics) -> None:
    weight = torch.randn(4, IN, generator=torch.Generator().manual_seed(3)).sign() * torch.finfo(torch.float32).max
    plain, tried = create("int4").quantize(weight), create("int4", method={"gptq": True}).quantize(weight, statistics)
    assert all(torch.equal(plain[name], tried[name]) for name in plain)


def test_a_layer_with_a_method_takes_an_input_without_rows(statistics: Statistics) -> None:
    backend, weight = create("int4", method=METHODS[-1]), torch.ones(8, IN)
    stored = backend.quantize(weight, statistics)
    assert backend.linear(torch.empty(0, 5, IN), stored, spec_of(weight), None).shape == (0, 5, 8)
