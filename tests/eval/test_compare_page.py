from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bitroute.errors import JobError
from bitroute.eval.compare_page import summary, write_comparison_page

Content = dict[str, Any]
PROMPTS = [f"fox number {i}" for i in range(8)]
# name, size in bytes, LPIPS, denoiser's error, on the Pareto front; by size
MADE = [("nf4", 5e6, 0.03, 0.09, True), ("mxfp4", 6e6, 0.05, 0.12, False), ("fp8", 8e6, 0.004, 0.02, True)]
VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Every element with its attributes, the rows of its tables, and the text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.rows: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.rows += [""] if tag == "tr" else []
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"script", "style"} & set(self.open):
            return
        self.text += data
        if "tr" in self.open:
            self.rows[-1] += f"{data} "

    def pictures(self) -> list[Image.Image]:
        uris = [each["src"] for tag, each in self.elements if tag == "img"]
        assert all(uri.startswith("data:image/") for uri in uris)
        return [Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) for uri in uris]


def scores(lpips: float) -> Content:
    means = {"lpips": lpips, "psnr": 30 - 100 * lpips, "ssim": 1 - lpips, "ms_ssim": 1 - lpips, "flip": 2 * lpips}
    return {
        metric: {"mean": {"value": value, "low": value * 0.9, "high": value * 1.1, "prompts": 8}, "identical": 0}
        for metric, value in means.items()
    }


def candidate(name: str, size_bytes: float, lpips: float, error: float, pareto: bool) -> Content:
    """The samples' LPIPS rises from the first prompt to the last."""
    samples = [
        {"prompt": prompt, "seed": 0, "picture": f"{i:04d}-0.png", "lpips": lpips * (i + 1), "psnr": 30.0}
        for i, prompt in enumerate(PROMPTS)
    ]
    return {
        "name": name, "report": f"report of {name}", "verdict": f"{name} differs measurably.", "closeness": "",
        "passed": True, "tripwires": [], "gate": [{"limit": "lpips < 0.1", "mean": lpips, "holds": True}],
        "size_bytes": int(size_bytes), "bits_per_weight": size_bytes / 1e6, "scores": scores(lpips),
        "denoiser_error": {"value": error, "low": error * 0.9, "high": error * 1.1, "prompts": 8}, "pareto": pareto,
        "pictures": f"pictures/{name}", "samples": samples,
    }  # fmt: skip


def pair(metric: str, better: str, worse: str, difference: float, p: float) -> Content:
    bounds = {"low": difference / 2, "high": difference * 2}
    return {
        "metric": metric, "better": better, "worse": worse, "difference": difference, **bounds, "wins": 7,
        "prompts": 8, "p": p, "significant": p < 0.05,
    }  # fmt: skip


@pytest.fixture
def content() -> Content:
    return {
        "schema": "bitroute-compare/1",
        "original": {"name": "tiny", "size_bytes": 13_000_000, "pictures": "pictures/original"},
        "sampling": {
            "prompts": PROMPTS, "seeds": [0], "call": {"num_inference_steps": 4}, "device": "cpu", "threads": 1,
            "attention": "default", "pipeline": "FluxImg2ImgPipeline", "inputs": {"image": ["kitchen.png"]},
        },
        "floor": {"drawn again": scores(0.0005)},
        "unrelated_lpips": 0.5,
        "notes": ["the pictures are small"],
        "candidates": [candidate(*each) for each in MADE],
        "by_size": ["nf4", "mxfp4", "fp8"],
        "by_quality": ["fp8", "nf4", "mxfp4"],
        "pairs": [
            pair("lpips", "fp8", "nf4", 0.026, 0.0001), pair("lpips", "fp8", "mxfp4", 0.046, 0.0001),
            pair("lpips", "nf4", "mxfp4", 0.02, 0.31), pair("psnr", "fp8", "nf4", 2.6, 0.004),
            pair("denoiser_error", "fp8", "nf4", 0.07, 0.02),
        ],
    }  # fmt: skip


Write = Callable[[Content], Page]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the pictures, each of its own colour, and returns the page."""

    def write(content: Content, size: int = 16) -> Page:
        folders = [content["original"]["pictures"], *(c["pictures"] for c in content["candidates"] if c["pictures"])]
        for place, folder in enumerate(folders):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            for number in range(len(PROMPTS)):
                image = Image.new("RGB", (size, size), (30 * number, 50 * place, 90))
                image.save(tmp_path / folder / f"{number:04d}-0.png")
        file = write_comparison_page(content, tmp_path)
        assert file == tmp_path / "compare.html"
        return Page(file.read_text(encoding="utf-8"))

    return write


def reject(content: Content, *names: str) -> None:
    for each in content["candidates"]:
        if each["name"] in names:
            each |= {"tripwires": ["NaN latents"], "passed": False, "pareto": False, "denoiser_error": None}
            each |= {"scores": {}, "samples": [], "pictures": "", "verdict": f"{each['name']} is rejected."}
    content["by_quality"].sort(key=lambda name: name in names)
    content["pairs"] = [p for p in content["pairs"] if not {p["better"], p["worse"]} & set(names)]


def rows_of(page: Page, names: Sequence[str]) -> list[str]:
    return [row for row in page.rows if row.split() and row.split()[0] in names and "MB" in row]


def test_the_summary_names_the_best_the_smallest_and_the_front(content: Content) -> None:
    words = summary(content, 4)
    assert words.startswith("fp8 is the closest to the original (LPIPS 0.0040, 8.00 MB)")
    assert "nf4 is the smallest (5.00 MB, LPIPS 0.0300)" in words
    assert words.endswith("no other is both smaller and better: fp8, nf4.")


def test_a_candidate_that_is_best_and_smallest_needs_no_front(content: Content) -> None:
    reject(content, "nf4", "mxfp4")
    assert summary(content, 3) == "fp8 is the closest to the original (LPIPS 0.004, 8.00 MB), and the smallest."
    reject(content, "fp8")
    assert summary(content, 3).startswith("Every candidate is rejected")


def test_the_table_is_sorted_by_size_and_has_every_figure(content: Content, write: Write) -> None:
    first, second, third = rows_of(write(content), ["nf4", "mxfp4", "fp8"])
    assert [row.split()[0] for row in (first, second, third)] == ["nf4", "mxfp4", "fp8"]
    for figure in ("5.00 MB", "38 %", "0.0300", "27.00", "0.9700", "0.0600", "9.00 %", "✔", "on it"):
        assert figure in first
    assert "on it" not in second


def test_every_column_that_can_be_sorted_has_a_value_in_each_row(content: Content, write: Write) -> None:
    content["candidates"][0]["scores"]["psnr"]["mean"]["value"] = "identical"
    page = write(content)
    heads = [each for tag, each in page.elements if tag == "th" and "data-first" in each]
    values = [each["data-value"] for tag, each in page.elements if tag in ("th", "td") and "data-value" in each]
    assert len(heads) == 9
    assert len(values) == 3 * len(heads)
    assert values[:5] == ["nf4", "5000000", "5.0", "0.03", "Infinity"]


def test_rejected_candidates_have_no_figures_and_say_why(content: Content, write: Write) -> None:
    reject(content, "mxfp4")
    page = write(content)
    [row] = rows_of(page, ["mxfp4"])
    assert "⚠" in row and "0.05" not in row
    assert "mxfp4 is rejected." in page.text
    assert not any("mxfp4" in each.get("title", "") for _, each in page.elements)


def test_a_page_without_any_scores_can_be_drawn(content: Content, write: Write) -> None:
    reject(content, "nf4", "mxfp4", "fp8")
    page = write(content)
    assert "No pictures." in page.text
    assert not [tag for tag, _ in page.elements if tag == "svg"]


def test_the_matrix_compares_every_pair_once_and_tells_which_are_significant(content: Content, write: Write) -> None:
    page = write(content)
    cells = {each["title"]: each["class"] for tag, each in page.elements if tag == "td" and "title" in each}
    assert list(cells.values()) == ["significant", "significant", "open"]
    assert "nf4 is better than mxfp4 by 0.020 [0.010, 0.040], on 7 of 8 prompts, p = 0.31" in cells


def test_neighbours_are_compared_by_each_metric(content: Content, write: Write) -> None:
    text = write(content).text
    assert "LPIPS: fp8 is better by 0.026 [0.013, 0.052], on 7 of 8 prompts, p < 0.001" in text
    assert "PSNR: fp8 is better by 2.60 dB [1.30, 5.20]" in text
    assert "denoiser error: fp8 is better by 7.00 percentage points [3.50, 14.00]" in text
    assert "LPIPS: no significant difference (nf4 ahead by 0.020" in text
    assert "fp8 and mxfp4" not in text


def test_pictures_come_worst_first_and_all_but_six_rows_are_folded(content: Content, write: Write) -> None:
    page = write(content)
    shown = re.findall(r"(\d{4}-0) fox", page.text)
    assert shown == [f"{number:04d}-0" for number in reversed(range(8))]
    assert "2 more samples" in page.text
    colors = [picture.convert("RGB").getpixel((0, 0)) for picture in page.pictures()]
    original, nf4, mxfp4, fp8 = (50 * place for place in range(4))
    assert [color for color in colors[:4]] == [(210, green, 90) for green in (original, fp8, nf4, mxfp4)]
    assert len(colors) == 8 * 4
    assert page.text.index("LPIPS 0.0320") < page.text.index("LPIPS 0.2400")


def test_large_pictures_are_reduced_and_the_page_says_so(content: Content, write: Callable[..., Page]) -> None:
    small, large = write(content, 200), write(content, 600)
    assert {picture.size for picture in small.pictures()} == {(200, 200)}
    assert {picture.size for picture in large.pictures()} == {(512, 512)}
    assert "reduced to 512 px" in large.text
    assert "reduced to" not in small.text


def test_the_front_is_joined_and_every_candidate_is_named_in_the_plot(
    content: Content, write: Write, tmp_path: Path
) -> None:
    write(content)
    html = (tmp_path / "compare.html").read_text(encoding="utf-8")
    svg = html[html.index("<svg") : html.index("</svg>")]
    [front] = re.findall(r'<polyline points="([^"]+)" class="front"', svg)
    assert len(front.split()) == 2
    assert [name for name in ("nf4", "mxfp4", "fp8", "noise floor") if f">{name}</text>" not in svg] == []


def test_how_it_was_drawn_is_told(content: Content, write: Write) -> None:
    text = write(content).text
    for words in ("FluxImg2ImgPipeline", "kitchen.png", "report of nf4", "the pictures are small", "0.50 LPIPS apart"):
        assert words in text


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)></style></svg>{{ 7 * 7 }}"


def is_hostile(content: Content) -> None:
    def hostile(name: str) -> str:
        return f"{HOSTILE}{name}"

    for each in content["candidates"]:
        each |= {"name": hostile(each["name"]), "report": HOSTILE, "verdict": HOSTILE}
        each["gate"][0]["limit"] = HOSTILE
        for sample in each["samples"]:
            sample["prompt"] = HOSTILE
    for key in ("by_size", "by_quality"):
        content[key] = [hostile(name) for name in content[key]]
    for each in content["pairs"]:
        each |= {"better": hostile(each["better"]), "worse": hostile(each["worse"])}
    content["sampling"] |= {"prompts": [HOSTILE] * 8, "call": {HOSTILE: HOSTILE}, "inputs": {HOSTILE: [HOSTILE]}}
    content["floor"] = {HOSTILE: content["floor"]["drawn again"]}
    content["original"]["name"] = HOSTILE
    content["notes"] = [HOSTILE]


def test_names_and_prompts_from_strangers_stay_text(content: Content, write: Write) -> None:
    usual = write(content)
    is_hostile(content)
    hostile = write(content)
    assert hostile.text.count(HOSTILE) > 20
    for tag in ("script", "style", "img"):
        counts = [[name for name, _ in page.elements].count(tag) for page in (usual, hostile)]
        assert counts[0] == counts[1]
    assert not any(name.startswith("on") for _, each in hostile.elements for name in each)


def test_only_the_pages_own_script_may_run_and_nothing_is_loaded(
    content: Content, write: Write, tmp_path: Path
) -> None:
    page = write(content)
    [policy] = [each["content"] for _, each in page.elements if each.get("http-equiv") == "Content-Security-Policy"]
    html = (tmp_path / "compare.html").read_text(encoding="utf-8")
    script = html[html.index("<script>") + len("<script>") : html.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    links = [each[name] for _, each in page.elements for name in ("src", "href") if name in each]
    assert all(link.startswith(("#", "data:image/")) for link in links)
    targets = {each["id"] for _, each in page.elements if "id" in each}
    assert [link for link in links if link.startswith("#") and link[1:] not in targets] == []


def test_every_picture_has_a_text_for_those_who_cannot_see_it(content: Content, write: Write) -> None:
    elements = write(content).elements
    assert all(each["alt"] for tag, each in elements if tag == "img")
    assert all(each["role"] == "img" and each["aria-label"] for tag, each in elements if tag == "svg")


def test_a_missing_picture_is_an_error_that_names_it_and_leaves_no_page(
    content: Content, write: Write, tmp_path: Path
) -> None:
    write(content)
    (tmp_path / "compare.html").unlink()
    (tmp_path / "pictures" / "nf4" / "0003-0.png").unlink()
    with pytest.raises(JobError, match=r"0003-0\.png"):
        write_comparison_page(content, tmp_path)
    assert not (tmp_path / "compare.html").exists()


def test_a_comparison_cannot_embed_files_outside_of_its_folder(content: Content, write: Write, tmp_path: Path) -> None:
    write(content)
    content["original"]["pictures"] = "../elsewhere"
    with pytest.raises(JobError, match="leads out of"):
        write_comparison_page(content, tmp_path)
