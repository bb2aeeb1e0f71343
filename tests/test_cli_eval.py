"""`quantize eval` as a user meets it: real processes, exit codes, and a report that is the same every time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bitroute.cli import main
from bitroute.eval.sampling import Sampling, call_arguments

SETTINGS = ("--call", "guidance_scale=0.0", "--call", "max_sequence_length=16", "--steps", "4", "--size", "64x64")
PROMPTS = "# two\nred apple, noto style\n\nfox, fluent style\n"
Convert = Callable[[str], Path]
Eval = Callable[..., Result]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    (folder / "prompts.txt").write_text(PROMPTS)
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Eval:
    """quantize eval WORDS… with the prompts and the cache of this module, or another cache."""

    def run(*words: str | Path, cache: str = "cache") -> Result:
        settings = [*SETTINGS, "--prompts", str(place / "prompts.txt")]
        environment = {"XDG_CACHE_HOME": str(place / cache), "OMP_NUM_THREADS": "1"}
        arguments = ["eval", *map(str, words), *settings, "--pictures-only"]
        return CliRunner().invoke(main, arguments, prog_name="quantize", env=environment)

    return run


@pytest.fixture(scope="module")
def first(run: Eval, place: Path, convert: Convert) -> Result:
    """The first evaluation: every pipeline in a process of its own."""
    return run("builtin:tiny-flux", convert("tiny-flux-fp8"), "--out", place / "first", "--gate", "psnr>30", "--json")


@pytest.fixture
def fill_cache(place: Path, tiny: Path, fill: Callable[..., None]) -> Callable[..., None]:
    sampling = Sampling(
        ("red apple, noto style", "fox, fluent style"),
        call=call_arguments(["guidance_scale=0.0", "max_sequence_length=16"], 4, "64x64"),
    )

    def fill_cache(cache: str, *models: Path) -> None:
        fill(place / cache / "bitroute" / "eval", tiny, models, sampling)

    return fill_cache


def without_costs(content: Any) -> Any:
    """Times and memory are measured, everything else is computed."""
    if isinstance(content, dict):
        return {key: without_costs(value) for key, value in content.items() if key != "measured"}
    return [without_costs(value) for value in content] if isinstance(content, list) else content


def test_a_good_candidate_ends_with_0_and_json_is_all_that_stdout_holds(first: Result, place: Path) -> None:
    assert first.exit_code == 0, first.output
    content = json.loads(first.stdout)
    assert content == json.loads((place / "first" / "report.json").read_text())
    assert content["passed"] and "It passes the gate" in content["verdict"]
    assert [line for line in first.stderr.splitlines() if not line.startswith("drawing: ")] == []
    assert (place / "first" / "report.html").stat().st_size > 10_000
    assert content["original"]["measured"]["pictures"] == 2


def test_two_evaluations_with_caches_of_their_own_give_the_same_numbers(
    first: Result, run: Eval, place: Path, convert: Convert, fill_cache: Callable[..., None]
) -> None:
    model = convert("tiny-flux-fp8")
    fill_cache("other", model)
    again = run("builtin:tiny-flux", model, "--out", place / "again", "--gate", "psnr>30", "--json", cache="other")
    assert again.exit_code == 0, again.output
    assert without_costs(json.loads(again.stdout)) == without_costs(json.loads(first.stdout))
    caches = [place / name / "bitroute" / "eval" for name in ("cache", "other")]
    drawn = [{str(file.relative_to(cache)): file.read_bytes() for file in cache.rglob("*.png")} for cache in caches]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 8


@pytest.mark.usefixtures("first")
def test_a_failed_gate_ends_with_3_and_the_table_and_the_reason_are_on_stdout(
    run: Eval, place: Path, convert: Convert
) -> None:
    found = run("builtin:tiny-flux", convert("tiny-flux-fp8"), "--out", place / "gate", "--gate", "psnr>90")
    assert found.exit_code == 3, found.output
    assert "It fails the gate: psnr > 90 (is " in found.stdout
    assert "floor: another attention kernel" in found.stdout and "report.html" in found.stdout


@pytest.mark.usefixtures("first")
def test_without_a_gate_the_one_of_the_candidates_recipe_is_judged(run: Eval, place: Path, convert: Convert) -> None:
    found = run("builtin:tiny-flux", convert("tiny-flux-fp8"), "--out", place / "own", "--json")
    (candidate,) = json.loads(found.stdout)["candidates"]
    assert [limit["limit"] for limit in candidate["gate"]] == ["lpips < 0.001", "psnr > 45"]
    assert found.exit_code == (0 if candidate["passed"] else 3)


def test_a_quantized_original_beside_an_unquantized_candidate_is_taken_for_a_slip(
    run: Eval, place: Path, convert: Convert
) -> None:
    found = run(convert("tiny-flux-fp8"), "builtin:tiny-flux", "--out", place / "swapped")
    assert found.exit_code == 2, found.output
    assert "give the original first" in found.stderr and not (place / "swapped").exists()


def test_a_report_does_not_go_into_a_model(run: Eval, convert: Convert) -> None:
    model = convert("tiny-flux-fp8")
    found = run("builtin:tiny-flux", model, "--out", model / "report")
    assert found.exit_code == 2, found.output
    assert "would lie in a model" in found.stderr and not (model / "report").exists()


@pytest.mark.usefixtures("first")
def test_candidates_of_two_reports_are_compared(run: Eval, place: Path, convert: Convert) -> None:
    run("builtin:tiny-flux", convert("tiny-flux-nf4"), "--out", place / "second")
    arguments = ["compare", str(place / "first"), str(place / "second"), "--out", str(place / "both")]
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == 0, found.output
    content = json.loads((place / "both" / "compare.json").read_text())
    assert len(content["by_quality"]) == 2 and len(content["pairs"]) == 2
    assert "(p = 0.5, 2 prompts)" in found.stdout  # two prompts cannot settle anything
    assert "is better than" not in found.stdout
    for folder, stem in (("first", "report"), ("second", "report"), ("both", "compare")):
        assert (place / folder / f"{stem}.md").read_text().startswith("|  | size |")
        assert (place / folder / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert "<html" in (place / folder / f"{stem}.html").read_text()


@pytest.mark.usefixtures("first")
def test_reports_of_other_settings_are_not_compared(place: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(place / "first", tmp_path / "other"))
    content = json.loads((other / "report.json").read_text())
    content["sampling"]["call"]["num_inference_steps"] = 8
    (other / "report.json").write_text(json.dumps(content))
    found = CliRunner().invoke(main, ["compare", str(place / "first"), str(other), "--out", str(tmp_path / "out")])
    assert found.exit_code == 2, found.output
    assert "num_inference_steps" in found.stderr and found.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("first")
def test_a_broken_candidate_ends_with_1_whatever_the_others_do(
    run: Eval, place: Path, tiny: Path, convert: Convert, fill_cache: Callable[..., None]
) -> None:
    fill_cache("cache", tiny)
    found = run(tiny, "builtin:tiny-flux", convert("tiny-flux-fp8"), "--out", place / "broken", "--gate", "psnr>90")
    assert found.exit_code == 1, found.output
    assert "tiny-flux is rejected: every component holds the original's weights" in found.stdout
    assert "out differs measurably" in found.stdout


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--gate", "psnr<30"), "points the wrong way"),
        (("--gate", ""), "not a limit"),
        (("--seeds", "0,0"), "not a list of seeds"),
        (("--size", "64"), "not a size"),
        (("--call", "guidance_scale=NaN"), "not a finite number"),
        (("--prompts", "emoji16"), "did you mean 'emoji-16'"),
        (("--steps", "0"), "--steps"),
        (("--call", "hight=64"), "did you mean 'height'"),
        (("--pipeline", "FluxImgImgPipeline"), "did you mean 'FluxImg2ImgPipeline'"),
        (("--input", "image=nothing.png"), "no such picture"),
        (("--score", "clp=folder"), "did you mean 'clip'"),
    ],
)
def test_what_is_wrong_with_the_words_ends_with_2_before_anything_is_drawn(
    place: Path, tmp_path: Path, words: tuple[str, ...], reason: str
) -> None:
    arguments = ["eval", "builtin:tiny-flux", "builtin:tiny-flux", "--out", str(tmp_path / "out"), *words]
    found = CliRunner().invoke(main, arguments, env={"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert found.exit_code == 2, found.output
    assert reason in found.stderr and found.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_pipeline_ends_with_2(run: Eval, place: Path, tmp_path: Path) -> None:
    for words in ((tmp_path, "builtin:tiny-flux"), ("builtin:tiny-flux", tmp_path / "nothing")):
        found = run(*words, "--out", tmp_path / "out", cache="unused")
        assert found.exit_code == 2, found.output
    assert not (place / "unused").exists()


@pytest.mark.usefixtures("first")
def test_a_file_where_the_report_should_go_ends_with_1_and_stays(run: Eval, convert: Convert, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    found = run("builtin:tiny-flux", convert("tiny-flux-fp8"), "--out", tmp_path / "taken")
    assert found.exit_code == 1
    assert "cannot write the report" in found.stderr
    assert (tmp_path / "taken").read_text() == "mine"
