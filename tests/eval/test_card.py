"""The table and the picture of a model card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image

from bitroute.errors import JobError
from bitroute.eval.card import card_markdown, card_picture, chosen_prompts, escaped, verdict, write_card
from bitroute.eval.sheet import CELL, GAP, Column, draw, fitted

Json = dict[str, Any]
EVIL = "<b>&amp;|`x`|*y*_z_ [a](https://b.example) ![i](j) \\| ~~s~~ $$m$$ :smile: # www.c.example <!-- \n- d"


def mean(value: float | str, half: float = 0.0) -> Json:
    bounds = {"low": value, "high": value} if isinstance(value, str) else {"low": value - half, "high": value + half}
    return {"value": value, **bounds, "prompts": 4}


def scores(lpips: float, psnr: float | str) -> Json:
    return {"lpips": {"mean": mean(lpips, 0.25 * lpips)}, "psnr": {"mean": mean(psnr, 1.0)}}


def candidate(name: str, lpips: Sequence[float], size_bytes: int = 5_650_000, **changed: Any) -> Json:
    average = sum(lpips) / len(lpips)
    return {
        "name": name, "tripwires": [], "gate": [], "passed": True, "closeness": "", "size_bytes": size_bytes,
        "bits_per_weight": 8.25, "scores": scores(average, 40.0), "denoiser_error": mean(0.0321, 0.001),
        "pictures": f"pictures/{name}", **changed,
        "samples": [{"picture": f"{n:04d}-0.png", "lpips": value, "psnr": 40.0} for n, value in enumerate(lpips)],
    }  # fmt: skip


def comparison(*candidates: Json, prompts: Sequence[str] = ("apple", "fox", "guitar", "rocket")) -> Json:
    pair = {"metric": "lpips", "better": candidates[0]["name"], "worse": candidates[-1]["name"], "difference": 0.1,
            "low": 0.08, "high": 0.12, "wins": 4, "prompts": 4, "p": 0.01, "significant": True}  # fmt: skip
    return {
        "original": {"name": "tiny", "size_bytes": 11_160_000, "pictures": "pictures/original"},
        "sampling": {"prompts": list(prompts), "seeds": [0], "call": {"height": 64, "note": EVIL},
                     "pipeline": None, "inputs": {}},
        "floor": {"drawn again": scores(0.0, "identical")}, "notes": ["small pictures"],
        "candidates": list(candidates), "by_quality": [found["name"] for found in candidates],
        "pairs": [pair] if len(candidates) > 1 else [],
    }  # fmt: skip


FP8, NF4 = candidate("fp8", [0.01, 0.02, 0.03, 0.04]), candidate("nf4", [0.1, 0.2, 0.1, 0.1], 2_000_000)


def parsed(text: str) -> list[Token]:
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)


def shown(token: Token) -> str:
    """What a reader sees; refuses everything but text and emphasis."""
    children = token.children or []
    assert {child.type for child in children} <= {"text", "text_special", "em_open", "em_close", "softbreak"}
    return "".join(child.content for child in children)


def cells(text: str) -> list[list[str]]:
    rows: list[list[str]] = []
    for previous, token in zip(parsed(text), parsed(text)[1:], strict=False):
        if token.type == "tr_open":
            rows.append([])
        if previous.type in ("td_open", "th_open"):
            rows[-1].append(shown(token))
    return rows


def write_pictures(content: Json, folder: Path, size_px: tuple[int, int] = (64, 64)) -> None:
    """Each candidate in its own grey, each prompt in its own red."""
    for number, entry in enumerate([content["original"], *content["candidates"]]):
        (folder / entry["pictures"]).mkdir(parents=True, exist_ok=True)
        for index in range(len(content["sampling"]["prompts"])):
            picture = Image.new("RGB", size_px, (50 * index, 20 * number, 20 * number))
            picture.save(folder / entry["pictures"] / f"{index:04d}-0.png")


def test_the_table_has_the_noise_floor_first_and_every_figure_with_its_interval() -> None:
    floor, fp8, nf4 = cells(card_markdown(comparison(FP8, NF4)))[1:]
    assert floor == ["noise floor: original, drawn again", "", "", "0.00 [0.00, 0.00]", "identical", "", ""]
    assert fp8 == [
        "fp8", "5.65 MB", "8.25", "0.025 [0.019, 0.031]", "40.0 [39.0, 41.0]", "3.21 % [3.11, 3.31]",
        "differs measurably",
    ]  # fmt: skip
    assert nf4[:2] == ["nf4", "2.00 MB"]


def test_the_text_says_how_it_was_measured_and_who_is_better() -> None:
    texts = [shown(token) for token in parsed(card_markdown(comparison(FP8, NF4))) if token.type == "inline"]
    assert "4 prompts, 1 seed, height = 64" in texts[-2]
    assert texts[-2].endswith("small pictures.")
    assert texts[-1] == "fp8 is better than nf4 by 0.10 [0.08, 0.12] LPIPS, on 4 of 4 prompts, p = 0.01"


def test_a_rejected_candidate_has_no_figures_but_its_reason() -> None:
    text = card_markdown(comparison({**FP8, "tripwires": ["NaN | here"]}))
    assert cells(text)[-1] == ["fp8", "5.65 MB", "8.25", "", "", "", "rejected"]
    assert "- fp8: NaN \\| here" in text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"closeness": "identical"}, "identical"),
        ({"closeness": "indistinguishable", "gate": [{}]}, "within the noise floor, passes the gate"),
        ({"gate": [{}], "passed": False}, "differs measurably, fails the gate"),
        ({"scores": {}}, "rejected"),
    ],
)
def test_a_verdict_is_a_few_words(changed: Json, said: str) -> None:
    assert verdict({**FP8, **changed}) == said


def test_what_strangers_wrote_is_shown_as_they_wrote_it() -> None:
    rows = cells(card_markdown(comparison(candidate(EVIL, [0.1] * 4), candidate("- 1. x", [0.2] * 4))))
    assert [row[0] for row in rows[2:]] == [" ".join(EVIL.split()), "- 1. x"]
    assert {len(row) for row in rows} == {7}


@given(text=st.text(alphabet=st.sampled_from("ab1 -.=+*_`~|\\[]()<>&;#!$:@/'\"\t\nw")))
def test_escaped_text_is_a_plain_paragraph_a_list_item_and_a_cell(text: str) -> None:
    plain = " ".join(text.split())
    if not plain:
        return
    for form, before in (
        (escaped(text), ["paragraph"]),
        (f"- {escaped(text)}", ["bullet_list", "list_item", "paragraph"]),
    ):
        tokens = parsed(form)
        assert [token.type.removesuffix("_open") for token in tokens[: len(before)]] == before
        assert sum(token.type == "inline" for token in tokens) == 1
        assert shown(tokens[len(before)]) == plain
    assert cells(f"| a | b |\n|---|---|\n| {escaped(text)} | c |")[1] == [plain, "c"]


def test_addresses_do_not_become_links() -> None:
    assert escaped("see https://x.example or www.x.example") == "see https\\://x.example or www\\.x.example"


def test_the_picture_has_the_original_and_each_candidate_for_the_worst_middle_and_best_prompt(tmp_path: Path) -> None:
    content = comparison(FP8, NF4)
    write_pictures(content, tmp_path)
    card_picture(content, tmp_path, tmp_path / "card.png")
    sheet = Image.open(tmp_path / "card.png").convert("RGB")
    assert sheet.width == GAP + 3 * (CELL + GAP)
    assert list(chosen_prompts(content).items()) == [(1, "worst"), (3, "middle"), (0, "best")]
    seen = {color for _, color in sheet.getcolors(1 << 20) or []}
    assert {(50 * index, 20 * number, 20 * number) for index in (0, 1, 3) for number in range(3)} <= seen
    assert (100, 0, 0) not in seen
    assert not list(tmp_path.glob("*.part"))


def test_more_than_six_candidates_wrap_beside_the_original_again(tmp_path: Path) -> None:
    content = comparison(*(candidate(f"n{n}", [0.1, 0.2, 0.3, 0.4]) for n in range(7)))
    write_pictures(content, tmp_path)
    card_picture(content, tmp_path, tmp_path / "seven.png")
    card_picture(comparison(*content["candidates"][:4]), tmp_path, tmp_path / "four.png")
    seven, four = Image.open(tmp_path / "seven.png"), Image.open(tmp_path / "four.png")
    assert seven.size == (four.width, 2 * four.height)
    assert four.width == GAP + 5 * (CELL + GAP)


@pytest.mark.parametrize(
    ("prompts", "ranks"), [(1, ["the only prompt"]), (2, ["worst", "best"]), (3, ["worst", "middle", "best"])]
)
def test_few_prompts_are_shown_once_each(prompts: int, ranks: list[str]) -> None:
    names = ("a", "b", "c")[:prompts]
    assert list(chosen_prompts(comparison(candidate("x", [0.1] * prompts), prompts=names)).values()) == ranks


def test_a_rejected_candidate_does_not_choose_the_prompts() -> None:
    black = candidate("black", [0.1, 0.1, 0.1, 9.9], tripwires=["black"])
    assert next(iter(chosen_prompts(comparison(FP8, NF4, black)))) == 1


def test_the_card_is_a_text_and_a_picture_and_the_text_alone_where_nothing_was_drawn(tmp_path: Path) -> None:
    content = comparison(FP8)
    write_pictures(content, tmp_path)
    write_card(content, tmp_path, "report")
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == card_markdown(content)
    assert Image.open(tmp_path / "report.png").format == "PNG"
    write_card(comparison({**FP8, "pictures": "", "samples": [], "scores": {}}), tmp_path, "dead")
    assert (tmp_path / "dead.md").is_file() and not (tmp_path / "dead.png").exists()
    with pytest.raises(JobError, match="cannot write the card"):
        write_card(content, tmp_path, "no-folder/report")


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot be read"):
        card_picture(comparison(FP8), tmp_path, tmp_path / "card.png")


def test_without_any_picture_there_is_no_card_picture(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no candidate drew"):
        card_picture(comparison({**FP8, "pictures": "", "samples": []}), tmp_path, tmp_path / "card.png")


@pytest.mark.parametrize(
    ("given_px", "shown_px"),
    [
        ((64, 64), (256, 256)),
        ((100, 50), (200, 100)),
        ((1024, 512), (256, 128)),
        ((5000, 1), (256, 1)),
        ((256, 9), (256, 9)),
    ],
)
def test_a_picture_fills_a_cell_without_losing_its_shape(given_px: tuple[int, int], shown_px: tuple[int, int]) -> None:
    assert fitted(Image.new("RGB", given_px)).size == shown_px


def test_small_pictures_keep_hard_pixels() -> None:
    picture = Image.new("RGB", (2, 1))
    picture.putpixel((1, 0), (255, 255, 255))
    assert {color for _, color in fitted(picture).getcolors() or []} == {(0, 0, 0), (255, 255, 255)}


@pytest.mark.parametrize("text", ["x" * 200, "two\nlines", "\x1b[31m", "…狐 ü", ""])
def test_any_text_stays_in_its_column(text: str, named: Callable[[str], Image.Image]) -> None:
    sheet = named(text)
    assert sheet.getbbox() is not None
    right = sheet.crop((GAP + CELL + 1, 0, 2 * GAP + CELL - 1, sheet.height))
    assert right.getcolors() == [(right.width * right.height, (255, 255, 255))]


@pytest.fixture
def named() -> Callable[[str], Image.Image]:
    """Two columns, of which the first has the text everywhere."""
    picture = Image.new("RGB", (8, 8))
    return lambda text: draw([Column(text, text, [picture], [text]), Column("", "", [picture], [""])])
