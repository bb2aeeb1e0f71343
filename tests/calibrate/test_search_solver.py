"""The solver against every combination, its promise about bytes, and fewer kinds for a little error."""

from __future__ import annotations

import itertools
import os
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitroute.calibrate.search_solver import Option, check_solver, smallest, solve
from bitroute.errors import JobError, RecipeError

OPTIONS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(1, 60), st.floats(0, 1).map(lambda x: round(x, 3))),
    min_size=1, max_size=4,
)  # fmt: skip
ITEMS = st.lists(OPTIONS, min_size=1, max_size=5).map(lambda items: [[Option(*o) for o in row] for row in items])


def total(items: list[list[Option]], chosen: tuple[int, ...] | list[int], what: str) -> float:
    return sum(getattr(options[index], what) for options, index in zip(items, chosen, strict=True))


def kinds(items: list[list[Option]], chosen: list[int], groups: list[str]) -> int:
    return len({(group, row[index].kind) for group, row, index in zip(groups, items, chosen, strict=True)})


@settings(max_examples=60, deadline=None)
@given(ITEMS, st.integers(0, 200))
def test_no_other_choice_within_the_budget_has_less_error(items: list[list[Option]], above: int) -> None:
    budget = smallest(items) + above
    chosen = solve(items, budget)
    every = itertools.product(*(range(len(options)) for options in items))
    least = min(total(items, choice, "error") for choice in every if total(items, choice, "size_bytes") <= budget)
    assert total(items, chosen, "size_bytes") <= budget
    assert total(items, chosen, "error") == pytest.approx(least, rel=1e-5, abs=1e-9)


def test_a_budget_of_gigabytes_is_kept_to_the_byte() -> None:
    """The solver's own tolerance is a millionth, here 7 kB."""
    items = [[Option("a", 3_500_000_000, 1.0), Option("b", 3_500_000_000 + extra, 0.5)] for extra in (1, 2)]
    assert solve(items, 7_000_000_000) == [0, 0]
    assert solve(items, 7_000_000_001) == [1, 0]
    assert solve(items, 7_000_000_003) == [1, 1]


def test_a_little_error_buys_fewer_kinds_in_a_group() -> None:
    items = [[Option("a", 10, 1.0 + 0.001 * n), Option("b", 10, 1.001 + 0.0009 * (n % 2))] for n in range(6)]
    groups = ["blocks"] * 6
    best, simple = solve(items, 60), solve(items, 60, groups, 0.01)
    assert kinds(items, best, groups) == 2 and kinds(items, simple, groups) == 1
    assert total(items, simple, "error") <= 1.01 * total(items, best, "error")
    assert solve(items, 60, groups, 0.0) == best


def test_a_budget_below_the_smallest_choice_is_refused_with_that_number() -> None:
    with pytest.raises(JobError, match="at least 30 bytes"):
        solve([[Option("a", 10, 1.0)], [Option("a", 20, 1.0), Option("b", 30, 0.0)]], 29)


def test_the_solver_leaves_stdout_alone(capfd: pytest.CaptureFixture[str]) -> None:
    os.write(1, b"before ")
    solve([[Option("a", 10, 1.0), Option("b", 20, 0.5)]] * 3, 45, ["x", "y", "y"], 0.5)
    os.write(1, b"after")
    assert capfd.readouterr().out == "before after"


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(RecipeError, match=r'pip install "bitroute\[search\]"'):
        check_solver()


def test_a_format_that_ruins_a_layer_does_not_hide_what_the_others_lose() -> None:
    """Errors below a ten-millionth of the largest are nothing to the solver."""
    ruined = [Option("a", 10, 1e6), Option("b", 20, 1e-5)]
    others = [[Option("a", 10, error), Option("b", 20, 1e-9)] for error in (1e-4, 4e-3, 2e-3, 3e-5)]
    assert solve([ruined, *others], 80) == [1, 0, 1, 1, 0]
