"""A learned book of 16 numbers: what it is learned from, the scales with it, and weights that are hard on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bitroute.backends import create
from bitroute.backends._elements import E4M3
from bitroute.backends.base import NONE, Backend, Statistics, TensorSpec
from bitroute.backends.codebook4 import Codebook4

SHAPE = (48, 1024)
each_block = pytest.mark.parametrize("block", [16, 32, 64])


def gaussian(shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.02


def moments(columns: int = SHAPE[1]) -> Statistics:
    return Statistics(torch.exp(torch.randn(columns, generator=torch.Generator().manual_seed(1)) * 3))


def hard_weights() -> dict[str, Tensor]:
    outliers, some_zeros = gaussian(), gaussian()
    outliers[::7, ::64] = 40
    some_zeros[3:] = 0
    heavy = torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)).clamp(min=1e-6).sqrt()
    return {
        "gaussian": gaussian(),
        "outliers": outliers,
        "mostly zeros": some_zeros,
        "heavy tails": gaussian() / heavy,
        "one value": torch.full(SHAPE, 0.3),
        "two values": torch.where(gaussian() > 0, 1.0, 0.01),
        "positive": gaussian().abs(),
        "tiny": gaussian() * 1e-29,
        "huge": gaussian() / gaussian().abs().max() * torch.finfo(torch.float32).max,
    }


def spec_of(weight: Tensor) -> TensorSpec:
    return TensorSpec(tuple(weight.shape), weight.dtype)


def roundtrip(backend: Backend, weight: Tensor, statistics: Statistics = NONE) -> Tensor:
    return backend.decode(backend.quantize(weight, statistics), spec_of(weight)).double()


def error_percent(decoded: Tensor, weight: Tensor) -> float:
    return 100 * float((decoded.double() - weight.double()).norm() / weight.double().norm())


@pytest.mark.parametrize(("block", "bits"), [(16, 4.5), (32, 4.25), (64, 4.125)])
def test_the_bits_are_those_of_codes_and_block_scales(block: int, bits: float) -> None:
    weight = TensorSpec((3072, 3072), torch.bfloat16)
    stored = sum(spec.size_bytes for spec in create("codebook4", block=block).outputs(weight).values())
    assert 8 * stored == bits * weight.numel + 8 * (16 + 1) * 4


@each_block
@pytest.mark.parametrize("kind", hard_weights())
def test_no_block_is_worse_than_with_its_plain_scale(kind: str, block: int) -> None:
    backend, weight = create("codebook4", block=block), hard_weights()[kind]
    blocks = weight.double().reshape(-1, block)
    for statistics in (NONE, moments()):
        stored = backend.quantize(weight, statistics)
        unit, book = stored["per_tensor_scale"].double(), stored["book"].double()
        plain = E4M3.nearest((blocks.abs().amax(1) / unit).float()).double()[:, None] * unit
        nearest = (blocks[..., None] / plain.clamp(min=1e-60)[..., None] - book).abs().argmin(-1)
        importance = torch.ones(SHAPE[1]) if statistics.second_moment is None else statistics.second_moment
        weights = importance.double().repeat(len(weight)).reshape(-1, block)
        found = backend.decode(stored, spec_of(weight)).double().reshape(-1, block)
        assert found.isfinite().all()
        errors, limit = (((values - blocks).square() * weights).sum(1) for values in (found, book[nearest] * plain))
        energy = (blocks.square() * weights).sum(1)  # Σ h (d + ε w)² of float32 differences d
        assert (errors <= limit + 1e-6 * (limit * energy).sqrt() + 1e-12 * energy).all()


@each_block
@pytest.mark.parametrize("kind", hard_weights())
def test_hard_weights_are_as_near_as_gaussian_ones_or_nearer(kind: str, block: int) -> None:
    weight = hard_weights()[kind]
    limit = {"heavy tails": 11.0, "mostly zeros": 9.0}.get(kind, 8.8)
    assert error_percent(roundtrip(create("codebook4", block=block), weight), weight) < limit


def test_one_value_decodes_to_itself() -> None:
    weight = torch.full((16, 64), 0.3)
    torch.testing.assert_close(roundtrip(Codebook4(), weight).float(), weight, rtol=1e-6, atol=0)


def test_a_loud_row_does_not_have_the_book_for_itself() -> None:
    weight = gaussian()
    weight[0] = torch.linspace(-20, 20, SHAPE[1])[torch.randperm(SHAPE[1], generator=torch.Generator().manual_seed(1))]
    assert error_percent(roundtrip(Codebook4(), weight)[1:], weight[1:]) < 6.72  # 6.57 without it


def test_scales_of_both_signs_mirror_a_book_that_is_not_symmetric() -> None:
    stored = Codebook4().quantize(gaussian())
    assert 0.4 < (stored["scale"].float() < 0).double().mean() < 0.6
    assert (stored["book"] + stored["book"].flip(0)).abs().max() > 0.05


def test_the_book_is_the_same_for_other_blocks_of_rows_threads_and_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, backend, threads = gaussian((96, 1024)), Codebook4(), torch.get_num_threads()
    monkeypatch.setattr("bitroute.backends.codebook4.SAMPLE", 65536)
    expected = backend.quantize(weight)["book"]
    monkeypatch.setattr("bitroute.backends.base.BLOCK_ELEMENTS", 7 * 1024)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    try:
        torch.set_num_threads(3)
        assert torch.equal(backend.quantize(weight)["book"], expected)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sample_of_the_blocks_teaches_nearly_as_much_as_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, backend = gaussian((96, 1024)), Codebook4()
    whole = error_percent(roundtrip(backend, weight), weight)
    monkeypatch.setattr("bitroute.backends.codebook4.SAMPLE", 8192)
    assert whole <= error_percent(roundtrip(backend, weight), weight) < 1.01 * whole


@each_block
def test_weights_lower_the_weighted_error(block: int) -> None:
    backend, weight, statistics = create("codebook4", block=block), gaussian(), moments()
    importance = statistics.second_moment
    assert importance is not None
    weighted, plain = (
        ((roundtrip(backend, weight, known) - weight).square() * importance).sum() for known in (statistics, NONE)
    )
    assert weighted < 0.6 * plain


def test_the_book_is_learned_for_the_inputs_that_count() -> None:
    weight, backend = gaussian(), Codebook4()
    weight[:, ::32] = torch.linspace(-0.06, 0.06, 32)
    importance = torch.ones(SHAPE[1])
    importance[::32] = 300
    errors = []
    for known in (Statistics(importance), NONE):
        survey = backend.survey(backend.blocks(weight), spec_of(weight), known)
        stored = {**survey.outputs, **backend.encode(weight, survey, Statistics(importance))}
        left = backend.decode(stored, spec_of(weight)).double() - weight
        errors.append(float((left.square() * importance).sum()))
    assert errors[0] < 0.97 * errors[1]


@each_block
def test_weights_that_are_rounded_under_given_scales_are_read_back_as_stored(block: int) -> None:
    backend, weight = Codebook4(block=block), gaussian()
    weight[2] = 0
    survey = backend.survey(backend.blocks(weight), spec_of(weight))
    scales = backend.scales(weight, survey)
    each = tuple(values.repeat_interleave(block, dim=1) for values in scales)
    stored = {**survey.outputs, **backend.store(weight, scales, survey)}
    torch.testing.assert_close(backend.nearest(weight, each, survey), backend.decode(stored, spec_of(weight)))


def test_a_convolution_runs_from_its_codes() -> None:
    layer = nn.Conv2d(16, 8, 3, padding=1)
    x, backend = torch.randn(1, 16, 5, 5, generator=torch.Generator().manual_seed(3)), Codebook4()
    assert backend.refuse_convolution() is None
    with torch.no_grad():
        layer.weight.data = gaussian((8, 144)).reshape(8, 16, 3, 3)
        expected = layer(x)
        result = backend.attach(layer, backend.quantize(layer.weight.flatten(1)))(x)
    assert error_percent(result, expected) < 12
