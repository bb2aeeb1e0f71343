"""The model card: what it says, what the Hub reads of it, and that strangers' words stay words."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub.cards import card_errors
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from bitroute.convert.card import CardInputs, component_bytes, model_card, pipeline_tag
from bitroute.convert.files import sha256, write_json
from bitroute.convert.markdown import fenced
from bitroute.convert.origin import Origin, find_origin, licence_of
from bitroute.convert.quality import Quality, find_quality
from bitroute.convert.reading import read_json
from bitroute.convert.record import read_record
from bitroute.convert.seal import sealed
from bitroute.convert.snippet import Trial, loading_code, try_loading
from bitroute.errors import RecipeError, SourceError

RAN = Trial(True)
EVIL = "<b>&amp;|`x`|*y* [a](https://b.example) ![i](j) ``` <script> </details> www.c.example\n\n# d\n---\n- e"
LICENSE = {"license": "other", "license_name": "some-license", "license_link": "https://h.example/l"}


@pytest.fixture
def mixed(convert: Callable[[str], Path], tmp_path: Path) -> Path:
    """A finished checkpoint of one's own: every family, half of it in the bitroute container."""
    return Path(shutil.copytree(convert("tiny-flux-mixed"), tmp_path / "mixed"))


def card_of(folder: Path, origin: Origin | None = None, **changed: Any) -> str:
    given = CardInputs(folder, read_record(folder), origin or Origin("tiny-flux"), RAN)
    return model_card(replace(given, **changed), "me/tiny-flux-mixed")


def change_record(folder: Path, **changes: Any) -> None:
    content = read_json(folder / "bitroute.json")
    write_json(folder / "bitroute.json", sealed({**content, **changes}))


def write_report(folder: Path, **changed: Any) -> Path:
    candidate = {"record_sha256": sha256(folder / "bitroute.json"), "tripwires": [], "passed": True, "verdict": "good"}
    place = folder.with_name(f"{folder.name}-report")
    place.mkdir(exist_ok=True)
    content = {"schema": "bitroute-report/1", "candidates": [{**candidate, **changed}]}
    (place / "report.json").write_text(json.dumps(content))
    (place / "report.md").write_text("| LPIPS |\n| --- |\n| 0.0009 |\n")
    (place / "report.png").write_bytes(b"\x89PNG\r\n\x1a\n and a picture")
    return place


# What it says


def test_the_card_tells_what_became_of_what(mixed: Path) -> None:
    card = card_of(mixed)
    assert "| transformer | bitroute | nf4 \\(scale mse\\) | 4 | 4.20 | 1.18 MB → 309.65 kB |" in card
    assert "| transformer | bitroute | nvfp4 \\(scale mse\\) | 6 | 4.50 |" in card
    assert "| vae | copied unchanged |" in card
    assert "tiny-flux quantized with bitroute: 13.15 MB → 7.38 MB (56% of the original)" in card
    assert "pip install accelerate bitroute bitsandbytes diffusers torch torchao transformers" in card
    assert read_json(mixed / "bitroute.json")["recipe"]["text"].strip() in card
    assert "This checkpoint was not evaluated." in card


def test_only_a_container_that_needs_bitroute_asks_for_it(mixed: Path, output: Path) -> None:
    assert "\nimport bitroute" in card_of(mixed)
    card = card_of(output)
    assert "import bitroute" not in card
    assert "Plain diffusers loads it" in card


def test_the_memory_is_that_of_the_loaded_tensors(mixed: Path) -> None:
    found = component_bytes(read_record(mixed), mixed, read_json(mixed / "model_index.json"))
    assert found.keys() == {"transformer", "text_encoder", "text_encoder_2", "vae"}
    file_bytes = (mixed / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert 0.98 * file_bytes < found["vae"] < file_bytes
    assert f"| all components | {sum(found.values()) / 1e6:.2f} MB |" in card_of(mixed)
    assert f"| the largest component alone | {found['transformer'] / 1e6:.2f} MB |" in card_of(mixed)


def test_what_could_not_be_run_is_not_called_run(mixed: Path) -> None:
    assert "were run in a fresh process before this upload." in card_of(mixed)
    card = card_of(mixed, trial=Trial(False, "it needs 40.0 GB of memory, 8.0 were free"))
    assert "were not run before this upload: it needs 40.0 GB" in card


def test_devices_that_a_format_computes_on_are_named(mixed: Path) -> None:
    plan = read_json(mixed / "bitroute.json")["plan"]
    devices = ["to compute transformer in nvfp4: CUDA compute capability 10.0 (Blackwell)"]
    change_record(mixed, plan={**plan, "devices": devices})
    assert "- to compute transformer in nvfp4\\: CUDA compute capability 10.0 \\(Blackwell\\)" in card_of(mixed)


# What the Hub reads


def test_the_metadata_is_such_as_the_hub_accepts(mixed: Path) -> None:
    card = card_of(mixed, Origin("you/Base", "you/Base", "0" * 40, LICENSE))
    assert [*card_errors(card)] == []
    data = ModelCard(card).data.to_dict()
    assert data == {
        "base_model": "you/Base", "base_model_relation": "quantized", "library_name": "diffusers",
        "pipeline_tag": "text-to-image", "tags": ["bitroute", "float8", "int8", "nf4", "nvfp4", "torchao"], **LICENSE,
    }  # fmt: skip
    assert "[you/Base](https://huggingface.co/you/Base) quantized" in card
    assert f"commit {'0' * 40} of you/Base" in card


def test_a_local_source_is_no_base_model(mixed: Path) -> None:
    card = card_of(mixed)
    assert [*card_errors(card)] == []
    assert "base_model" not in ModelCard(card).data.to_dict()


@pytest.mark.parametrize(
    "metadata",
    ["license: my-own", "license: other", "tags: [1]", "base_model: here", "base_model_relation: smaller", "[", "- a"],
)
def test_the_hub_of_the_tests_refuses_what_the_real_one_does(metadata: str) -> None:
    assert [*card_errors(f"---\n{metadata}\n---\n")]


@pytest.mark.parametrize(
    ("class_name", "task"),
    [
        ("FluxPipeline", "text-to-image"), ("StableDiffusionXLPipeline", "text-to-image"),
        ("WanPipeline", "text-to-video"), ("WanImageToVideoPipeline", "image-to-video"),
        ("FluxInpaintPipeline", "image-to-image"), ("NobodysPipeline", None),
    ],
)  # fmt: skip
def test_a_pipeline_class_has_the_task_that_diffusers_lists_it_for(class_name: str, task: str | None) -> None:
    assert pipeline_tag(class_name) == task


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# x", {"license": "mit"}),
        ("---\nlicense: [mit, other]\n---\n", {}), ("---\nlicense: {a: b}\n---\n", {}), ("---\n- a\n---\n", {}),
        ("---\n[[[\n---\n", {}), ("# no metadata", {}), ("", {}), ("---\nlicense: ''\n---\n", {}),
        (f"---\nlicense: {'[' * 2000}\n---\n", {}),
    ],
)  # fmt: skip
def test_a_licence_is_read_from_any_card(card: str, licence: dict[str, str]) -> None:
    assert licence_of(card) == licence


def test_a_local_source_has_the_licence_of_its_own_card(mixed: Path, source: Path) -> None:
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    record = replace(read_record(mixed), model=str(source))
    found = find_origin(record)
    assert (found.name, found.repo, found.license) == ("source", None, {"license": "mit"})
    assert "--base-model" in found.note
    assert find_origin(replace(record, model="/not/here")).license == {}
    with pytest.raises(RecipeError, match="not a base model"):
        find_origin(record, "no name")


# Words of strangers


def test_words_of_strangers_are_shown_and_not_read(mixed: Path) -> None:
    change_record(mixed, recipe={"name": EVIL, "text": EVIL}, libraries={EVIL: EVIL})
    origin = Origin(EVIL, license={"license": EVIL}, note=EVIL)
    card = card_of(mixed, origin, trial=Trial(True, EVIL), quality=Quality(EVIL, "", None))
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(ModelCard(card).text)
    blocks = [token.content.strip() for token in tokens if token.type == "html_block"]
    assert [block.split("\n")[0] for block in blocks] == ["<details>", "</details>"]
    assert "<b>" not in blocks[0]
    inline = {child.type for token in tokens for child in token.children or []}
    assert inline <= {"text", "text_special", "code_inline", "softbreak"}
    assert sum(token.type == "heading_open" for token in tokens) == 7
    assert ModelCard(card).data.to_dict()["license"] == EVIL


@pytest.mark.parametrize("code", ["```", "a ````` b", "~~~\n```", "", "\x1b[31m\ttab"])
def test_no_line_of_code_closes_its_fence(code: str) -> None:
    tokens = MarkdownIt("commonmark").parse(fenced(code, "yaml"))
    assert [token.type for token in tokens] == ["fence"]
    assert "\x1b" not in tokens[0].content


# The report


@pytest.mark.parametrize("name", ["report.md", "report.png"])
def test_what_a_link_in_the_report_leads_to_is_not_published(mixed: Path, name: str) -> None:
    place, secret = write_report(mixed), mixed.with_name("secret")
    secret.write_text("hf_secret")
    (place / name).unlink()
    (place / name).symlink_to(secret)
    with pytest.raises(SourceError, match="a link"):
        find_quality(mixed)


@pytest.mark.parametrize("text", ["<img src=x>", "[click](javascript:x)", "ok\n\n## License\n\nPublic domain"])
def test_what_no_report_says_is_not_published(mixed: Path, text: str) -> None:
    (write_report(mixed) / "report.md").write_text(text)
    with pytest.raises(SourceError, match="this is not what `quantize eval` wrote"):
        find_quality(mixed)


def test_the_report_beside_the_checkpoint_goes_into_its_card(mixed: Path) -> None:
    place = write_report(mixed)
    quality, note = find_quality(mixed)
    assert quality == Quality("good", "| LPIPS |\n| --- |\n| 0.0009 |", place / "report.png")
    assert note == ""
    card = card_of(mixed, quality=quality)
    assert "good\n\n| LPIPS |" in card
    assert "](report.png)" in card


def test_the_report_of_another_checkpoint_is_left_out_and_refused_where_it_was_asked_for(mixed: Path) -> None:
    assert find_quality(mixed)[0] is None
    place = write_report(mixed, record_sha256="0" * 64)
    quality, note = find_quality(mixed)
    assert quality is None
    assert "not about this checkpoint" in note
    with pytest.raises(SourceError, match="not about this checkpoint"):
        find_quality(mixed, place)
    with pytest.raises(SourceError, match="the file is missing"):
        find_quality(mixed, mixed.with_name("nowhere"))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"passed": False, "verdict": "LPIPS 0.5"}, "fails its quality gate"),
        ({"tripwires": ["NaN latents"], "passed": False}, "the evaluation rejected this checkpoint"),
    ],
)
def test_a_checkpoint_that_its_report_rejects_is_refused(mixed: Path, changed: dict[str, Any], words: str) -> None:
    write_report(mixed, **changed)
    with pytest.raises(SourceError, match=words):
        find_quality(mixed)


@pytest.mark.parametrize("content", ['{"schema": "x"}', '{"schema": "bitroute-report/1"}', "[]", "{"])
def test_a_damaged_report_is_refused(mixed: Path, content: str) -> None:
    (write_report(mixed) / "report.json").write_text(content)
    with pytest.raises(SourceError, match=r"report\.json"):
        find_quality(mixed)


# The lines that load it


@pytest.mark.parametrize("place", ["me/tiny", 'a "b" \\n {0}', "Modèle 🙂", "C:\\models\\new"])
def test_the_lines_name_any_place(place: str) -> None:
    call = ast.parse(loading_code(place, True, "a branch")).body[-1]
    assert isinstance(call, ast.Assign)
    assert isinstance(call.value, ast.Call)
    assert ast.literal_eval(call.value.args[0]) == place
    assert ast.literal_eval(call.value.keywords[0].value) == "a branch"


def test_lines_that_fail_are_a_problem_with_the_last_words_of_the_process(output: Path) -> None:
    (output / "vae" / "config.json").unlink()
    trial = try_loading(output, read_record(output))
    assert trial.ran
    assert trial.problem
    assert "does not load in a fresh process" in trial.problem.what
    assert "vae" in trial.problem.got
