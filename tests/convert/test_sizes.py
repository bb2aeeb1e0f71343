"""Every built-in recipe on the full-size model of its family: the plan, to the byte."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from families import published, read
from sizes import PIPELINES, RECIPES, Sizes, planned, sizes

from bitroute.convert.recipe import builtin_recipes, family_of, read_recipe

STORED: dict[str, Sizes] = read("sizes.yaml")
FORMATS = ("fp8", "int8", "mixed", "nf4", "nvfp4")
PER_ROW = {"float8": 4, "int8": 5}  # bytes: a scale, and for INT8 a zero point


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("full")


def test_every_family_has_the_five_formats_and_a_full_size_pipeline() -> None:
    families = {family_of(name) for name in builtin_recipes()} - {"tiny-flux"}
    missing = {f"{family}-{kind}" for family in families & set(PIPELINES) for kind in FORMATS} - set(builtin_recipes())
    assert missing == set() and set(PIPELINES) <= families


@pytest.mark.parametrize("name", RECIPES)
def test_the_plan_of_the_full_size_model_has_the_container_and_the_bytes_that_are_written_down(
    name: str, folder: Path
) -> None:
    parts = planned(name, folder)
    assert sizes(parts) == STORED[name]
    assert all(part.quantized for part in parts)
    if name.endswith(("-fp8", "-int8")):
        for part in parts:
            quantized = [(entry.backend.name, *entry.weight.rows.shape) for entry in part.entries if entry.quantized]
            saved = sum(rows * columns - PER_ROW[backend] * rows for backend, rows, columns in quantized)
            assert part.size_bytes == part.source_bytes - saved


def test_the_source_of_a_plan_is_the_published_model() -> None:
    for name, parts in STORED.items():
        for component, (class_name, model) in PIPELINES[family_of(name)].items():
            if component in parts and isinstance(model, str):
                facts = published()[class_name][model]
                assert parts[component]["before"] == 2 * facts.get("stored", facts["parameters"]), (name, component)


@pytest.mark.parametrize("name", RECIPES)
def test_a_description_says_what_is_needed_to_load_and_no_smaller_size_than_the_plan(name: str) -> None:
    recipe, parts = read_recipe(name).recipe, STORED[name].values()
    assert recipe
    said = recipe.description
    assert ("loads with bitroute" in said) == any(part["container"] == "bitroute" for part in parts)
    left = sum(part["after"] for part in parts) / sum(part["before"] for part in parts)
    assert "half the size" not in said or left < 0.555
    percent = re.search(r"(\d+) % of the size", said)
    assert percent is None or int(percent[1]) == round(100 * left)
