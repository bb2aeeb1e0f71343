"""The words for what is wrong in a recipe: they say how it was probably meant, and never repeat a long value."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitroute.convert.recipe import read_recipe
from bitroute.errors import Problem


def problems(folder: Path, text: str) -> list[Problem]:
    (folder / "r.yaml").write_text(text, encoding="utf-8")
    return read_recipe(str(folder / "r.yaml")).problems


def only_problem(folder: Path, text: str) -> Problem:
    [problem] = problems(folder, text)
    return problem


@pytest.mark.parametrize(
    ("component", "next_step"),
    [
        ("nf4", "write `t: {backend: nf4}`"),
        ("fp8", "write `t: {backend: float8}`"),
        ("flaot8", "write `t: {backend: float8}`"),
        ("qqqq", "write `t: {backend: NAME}`"),
        ("{keep: proj_out}", "write a list: `keep: [proj_out]`"),
        ('{keep: "*.proj_out"}', "write a list: `keep: ['*.proj_out']`"),
        ("{keep: profle}", "did you mean 'profile'?"),
        ("{rules: [proj_out]}", "write `{layers: 'proj_out', backend: NAME}`"),
        ("{backend: fp8}", "did you mean 'float8'?"),
        ("{backend: nvfp4, scale: mse}", "'scale' is an option of nvfp4: write `options: {scale: …}`"),
        (
            "{rules: [{layers: x, backend: float8, granularity: row}]}",
            "'granularity' is an option of float8: write `options: {granularity: …}`",
        ),
        ("{layers: x}", "'layers' belongs in a rule"),
        ("{model: x}", "'model' belongs at the top of the recipe"),
        ("{rules: [{layers: x, backend: int8, keep: none}]}", "'keep' belongs in a component"),
        ("{rule: []}", "did you mean 'rules'?"),
    ],
)
def test_a_mistake_says_how_it_was_probably_meant(tmp_path: Path, component: str, next_step: str) -> None:
    assert only_problem(tmp_path, f"components: {{t: {component}}}\n").next_step == next_step


@pytest.mark.parametrize(
    ("text", "next_step"),
    [
        ("backend: nf4", "'backend' belongs in a component or in a rule"),
        ("transformer: {backend: nf4}", "components stand under `components:`"),
        ("modle: x", "did you mean 'model'?"),
        ("extend: x", "did you mean 'extends'?"),
    ],
)
def test_a_key_in_the_wrong_place_says_the_right_one(tmp_path: Path, text: str, next_step: str) -> None:
    assert only_problem(tmp_path, f"components: {{t: {{}}}}\n{text}\n").next_step == next_step


@pytest.mark.parametrize(
    "text",
    [
        "components: {{t: {{backend: {}}}}}",
        "components: {{t: {{keep: {}}}}}",
        "components: {{t: {{keep: [[{}]]}}}}",
        "components: {{t: {{container: {}}}}}",
        "components: {{t: {{options: {}}}}}",
        "components: {{t: {}}}",
        "components: {{t: {{rules: [{}]}}}}",
        "components: {{t: {{rules: [{{layers: [{}], backend: int8}}]}}}}",
        "components: {{t: {{}}}}\nmodel: {}",
        "components: {{t: {{}}}}\ndescription: {}",
    ],
)
def test_no_problem_repeats_a_long_or_painting_value(tmp_path: Path, text: str) -> None:
    for value in ("x" * 200_000, '"' + "\\u202e\\e" * 20_000 + '"'):
        problem = only_problem(tmp_path, text.format(value))
        for words in (problem.what, problem.got, problem.next_step):
            assert len(words) < 130 and "\u202e" not in words and "\x1b" not in words


def test_a_key_is_shown_escaped_and_refused_where_it_is_long(tmp_path: Path) -> None:
    assert only_problem(tmp_path, 'components: {t: {}}\n"\\u202ea\\e": 1\n').what == r"unknown key '\u202ea\x1b'"


def test_more_rules_entries_or_components_than_anyone_writes_are_one_problem(tmp_path: Path) -> None:
    rules = "components: {t: {rules: [" + "{layers: x, backend: int8}," * 2001 + "]}}"
    keep = "components: {t: {keep: [" + "x," * 2001 + "]}}"
    components = "components: {" + ",".join(f"c{i}: {{}}" for i in range(65)) + "}"
    for text, most in ((rules, 2000), (keep, 2000), (components, 64)):
        assert only_problem(tmp_path, text).expected == f"at most {most}"


def test_of_many_errors_the_first_lines_are_explained_and_the_rest_counted(tmp_path: Path) -> None:
    text = "components:\n  t:\n    rules:\n" + "    - {layers: x, backend: flot8}\n" * 100
    found = problems(tmp_path, text)
    assert [problem.where.rpartition(":")[2] for problem in found[:-1]] == [str(line) for line in range(4, 54)]
    assert all(problem.next_step == "did you mean 'float8'?" for problem in found[:-1])
    assert found[-1].what == "and 50 more problems"
