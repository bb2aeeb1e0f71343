"""The matcher: whole names only, first rule wins, and a rule without effect is an error that says why."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest

from bitroute import backends
from bitroute.backends import Kind
from bitroute.convert.document import sorted_problems
from bitroute.convert.profile import EVERY_KIND
from bitroute.convert.routing import Route, route
from bitroute.convert.schema import ComponentRecipe
from bitroute.errors import Problem

DOUBLE, SINGLE = 19, 38
LINEAR = [
    "x_embedder",
    *(f"transformer_blocks.{i}.{leaf}" for i in range(DOUBLE) for leaf in ("attn.to_q", "attn.to_out.0", "ff.net.2")),
    *(f"single_transformer_blocks.{i}.{leaf}" for i in range(SINGLE) for leaf in ("attn.to_q", "proj_out")),
    "proj_out",
]
OTHER = [f"transformer_blocks.{i}.attn.norm_q" for i in range(DOUBLE)]
ROLES = {name: "attention" if ".attn." in name else "output" if name == "proj_out" else "other" for name in LINEAR}
KEPT = dict.fromkeys(["x_embedder", "proj_out"], EVERY_KIND)


def routed(
    *rules: Mapping[str, Any],
    roles: Mapping[str, str] = ROLES,
    kept: Mapping[str, frozenset[Kind]] = KEPT,
    **component: Any,
) -> tuple[dict[str, Route], list[Problem]]:
    recipe = ComponentRecipe.model_validate({"backend": "float8", "rules": list(rules), **component})
    where = lambda path: "r.yaml:" + ".".join(map(str, path))  # noqa: E731
    return route("transformer", recipe, LINEAR, OTHER, roles, kept, where, "profile", kind_of)


def kind_of(backend: str, options: Mapping[str, object]) -> Kind | None:
    return backends.create(backend, **options).kind


def rule(layers: str, backend: str = "int8") -> dict[str, Any]:
    return {"layers": layers, "backend": backend}


def only_problem(*rules: Mapping[str, Any], **given: Any) -> str:
    problems = routed(*rules, **given)[1]
    assert len(problems) == 1, problems
    return str(problems[0])


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
        ("transformer_blocks.0-1.*", "block ranges stand in braces: 'transformer_blocks.{0-1}.*' matches 8"),
        ("single_transformer_blocks.3-1.*", "near names"),
        ("0-1.0-1.0-1.0-1.0-1", "quantize inspect"),
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


def many(rules: list[dict[str, Any]]) -> ComponentRecipe:
    """As the reader of a file does it, which looks up the backends once."""
    return ComponentRecipe.model_validate({"rules": rules, "keep": "none"}, context={"backends": ["int8", "keep"]})


def test_thousands_of_patterns_that_match_nothing_do_not_take_long() -> None:
    for text in ("zzz{}", "z*{}", "*.{{{}}}.z*", "re:.*.*.*{}", "re:.*.*(a|bc|d)X{}"):
        recipe = many([rule(text.format(i)) for i in range(2000)])
        started = time.monotonic()
        problems = route("t", recipe, [f"{name}.weighted" for name in LINEAR], [], {}, {}, lambda path: "r.yaml:1")[1]
        assert time.monotonic() - started < 5
        assert len(problems) == 2000 and sorted_problems(problems)[-1].what == "and 1950 more problems"


def test_rules_that_can_never_win_do_not_take_long() -> None:
    recipe = many([rule("*")] * 2000)
    started = time.monotonic()
    problems = route("t", recipe, LINEAR, [], {}, {}, lambda path: "r.yaml:1")[1]
    assert time.monotonic() - started < 5 and len(problems) == 1999


def test_patterns_that_take_too_long_together_are_refused_and_plain_names_are_free() -> None:
    costly = [rule(f"re:.*.*.*_out{'x' * i}") for i in range(9)]
    recipe = ComponentRecipe.model_validate({"rules": [*costly, rule("x_embedder")], "keep": LINEAR[1:1000]})
    routes, problems = route("t", recipe, LINEAR, OTHER, {}, {}, lambda path: "r.yaml:1")
    assert "together they take too long" in problems[-1].what and "plain names cost nothing" in problems[-1].next_step
    assert routes["x_embedder"].label == "rule 10"


def test_a_problem_never_shows_more_than_the_beginning_of_a_pattern_or_a_role() -> None:
    for wrong in (rule("z" * 300), rule("re:" + "z" * 900), {"role": "r" * 10_000, "backend": "int8"}):
        assert max(map(len, only_problem(wrong).splitlines())) < 200


def test_a_layer_that_is_kept_in_4_bits_only_is_quantized_to_8() -> None:
    kept = {**KEPT, "single_transformer_blocks.0.proj_out": frozenset[Kind]({"4-bit"})}
    four = {"role": "other", "backend": "nf4"}
    routes, problems = routed(four, kept=kept)
    assert not problems
    assert routes["single_transformer_blocks.0.proj_out"].label == "keep (profile, 4-bit)"
    assert routes["single_transformer_blocks.1.proj_out"].backend == "nf4"
    routes, _ = routed(kept=kept)
    assert routes["single_transformer_blocks.0.proj_out"].backend == "float8"
    routes, _ = routed(kept=kept, keep="none", backend="nf4")
    assert routes["single_transformer_blocks.0.proj_out"].backend == "nf4"


def test_a_rule_that_only_touches_what_its_own_kind_keeps_can_never_win() -> None:
    kept = {"single_transformer_blocks.0.proj_out": frozenset[Kind]({"w8a8"})}
    eight = {**rule("single_transformer_blocks.0.proj_out"), "options": {"activations": "dynamic"}}
    assert "can never win: keep (profile, w8a8)" in only_problem(eight, kept=kept)
