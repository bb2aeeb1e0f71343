"""What the tests share: the bundled pipeline, copies of it to damage, and conversions that are made once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

from bitroute import quantize

TINY_FLUX = Path(str(files("bitroute.recipes"))) / "tiny-flux"
Convert = Callable[[str], Path]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The bundled pipeline; read-only by agreement."""
    return TINY_FLUX


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A pipeline folder of one's own."""
    return Path(shutil.copytree(TINY_FLUX, tmp_path / "source"))


@pytest.fixture(scope="session")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """Converts a recipe (a built-in name, or YAML text) once; read-only by agreement."""
    made: dict[str, Path] = {}

    def convert(recipe: str) -> Path:
        if recipe not in made:
            place = tmp_path_factory.mktemp("converted")
            name = recipe
            if "\n" in recipe:
                name = str(place / "recipe.yaml")
                Path(name).write_text(recipe, encoding="utf-8")
            made[recipe] = quantize(name, out=place / "out")
        return made[recipe]

    return convert


@pytest.fixture
def output(tmp_path: Path, convert: Convert) -> Path:
    """A finished checkpoint of one's own: float8, one file per component."""
    return Path(shutil.copytree(convert("tiny-flux-fp8"), tmp_path / "output"))


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[str], str]:
    """Writes a recipe file and returns its path."""

    def write(text: str) -> str:
        file = tmp_path / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        return str(file)

    return write


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Runs `python -m bitroute ARGS` in a process of its own."""

    def command(*arguments: str | Path, **keywords: object) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "bitroute", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            words, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120, **keywords
        )  # type: ignore[call-overload, no-any-return]

    return command
