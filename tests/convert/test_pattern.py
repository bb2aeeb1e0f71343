"""Patterns: whole names only, what cannot be understood is refused, and nothing takes long."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitroute.convert.pattern import Layers, Pattern
from bitroute.errors import RecipeError

DOUBLE, SINGLE = 19, 38
DOUBLE_LEAVES, SINGLE_LEAVES = ("attn.to_q", "attn.to_out.0", "ff.net.2"), ("attn.to_q", "proj_out")
LINEAR = [
    "x_embedder",
    *(f"transformer_blocks.{i}.{leaf}" for i in range(DOUBLE) for leaf in DOUBLE_LEAVES),
    *(f"single_transformer_blocks.{i}.{leaf}" for i in range(SINGLE) for leaf in SINGLE_LEAVES),
    "proj_out",
]
OTHER = [f"transformer_blocks.{i}.attn.norm_q" for i in range(DOUBLE)]


def matching(pattern: str) -> list[str]:
    return Layers([*LINEAR, *OTHER]).matching(Pattern.parse(pattern))


def refusal(pattern: str) -> str:
    with pytest.raises(RecipeError) as caught:
        Pattern.parse(pattern)
    return str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("proj_out", 1),
        ("*proj_out", 1 + SINGLE),
        ("*.proj_out", SINGLE),
        ("attn", 0),
        ("transformer_blocks.*", 4 * DOUBLE),
        ("transformer_blocks.?.attn.to_q", 10),
        ("transformer_blocks.[0-2].attn.to_q", 3),
        ("transformer_blocks.{0-3}.*", 4 * 4),
        ("transformer_blocks.{1}.attn.to_q", 1),
        ("transformer_blocks.{-2--1}.attn.to_q", 2),
        ("transformer_blocks.{15--1}.attn.to_q", 4),
        ("*_blocks.{-1}.*", 4 + 2),
        ("*_blocks.{20-30}.attn.to_q", 11),
        ("transformer_blocks.{0-1}.attn.to_out.{0}", 2),
        ("re:.*\\.attn\\.to_q", DOUBLE + SINGLE),
        ("re:attn", 0),
        ("re:single_transformer_blocks\\.\\d\\.proj_(mlp|out)", 10),
        ("X_EMBEDDER", 0),
    ],
)
def test_patterns_match_whole_names(pattern: str, count: int) -> None:
    assert len(matching(pattern)) == count


def test_negative_numbers_count_from_the_end_of_each_stack() -> None:
    assert matching("*_blocks.{-1}.attn.to_q") == [
        "transformer_blocks.18.attn.to_q",
        "single_transformer_blocks.37.attn.to_q",
    ]


@pytest.mark.parametrize(
    ("pattern", "got"),
    [
        ("blocks.{3-1}.*", "the range {3-1}, which runs backwards"),
        ("blocks.{-1--3}.*", "runs backwards"),
        ("blocks.{a}.*", "no block range"),
        ("blocks.{0,1}.*", "no block range"),
        ("blocks.{0-3.*", "no block range"),
        ("blocks.}.*", "no block range"),
        ("{1}{1}{1}{1}{1}", "more than 4"),
        ("re:(", "an error"),
        ("blocks.[0-18].*", "stand for one character"),
        ("re:[[a]", "an error"),
        ("re:(a+)+b", "take forever"),
        ("re:((a|aa)b?)*", "take forever"),
        ("re:" + "x" * 1000, "1003 characters"),
    ],
)
def test_malformed_patterns_are_refused_and_say_what_is_wrong(pattern: str, got: str) -> None:
    with pytest.raises(RecipeError, match="pattern") as caught:
        Pattern.parse(pattern)
    assert got in caught.value.problems[0].got


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40) | st.text("re:{}-0123*?[]().|+\\", max_size=20))
def test_any_text_is_a_pattern_or_refused(text: str) -> None:
    try:
        pattern = Pattern.parse(text)
    except RecipeError:
        return
    assert set(matching(text)) <= {*LINEAR, *OTHER} and isinstance(Layers(LINEAR).outside(pattern), str)


def test_many_stars_do_not_explode() -> None:
    started = time.monotonic()
    assert matching("*a" * 60 + "zz") == []
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "expression",
    [
        ".*" * 12 + "X",
        "[a-z_.0-9]*" * 20 + "X",
        "(.?){60}X",
        ".?" * 60 + "X",
        "(?:a|ab)" * 30,
        "(?=(.*.*.*.*.*.*.*.*X))x",
        "(?<!a)x",
        r"(a*)\1",
        "(a)?(?(1)b|c)",
        "(?>a*)b",
        "a*+b",
        "(?:^){100000000}x",
        "(((^){60000}){60000}){60000}x",
        "((((.*){15}){15}){15}){15}",
    ],
)
def test_an_expression_that_could_take_forever_is_refused_with_the_rule(expression: str) -> None:
    started = time.monotonic()
    assert "at most three open repeats" in refusal("re:" + expression)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    ("expression", "count"),
    [
        (r".*\.attn\..*\.\d+", DOUBLE),
        (r".*blocks\.\d+\..*(to_q|proj_out)", DOUBLE + 2 * SINGLE),
        (r"(?:single_)?transformer_blocks\.(?:[0-9]|1[0-8])\.attn\.to_q", DOUBLE * 2),
        (r"(?i)TRANSFORMER_blocks\.\d{1,2}\.ff.*?", DOUBLE),
        (r"(\w+\.){2}proj_out", SINGLE),
    ],
)
def test_ordinary_expressions_are_not_refused(expression: str, count: int) -> None:
    assert len(matching("re:" + expression)) == count


@pytest.mark.parametrize(
    "expression", [".*" * 3 + "X", ".*.*.*(ab|cd|ef|gh)X", ".?" * 14 + "X", "[a-z_.0-9]*" * 3 + "X"]
)
def test_the_costliest_expressions_allowed_still_end(expression: str) -> None:
    started = time.monotonic()
    assert matching("re:" + expression) == []
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "pattern", ["*a*" * 60 + "zz", "*a" * 100 + "[!a]", "*{1}*{2}*{3}*{4}*zz", "{1}.{1}.*" + "?" * 200 + "b"]
)
def test_globs_do_not_explode_on_long_names(pattern: str) -> None:
    layers = Layers(["1." * 3000 + "a", "a" * 9000, "blocks." + "9" * 5000])
    started = time.monotonic()
    assert layers.matching(Pattern.parse(pattern)) == [] and not layers.outside(Pattern.parse(pattern))
    assert time.monotonic() - started < 5
