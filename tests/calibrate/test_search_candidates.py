"""Candidates as people list them: in words, in a file, and with mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitroute.backends import create
from bitroute.calibrate.search_candidates import (
    default_candidates,
    native_families,
    parse_candidates,
    without_plain,
)
from bitroute.errors import RecipeError


def test_words_give_backends_with_options_and_methods_each_once() -> None:
    found = parse_candidates("nvfp4:scale=mse, mxfp4:scale=mse:method.rotate=32:method.low_rank=8,keep,nvfp4:scale=mse")
    assert [str(backend) for backend in found] == [
        "nvfp4 (scale mse)", "mxfp4 (scale mse, rotate 32, low_rank 8)", "keep",
    ]  # fmt: skip
    assert found[0] == create("nvfp4", scale="mse")


def test_a_file_says_the_same_as_rules_do(tmp_path: Path) -> None:
    file = tmp_path / "formats.yaml"
    file.write_text(
        "candidates:\n- int8\n- {backend: mxfp4, options: {scale: mse}, method: {rotate: 32, low_rank: 8}}\n- keep\n"
    )
    words = "int8,mxfp4:scale=mse:method.rotate=32:method.low_rank=8,keep"
    assert parse_candidates(str(file)) == parse_candidates(words)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as refused:
        parse_candidates("nvfp5,nvfp4:scale=best,int8:colour=red,mxfp4:method.spin=3,keep:dtype=float16")
    said = str(refused.value)
    assert len(refused.value.problems) == 5
    for word in ("nvfp5", "best", "colour", "spin"):
        assert word in said


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (",", "0 of them"), ("nvfp4:scale", "not an option"), ("nvfp4:.x=1", "not an option"),
        ("", "0 of them"), ("nvfp4:method=5:method.rotate=32", "'method' is said twice"),
        ("missing.yaml", "cannot be read"), (",".join(["int8:a=1"] * 40), "40 of them"),
    ],
)  # fmt: skip
def test_what_is_no_list_is_refused(text: str, word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        parse_candidates(text)


@pytest.mark.parametrize(
    "text", ["candidates: int8\n", "formats: [int8]\n", "candidates: [{options: {}}]\n", "candidates: [int8]\nx: 1\n",
             "candidates: [{backend: int8, colour: red}]\n", "candidates: [{backend: int8, options: 3}]\n"],
)  # fmt: skip
def test_a_file_of_another_form_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    file = tmp_path / "formats.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=r"formats\.yaml"):
        parse_candidates(str(file))


def test_the_default_has_four_six_and_eight_bits_and_all() -> None:
    labels = {str(backend) for backend in default_candidates()}
    assert labels >= {"nf4 (scale mse)", "nvfp4 (scale mse)", "codebook4", "int6", "int8", "float8", "keep"}
    compensated = {str(backend) for backend in default_candidates(compensated=True)}
    assert compensated >= {"codebook4 (gptq)", "int8", "keep"}


def test_native_families_hold_only_what_one_library_runs() -> None:
    """A quanto folder has one type for all its layers."""
    listed = "int8,float8,nf4,nvfp4:scale=mse,mxfp4,int8:method.rotate=32,keep,quanto-int4,quanto-int8"
    found = native_families(parse_candidates(listed))
    named = {family: [str(backend) for backend in members] for family, members in found.items()}
    assert named == {
        "torchao": ["int8", "float8", "nvfp4 (scale mse)", "keep"], "bitsandbytes_4bit": ["nf4", "keep"],
        "quanto quanto-int4": ["quanto-int4", "keep"], "quanto quanto-int8": ["quanto-int8", "keep"],
    }  # fmt: skip


def test_quantized_activations_are_seen_behind_a_method() -> None:
    weights, both, behind = parse_candidates("int8,nvfp4:activations=nvfp4,nvfp4:activations=nvfp4:method.rotate=32")
    assert [backend.quantizes_activations for backend in (weights, both, behind)] == [False, True, True]


def test_a_format_is_tried_with_gptq_and_plain_only_where_gptq_cannot_be() -> None:
    candidates = {str(backend): backend for backend in default_candidates(compensated=True)}
    measured = without_plain(candidates, dict.fromkeys(candidates, 1))
    assert "nvfp4 (scale mse, gptq)" in measured
    assert not {"nvfp4 (scale mse)", "int6", "codebook4"} & measured.keys()
    unmeasured = {name: 1 for name, backend in candidates.items() if not backend.measured}
    assert {"nvfp4 (scale mse)", "int6", "codebook4", "int8", "keep"} <= without_plain(candidates, unmeasured).keys()
