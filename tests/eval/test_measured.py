"""One evaluation that measures all there is; docs/report.md and docs/compare.md explain what is written of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bitroute.eval.compare import compare_reports
from bitroute.eval.evaluate import Evaluation
from bitroute.eval.report import write_report

Json = dict[str, Any]


def keys(value: Any, path: str = "") -> Iterator[str]:
    """The paths of all leaves; `[]` for an entry of a list of objects. Empty objects and lists have none."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from keys(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for item in value:
            yield from keys(item, f"{path}[]")
    else:
        yield path


NAMED_BY_THE_REPORT = [
    (r"^(floor\.[^.]+|candidates\[\]\.scores)\.\w+\.", "<metric>."),
    (r"^(original|candidates\[\])\.measured\.", "measured."),
    (r"^(candidates\[\]\.samples\[\])\.(lpips|psnr|ssim|ms_ssim|flip)$", r"\1.<metric>"),
    (r"^sampling\.call\..*", "sampling.call.<argument>"),
    (r"^sampling\.inputs\..*", "sampling.inputs.<argument>"),
    (r"^environment\.libraries\..*", "environment.libraries.<library>"),
    (r"^candidates\[\]\.(bits_per_weight|parameters)\..*", r"candidates[].\1.<component>"),
    (r"^candidates\[\]\.(text|weights)\.[^.]+\.", r"candidates[].\1.<component>."),
    (r"^candidates\[\]\.standalone\.[^.]+\.", "candidates[].standalone.<score>."),
]


NAMED_BY_THE_COMPARISON = [
    (r"^(candidates\[\]\.samples\[\])\.(lpips|psnr|ssim|ms_ssim|flip)$", r"\1.<metric>"),
    (r"^(floor)\.[^.]+\..*", r"\1.<what>"),
    (r"^(candidates\[\]\.scores)\..*", r"\1"),
    (r"^(sampling)\..*", r"\1"),
]


def general(content: Any, names: Sequence[tuple[str, str]]) -> set[str]:
    """The paths of all leaves, those of the run's own names as the documentation calls them."""
    found = set()
    for key in keys(content):
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        found.add(key)
    return found


def rows(page: str) -> list[tuple[str, str]]:
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \| (.*) \|$", text, flags=re.MULTILINE)


def test_every_key_of_the_report_is_documented_and_every_documented_key_is_written(
    measured: Evaluation, tmp_path: Path
) -> None:
    documented = {key for key, _ in rows("report.md") if key != "<metric>"}
    written = general(write_report(measured, tmp_path), NAMED_BY_THE_REPORT)
    asked_for = {key for key in documented if ".standalone." in key or key.startswith("sampling.inputs")}
    empty = {"candidates[].tripwires", "notes"}  # present, but may have no entry
    assert written - documented == set()
    assert documented - asked_for - written - empty == set()


def test_every_key_of_the_comparison_is_documented_and_every_documented_key_is_written(
    write: Callable[..., Path], candidate: Callable[..., Json], report: Callable[..., Json], tmp_path: Path
) -> None:
    content = compare_reports([write(report(candidate("fp8", 0.1), candidate("nf4", 0.2)))], tmp_path / "out")
    assert general(content, NAMED_BY_THE_COMPARISON) == {key for key, _ in rows("compare.md")}


def test_the_denoiser_is_judged_on_the_originals_inputs(measured: Evaluation) -> None:
    replay = measured.candidates[0].replay
    assert replay is not None
    steps = [step["relative_error"] for step in replay.trajectory["timesteps"]]
    assert len(steps) == measured.sampling.call["num_inference_steps"]
    assert all(0.005 < error < 0.1 for error in steps)
    assert len(replay.layers) == 52
    assert replay.layers[0]["relative_error"] < 0.05


def test_a_quantized_text_encoder_has_an_error_though_the_pictures_used_the_originals(measured: Evaluation) -> None:
    (found,) = measured.candidates
    assert measured.share_text and found.replay is not None
    assert found.replay.text.keys() == {"text_encoder_2"}
    assert 0.03 < found.replay.text["text_encoder_2"]["relative_error"] < 0.2


def test_the_weights_and_the_drift_are_measured_too(measured: Evaluation) -> None:
    (found,) = measured.candidates
    assert found.weights.keys() == {"transformer", "text_encoder_2"}
    assert 0.02 < found.weights["transformer"]["relative_error"] < 0.03
    assert found.weights["text_encoder_2"]["relative_error"] > 0.1
    assert [step["step"] for step in found.drift] == list(range(measured.sampling.call["num_inference_steps"]))
    assert all(0 < step["relative_error"] < 0.1 for step in found.drift)
