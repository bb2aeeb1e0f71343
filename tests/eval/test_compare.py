"""Reports of strangers and of our own, beside each other."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitroute.errors import JobError, RecipeError
from bitroute.eval.compare import WIDTH, compare_reports, comparison_text, neighbour_sentences, report_content
from bitroute.eval.evaluate import Evaluation
from bitroute.eval.intervals import compare
from bitroute.eval.report import write_report

Json = dict[str, Any]
Make = Callable[..., Json]
Write = Callable[..., Path]


def names(content: Json) -> list[str]:
    return [entry["name"] for entry in content["candidates"]]


def test_candidates_of_two_reports_are_ordered_by_size_and_by_quality(
    write: Write, tmp_path: Path, candidate: Make, report: Make
) -> None:
    first = write(report(candidate("fp8", 0.01, 200), candidate("nf4", 0.05, 100)), "first")
    second = write(report(candidate("mxfp4", 0.06, 110)), "second")
    content = compare_reports([first, second / "report.json"], tmp_path / "out")
    assert names(content) == ["fp8", "nf4", "mxfp4"]
    assert [entry["report"] for entry in content["candidates"]] == ["first", "first", "second"]
    assert content["by_size"] == ["nf4", "mxfp4", "fp8"]
    assert content["by_quality"] == ["fp8", "nf4", "mxfp4"]
    assert [entry["pareto"] for entry in content["candidates"]] == [True, True, False]
    assert json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8")) == content
    assert not list(tmp_path.rglob("*.part"))


def test_the_pictures_of_every_candidate_are_beside_the_comparison(
    write: Write, tmp_path: Path, candidate: Make, report: Make
) -> None:
    first, second = write(report(candidate("a/b", 0.1)), "first"), write(report(candidate("a-b", 0.2)), "second")
    content = compare_reports([first, second], tmp_path / "out")
    folders = [entry["pictures"] for entry in (content["original"], *content["candidates"])]
    assert len(set(folders)) == 3
    for folder, source in zip(folders, [first / "pictures/original", first / "pictures/candidate-a/b",
                                        second / "pictures/candidate-a-b"], strict=True):  # fmt: skip
        for sample in content["candidates"][0]["samples"]:
            assert (tmp_path / "out" / folder / sample["picture"]).read_bytes() == (
                source / sample["picture"]
            ).read_bytes()


def test_a_pair_has_the_paired_difference_of_the_candidates_scores(
    write: Write, tmp_path: Path, candidate: Make, report: Make
) -> None:
    good, bad = candidate("good", 0.01), candidate("bad", [0.05, 0.03, 0.04, 0.06, 0.05, 0.002, 0.07, 0.04])
    content = compare_reports([write(report(bad, good))], tmp_path / "out")
    pairs = {pair["metric"]: pair for pair in content["pairs"]}
    assert list(pairs) == ["lpips", "psnr", "denoiser_error"]
    assert all((pair["better"], pair["worse"]) == ("good", "bad") for pair in pairs.values())
    wanted = compare(*([s["lpips"] for s in found["samples"]] for found in (bad, good)))
    lpips = pairs["lpips"]
    assert (lpips["difference"], lpips["low"], lpips["high"], lpips["p"], lpips["wins"]) == pytest.approx(
        (wanted.mean.value, wanted.mean.low, wanted.mean.high, wanted.p, wanted.above)
    )
    assert lpips["wins"] == 7 and lpips["prompts"] == 8 and lpips["significant"]
    assert pairs["psnr"]["difference"] == pytest.approx(100 * lpips["difference"])
    assert pairs["denoiser_error"]["low"] == pytest.approx(lpips["low"] / 2)


def test_the_p_values_of_one_metric_are_corrected_for_all_of_its_pairs(
    write: Write, tmp_path: Path, candidate: Make, report: Make
) -> None:
    three = [candidate(name, lpips) for name, lpips in (("a", 0.1), ("b", 0.2), ("c", 0.3))]
    alone = compare_reports([write(report(*three[:2]))], tmp_path / "two")["pairs"]
    assert {pair["p"] for pair in alone} == {2 / 2**8}
    together = compare_reports([write(report(*three))], tmp_path / "three")["pairs"]
    assert {pair["p"] for pair in together} == {3 * 2 / 2**8}
    assert [pair["significant"] for pair in together] == [True] * 9


def test_seeds_of_one_prompt_are_no_pairs_of_their_own(
    write: Write, tmp_path: Path, candidate: Make, report: Make
) -> None:
    content = report(candidate("a", [0.1] * 16), candidate("b", [0.2] * 16), seeds=(3, 5))
    pairs = compare_reports([write(content)], tmp_path / "out")["pairs"]
    assert [pair["prompts"] for pair in pairs] == [8, 8, 8]


def test_a_single_candidate_has_no_pairs(write: Write, tmp_path: Path, candidate: Make, report: Make) -> None:
    content = compare_reports([write(report(candidate("fp8", 0.01)))], tmp_path / "out")
    assert (content["pairs"], content["by_quality"], content["candidates"][0]["pareto"]) == ([], ["fp8"], True)
    assert neighbour_sentences(content) == []
    assert "fp8" in comparison_text(content)


def test_equally_good_candidates_do_not_differ_and_the_larger_one_is_off_the_front(
    write: Write, tmp_path: Path, candidate: Make, report: Make
) -> None:
    content = compare_reports([write(report(candidate("big", 0.1, 20), candidate("small", 0.1, 10)))], tmp_path / "out")
    assert all(pair["p"] == 1.0 and pair["wins"] == 0 and not pair["significant"] for pair in content["pairs"])
    assert {entry["name"]: entry["pareto"] for entry in content["candidates"]} == {"big": False, "small": True}


def test_a_rejected_candidate_comes_last_and_is_never_compared(
    write: Write, tmp_path: Path, candidate: Make, report: Make
) -> None:
    black = candidate("black", 0.0, 1, tripwires=["pictures of a single colour"], passed=False)
    dead = candidate("dead", 0.1, 2, tripwires=["does not load"], passed=False, scores={}, samples=[], pictures="")
    dead["trajectory"] = None
    content = compare_reports([write(report(black, candidate("fp8", 0.1, 9), dead))], tmp_path / "out")
    assert content["by_quality"] == ["fp8", "black", "dead"]
    assert content["by_size"] == ["black", "dead", "fp8"]
    assert [entry["pareto"] for entry in content["candidates"]] == [False, True, False]
    assert content["pairs"] == []
    assert content["candidates"][2]["pictures"] == ""
    assert len(re.findall("rejected", comparison_text(content))) == 4


def test_identical_pictures_have_no_psnr_to_compare_and_a_note_says_so(
    write: Write, tmp_path: Path, candidate: Make, report: Make
) -> None:
    same = candidate("same", [0.0] * 8, psnr=[math.inf] * 8, closeness="identical")
    content = compare_reports([write(report(candidate("fp8", 0.1), same))], tmp_path / "out")
    assert [pair["metric"] for pair in content["pairs"]] == ["lpips", "denoiser_error"]
    assert content["notes"][-1] == "same is identical to the original: there is no PSNR to compare with"
    assert "identical" in comparison_text(content)


def test_a_report_alone_is_a_comparison_of_its_own_pictures(write: Write, candidate: Make, report: Make) -> None:
    folder = write(report(candidate("fp8", 0.1), candidate("dead", 0.1, scores={}, samples=[], pictures="")))
    content = report_content(folder)
    assert content["original"]["pictures"] == "pictures/original"
    assert [entry["pictures"] for entry in content["candidates"]] == ["pictures/candidate-fp8", ""]
    assert not (folder / "compare.json").exists()


def test_a_report_that_is_given_twice_counts_once(write: Write, tmp_path: Path, candidate: Make, report: Make) -> None:
    folder = write(report(candidate("fp8", 0.1)))
    (tmp_path / "link").symlink_to(folder)
    content = compare_reports([folder, folder / "report.json", tmp_path / "link"], tmp_path / "out")
    assert names(content) == ["fp8"]


def test_the_same_candidate_in_two_reports_counts_once_with_its_denoiser_error(
    write: Write, tmp_path: Path, candidate: Make, report: Make
) -> None:
    bare = candidate("fp8", 0.1)
    del bare["trajectory"]
    paths = [write(report(bare), "bare"), write(report(candidate("fp8", 0.1), candidate("nf4", 0.2)), "full")]
    content = compare_reports(paths, tmp_path / "out")
    assert names(content) == ["fp8", "nf4"]
    assert content["candidates"][0]["denoiser_error"]["value"] == pytest.approx(0.05175)


def test_different_candidates_of_one_name_are_told_apart_by_their_reports(
    write: Write, tmp_path: Path, candidate: Make, report: Make
) -> None:
    paths = [write(report(candidate("fp8", lpips)), name) for lpips, name in ((0.1, "x/run"), (0.2, "y/run"))]
    assert names(compare_reports(paths, tmp_path / "out")) == ["x/run/fp8", "y/run/fp8"]
    paths.append(write(report(candidate("x/run/fp8", 0.3)), "z"))
    assert names(compare_reports(paths, tmp_path / "out")) == ["x/run/fp8", "y/run/fp8", "x/run/fp8'"]


@pytest.mark.parametrize(
    ("parts", "parameters", "bits"),
    [
        ({}, {}, None),
        ({"transformer": 4.5}, {}, 4.5),
        ({"transformer": 4.0, "text_encoder": 8.0}, {"transformer": 300, "text_encoder": 100}, 5.0),
        ({"transformer": 4.0, "text_encoder": 8.0}, {"transformer": 300}, None),
    ],
)
def test_bits_per_weight_are_those_of_all_written_components_together(
    parts: Json, parameters: Json, bits: float | None, write: Write, tmp_path: Path, candidate: Make, report: Make
) -> None:
    found = candidate("x", 0.1, bits_per_weight=parts, parameters=parameters)
    content = compare_reports([write(report(found))], tmp_path / "out")
    assert content["candidates"][0]["bits_per_weight"] == bits


def test_a_note_of_one_report_alone_is_said_with_its_name(
    write: Write, tmp_path: Path, candidate: Make, report: Make
) -> None:
    paths = [write(report(candidate("a", 0.1), notes=["all", "mine"]), "one"),
             write(report(candidate("b", 0.1), notes=["all"]), "two")]  # fmt: skip
    assert compare_reports(paths, tmp_path / "out")["notes"] == ["all", "one: mine"]


def test_the_folder_of_a_report_is_no_place_for_a_comparison(write: Write, candidate: Make, report: Make) -> None:
    folder = write(report(candidate("fp8", 0.1)))
    with pytest.raises(RecipeError, match="the folder of a report"):
        compare_reports([folder], folder)


def test_a_folder_that_cannot_be_written_is_named(write: Write, tmp_path: Path, candidate: Make, report: Make) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(JobError, match="cannot write the comparison"):
        compare_reports([write(report(candidate("fp8", 0.1)))], tmp_path / "file")


def test_the_words_fit_a_terminal_and_say_who_is_better(
    write: Write, tmp_path: Path, candidate: Make, report: Make
) -> None:
    long = "x" * 60
    found = [candidate("fp8", 0.01, 300), candidate("nf4", 0.02, 200), candidate(long, [0.0271, *[0.02] * 7], 250)]
    content = compare_reports([write(report(*found))], tmp_path / "out")
    text = comparison_text(content)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "floor: drawn again" in text
    better, equal = neighbour_sentences(content)
    assert better == f"fp8 is better than {long} by 0.0074 [0.0049, 0.0105] LPIPS, on 8 of 8 prompts, p = 0.023"
    assert equal.startswith(f"no significant difference in LPIPS between {long} and nf4 (p = ")


def test_what_would_act_on_a_terminal_is_shown_as_it_is(
    write: Write, tmp_path: Path, candidate: Make, report: Make
) -> None:
    evil = candidate("\x1b[2Jfp8\n", 0.1, pictures="pictures/x", tripwires=[])
    content = compare_reports([write(report(evil, candidate("b", 0.2)))], tmp_path / "out")
    text = comparison_text(content) + "".join(neighbour_sentences(content))
    assert "\x1b" not in text and "\\x1b[2Jfp8\\n" in text


def test_what_quantize_eval_writes_can_be_compared(
    judge: Callable[..., Evaluation], convert: Callable[[str], Path], tmp_path: Path
) -> None:
    found = judge(convert("tiny-flux-nf4"))
    written = write_report(found, tmp_path / "report")
    content = compare_reports([tmp_path / "report"], tmp_path / "out")
    (entry,) = content["candidates"]
    for key in ("name", "verdict", "size_bytes", "scores", "samples", "gate", "closeness"):
        assert entry[key] == written["candidates"][0][key]
    assert content["sampling"] == written["sampling"]
    assert content["floor"] == written["floor"]
    assert content["notes"] == written["notes"]
