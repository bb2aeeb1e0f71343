"""The house: no import runs upstairs, no file and no function grows too long, no package is forgotten."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["errors", "backends", "convert", "eval", "calibrate", "cli"]  # each may import those before it
OUTSIDE = {"tests", "docs", "benchmarks", "build", "dist"}  # not part of the installed package
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


@cache
def python_files() -> list[Path]:
    """Every source file of the repository; not what tools have left beside it."""
    found = []
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).parts
        if parts[0] not in {"build", "dist"} and not any(
            part.startswith(".") or part == "__pycache__" for part in parts
        ):
            found.append(file)
    return found


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def packaged_files() -> list[Path]:
    return [file for file in python_files() if file.relative_to(ROOT).parts[0] not in OUTSIDE]


def imports(file: Path) -> Iterator[tuple[int, str, int]]:
    """Line, module and number of leading dots of every import, wherever it stands."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "bitroute" else [node.module]
            )
            yield from ((node.lineno, name or "", node.level) for name in names)


def floor_of(module: str) -> int | None:
    """`bitroute.convert.plan` → 2."""
    parts = module.split(".")
    known = len(parts) > 1 and parts[0] == "bitroute" and parts[1] in FLOORS
    return FLOORS.index(parts[1]) if known else None


def lived_on(file: Path) -> int | None:
    part = file.relative_to(ROOT).parts[0].removesuffix(".py")
    return FLOORS.index(part) if part in FLOORS else None


def test_no_import_runs_upstairs() -> None:
    upstairs = [
        f"{name_of(file)}:{line} imports {module}"
        for file in packaged_files()
        for line, module, _ in imports(file)
        if (home := lived_on(file)) is not None and (floor := floor_of(module)) is not None and floor > home
    ]
    assert upstairs == []


def test_a_stair_would_be_seen() -> None:
    assert floor_of("bitroute.convert.plan") == 2
    assert floor_of("bitroute.errors") == 0
    assert floor_of("torch") is floor_of("bitroute") is floor_of("bitroute.recipes") is None
    assert lived_on(ROOT / "convert" / "plan.py") == 2
    assert lived_on(ROOT / "cli.py") == len(FLOORS) - 1
    assert ("bitroute.backends", 0) in [(module, dots) for _, module, dots in imports(ROOT / "convert" / "plan.py")]


def test_every_source_file_lives_on_a_floor_or_at_the_door() -> None:
    homeless = [name_of(file) for file in packaged_files() if lived_on(file) is None]
    assert homeless == ["__init__.py", "__main__.py", "recipes/__init__.py"]


def test_every_import_is_absolute_and_by_the_full_name() -> None:
    folders = {file.relative_to(ROOT).parts[0].removesuffix(".py") for file in packaged_files()}
    bad = [
        f"{name_of(file)}:{line} imports {'.' * dots}{module}"
        for file in python_files()
        for line, module, dots in imports(file)
        if dots or module.partition(".")[0] in folders - {"__init__", "__main__"}
    ]
    assert bad == []


def test_every_package_folder_is_listed_for_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {file.parent.relative_to(ROOT) for file in packaged_files()}
    wanted = {".".join(("bitroute", *folder.parts)) for folder in folders}
    assert set(settings["packages"]) == wanted
    assert [folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("file", python_files(), ids=name_of)
def test_files_and_functions_stay_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) < LONGEST_FILE
    functions = [node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("file", packaged_files(), ids=name_of)
def test_no_module_is_named_after_its_lack_of_an_idea(file: Path) -> None:
    assert not {"utils", "util", "helpers", "common", "manager", "misc"} & set(file.stem.strip("_").split("_"))
