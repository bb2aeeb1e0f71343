"""A candidate whose quantized activations are emulated where it was drawn is labelled so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bitroute.eval.emulated import emulated
from bitroute.eval.evaluate import Evaluation
from bitroute.eval.report import describe

RECIPE = """\
model: builtin:tiny-flux
components:
  transformer: {{backend: {backend}, options: {{activations: {activations}}}, container: {container}}}
  text_encoder_2: {{backend: int8, options: {{activations: dynamic}}}}
"""


def test_the_label_is_in_the_verdict_and_its_components_in_the_report(
    small_text: Path, judge: Callable[..., Evaluation]
) -> None:
    content = describe(judge(small_text, share_text=False))["candidates"][0]
    assert content["emulated"] == ["text_encoder_2"]
    assert "Activations emulated on this device: text_encoder_2." in content["verdict"]


@pytest.mark.parametrize(
    ("backend", "activations", "container", "expected"),
    [
        ("mxfp4", "mxfp8", "native", ["transformer"]),  # torchao itself emulates it
        ("nvfp4", "nvfp4", "bitroute", ["transformer"]),
        ("nvfp4", "nvfp4", "native", []),  # runs on a Blackwell GPU or not at all
        ("float8", "dynamic", "bitroute", []),
    ],
)
def test_only_what_the_device_does_not_multiply_is_labelled(
    backend: str, activations: str, container: str, expected: list[str], convert: Callable[[str], Path]
) -> None:
    out = convert(RECIPE.format(backend=backend, activations=activations, container=container))
    assert emulated(out, "cpu") == expected


def test_a_damaged_record_and_other_tools_checkpoints_have_no_label(tmp_path: Path) -> None:
    assert emulated(tmp_path, "cpu") == []
    (tmp_path / "bitroute.json").write_text(json.dumps({"plan": {}}))
    assert emulated(tmp_path, "cpu") == []
