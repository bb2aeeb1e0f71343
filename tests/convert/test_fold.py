"""Folding layer names: nothing is lost, nothing is added."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from bitroute.convert.fold import fold, fold_by

PARTS = st.sampled_from(["blocks", "attn", "to_q", "x.y", "0", "1", "2", "3", "10", "11"])
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), unique=True, max_size=12)


def test_consecutive_blocks_become_ranges() -> None:
    names = [f"blocks.{number}.ff" for number in (0, 1, 2, 5, 7, 8)]
    assert [str(found) for found in fold(names)] == ["blocks.{0-2,5,7-8}.ff"]


def test_the_order_of_the_names_is_kept() -> None:
    names = ["x_embedder", "blocks.0.b", "blocks.0.a", "blocks.1.b", "proj_out"]
    assert [str(found) for found in fold(names)] == [
        "x_embedder",
        "blocks.{0-1}.b",
        "blocks.{0}.a",
        "proj_out",
    ]


def test_numbers_inside_words_are_no_blocks() -> None:
    assert [str(found) for found in fold(["norm1.linear", "norm2.linear"])] == [
        "norm1.linear",
        "norm2.linear",
    ]


def test_only_layers_of_one_key_fold_together() -> None:
    keys = {"blocks.0.ff": "a", "blocks.1.ff": "b", "blocks.2.ff": "a"}
    assert [(key, str(found)) for key, found in fold_by(keys)] == [
        ("a", "blocks.{0,2}.ff"),
        ("b", "blocks.{1}.ff"),
    ]


@given(NAMES)
def test_the_regexes_of_the_folds_match_the_folded_names_once_and_no_others(names: list[str]) -> None:
    folds = fold(names)
    assert sum(len(found.names) for found in folds) == len(names)
    assert sorted(name for found in folds for name in found.names) == sorted(names)
    for name in names:
        assert sum(bool(re.fullmatch(found.regex, name)) for found in folds) == 1
    others = [name.replace("attn", "attm") + "x" for name in names] + [f"a.{name}" for name in names]
    for other in set(others) - set(names):
        assert not any(re.fullmatch(found.regex, other) for found in folds)
