"""The general prompt sets: each begins with the smaller one, no kind of prompt is missing, and all fit the encoders."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from bitroute.eval.sampling import prompt_sets, read_prompts

SIZES = (16, 64, 128)
FEWEST = {  # of each kind among the 128
    "people": 10, "text in the picture": 10, "counting": 8, "attributes and relations": 8, "textures and materials": 6,
    "night and low light": 6, "wide landscapes and architecture": 8, "animals": 6, "food": 6,
    "illustrations and styles": 8, "macro": 6, "motion": 6, "long prompts": 8, "very short prompts": 6,
    "not in English": 4,
}  # fmt: skip


def kinds(name: str) -> Counter[str]:
    """How many prompts stand below each kind's comment; `# ----` begins a part, it names no kind."""
    found: Counter[str] = Counter()
    kind = ""
    for line in prompt_sets()[name].read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "----" not in line:
            kind = line.removeprefix("# ")
        elif line and not line.startswith("#"):
            found[kind] += 1
    return found


@pytest.mark.parametrize("size", SIZES)
def test_a_set_has_as_many_prompts_as_its_name_says_and_none_twice(size: int) -> None:
    prompts = read_prompts(f"general-{size}")
    assert len(prompts) == len({prompt.casefold() for prompt in prompts}) == size


@pytest.mark.parametrize("size", SIZES)
def test_a_prompt_has_the_same_number_in_every_set_that_holds_it(size: int) -> None:
    assert read_prompts("general-128")[:size] == read_prompts(f"general-{size}")


def test_every_kind_of_prompt_is_in_both_larger_sets() -> None:
    assert set(kinds("general-64")) == set(kinds("general-128")) == set(FEWEST)
    assert {kind: count for kind, count in kinds("general-128").items() if count < FEWEST[kind]} == {}
    assert min(kinds("general-64").values()) >= 2


def test_there_are_long_prompts_very_short_ones_and_several_scripts() -> None:
    prompts = read_prompts("general-128")
    lengths = [len(prompt.split()) for prompt in prompts]
    assert sum(60 <= length <= 120 for length in lengths) >= 8
    assert sum(length <= 3 for length in lengths) >= 6
    assert max(lengths) <= 120
    letters = {letter for prompt in prompts for letter in prompt}
    assert letters & set("кот") and letters & set("雪竹林") and letters & set("äöüÜ") and '"' in letters


def test_every_prompt_fits_512_tokens_of_t5(tiny: Path) -> None:
    """The bundled tokenizer's 992 tokens are shorter than those of a full T5, so that it counts more of them."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "tokenizer_2")
    assert max(len(tokenizer(prompt)["input_ids"]) for prompt in read_prompts("general-128")) <= 512
