"""Plug-ins that score a picture by itself: what they are, where they are found, how they run (docs/scores.md).

Imports no torch: this is all that a plug-in's process loads besides the plug-in.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from bitroute.errors import Problem, RecipeError, did_you_mean
from bitroute.eval.apart import answer

GROUP = "bitroute.scores"
FRAMES = 8  # of a video, at most


class Score(Protocol):
    """What an entry point of GROUP names: a class that is built once for all pictures."""

    title: str
    higher_is_better: bool

    def __init__(self, argument: str | None) -> None:
        """argument: what follows `NAME=` on the command line."""

    def score(self, picture: Image.Image, prompt: str) -> float:
        """A finite number for an RGB picture and the prompt that it was drawn for."""


@dataclass(frozen=True)
class Chosen:
    name: str
    argument: str | None = None

    @property
    def label(self) -> str:
        """The report's key; of a path only its last part, because the report may be published."""
        return f"{self.name}={Path(self.argument).name}" if self.argument else self.name


def find(name: str) -> EntryPoint:
    """The plug-in of that name, not imported.

    Raises:
        RecipeError: no such plug-in is installed.
    """
    installed = {point.name: point for point in entry_points(group=GROUP)}
    if name not in installed:
        others = f"install a package that brings it: one with the entry-point group {GROUP}"
        raise RecipeError(
            Problem(
                f"no score {name!r} is installed", "--score",
                expected=f"one of {', '.join(sorted(installed))}" if installed else "none is installed here",
                next_step=f"{did_you_mean(name, installed)} or {others}".removeprefix(" or "),
            )
        )  # fmt: skip
    return installed[name]


def judge(chosen: Chosen, pictures: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """`title`, `higher_is_better` and the `values` of files with their prompts; raises whatever the plug-in raises."""
    made: Score = find(chosen.name).load()(chosen.argument)
    content = {"title": str(made.title), "higher_is_better": bool(made.higher_is_better)}
    return {**content, "values": [_score(made, Path(file), prompt) for file, prompt in pictures]}


def _score(made: Score, file: Path, prompt: str) -> float:
    """Of a video the mean over its frames."""
    values = [float(made.score(picture, prompt)) for picture in _frames(file)]
    mean = sum(values) / len(values)
    if not math.isfinite(mean):
        raise ValueError(f"{mean} for {file.name}, not a finite number")
    return mean


def _frames(file: Path) -> Iterator[Image.Image]:
    """The picture in RGB, or of an animated PNG up to FRAMES even frames, the first and the last among them."""
    with Image.open(file) as image:
        count = getattr(image, "n_frames", 1)
        wanted = min(count, FRAMES)
        for place in range(wanted):
            image.seek(round(place * (count - 1) / max(wanted - 1, 1)))
            yield image.convert("RGB")


def _work(request: Mapping[str, Any]) -> None:
    """Without a file the plug-in is only built."""
    found = judge(Chosen(request["name"], request["argument"]), request["pictures"])
    if request["file"]:
        partial = Path(f"{request['file']}.part")
        partial.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
        os.replace(partial, request["file"])


if __name__ == "__main__":
    answer(_work)
