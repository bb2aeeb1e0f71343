"""The matcher: whole names only, first rule wins, and a rule without effect is an error that says why."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitroute.convert.recipe import ComponentRecipe
from bitroute.convert.routing import Layers, Pattern, Route, route
from bitroute.errors import Problem, RecipeError

DOUBLE, SINGLE = 19, 38
LINEAR = [
    "x_embedder",
    *(f"transformer_blocks.{i}.{leaf}" for i in range(DOUBLE) for leaf in ("attn.to_q", "attn.to_out.0", "ff.net.2")),
    *(f"single_transformer_blocks.{i}.{leaf}" for i in range(SINGLE) for leaf in ("attn.to_q", "proj_out")),
    "proj_out",
]
OTHER = [f"transformer_blocks.{i}.attn.norm_q" for i in range(DOUBLE)]
ROLES = {name: "attention" if ".attn." in name else "output" if name == "proj_out" else "other" for name in LINEAR}
KEPT = {"x_embedder": "first", "proj_out": "last"}


def matching(pattern: str) -> list[str]:
    return Layers([*LINEAR, *OTHER]).matching(Pattern.parse(pattern))


def routed(
    *rules: Mapping[str, Any],
    roles: Mapping[str, str] = ROLES,
    kept: Mapping[str, str] = KEPT,
    **component: Any,
) -> tuple[dict[str, Route], list[Problem]]:
    recipe = ComponentRecipe.model_validate({"backend": "float8", "rules": list(rules), **component})
    return route("transformer", recipe, LINEAR, OTHER, roles, kept, lambda path: "r.yaml:" + ".".join(map(str, path)))


def rule(layers: str, backend: str = "int8") -> dict[str, Any]:
    return {"layers": layers, "backend": backend}


def only_problem(*rules: Mapping[str, Any], **given: Any) -> str:
    problems = routed(*rules, **given)[1]
    assert len(problems) == 1, problems
    return str(problems[0])


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


def test_what_is_kept_comes_before_the_first_rule_and_the_default_last() -> None:
    routes, problems = routed(
        rule("transformer_blocks.{0}.*"), {"role": "attention", "backend": "nf4", "otherwise": "keep"}
    )
    assert not problems and list(routes) == [*LINEAR, *OTHER]
    assert (routes["proj_out"].backend, routes["proj_out"].label) == ("keep", "keep (profile)")
    assert (
        routes["transformer_blocks.0.attn.to_q"].backend,
        routes["transformer_blocks.0.attn.to_q"].label,
    ) == (
        "int8",
        "rule 1",
    )
    attention = routes["transformer_blocks.1.attn.to_q"]
    assert (attention.backend, attention.otherwise, attention.label) == ("nf4", "keep", "rule 2")
    assert attention.source == ("components", "transformer", "rules", 1)
    assert (
        routes["transformer_blocks.1.ff.net.2"].backend,
        routes["transformer_blocks.1.ff.net.2"].label,
    ) == (
        "float8",
        "default",
    )
    assert routes[OTHER[0]].label == "not a linear layer" and routes[OTHER[0]].backend == "keep"


def test_a_keep_list_stands_in_place_of_the_profile() -> None:
    routes, problems = routed(keep=["*.attn.to_q"])
    assert not problems
    assert routes["proj_out"].backend == "float8"
    assert routes["transformer_blocks.3.attn.to_q"].label == "keep (list)"


def test_keep_none_keeps_nothing() -> None:
    assert routed(rule("proj_out"), keep="none")[0]["proj_out"].backend == "int8"


def test_only_keep_reaches_layers_that_are_not_linear() -> None:
    cast = {"layers": "*.norm_q", "backend": "keep", "options": {"dtype": "float32"}}
    routes, problems = routed(cast)
    assert not problems and routes[OTHER[0]].options == {"dtype": "float32"}
    routes, problems = routed(rule("transformer_blocks.{0}.attn.*"))
    assert not problems and routes[OTHER[0]].backend == "keep"
    assert "matches only layers that are not linear" in only_problem(rule("*.norm_q"))


def test_a_default_of_keep_casts_every_layer() -> None:
    routes, _ = routed(backend="keep", options={"dtype": "bfloat16"}, kept={})
    assert {found.label for found in routes.values()} == {"default"}


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("to_q", "'*.to_q' matches 57"),
        ("attn", "'*.attn.*' matches"),
        ("proj_out.weight", "'proj_out' matches 1 (proj_out)"),
        ("transformer.transformer_blocks.{0}.*", "'transformer_blocks.{0}.*' matches 4"),
        ("transformer_blocks.*.atn.to_q", "near names: transformer_blocks.*.attn.to_q"),
        ("zzz", "quantize inspect"),
        ("re:zzz", "quantize inspect"),
    ],
)
def test_a_rule_that_matches_nothing_says_how_it_could(pattern: str, hint: str) -> None:
    message = only_problem(rule("*.attn.*"), rule(pattern))
    assert "r.yaml:components.transformer.rules.1.layers: " in message
    assert "matches no layer of transformer" in message and hint in message


@pytest.mark.parametrize("pattern", ["transformer_blocks.{0-99}.*", "*_blocks.{40}.*", "transformer_blocks.{-20}.*"])
def test_a_range_outside_the_model_names_the_blocks_that_exist(pattern: str) -> None:
    assert "blocks there are" in only_problem(rule(pattern)) and "0-18 in transformer_blocks" in only_problem(
        rule(pattern)
    )


def test_a_rule_behind_wider_rules_names_them_and_their_lines() -> None:
    message = only_problem(
        rule("transformer_blocks.*"), rule("single_transformer_blocks.*"), rule("*.attn.to_q", "nf4")
    )
    for words in (
        "rule 1 (r.yaml:components.transformer.rules.0)",
        "rule 2 (",
        "can never win",
        "move it above",
    ):
        assert words in message


def test_a_rule_whose_layers_are_all_kept_says_how_to_free_them() -> None:
    message = only_problem({"role": "output", "backend": "int8"})
    assert "keep (profile)" in message and "keep the others only: `keep: [" in message


def test_an_unknown_role_lists_the_roles_there_are() -> None:
    message = only_problem({"role": "atention", "backend": "int8"})
    assert "attention, other, output" in message and "did you mean 'attention'?" in message


def test_a_role_needs_a_profile() -> None:
    assert "has no profile" in only_problem({"role": "attention", "backend": "int8"}, roles={})


def test_a_keep_pattern_that_matches_nothing_is_a_problem_too() -> None:
    assert "r.yaml:components.transformer.keep.0.layers: 'to_q' matches no layer" in only_problem(keep=["to_q"])


def test_every_problem_of_every_rule_is_reported() -> None:
    problems = routed(rule("nope"), rule("{"), rule("transformer_blocks.{99}.*"), {"role": "x", "backend": "int8"})[1]
    assert len(problems) == 4


def test_two_thousand_layers_and_fifty_rules_take_a_moment() -> None:
    names = [f"blocks.{i}.part.{j}.attn.to_{k}" for i in range(100) for j in range(5) for k in "qkvo"]
    rules = [rule(f"*.{{{i}}}.part.{{0-4}}.attn.to_?") for i in range(25)] + [rule(f"blok{i}.*") for i in range(25)]
    recipe = ComponentRecipe.model_validate({"rules": rules})
    started = time.monotonic()
    routes, problems = route("t", recipe, names, [], {}, {}, lambda path: "r.yaml:1")
    assert time.monotonic() - started < 4
    assert len(routes) == 2000 and len(problems) == 25
