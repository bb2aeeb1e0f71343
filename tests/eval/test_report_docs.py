"""docs/report.md explains report.json as it is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitroute.eval.evaluate import Evaluation
from bitroute.eval.report import write_report


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


NAMED_BY_THE_RUN = [
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


def general(key: str) -> str:
    for pattern, replacement in NAMED_BY_THE_RUN:
        key = re.sub(pattern, replacement, key)
    return key


def test_every_key_of_the_report_is_documented_and_every_documented_key_is_written(
    measured: Evaluation, tmp_path: Path
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", page, flags=re.MULTILINE)
    documented = {key for key, _ in rows if key != "<metric>"}
    written = {general(key) for key in keys(write_report(measured, tmp_path))}
    asked_for = {key for key in documented if ".standalone." in key or key.startswith("sampling.inputs")}
    empty = {"candidates[].tripwires", "notes"}  # present, but may have no entry
    assert written - documented == set()
    assert documented - asked_for - written - empty == set()
