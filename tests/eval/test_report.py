"""report.json and its sentences: readable by any program and by a stranger, and the same every time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitroute.errors import JobError
from bitroute.eval.evaluate import Evaluation
from bitroute.eval.gate import parse_gate
from bitroute.eval.judge import Candidate
from bitroute.eval.page import write_page
from bitroute.eval.report import candidate_verdict, describe, table, write_report
from bitroute.eval.scores import Scores

Judge = Callable[..., Evaluation]
Convert = Callable[[str], Path]


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def scores_of(lpips: Sequence[float], psnr: Sequence[float]) -> Scores:
    values = {"lpips": lpips, "psnr": psnr, "ssim": [0.9] * len(lpips), "ms_ssim": [0.9] * len(lpips)}
    return Scores(values, list(range(len(lpips))), [])


@pytest.fixture(scope="module")
def found(judge: Judge, convert: Convert) -> Evaluation:
    return judge(convert("tiny-flux-nf4"), limits=parse_gate("lpips<0.1,psnr>20"))


@pytest.fixture
def say(found: Evaluation, tmp_path: Path) -> Callable[..., str]:
    """The verdict on made-up scores, beside a floor of 56 dB or another."""

    def say(
        scores: Scores | None, closeness: str = "", gate: str | None = None, floor_db: float = 56.0,
        tripwires: Sequence[str] = (),
    ) -> str:  # fmt: skip
        candidate = Candidate("fox", tmp_path, None, scores, tripwires, parse_gate(gate), closeness)
        floor = {"drawn again": scores_of([0.0] * 2, [math.inf] * 2), "plain": scores_of([0.0] * 2, [floor_db] * 2)}
        return candidate_verdict(candidate, replace(found, floor=floor))

    return say


def test_a_difference_is_told_with_its_measure_and_the_noise_floor(say: Callable[..., str]) -> None:
    assert say(scores_of([0.01, 0.03], [40.0, 44.0])) == (
        "fox differs measurably from the original: PSNR 42.0 [40.0, 44.0] dB, outside the noise floor of 56.0 dB; "
        "LPIPS 0.020 [0.010, 0.030]."
    )


def test_what_lies_within_the_noise_is_called_indistinguishable(say: Callable[..., str]) -> None:
    said = say(scores_of([0.0001] * 2, [55.5] * 2), "indistinguishable")
    assert "is indistinguishable from the original" in said
    assert "within 1 dB of the noise floor of 56.0 dB" in said


def test_no_sentence_speaks_of_infinite_decibels(say: Callable[..., str]) -> None:
    said = say(scores_of([0.01] * 2, [40.0] * 2), floor_db=math.inf)
    assert "where the original drawn again is identical" in said
    identical = say(scores_of([0.0] * 2, [math.inf] * 2), "identical", gate="psnr>30")
    assert identical == "fox draws pictures identical to the original's. It passes the gate."
    assert "inf" not in said + identical


def test_a_failed_gate_names_each_limit_and_what_was_found(say: Callable[..., str]) -> None:
    said = say(scores_of([0.5, 0.3], [20.0, 24.0]), gate="lpips<0.1,psnr>28,ssim>0.5")
    assert said.endswith("It fails the gate: lpips < 0.1 (is 0.40), psnr > 28 (is 22.0).")
    assert say(scores_of([0.01] * 2, [40.0] * 2), gate="psnr>28").endswith("It passes the gate.")


def test_a_tripwire_is_the_reason_and_no_score_is_quoted(say: Callable[..., str]) -> None:
    assert say(scores_of([0.01] * 2, [40.0] * 2), tripwires=["NaN here", "black there"]) == (
        "fox is rejected: NaN here; black there."
    )
    assert say(None, tripwires=["the pipeline does not draw"]) == "fox is rejected: the pipeline does not draw."


def test_the_json_is_strict_and_names_no_path_of_this_machine(
    found: Evaluation, tiny: Path, cache: Path, tmp_path: Path
) -> None:
    content = write_report(found, tmp_path)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert strict_json(text) == content
    for path in (Path.home(), tiny.parent, cache.parent, tmp_path, found.candidates[0].model.parent):
        assert str(path) not in text
    assert not list(tmp_path.glob("*.part"))


def test_every_picture_that_the_report_names_is_there(found: Evaluation, tmp_path: Path) -> None:
    content = write_report(found, tmp_path)
    folders = [content["original"]["pictures"], content["candidates"][0]["pictures"]]
    for sample in content["candidates"][0]["samples"]:
        assert all((tmp_path / folder / sample["picture"]).read_bytes()[:4] == b"\x89PNG" for folder in folders)


def test_the_report_says_whose_text_encoders_were_used(small_text: Path, judge: Judge, tmp_path: Path) -> None:
    said = {}
    for share in (True, False):
        content = write_report(judge(small_text, share_text=share), tmp_path / str(share))
        said[content["text_encoders"]] = content["notes"][0]
        assert content["notes"][0] in write_page(content, tmp_path / str(share)).read_text().replace("&#39;", "'")
    assert said == {
        "original": "Candidates encode prompts with the original's text encoders",
        "own": "Candidates encode prompts with their own text encoders",
    }


def test_scores_and_gate_of_the_report_are_those_of_the_samples(found: Evaluation) -> None:
    content = describe(found)
    (candidate,) = content["candidates"]
    mean = sum(sample["psnr"] for sample in candidate["samples"]) / len(candidate["samples"])
    assert candidate["scores"]["psnr"]["mean"]["value"] == pytest.approx(mean, rel=1e-12)
    assert [limit["holds"] for limit in candidate["gate"]] == [True, True] and content["passed"]
    assert candidate["gate"][1]["mean"] == candidate["scores"]["psnr"]["mean"]["value"]
    assert content["floor"]["drawn again"]["psnr"]["mean"]["value"] == "identical"
    assert 0.2 < content["unrelated_lpips"] < 1
    assert 4 < candidate["bits_per_weight"]["transformer"] < 9


def test_candidates_whose_names_differ_by_a_slash_keep_their_own_pictures(found: Evaluation, tmp_path: Path) -> None:
    (candidate,) = found.candidates
    names = ("a/b", "a-b", "original")
    content = write_report(replace(found, candidates=[replace(candidate, name=n) for n in names]), tmp_path)
    folders = [entry["pictures"] for entry in (content["original"], *content["candidates"])]
    assert len({(tmp_path / folder).resolve() for folder in folders}) == 4
    assert write_page(content, tmp_path).is_file()


def test_the_table_has_the_floor_first_and_no_scores_for_the_rejected(found: Evaluation) -> None:
    (candidate,) = found.candidates
    rejected = replace(candidate, name="black", tripwires=["pictures of a single colour"])
    lines = table(replace(found, candidates=[candidate, rejected])).splitlines()
    assert "PSNR dB" in lines[0] and lines[1].startswith("floor: drawn again")
    assert lines[-1].split()[-1] == "rejected"
    assert f"{candidate.scores.mean('psnr'):.1f}" in lines[-2] if candidate.scores else False


def test_a_report_that_cannot_be_written_says_that_nothing_has_to_be_drawn_again(
    found: Evaluation, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(JobError, match="the pictures are kept") as error:
        write_report(found, tmp_path / "file")
    assert str(tmp_path / "file") in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_candidate_that_saw_the_prompts_in_its_calibration_is_named(found: Evaluation, tmp_path: Path) -> None:
    prompts = found.sampling.prompts
    for name, statistics in (
        ("seen", {"settings": {"prompts": [prompts[0], "another"]}}),
        ("unseen", {"settings": {"prompts": ["another"]}}),
        ("odd", {"settings": ["prompts"]}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "bitroute.json").write_text(json.dumps({"statistics": statistics}))
    candidates = [replace(found.candidates[0], name=name, model=tmp_path / name) for name in ("seen", "unseen", "odd")]
    notes = [note for note in describe(replace(found, candidates=candidates))["notes"] if "calibrated" in note]
    assert notes == [f"seen was calibrated on 1 of these {len(prompts)} prompts: judge it on others"]
