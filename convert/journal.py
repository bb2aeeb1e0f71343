"""What an unfinished job leaves beside its files: what it makes, from what, on which device, and what it replaces.

Whoever takes the job up compares that with what they would begin today.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

from bitroute.convert.bare import INDEX
from bitroute.convert.describe import provenance
from bitroute.convert.files import write_json, write_text
from bitroute.convert.plan import ComponentPlan, Plan
from bitroute.convert.reading import read_json
from bitroute.convert.seal import SEAL, sealed_text
from bitroute.errors import Problem, SourceError

DONE = "bitroute.json"  # the record; it gets its name last of all
UNFINISHED = "bitroute.json.part"  # the journal; there from before the first file until the record has its name
DRAFT = "bitroute.json.new"  # either of them while it is written
SINCE = "has changed since the job began"

Stamp = list[int]  # a file's bytes, and when it was written in ns; 0 where that does not matter
Where = tuple[str | int, ...]


@dataclass(frozen=True)
class Journal:
    """record: what bitroute.json will hold, but for the hashes. source: file below the pipeline folder → its stamp.

    earlier: files of the output that this job replaces, which go before the first new one is written.
    """

    record: dict[str, Any]
    device: str = ""
    source: Mapping[str, Stamp | None] = field(default_factory=dict)
    earlier: tuple[str, ...] = ()

    @property
    def files(self) -> list[str]:
        """Everything that is written, relative to the output folder."""
        return [str(name) for name in self.record["files"]]

    def write(self, out: Path) -> None:
        resume = {"device": self.device, "source": self.source, "earlier": self.earlier}
        write_json(out / UNFINISHED, {**self.record, "resume": resume}, out / DRAFT, indent=None)

    def finish(self, out: Path, hashes: Mapping[str, str]) -> None:
        write_text(out / DONE, sealed_text({**self.record, "sha256": hashes}), out / DRAFT)
        (out / UNFINISHED).unlink()

    def changes(self, now: Journal) -> list[Problem]:
        """Why `now` would not write the same bytes; a finished output knows no device, it and an outline no stamps."""
        problems = [_changed(what, then, new) for what, then, new in _facts(self, now) if then != new]
        problems += _recipe_changes(self.record["recipe"], now.record["recipe"])
        if self.source and now.source:
            problems += _source_changes(self.source, now.source, now.record["source"]["model"])
        return problems or _plan_changes(self.record["plan"], now.record["plan"])


def journal_of(plan: Plan, device: str) -> Journal:
    """The journal of a job that begins now, as it would be read back."""
    folder, dated = plan.pipeline.folder, plan.pipeline.hub is None  # a commit is the same whenever it was downloaded
    files = [] if plan.pipeline.is_outline else _sources(plan)
    source = {_place(file, folder): _stamp(file, dated or folder not in file.parents) for file in files}
    return Journal(json.loads(json.dumps(provenance(plan))), device, source)


def read_journal(file: Path) -> Journal | None:
    """A journal, or a finished output's record; None where there is none, or none that a job wrote."""
    try:
        content = read_json(file)
        for key in ("sha256", SEAL):
            content.pop(key, None)
        resume = content.pop("resume", {})
        source = {name: stamp and [int(stamp[0]), int(stamp[1])] for name, stamp in resume.get("source", {}).items()}
        found = Journal(content, str(resume.get("device", "")), source, tuple(map(str, resume.get("earlier", ()))))
        found.changes(found)  # reads all that a comparison reads
        return found if found.files else None
    except (SourceError, LookupError, TypeError, ValueError, AttributeError):
        return None


def _sources(plan: Plan) -> Iterable[Path]:
    """Every file of the pipeline that the job reads."""
    if not plan.pipeline.bare:
        yield plan.pipeline.folder / INDEX
    for component in plan.components:
        yield from _component_sources(component)
    yield from (plan.pipeline.folder / name for name in plan.copied)
    if plan.statistics:
        yield plan.statistics.file


def _component_sources(plan: ComponentPlan) -> Iterator[Path]:
    folder = plan.component.folder
    yield folder / "config.json"
    yield from sorted(plan.component.headers)
    yield from folder.glob("*.index.json")


def _place(file: Path, folder: Path) -> str:
    """Below the pipeline folder; a single file lies anywhere."""
    return file.relative_to(folder).as_posix() if folder in file.parents else str(file)


def _stamp(file: Path, dated: bool) -> Stamp | None:
    try:
        found = file.stat()
    except OSError:
        return None  # the job says so when it comes to it
    return [found.st_size, found.st_mtime_ns if dated else 0]


def _facts(then: Journal, now: Journal) -> Iterator[tuple[str, str, str]]:
    """What stands in one line, then and now."""
    versions, present = then.record["libraries"], now.record["libraries"]
    yield "the version of bitroute", then.record["bitroute"], now.record["bitroute"]
    for library in present:
        yield f"the version of {library}", versions.get(library, "none"), present[library]
    yield "the recipe's name", then.record["recipe"]["name"], now.record["recipe"]["name"]
    model, current = then.record["source"], now.record["source"]
    for key in {**model, **current}:
        yield f"the source's {key}", str(model.get(key, "none")), str(current.get(key, "none"))
    yield "the statistics", str(then.record.get("statistics", "none")), str(now.record.get("statistics", "none"))
    if then.device:
        yield "the device", then.device, now.device


def _changed(what: str, then: str, now: str, where: str = "") -> Problem:
    return Problem(f"{what} {SINCE}", where, got=now, expected=then)


def _recipe_changes(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Problem]:
    """The first line that differs."""
    lines = zip_longest(then["text"].splitlines(), now["text"].splitlines(), fillvalue="the end of the recipe")
    for number, (line, new) in enumerate(lines, 1):
        if line != new:
            yield _changed("the recipe", line.strip()[:200], new.strip()[:200], f"{now['name']}:{number}")
            return


def _source_changes(then: Mapping[str, Stamp | None], now: Mapping[str, Stamp | None], model: str) -> Iterator[Problem]:
    for name in sorted({*then, *now}):
        old, new = then.get(name), now.get(name)
        if old != new:
            beside = name == model or Path(name).is_absolute()
            yield _changed("the source file", _words(old), _words(new), name if beside else f"{model}/{name}")


def _words(stamp: Stamp | None) -> str:
    if stamp is None:
        return "no such file"
    size_bytes, (seconds, rest) = stamp[0], divmod(stamp[1], 10**9)
    try:
        return f"{size_bytes} bytes, written {datetime.fromtimestamp(seconds)}.{rest:09}"
    except (ValueError, OverflowError, OSError):  # some file systems keep years that no calendar has
        return f"{size_bytes} bytes, written at {seconds}.{rest:09} s"


def _plan_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Problem]:
    """The memory it takes is the machine's own affair."""
    return [
        _changed("the plan", str(old)[:200], str(new)[:200], ".".join(map(str, where)))
        for where, old, new in _differences(then, now)
        if not str(where[-1]).endswith("_peak_bytes")
    ][:3]


def _differences(then: Any, now: Any, where: Where = ()) -> Iterator[tuple[Where, Any, Any]]:
    """The leaves that are not the same in both."""
    if isinstance(then, dict) and isinstance(now, dict):
        pairs = [(key, then.get(key), now.get(key)) for key in {**then, **now}]
    elif isinstance(then, list) and isinstance(now, list):
        pairs = [(place, *both) for place, both in enumerate(zip_longest(then, now))]
    else:
        pairs = []
        if then != now:
            yield where, then, now
    for key, old, new in pairs:
        yield from _differences(old, new, (*where, key))
