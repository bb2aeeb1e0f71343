"""Documents: chains of files, what is no file, and errors that nobody can flood or paint."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bitroute.convert.document import (
    MAX_CHAIN,
    MAX_PROBLEMS,
    check_new,
    parse,
    printable,
    read_text,
    shown,
    sorted_problems,
    write_new,
)
from bitroute.convert.recipe import read_recipe
from bitroute.errors import Problem, RecipeError

BOTTOM = "model: a\ncomponents: {t: {}}\n"


def chain(folder: Path, length: int) -> str:
    """As many recipes, each extending the next; the path of the first."""
    for number in range(1, length):
        (folder / f"{number}.yaml").write_text(
            f"description: of {number}\nextends: {number + 1}.yaml\n", encoding="utf-8"
        )
    (folder / f"{length}.yaml").write_text(BOTTOM, encoding="utf-8")
    return str(folder / "1.yaml")


def refusal(name: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read_recipe(name)
    return str(caught.value)


def test_the_longest_chain_allowed_is_read_from_the_bottom_up(tmp_path: Path) -> None:
    file = read_recipe(chain(tmp_path, MAX_CHAIN))
    assert file.recipe and (file.recipe.description, file.recipe.model) == ("of 1", "a")
    assert file.text.count("# extends ") == MAX_CHAIN - 1


@pytest.mark.parametrize("length", [MAX_CHAIN + 1, 3000])
def test_a_longer_chain_is_refused_where_it_becomes_too_long(tmp_path: Path, length: int) -> None:
    message = refusal(chain(tmp_path, length))
    assert "16.yaml:2: too many recipes extend each other" in message and "at most 16 in a chain" in message


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "r.yaml").write_text("extends: pipe.yaml\n", encoding="utf-8")
    for name in ("pipe.yaml", "r.yaml"):
        assert "pipe.yaml: is not a file\n    got:      a pipe" in refusal(str(tmp_path / name))


def test_a_folder_and_an_unreadable_file_are_refused(tmp_path: Path) -> None:
    assert "got:      a folder" in refusal(str(tmp_path))
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_text(tmp_path / "loop.yaml", "loop.yaml")
    assert "no recipe" in refusal(str(tmp_path / "loop.yaml"))


def test_a_result_folder_with_the_name_of_a_built_in_recipe_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flux-fp8").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_recipe("flux-fp8").name == "flux-fp8.yaml"


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 300, '"\\0"', "a.yaml/b", '"\\u202e"'])
def test_a_parent_with_an_impossible_name_is_a_missing_parent(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.yaml").write_text(f"extends: {name}\n", encoding="utf-8")
    message = refusal(str(tmp_path / "a.yaml"))
    assert "which does not exist" in message and "\u202e" not in message
    assert max(len(line) for line in message.replace(str(tmp_path), "").splitlines()) < 130


def test_file_names_and_values_cannot_paint_the_terminal(tmp_path: Path) -> None:
    assert printable("a\x1b[31m\u202eb\udcff.yaml") == "a\\x1b[31m\\u202eb\\udcff.yaml"
    assert shown("\x1b[31m\u202e") == r"'\x1b[31m\u202e'"
    (tmp_path / "a\x1b[31m.yaml").write_text("x: 1\n", encoding="utf-8")
    problems = read_recipe(str(tmp_path / "a\x1b[31m.yaml")).problems
    assert problems and all("\x1b" not in str(problem) for problem in problems)


@pytest.mark.parametrize(("character", "code"), [("\0", "U+0000"), ("\x1b", "U+001B"), ("\ufffe", "U+FFFE")])
def test_a_forbidden_character_is_named_with_its_line(character: str, code: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(f"a: 1\nb: x{character}\n", "r.yaml")
    assert str(caught.value) == f"r.yaml:2: holds a character that YAML forbids\n    got:      {code}"


@pytest.mark.parametrize("value", ["x" * 900_000, "\u202e" * 900_000, ["y" * 50] * 1000, {"k": "z" * 10_000}])
def test_a_shown_value_is_never_long(value: object) -> None:
    assert len(shown(value)) <= 80


@pytest.mark.parametrize(
    "text",
    [
        "a: &" + "x" * 100_000 + " b\nc: &" + "x" * 100_000 + " d\n",
        "? " + "x" * 100_000 + "\n: 1\n",
        "a: " + "[" * 90_000,
    ],
)
def test_a_syntax_error_never_prints_a_long_value(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml")
    assert len(str(caught.value)) < 250


def test_problems_are_sorted_by_file_and_line_and_those_without_come_last() -> None:
    places = ["b.yaml:2", "", "a.yaml:10", "some/folder", "a.yaml:9"]
    ordered = [problem.where for problem in sorted_problems(Problem("x", place) for place in places)]
    assert ordered == ["a.yaml:9", "a.yaml:10", "b.yaml:2", "", "some/folder"]


def test_problems_beyond_the_limit_are_counted() -> None:
    many = [Problem("x", f"r.yaml:{line}") for line in range(MAX_PROBLEMS + 2, 0, -1)]
    kept = sorted_problems(many)
    assert kept[0].where == "r.yaml:1" and kept[-2].where == f"r.yaml:{MAX_PROBLEMS}"
    assert kept[-1].what == "and 2 more problems" and len(kept) == MAX_PROBLEMS + 1
    assert sorted_problems(many[:MAX_PROBLEMS])[-1].where == "r.yaml:52"


RULES = "components:\n  t:\n    rules:\n"


@pytest.mark.parametrize(
    "text",
    [
        RULES + "    - {layers: 1, backend: x}\n" * 8000,
        RULES + "    - {layers: 1, backend: x}\n" * 1900,
        RULES + "    - {layers: 1, backend: x}\n" * 3900,
        RULES + "    - {layers: x, backend: int8}\n" * 1900,
        "".join(f"modell{i}: 1\n" for i in range(20_000)),
        "".join(f"modell{i}: 1\n" for i in range(9_000)),
        "components: {t: {" + ", ".join(f"backendd{i}: 1" for i in range(9000)) + "}}",
        "components: {t: {keep: [" + ", ".join(f"q{i}" for i in range(10_000)) + "]}}",
        "components:\n" + "".join(f"  c{i}: {{backend: x}}\n" for i in range(4000)),
        "a: " + "x " * 120_000,
        "\n" * 250_000 + "a: b",
        "x" * 2**20,
    ],
)
def test_a_large_recipe_full_of_errors_is_answered_quickly(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    started = time.monotonic()
    try:
        problems = list(read_recipe(str(tmp_path / "r.yaml")).problems)
    except RecipeError as error:
        problems = list(error.problems)
    assert time.monotonic() - started < 5
    assert len(problems) <= MAX_PROBLEMS + 1


def test_what_cannot_be_written_whole_is_not_left_half_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot write the file"):
        write_new("a: 1\n" * 10_000 + "\ud800", tmp_path / "r.yaml", "r.yaml")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "word"),
    [
        ("r.yaml", "exists already"), ("dangling", "exists already"), ("none/r.yaml", "no such folder"),
        ("r.yaml/s.yaml", "cannot write"), ("x" * 300, "cannot write"), (".", "exists already"),
    ],
)  # fmt: skip
def test_where_no_new_file_can_be_is_known_beforehand(tmp_path: Path, place: str, word: str) -> None:
    (tmp_path / "r.yaml").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(RecipeError, match=word):
        check_new(tmp_path / place)
    check_new(tmp_path / "new.yaml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "r.yaml"]
