"""What fits the memory is known before a weight is read, and what does not fit is refused with what would."""

from __future__ import annotations

import re

import pytest
import torch

from bitroute.calibrate.budget import Layer, Measures, hessian_block, measures
from bitroute.calibrate.statistics import Accumulator
from bitroute.convert.shards import parse_size
from bitroute.errors import RecipeError

FLUX = tuple(Layer("transformer", f"layer{index}", 3072 if index % 6 else 12288) for index in range(60))


@pytest.mark.parametrize(
    ("columns", "largest", "block"),
    [(3072, None, 3072), (3072, 4096, 3072), (15360, 4096, 1024), (12288, 4096, 4096), (3072, 256, 256),
     (1152, 512, 128), (2240, 2048, 64), (2520, 2048, 0), (64, 128, 64)],
)  # fmt: skip
def test_a_hessians_block_is_the_largest_that_divides_the_channels(columns: int, largest: int, block: int) -> None:
    assert hessian_block(columns, largest) == block


@pytest.mark.parametrize(
    ("budget_bytes", "block"), [(10**11, None), (2 * 10**9, 2048), (310 * 10**6, 128), (300 * 10**6, 0)]
)
def test_the_largest_hessians_that_fit_for_all_layers_are_measured(budget_bytes: int, block: int | None) -> None:
    found = measures(FLUX, 256, True, budget_bytes)
    assert found.block == block and found.memory_bytes <= budget_bytes
    blocks = [hessian_block(layer.columns, block) if block != 0 else 0 for layer in FLUX]
    assert [layer.block for layer in found.layers] == blocks


def test_hessians_can_be_left_out() -> None:
    assert not any(layer.block for layer in measures(FLUX, 256, False, 10**11).layers)


@pytest.mark.parametrize("layer", [Layer("unet", "a", 96, block=96), Layer("unet", "b", 512, item_bytes=4, block=128)])
def test_the_bytes_are_those_of_the_tensors(layer: Layer) -> None:
    accumulator = Accumulator(layer, 8)
    accumulator.add(torch.ones(20, layer.columns, dtype=torch.bfloat16 if layer.item_bytes == 2 else torch.float32))
    planned = Measures((layer,), 8).memory_bytes
    assert planned == sum(part.nbytes for part in accumulator.state().values())
    assert planned > sum(spec.size_bytes for spec in accumulator.specs().values())


@pytest.mark.parametrize("rows", [256, 0])
def test_a_budget_that_is_too_small_is_refused_with_one_that_would_do(rows: int) -> None:
    with pytest.raises(RecipeError, match="the budget is too small") as refusal:
        measures(FLUX, rows, True, 10**6)
    said = re.search(r"--budget (\w+)", refusal.value.problems[0].next_step)
    assert said
    enough = parse_size(said[1])
    assert enough and measures(FLUX, rows, True, enough).rows == rows
    with pytest.raises(RecipeError):
        measures(FLUX, rows, True, enough - 2 * 10**6)
