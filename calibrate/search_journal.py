"""What a search has measured so far, a line of JSON each, so that a killed search goes on from there."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitroute.convert.document import shown
from bitroute.errors import JobError, Problem, RecipeError

__all__ = ["MEASUREMENTS", "Journal"]

MEASUREMENTS = "measurements.jsonl"
LIMIT_BYTES = 1 << 28  # a thousand layers in thirty formats take four megabytes


class Journal:
    """Squared errors by what was measured; every one is on the disk before the next is begun.

    The first line holds the settings that all others depend on; a last line that was cut off is dropped.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Raises RecipeError where the folder holds measurements of other settings, JobError where it is unusable."""
        self.file = folder / MEASUREMENTS
        self.errors: dict[str, float] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            known_bytes = self._read(settings) if self.file.exists() else 0
            if known_bytes:
                os.truncate(self.file, known_bytes)
            else:
                self.file.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise JobError(Problem("cannot keep measurements", str(self.file), got=str(error)[:200])) from error

    def add(self, what: str, error: float) -> None:
        """error: infinite where a format gave no number."""
        self.errors[what] = error
        line = json.dumps({"what": what, "squared_error": error if math.isfinite(error) else None})
        try:
            with open(self.file, "a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        except OSError as failed:
            raise JobError(Problem("cannot keep measurements", str(self.file), got=failed.strerror or "")) from failed

    def _read(self, settings: Mapping[str, Any]) -> int:
        """The bytes of the file that are whole lines; 0 where not even the settings are."""
        if self.file.stat().st_size > LIMIT_BYTES:
            raise RecipeError(Problem("not the measurements of a search", str(self.file), got="a huge file"))
        lines = self.file.read_bytes().split(b"\n")[:-1]
        if not lines:
            return 0
        try:
            self._check(json.loads(lines[0])["settings"], settings)
            for line in lines[1:]:
                found = json.loads(line)
                self.errors[found["what"]] = _squared_error(found["squared_error"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            mend = f"give another --work, or remove {self.file}"
            raise RecipeError(
                Problem("not the measurements of a search", str(self.file), got=str(error)[:100], next_step=mend)
            ) from error
        return sum(len(line) + 1 for line in lines)

    def _check(self, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        problems = [
            Problem(
                f"the search was begun with another {name}", str(self.file), got=shown(found.get(name)),
                expected=shown(settings.get(name)), next_step="give another --work for the new settings",
            )
            for name in {**found, **settings}
            if found.get(name) != settings.get(name)
        ]  # fmt: skip
        if problems:
            raise RecipeError(problems)


def _squared_error(found: Any) -> float:
    """Raises ValueError for what `add` does not write."""
    if found is None:
        return math.inf
    if type(found) not in (int, float) or not 0 <= found < math.inf:
        raise ValueError(f"the squared error {found!r}")
    return float(found)
