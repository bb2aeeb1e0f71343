"""Methods are measured where they are expected to lower the error of a layer per byte, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitroute.backends.base import Backend, TensorSpec
from bitroute.calibrate.search_candidates import parse_candidates
from bitroute.calibrate.search_methods import MOST, trials, with_methods
from bitroute.calibrate.search_space import Layer, Space, choose_component, open_space
from bitroute.convert.checkpoint import open_pipeline
from bitroute.convert.layout import StoredTensor
from bitroute.convert.recipe import RecipeFile
from bitroute.convert.statistics import StatisticsFile

NAME = "transformer_blocks.0.ff.net.2"  # [192, 768]
Expect = Callable[[Layer, Backend], float]


@pytest.fixture(scope="module")
def space() -> Space:
    """One layer."""
    pipeline = open_pipeline("builtin:tiny-flux")
    base = RecipeFile.made("base", "model: builtin:tiny-flux\ncomponents: {text_encoder: {}}\n")
    listed = parse_candidates("mxfp4:scale=mse,nvfp4,float8,nvfp4:activations=nvfp4,keep")
    found = open_space(base, pipeline, choose_component(pipeline, None), listed, "none")
    return replace(found, layers=tuple(layer for layer in found.layers if layer.name == NAME))


def tried(space: Space, expect: Expect, **shapes: tuple[int, ...]) -> tuple[set[str], list[str]]:
    """What remains, and the trials. shapes: of what was measured."""
    asked = list[str]()
    specs = {kind: TensorSpec(shape, torch.float32) for kind, shape in shapes.items()}
    tensors = {f"transformer/{NAME}/{kind}": StoredTensor(kind, spec, Path("none"), 0) for kind, spec in specs.items()}

    def heard(layer: Layer, backend: Backend) -> float:
        asked.append(str(backend))
        return expect(layer, backend)

    measured = StatisticsFile(Path("none"), tensors, "", {}, {})
    [layer] = with_methods(space, measured, heard, lambda what, done, total: None).layers
    assert len(asked) == len(set(asked)) <= trials(space)
    return set(layer.size_bytes), asked


def by(**factors: float) -> Expect:
    """Errors by the bits of the format, times a factor for each method."""

    def expect(layer: Layer, backend: Backend) -> float:
        error = 0.5 if backend.name == "nvfp4" else 0.01 if backend.name == "float8" else 1.0
        for name, value in backend.options.get("method", {}).items():
            error *= factors.get(f"{name}_{value}", factors.get(name, 1.0))
        return error

    return expect


def test_a_method_that_lowers_the_error_takes_the_place_of_the_format_alone(space: Space) -> None:
    found, asked = tried(space, by(rotate_32=0.5, rotate_64=0.9, low_rank=1.1), second_moment=(768,))
    assert found == {
        "mxfp4 (scale mse, rotate 32)", "nvfp4 (rotate 32)", "float8", "nvfp4 (activations nvfp4)", "keep",
    }  # fmt: skip
    assert "mxfp4 (scale mse, rotate 32, low_rank 4)" in asked
    assert not any("gptq" in name or "smooth" in name for name in asked)


def test_methods_that_cost_more_than_they_bring_are_not_measured(space: Space) -> None:
    found, _ = tried(space, by(low_rank=0.99, rotate=0.95, smooth=2.0), second_moment=(768,), absmax=(768,))
    assert found == set(space.layers[0].size_bytes)


def test_what_gptq_fitted_is_not_held_against_what_it_did_not(space: Space) -> None:
    found, asked = tried(space, by(gptq=1e-9), hessian=(12, 64, 64), absmax=(768,))
    assert {"mxfp4 (scale mse)", "float8", "nvfp4 (activations nvfp4)", "mxfp4 (scale mse, gptq)", "keep"} <= found
    assert not any("rotate 128" in name for name in asked)  # twice a block of the Hessian
    assert "nvfp4 (smooth 0.25, gptq)" in asked and "nvfp4 (rotate 64, gptq)" in asked


def test_rotation_and_smoothing_are_combined_and_at_most_so_many_remain(space: Space) -> None:
    lower = by(rotate_64=0.8, smooth=0.9, low_rank_4=0.7, low_rank_8=0.6, low_rank_16=0.5)
    found, asked = tried(space, lower, hessian=(1, 768, 768), absmax=(768,))
    assert "mxfp4 (scale mse, rotate 64, smooth 0.25, low_rank 8, gptq)" in asked
    assert len(found - {"keep", "nvfp4 (activations nvfp4)"}) <= MOST
    assert "mxfp4 (scale mse, rotate 64, gptq)" in found and "float8" in found


def test_a_layer_of_which_nothing_was_measured_stays_as_it_is(space: Space) -> None:
    assert tried(space, by()) == (set(space.layers[0].size_bytes), [])
