"""Every family on a small random pipeline: quantized by its fp8, nf4 and mixed recipes, verified, loaded and called."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from drawing import draw_all
from families import read
from pipelines import write_pipeline

from bitroute import quantize, verify
from bitroute.cli import main as command
from bitroute.convert.recipe import family_of, read_recipe
from bitroute.convert.schema import Recipe

FAMILIES: dict[str, dict[str, Any]] = read("small_pipelines.yaml")
RECIPES = [f"{family}-{kind}" for family in FAMILIES for kind in ("fp8", "nf4", "mixed")]
KNOWN_FAILURES = Path(__file__).parents[2] / "docs" / "known-failures.yaml"
Folders = dict[str, Path]


def recipe_of(name: str) -> Recipe:
    found = read_recipe(name).recipe
    assert found
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Family → its small pipeline."""
    root = tmp_path_factory.mktemp("small")
    return {family: write_pipeline(root / family, facts) for family, facts in FAMILIES.items()}


@pytest.fixture(scope="module")
def quantized(sources: Folders, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Recipe → what it makes of the small pipeline of its family."""
    root = tmp_path_factory.mktemp("quantized")
    return {name: quantize(name, str(sources[family_of(name)]), out=root / name) for name in RECIPES}


@pytest.fixture(scope="module")
def drawn(sources: Folders, quantized: Folders) -> dict[str, Any]:
    """Recipe, or family of a known failure → its picture in figures, or what diffusers said; all in one fresh process.

    bitroute is imported there only for the recipes whose description says that it is needed.
    """
    plain = {str(sources[family]): facts for family, facts in failing().items()}
    with_bitroute: dict[str, Any] = {}
    for name, folder in quantized.items():
        calls = with_bitroute if "loads with bitroute" in recipe_of(name).description else plain
        calls[str(folder)] = FAMILIES[family_of(name)]
    answers = draw_all(plain, with_bitroute)
    return {Path(folder).name: answer for folder, answer in answers.items()}


def failing() -> dict[str, dict[str, Any]]:
    """Family → what makes its small pipeline fail in diffusers, quantized or not."""
    mochi = {**FAMILIES["mochi"], "call": {"num_inference_steps": 1}}
    longcat = {**FAMILIES["longcat-image"], "components": {}}  # as if nobody had said that text_processor is None
    return {"mochi": mochi, "longcat-image": longcat}


def test_what_the_recipes_quantize_has_the_classes_of_the_published_pipelines() -> None:
    published = read("pipelines.yaml")
    assert set(FAMILIES) == set(published)
    for name in RECIPES:
        components = FAMILIES[family_of(name)]["components"]
        for component in recipe_of(name).components:
            assert components[component][0] == published[family_of(name)][component][0], (name, component)


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_makes_of_a_small_pipeline_holds_its_weights(name: str, quantized: Folders) -> None:
    found = verify(quantized[name], load=False)
    assert found.problems == [] and found.compared
    assert {layer.component for layer in found.layers} == set(recipe_of(name).components)


@pytest.mark.parametrize("name", RECIPES)
def test_the_real_pipeline_draws_with_it(name: str, drawn: dict[str, Any]) -> None:
    assert isinstance(drawn[name], dict), drawn[name]
    assert 0.02 < drawn[name]["spread"] < 0.5  # neither black nor flat; NaN is in no range
    *frames, channels, height, width = drawn[name]["shape"]
    assert (channels, height, width) == (3, 32, 32)
    is_video = {"num_frames", "frames"} & set(FAMILIES[family_of(name)]["call"])
    assert all(count > 1 for count in frames) and len(frames) == len(is_video)


def same_files(one: Path, other: Path) -> bool:
    names = sorted(file.name for file in one.iterdir())
    return (
        names == sorted(file.name for file in other.iterdir())
        and filecmp.cmpfiles(one, other, names, False)[0] == names
    )


def test_the_command_makes_the_same_checkpoint(sources: Folders, quantized: Folders, tmp_path: Path) -> None:
    arguments = ["--recipe", "wan22-mixed", "--model", str(sources["wan22"]), "--out", str(tmp_path / "out")]
    ran = CliRunner().invoke(command, [*arguments, "--no-verify"])
    assert ran.exit_code == 0, (ran.output, ran.exception)
    for component in ("transformer", "transformer_2", "text_encoder", "vae"):
        assert same_files(quantized["wan22-mixed"] / component, tmp_path / "out" / component)


@pytest.mark.parametrize("name", ["hidream-fp8", "hidream-nf4", "hidream-mixed"])
def test_a_text_encoder_that_no_recipe_names_is_copied(name: str, sources: Folders, quantized: Folders) -> None:
    assert "text_encoder_4" not in recipe_of(name).components
    assert (quantized[name] / "text_encoder_4" / "model.safetensors").is_file()
    assert same_files(sources["hidream"] / "text_encoder_4", quantized[name] / "text_encoder_4")


def known_failure(class_name: str) -> str:
    entries = yaml.safe_load(KNOWN_FAILURES.read_text(encoding="utf-8"))
    error: str = next(entry["error"] for entry in entries if entry["class"].startswith(class_name))
    return error


def test_the_known_failure_of_nf4_on_a_cpu_is_as_written() -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, quantize_4bit

    packed, state = quantize_4bit(torch.randn(16, 64, dtype=torch.bfloat16), quant_type="nf4")
    with pytest.raises(AssertionError) as failure:
        _convert_weight_packed_for_cpu(packed, state)
    assert f"AssertionError: {failure.value}" == known_failure("any, stored in bitsandbytes")


def test_the_known_failures_of_diffusers_are_as_written(drawn: dict[str, Any]) -> None:
    assert known_failure("LongCatImagePipeline") in drawn["longcat-image"]
    assert known_failure("MochiPipeline") == drawn["mochi"]
