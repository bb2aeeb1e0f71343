"""The report of an evaluation, read back for the card of the checkpoint that it judged."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitroute.convert.files import sha256
from bitroute.convert.layout import check_regular
from bitroute.convert.reading import CONFIG_LIMIT_BYTES, read_json
from bitroute.errors import Problem, SourceError

SCHEMA = "bitroute-report/1"
PNG = b"\x89PNG\r\n\x1a\n"
FOREIGN = re.compile(r"(?<!\\)<|(?<!\\)\]\(|^\s*#", re.MULTILINE)  # tags, links, headings: report.md escapes them


@dataclass(frozen=True)
class Quality:
    """What `quantize eval` found."""

    verdict: str
    table: str  # report.md, whose words are escaped already
    picture: Path | None


def find_quality(folder: Path, report: Path | None = None) -> tuple[Quality | None, str]:
    """The report of the checkpoint in `folder`, and why there is none.

    report: its folder; by default the one that `--eval` writes, which may be missing or of an earlier checkpoint.

    Raises:
        SourceError: the report rejects the checkpoint; or a `report` that was asked for is none, or is not its own.
    """
    own = Path(os.path.abspath(folder))  # `.` has no name
    place = report or own.with_name(f"{own.name}-report")
    if report is None and not (place / "report.json").is_file():
        return None, f"no report in {place}: `quantize eval` writes one"
    content = read_json(place / "report.json")
    candidate = _candidate(content, sha256(folder / "bitroute.json"), place)
    if candidate is None:
        what = "the report is not about this checkpoint"
        mend = f"evaluate it: quantize eval ORIGINAL {folder} --out {place}"
        if report:
            raise SourceError(Problem(what, str(place), expected=f"one of {folder} as it is", next_step=mend))
        return None, f"{place}: {what}; {mend}"
    _check_verdict(candidate, place)
    return _quality(candidate, place), ""


def _candidate(content: Mapping[str, Any], record_sha256: str, place: Path) -> Mapping[str, Any] | None:
    """Of a report of several checkpoints, this one's entry."""
    if content.get("schema") != SCHEMA:
        got = str(content.get("schema"))
        raise SourceError(Problem("report.json has another format", str(place), got, SCHEMA, "evaluate again"))
    try:
        found = [candidate for candidate in content["candidates"] if candidate["record_sha256"] == record_sha256]
        if found and not {"tripwires", "passed", "verdict"} <= found[0].keys():
            raise KeyError("tripwires, passed, verdict")
    except (KeyError, TypeError, AttributeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise SourceError(Problem("report.json is damaged", str(place), got, next_step="evaluate again")) from error
    return found[0] if found else None


def _check_verdict(candidate: Mapping[str, Any], place: Path) -> None:
    what = ""
    if candidate["tripwires"]:
        what = "the evaluation rejected this checkpoint"
    elif not candidate["passed"]:
        what = "the checkpoint fails its quality gate"
    if what:
        mend = "convert with a recipe that keeps more layers, or evaluate with another --gate"
        raise SourceError(Problem(what, str(place), got=str(candidate["verdict"])[:500], next_step=mend))


def _quality(candidate: Mapping[str, Any], place: Path) -> Quality:
    table, picture = _own(place / "report.md"), _own(place / "report.png")
    text = table.read_text("utf-8", "replace")[:CONFIG_LIMIT_BYTES].strip() if table else ""
    if FOREIGN.search(text):
        raise _not_written(place / "report.md", "Markdown or HTML that no report has")
    if picture and not picture.read_bytes().startswith(PNG):
        raise _not_written(picture, "no PNG")
    return Quality(str(candidate["verdict"]), text, picture)


def _own(file: Path) -> Path | None:
    """Never what a link leads to: it would be published."""
    if file.is_symlink():
        raise _not_written(file, "a link")
    if not file.is_file():
        return None
    check_regular(file)
    return file


def _not_written(file: Path, got: str) -> SourceError:
    mend = "evaluate again, or remove the file and publish without it"
    return SourceError(Problem("this is not what `quantize eval` wrote", str(file), got=got, next_step=mend))
