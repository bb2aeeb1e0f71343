from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bitroute.errors import JobError
from bitroute.eval.evaluate import Evaluation
from bitroute.eval.gate import parse_gate
from bitroute.eval.generate import draw
from bitroute.eval.judge import Candidate, Run
from bitroute.eval.page import write_page
from bitroute.eval.report import write_report
from bitroute.eval.sampling import Sampling
from bitroute.eval.scores import read_pictures, score

VOID = {"meta", "br", "img", "input", "link", "hr"}
Content = dict[str, Any]
Change = Callable[[Content], None]


class Page(HTMLParser):
    """Every element with its attributes, and the text outside of scripts and styles; refuses tags out of order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data

    def pictures(self) -> list[str]:
        found = [each.get("src") or each.get("href", "") for tag, each in self.elements if tag in ("img", "image")]
        assert all(uri.startswith("data:image/") for uri in found)
        return found


Show = Callable[[Change], Page]


@pytest.fixture(scope="session")
def evaluation(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Eight prompts of the bundled model after one step; the candidate's pictures are a little brighter."""
    root = tmp_path_factory.mktemp("evaluation")
    call = {
        "height": 64,
        "width": 64,
        "num_inference_steps": 1,
        "max_sequence_length": 8,
        "guidance_scale": 0.0,
    }
    sampling = Sampling(tuple(f"fox number {i}" for i in range(8)), call=call)
    samples = list(sampling.samples())
    draw(tiny, sampling, root / "original")
    shutil.copytree(root / "original", root / "other")
    for index, sample in enumerate(samples):
        image = Image.open(root / "original" / f"{sample.stem}.png")
        image.point([min(255, v + index) for v in range(256)] * 3).save(root / "other" / f"{sample.stem}.png")
    model = root / "model"
    model.mkdir()
    plan = {"components": {"transformer": {"size_bytes": 10, "parameters": 10}}}
    recipe = {"name": "fox.yaml", "text": "model: fox"}
    (model / "bitroute.json").write_text(json.dumps({"plan": plan, "recipe": recipe}), encoding="utf-8")
    measured = json.loads((root / "original" / "run.json").read_text(encoding="utf-8"))
    first, second = (Run(root / n, read_pictures(root / n, samples), measured) for n in ("original", "other"))
    scores = score(samples, first.pictures, second.pictures)
    floor = {"drawn again": score(samples, first.pictures, first.pictures)}
    candidate = Candidate("dim", model, second, scores, [], parse_gate("lpips<1,psnr>99"))
    environment = {"device": "x", "threads": 1, "python": "3", "libraries": {"torch": "2"}}
    return Evaluation(tiny, sampling, samples, root, first, floor, candidates=[candidate], environment=environment)


@pytest.fixture
def show(evaluation: Evaluation, tmp_path: Path) -> Show:
    """Writes the report, changes its content, and returns the page."""

    def show(change: Change) -> Page:
        content = write_report(evaluation, tmp_path)
        change(content)
        return Page(write_page(content, tmp_path).read_text(encoding="utf-8"))

    return show


def unchanged(content: Content) -> None:
    """The report as it is."""


def breaks(content: Content) -> None:
    content["candidates"][0].update(
        tripwires=["NaN latents"], scores={}, samples=[], pictures="", measured={}, passed=False
    )


def measures_more(content: Content) -> None:
    interval = {"relative_error": 0.5, "low": 0.25, "high": 0.75}
    step = {"timestep": 1000.0, **interval}
    weights = {"bits_per_weight": 8.25, "relative_error": 0.0361, "sqnr_db": 28.85, "gap_db": 20.85}
    equal = {"layer": "proj_out", "backend": "float8", "bits_per_weight": 16.5, "relative_error": 0.0}
    content["sampling"] |= {"pipeline": "FluxImg2ImgPipeline", "inputs": {"image": ["kitchen.png", "garden.png"]}}
    content["candidates"][0] |= {
        "trajectory": {"timesteps": [{"step": 0, **step}, {"step": 1, **step}]},
        "drift": [{"step": 0, **interval}, {"step": 1, **interval}],
        "layers": [{"layer": "blocks.0.to_q", "backend": "nf4", "relative_error": 0.0912}],
        "text": {"text_encoder_2": {"relative_error": 0.0123, "low": 0.0111, "high": 0.0135, "prompts": 8}},
        "weights": {
            "transformer": {
                **weights, "limit_db": 49.7, "largest_error": 0.0104,
                "layers": [{"layer": "blocks.1.to_k", "backend": "float8", **weights},
                           {**equal, "sqnr_db": "identical", "gap_db": "identical"}],
            }
        },
        "standalone": {
            "clip": {
                "title": "CLIP score", "higher_is_better": True, "original": 31.42, "candidate": 31.37,
                "difference": {"value": -0.05, "low": -0.11, "high": 0.01, "prompts": 8}, "p": 0.0731,
            }
        },
    }  # fmt: skip


def every_sample_identical(content: Content) -> None:
    candidate = content["candidates"][0]
    candidate["scores"] = content["floor"]["drawn again"]
    candidate["pictures"] = content["original"]["pictures"]
    candidate["samples"] = [{**s, "lpips": 0.0, "psnr": "identical"} for s in candidate["samples"]]


def only_one_sample(content: Content) -> None:
    content["sampling"]["prompts"] = content["sampling"]["prompts"][:1]
    candidate = content["candidates"][0]
    candidate["samples"] = candidate["samples"][:1]
    for metric in candidate["scores"].values():
        metric["mean"].update(low=None, high=None, prompts=1)


def several_candidates(content: Content) -> None:
    content["candidates"] = [{**content["candidates"][0], "name": name} for name in ("one", "two", "three")]


CHANGES = [unchanged, breaks, measures_more, every_sample_identical, only_one_sample, several_candidates]


@pytest.mark.parametrize("change", CHANGES)
def test_the_page_is_whole_and_refers_to_nothing_outside_of_it(change: Change, show: Show) -> None:
    page = show(change)
    links = [each.get(name, "") for _, each in page.elements for name in ("src", "href", "action")]
    assert all(link == "" or link.startswith(("#", "data:image/")) for link in links)
    targets = {each["id"] for _, each in page.elements if "id" in each}
    assert [link for link in links if link.startswith("#") and link[1:] not in targets] == []
    assert not any("url(" in each.get("style", "") for _, each in page.elements)
    assert not re.search(r"https?://", page.text)


def test_every_picture_is_embedded_once_however_many_candidates_there_are(show: Show) -> None:
    one, three = show(unchanged).pictures(), show(several_candidates).pictures()
    originals, quantized, maps = 8, 8, 6 * 2
    assert len(one) == originals + quantized + maps
    assert len(three) == originals + 3 * (quantized + maps)
    for uri in one:
        Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).verify()


def test_pictures_of_small_models_are_embedded_without_loss(show: Show, evaluation: Evaluation) -> None:
    shown = {
        Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB").tobytes()
        for uri in show(unchanged).pictures()
    }
    drawn = [Image.open(evaluation.drawn.folder / f"{sample.stem}.png").tobytes() for sample in evaluation.samples]
    assert set(drawn) <= shown


def test_every_picture_has_a_text_for_those_who_cannot_see_it(show: Show) -> None:
    page = show(unchanged)
    assert all(each.get("alt") for tag, each in page.elements if tag == "img")
    sliders = [each for tag, each in page.elements if tag == "input"]
    assert len(sliders) == 8
    assert all(each["type"] == "range" and each["aria-label"] for each in sliders)
    drawings = [each for tag, each in page.elements if tag == "svg" and each.get("class") != "defs"]
    assert all(each["role"] == "img" and each["aria-label"] for each in drawings)


def test_the_worst_sample_by_lpips_comes_first_and_the_best_is_shown_in_full(show: Show) -> None:
    text = show(unchanged).text
    shown = re.findall(r"(worst|best|\dth worst|\d.. worst) (\d{4}-0) fox", text)
    assert [rank for rank, _ in shown] == [
        "worst",
        "2nd worst",
        "3rd worst",
        "4th worst",
        "5th worst",
        "best",
    ]
    assert (shown[0][1], shown[-1][1]) == ("0007-0", "0000-0")


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)></style></svg>{{ 7 * 7 }}"


def is_hostile(content: Content) -> None:
    measures_more(content)
    candidate = content["candidates"][0]
    candidate.update(name=HOSTILE, verdict=f"{HOSTILE} is fine", tripwires=[HOSTILE])
    candidate["recipe"] = {"name": HOSTILE, "text": HOSTILE}
    candidate["layers"][0]["layer"] = HOSTILE
    candidate["bits_per_weight"] = {HOSTILE: 8.0}
    candidate["text"] = {HOSTILE: candidate["text"]["text_encoder_2"]}
    candidate["weights"] = {HOSTILE: candidate["weights"]["transformer"]}
    candidate["weights"][HOSTILE]["layers"][0].update(layer=HOSTILE, backend=HOSTILE)
    candidate["standalone"]["clip"]["title"] = HOSTILE
    candidate["gate"][0]["limit"] = HOSTILE
    for sample in candidate["samples"]:
        sample["prompt"] = HOSTILE
    content["sampling"].update(prompts=[HOSTILE] * 8, call={HOSTILE: HOSTILE}, inputs={HOSTILE: [HOSTILE]})
    content["floor"] = {HOSTILE: content["floor"]["drawn again"]}
    content["environment"]["libraries"] = {HOSTILE: HOSTILE}
    content["original"]["name"] = HOSTILE
    content["notes"] = [HOSTILE]


def test_names_and_prompts_from_strangers_stay_text(show: Show) -> None:
    usual, hostile = show(measures_more), show(is_hostile)
    assert hostile.text.count(HOSTILE) > 20
    for tag in ("script", "style"):
        assert [name for name, _ in hostile.elements].count(tag) == 1
    assert len(hostile.pictures()) == len(usual.pictures())
    assert not any(name.startswith("on") for _, each in hostile.elements for name in each)


def test_only_the_pages_own_script_may_run(show: Show, tmp_path: Path) -> None:
    page = show(unchanged)
    [policy] = [each["content"] for tag, each in page.elements if each.get("http-equiv") == "Content-Security-Policy"]
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    script = html[html.index("<script>") + len("<script>") : html.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_a_rejected_candidate_is_marked_and_its_tripwire_is_shown(show: Show) -> None:
    text = show(breaks).text
    assert "⚠ rejected" in text
    assert "no scores" in text
    assert text.count("NaN latents") >= 2


def test_marks_are_words_and_not_only_colours(show: Show) -> None:
    assert "✘ fail" in show(unchanged).text
    assert "✔ pass" in show(lambda content: content["candidates"][0].update(passed=True)).text
    assert "○ no gate" in show(lambda content: content["candidates"][0].update(passed=True, gate=[])).text


def test_identical_pictures_are_called_so_and_not_plotted_as_numbers(show: Show) -> None:
    text = show(every_sample_identical).text
    assert "Every picture is identical to the original's." in text
    assert "Nothing to plot" in text
    assert not re.search(r"\b(inf|nan|None)\b", text)


def test_means_that_differ_late_show_enough_decimals_to_differ(show: Show) -> None:
    def nearly_equal(content: Content) -> None:
        several_candidates(content)
        for candidate, mean in zip(content["candidates"], (0.000014, 0.000033, 0.0021), strict=True):
            summary = {
                **candidate["scores"]["lpips"],
                "mean": {"value": mean, "low": None, "high": None, "prompts": 1},
            }
            candidate["scores"] = {**candidate["scores"], "lpips": summary}

    text = show(nearly_equal).text
    assert [mean for mean in ("0.000014", "0.000033", "0.002100") if mean not in text] == []


def test_what_was_measured_beside_pictures_is_shown_where_it_is_there(show: Show) -> None:
    plain, more = show(unchanged).text, show(measures_more).text
    headings = ("Error per denoising step", "Free-running latent drift", "Weights", "Scores of each picture alone")
    of_text, of_layers = ("text_encoder_2", "0.0123", "[0.0111, 0.0135]"), ("blocks.0.to_q", "0.0912")
    of_weights = ("blocks.1.to_k", "the worst 2 layers", "0.0361", "28.9", "20.9", "49.7")
    of_scores = ("CLIP score ↑", "31.420", "31.370", "-0.050", "[-0.110, 0.010]", "0.073")
    of_sampling = ("FluxImg2ImgPipeline", "kitchen.png, garden.png")
    for words in (*headings, *of_text, *of_layers, *of_weights, *of_scores, *of_sampling):
        assert words not in plain
        assert words in more


def test_every_fully_shown_sample_has_a_difference_map_and_a_flip_map(show: Show) -> None:
    texts = [each["alt"] for tag, each in show(unchanged).elements if tag == "img"]
    assert [text.split(" of ")[0] for text in texts] == ["difference map", "FLIP map"] * 6
    assert len({text.split(" of ")[1] for text in texts}) == 6


def test_of_videos_the_middle_frame_is_shown_and_the_page_says_so(evaluation: Evaluation, tmp_path: Path) -> None:
    content = write_report(evaluation, tmp_path)
    still = write_page(content, tmp_path).read_text(encoding="utf-8")
    for file in tmp_path.rglob("*.png"):
        middle = Image.open(file).convert("RGB")
        others = [Image.new("RGB", middle.size, color) for color in ("white", "black")]
        others[0].save(file, save_all=True, append_images=[middle, others[1]])
    moving = Page(write_page(content, tmp_path).read_text(encoding="utf-8"))
    assert moving.pictures() == Page(still).pictures()
    assert "videos of 3 frames" in moving.text
    assert "videos" not in Page(still).text


def test_a_missing_picture_is_an_error_that_names_it_and_leaves_no_page(evaluation: Evaluation, tmp_path: Path) -> None:
    content = write_report(evaluation, tmp_path)
    (tmp_path / "pictures" / "candidate-dim" / "0003-0.png").unlink()
    with pytest.raises(JobError, match=r"0003-0\.png"):
        write_page(content, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_report_cannot_embed_files_outside_of_its_folder(evaluation: Evaluation, tmp_path: Path) -> None:
    content = write_report(evaluation, tmp_path / "report")
    shutil.copy(tmp_path / "report" / "pictures" / "original" / "0000-0.png", tmp_path / "secret.png")
    content["candidates"][0]["samples"][0]["picture"] = "../../../secret.png"
    with pytest.raises(JobError, match="leads out of"):
        write_page(content, tmp_path / "report")


def test_large_pictures_become_webp_and_the_page_says_so(evaluation: Evaluation, tmp_path: Path) -> None:
    content = write_report(evaluation, tmp_path)
    for file in tmp_path.rglob("*.png"):
        Image.open(file).resize((320, 320)).save(file)
    page = Page(write_page(content, tmp_path).read_text(encoding="utf-8"))
    assert {uri.split(";")[0] for uri in page.pictures()} == {"data:image/webp"}
    assert "embedded as WebP" in page.text


def test_the_report_of_a_broken_candidate_is_still_drawn_from_a_real_evaluation(
    evaluation: Evaluation, tmp_path: Path
) -> None:
    broken = replace(evaluation.candidates[0], run=None, scores=None, tripwires=["the pipeline does not draw"])
    content = write_report(replace(evaluation, candidates=[broken, *evaluation.candidates]), tmp_path)
    text = Page(write_page(content, tmp_path).read_text(encoding="utf-8")).text
    assert "the pipeline does not draw" in text
    assert "✘ fail" in text
