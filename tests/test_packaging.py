"""The wheel holds everything that the program reads, and works from another place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEFT_OUT = {"tests", "docs", "benchmarks"}
NOT_SOURCE = shutil.ignore_patterns(*LEFT_OUT, "build", "dist", ".*", "__pycache__", "*.egg-info")


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Setuptools writes into the source tree, and reads what it left there."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("wheel") / "source", ignore=NOT_SOURCE))


@pytest.fixture(scope="module")
def packaged(source_copy: Path) -> set[str]:
    """Every file in a folder of the package, and every module beside them, as the wheel should name it."""
    found = [*source_copy.glob("*.py"), *source_copy.glob("*/**/*")]
    return {f"bitroute/{file.relative_to(source_copy).as_posix()}" for file in found if file.is_file()}


@pytest.fixture(scope="module")
def wheel(source_copy: Path, packaged: set[str]) -> Iterator[zipfile.ZipFile]:
    offline = ["--no-build-isolation"] if int(version("setuptools").partition(".")[0]) >= 77 else []
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *offline, str(source_copy)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=source_copy.parent)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(source_copy.parent.glob("bitroute-*.whl"))) as opened:
        yield opened


def test_every_module_is_in_the_wheel(wheel: zipfile.ZipFile, packaged: set[str]) -> None:
    modules = {name for name in wheel.namelist() if name.endswith(".py")}
    assert modules == {name for name in packaged if name.endswith(".py")}
    assert "bitroute/py.typed" in wheel.namelist()


def test_every_recipe_profile_and_other_data_file_is_in_the_wheel(wheel: zipfile.ZipFile, packaged: set[str]) -> None:
    assert packaged - set(wheel.namelist()) == set()
    for name in ("flux-fp8.yaml", "profiles/FluxTransformer2DModel.yaml", "tiny-flux/vae/config.json"):
        assert f"bitroute/recipes/{name}" in wheel.namelist()


def test_the_wheel_brings_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top.partition("-")[0] for top in tops} == {"bitroute"}
    folders = {name.split("/")[1] for name in wheel.namelist() if name.startswith("bitroute/") and name.count("/") > 1}
    assert folders & LEFT_OUT == set()


def test_both_commands_and_the_licence_are_declared(wheel: zipfile.ZipFile) -> None:
    information = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    scripts = wheel.read(information).decode()
    assert "quantize = bitroute.cli:main" in scripts
    assert "bitroute = bitroute.cli:main" in scripts
    metadata = wheel.read(information.replace("entry_points.txt", "METADATA")).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_the_wheel_runs_from_another_place(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    code = (
        "import bitroute; from bitroute.cli import main\nfrom bitroute import plan\n"
        "assert 'site' in bitroute.__file__, bitroute.__file__\n"
        "assert plan('tiny-flux-fp8').size_bytes > 8_000_000\n"
        "main(['recipes', 'list', '--json'], standalone_mode=False)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "tiny-flux-fp8" in json.loads(done.stdout)
