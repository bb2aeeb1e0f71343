"""What every built-in recipe makes of its full-size model; `python tests/sizes.py` writes it to convert/sizes.yaml.

A test plans each recipe again and compares; the page of the models is made from the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from families import DATA, on_meta, published, read, write_index
from hollow import write_hollow

from bitroute.convert.checkpoint import Pipeline, open_pipeline
from bitroute.convert.plan import ComponentPlan, plan_pipeline
from bitroute.convert.recipe import builtin_recipes, family_of, read_recipe

FILE = DATA / "sizes.yaml"
HEAD = """\
# Of every built-in recipe and each component that it names, on the full-size model: container, bytes before and after.
# Written by `python tests/sizes.py`; do not edit.
"""
PIPELINES: dict[str, dict[str, Any]] = read("pipelines.yaml")
RECIPES = [name for name in builtin_recipes() if family_of(name) in PIPELINES]
Sizes = dict[str, dict[str, Any]]


def config_of(class_name: str, model: Any) -> dict[str, Any]:
    config: dict[str, Any] = published()[class_name][model]["config"] if isinstance(model, str) else model
    return config


@cache
def full_size(family: str, folder: Path) -> Pipeline:
    """The pipeline of a family, its weights holes."""
    place = folder / family
    for component, (class_name, model) in PIPELINES[family].items():
        (place / component).mkdir(parents=True)
        write_hollow(on_meta(class_name, config_of(class_name, model)), place / component)
    write_index(place, {component: class_name for component, (class_name, _) in PIPELINES[family].items()})
    return open_pipeline(str(place))


def planned(recipe: str, folder: Path) -> tuple[ComponentPlan, ...]:
    return plan_pipeline(read_recipe(recipe), full_size(family_of(recipe), folder)).components


def sizes(parts: Iterable[ComponentPlan]) -> Sizes:
    return {
        part.name: {"container": part.container.name, "before": part.source_bytes, "after": part.size_bytes}
        for part in parts
    }


def main() -> None:
    with TemporaryDirectory() as folder:
        found = {name: sizes(planned(name, Path(folder))) for name in RECIPES}
    FILE.write_text(HEAD + yaml.safe_dump(found, sort_keys=False, width=160, default_flow_style=None), encoding="utf-8")


if __name__ == "__main__":
    main()
