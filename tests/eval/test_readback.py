"""Reports that strangers edited, and reports that do not belong together."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitroute.errors import BitrouteError, SourceError
from bitroute.eval.card import card_markdown
from bitroute.eval.compare import compare_reports, comparison_text
from bitroute.eval.readback import read_reports

Json = dict[str, Any]
Make = Callable[..., Json]
Write = Callable[..., Path]


@pytest.fixture
def refusal(write: Write, candidate: Make, report: Make) -> Callable[..., str]:
    """What is said of a report whose JSON went through `change`."""

    def refusal(change: Callable[[Json], None]) -> str:
        content = report(candidate("fp8", 0.1))
        folder = write(content)
        change(content)
        (folder / "report.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(SourceError) as error:
            read_reports([folder])
        return str(error.value)

    return refusal


def test_every_problem_of_every_report_is_told_at_once(
    write: Write, tmp_path: Path, candidate: Make, report: Make
) -> None:
    good = write(report(candidate("good", 0.1)), "good")
    broken = report(candidate("bad", 0.1))
    missing = write(broken, "missing")
    shutil.rmtree(missing / "pictures" / "original")
    (missing / "pictures" / "candidate-bad" / "0003-0.png").write_text("no picture")
    del broken["floor"]
    broken["candidates"][0]["size_bytes"] = "big"
    keys = write(broken, "keys")
    other = report(candidate("other", 0.1))
    other["sampling"] = {
        **other["sampling"],
        "device": "cuda",
        "prompts": [*other["sampling"]["prompts"][:-1], "a hare"],
    }
    other["candidates"][0]["samples"][-1]["prompt"] = "a hare"
    other["original"]["pictures_sha256"] = "b" * 64
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "old.json").write_text('{"schema": "bitroute-report/0"}')
    paths = [
        good,
        missing,
        keys,
        write(other, "other"),
        tmp_path / "none",
        tmp_path / "text.json",
        tmp_path / "old.json",
    ]
    with pytest.raises(SourceError) as error:
        compare_reports(paths, tmp_path / "out")
    said = str(error.value)
    for words in (
        "'pictures/original' lacks pictures: 0000-0.png is missing, and 7 more",
        "'pictures/candidate-bad' lacks pictures: 0003-0.png cannot be read", "floor is missing",
        "candidates[0].size_bytes is not valid", "got:      'big'",
        "sampling.device differs from that of good", "got:      'cuda'", "expected: 'cpu'",
        "sampling.prompts[7] differs", "got:      'a hare'", "expected: 'fox number 7'",
        "original.pictures_sha256", f"{tmp_path / 'none'}: no report here", "cannot read the file as JSON",
        "got:      'bitroute-report/0'",
    ):  # fmt: skip
        assert words in said
    assert error.value.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("seeds", [0, 1], "the number of sampling.seeds differs"),
        ("call", {"num_inference_steps": 5}, "sampling.call.num_inference_steps differs"),
        ("call", {}, "sampling.call.num_inference_steps differs"),
        ("inputs", {"image": ["fox.png"]}, "sampling.inputs.image differs"),
        ("pipeline", "FluxImg2ImgPipeline", "sampling.pipeline differs"),
        ("threads", 2, "sampling.threads differs"),
    ],
)
def test_reports_of_different_samplings_are_refused_with_the_key(
    key: str, value: Any, said: str, write: Write, tmp_path: Path, candidate: Make, report: Make
) -> None:
    one, seeds = write(report(candidate("a", 0.1)), "one"), [0, 1] if key == "seeds" else [0]
    other = report(candidate("b", [0.1] * 8 * len(seeds)), seeds=seeds)
    other["sampling"][key] = value
    with pytest.raises(SourceError, match=re.escape(said)):
        compare_reports([one, write(other, "two")], tmp_path / "out")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("candidates",), [], "candidates is not valid"),
        (("candidates", 0, "pictures"), "../../elsewhere", "leads out of the report's folder"),
        (("candidates", 0, "pictures"), "pictures/\0", "lacks pictures"),
        (("candidates", 0, "samples", 0, "picture"), "../x.png", "samples are not those of the sampling"),
        (("candidates", 0, "samples", 0, "lpips"), "identical", "samples[0].lpips is not a number"),
        (("candidates", 0, "samples", 0, "psnr"), math.nan, "holds what is no JSON"),
        (("candidates", 0, "scores", "lpips", "mean", "value"), 1e300, "lpips.mean.value is not valid"),
        (("candidates", 0, "scores", "psnr"), None, "scores.psnr is not valid"),
        (("candidates", 0, "samples"), [], "samples are not those of the sampling"),
        (("candidates", 0, "trajectory", "prompts", 0, "prompt"), 99, "trajectory.prompts are not those"),
        (("candidates", 0, "trajectory", "prompts", 0, "prompt"), 1, "trajectory.prompts are not those"),
        (("candidates", 0, "size_bytes"), 10**400, "size_bytes is not valid"),
        (("candidates", 0, "name"), "\ud800", "holds what is no JSON"),
        (("candidates", 0, "name"), True, "name is not valid"),
        (("original", "pictures_sha256"), "short", "pictures_sha256 is not valid"),
        (("sampling", "prompts"), [], "prompts is not valid"),
        (("sampling", "call"), {"x": math.inf}, "holds what is no JSON"),
        (("floor",), {}, "floor is not valid"),
        (("floor", "drawn again"), {}, "floor.drawn again.lpips is missing"),
        (("floor", "drawn again", "ssim", "mean", "value"), "identical", "ssim is not a number"),
        (("schema",), ["bitroute-report/1"], "not a report of this kind"),
    ],
)
def test_what_a_stranger_edits_is_refused_in_words(
    path: tuple[str | int, ...], value: Any, said: str, refusal: Callable[..., str]
) -> None:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    assert said in refusal(change)


def test_two_candidates_of_one_report_cannot_have_one_name(refusal: Callable[..., str]) -> None:
    assert "two candidates have one name" in refusal(
        lambda content: content["candidates"].append(content["candidates"][0])
    )


def test_a_pipe_among_the_pictures_is_not_waited_for(write: Write, candidate: Make, report: Make) -> None:
    folder = write(report(candidate("fp8", 0.1)))
    picture = folder / "pictures" / "original" / "0000-0.png"
    picture.unlink()
    os.mkfifo(picture)
    with pytest.raises(SourceError, match="is missing"):
        read_reports([folder])


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in the JSON as its container and its key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from spots(item)


ODD = [None, True, "", "identical", "../..", "\0", "\ud800", [], {}, [[]], 10**400, -1, math.nan]
REMOVED = "removed"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_edit_ends_in_a_traceback(
    data: st.DataObject, write: Write, tmp_path: Path, candidate: Make, report: Make
) -> None:
    content = report(candidate("fp8", 0.1), candidate("nf4", 0.2, tripwires=["x"]))
    folder = tmp_path / "report"
    if not folder.exists():
        write(content)
    edited = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 3))):
        places = list(spots(edited))
        container, key = places[data.draw(st.integers(0, len(places) - 1))]
        value = data.draw(st.one_of(st.sampled_from([*ODD, REMOVED]), st.floats(), st.integers(), st.text(max_size=5)))
        if value == REMOVED:
            del container[key]
        else:
            container[key] = value
    (folder / "report.json").write_text(json.dumps(edited), encoding="utf-8")
    try:
        found = compare_reports([folder], tmp_path / "out")
    except BitrouteError as error:
        str(error).encode()
        assert error.exit_code == 2
    else:
        (comparison_text(found) + card_markdown(found)).encode()
        json.dumps(found, allow_nan=False)
